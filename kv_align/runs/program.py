"""The name by which a command was called, for its usage and its messages."""

from __future__ import annotations

import sys

COMMAND = "kv-align"


def program(module: str) -> str:
    """Return `kv-align VERB` where a module is run by that command, else `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith(f"{COMMAND} ") else f"python -m {module}"
