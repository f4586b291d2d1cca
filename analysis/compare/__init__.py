"""Two runs or two arms side by side."""
