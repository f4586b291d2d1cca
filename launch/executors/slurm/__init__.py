"""Slurm through submitit, as a kind of cluster."""

from launch.executors.slurm.executor import SlurmExecutor

EXECUTOR = SlurmExecutor
