"""`python -m launch.worker SWEEP UID RUN...`: see `launch.worker.worker`."""

import os
import sys

from kv_align.runs.errors import ConfigError
from launch.journal.pause import tell
from launch.journal.retry import BAD_INPUT
from launch.worker.worker import execute

try:
    code = execute(sys.argv[1], sys.argv[3:], sys.argv[2])
except ConfigError as problem:
    tell(f"kv-align: {problem}")
    code = BAD_INPUT
try:
    sys.stdout.flush()
except OSError:  # on a full disk Python would end with a code of its own
    os._exit(code)
sys.exit(code)
