"""One run put together, done and concluded."""
