"""The public functions: read what the caller gave, call the engine, report."""
