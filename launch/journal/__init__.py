"""What a sweep remembers of its submissions and attempts, and what follows from it: retries, holds, endings."""
