"""What callers set: settings, their checks, recipes."""
