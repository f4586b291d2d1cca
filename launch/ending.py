"""The last line of a Slurm job that version 0.1.0 queued: `python -m launch.ending SWEEP UID CODE`."""

import sys

from launch.executors.slurm.ending import end_job

if __name__ == "__main__":
    end_job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
