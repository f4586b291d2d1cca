"""What a job executes."""

# A job that version 0.1.0 queued, when this was a module, still finds here what its pickle names.
from launch.worker.worker import Shell as Shell
from launch.worker.worker import Worker as Worker
