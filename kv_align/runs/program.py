"""The names of the commands, for their usage and for messages that name another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND = "kv-align"


def program(module: str) -> str:
    """Return how a module's command is typed by whoever typed this one: `kv-align VERB` or `python -m MODULE`.

    Parameters
    ----------
    module
        `launch`, `analysis` (whose verbs are commands of `kv-align` themselves), or a module of `kv_align`.
    """
    if not sys.argv[0].startswith(f"{COMMAND} "):
        return f"python -m {module}"
    return COMMAND if module == "analysis" else f"{COMMAND} {module.removeprefix('kv_align.')}"


@contextmanager
def interrupts_in_one_line() -> Iterator[None]:
    """Leave with 75 and one line on a Ctrl-C that no run notes itself: in imports and checks, or the second one."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(75)  # as a run that was asked to leave
