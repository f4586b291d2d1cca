"""The name by which a command was called, for its usage and its messages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND = "kv-align"


def program(module: str) -> str:
    """Return `kv-align VERB` where a module is run by that command, else `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith(f"{COMMAND} ") else f"python -m {module}"


@contextmanager
def interrupts_in_one_line() -> Iterator[None]:
    """Leave with 75 and one line on a Ctrl-C that no run notes itself: in imports and checks, or the second one."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(75)  # as a run that was asked to leave
