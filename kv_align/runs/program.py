"""The names of the commands, for their usage and for messages that name another."""

from __future__ import annotations

import logging
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
def as_a_command() -> Iterator[None]:
    """Leave with 75 and one line on a Ctrl-C that no run notes itself: in imports and checks, or the second one."""
    # On processors with AVX512-BF16 it warns as it is imported of kernels that are not installed, asked for or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(75)  # as a run that was asked to leave
