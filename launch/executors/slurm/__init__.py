"""A Slurm cluster, through submitit and Slurm's own commands."""
