"""Losses of next-token predictions, and how they are computed without all logits at once."""
