"""What callers give: checks of tensors, layouts."""
