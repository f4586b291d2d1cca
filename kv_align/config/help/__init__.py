"""What a command line can say, and what it means."""
