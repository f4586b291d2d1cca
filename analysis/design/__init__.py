"""What a sweep was meant to show: its criteria, cells, pairing, history and cost."""
