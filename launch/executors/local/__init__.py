"""This machine's slots, as a kind of cluster: a supervisor process works a queue of runs off."""

from launch.executors.local.executor import LocalExecutor

EXECUTOR = LocalExecutor
