"""What a sweep looks like now: states, reasons, tables and logs."""
