"""What the teacher gives for a batch: computed, or read from a cache that runs share."""
