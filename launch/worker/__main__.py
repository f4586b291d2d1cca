"""`python -m launch.worker SWEEP UID RUN...`: see `launch.worker.worker`."""

import sys

from kv_align.runs.errors import ConfigError
from launch.journal.retry import BAD_INPUT
from launch.worker.worker import execute

try:
    sys.exit(execute(sys.argv[1], sys.argv[3:], sys.argv[2]))
except ConfigError as problem:
    print(f"kv-align: {problem}", file=sys.stderr)
    sys.exit(BAD_INPUT)
