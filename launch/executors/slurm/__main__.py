"""`python -m launch.executors.slurm SWEEP UID RUN`: one run of a packed job, as a job of its own would do it."""

import sys

from launch.executors.slurm.task import Worker

Worker(sys.argv[1], (sys.argv[3],), sys.argv[2])()
