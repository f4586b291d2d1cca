"""From paired differences to declared levels and words."""
