"""Slurm, this machine's slots, and this process, as peers: each submits, answers for its jobs, and cancels them."""
