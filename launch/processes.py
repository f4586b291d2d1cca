"""Processes of this machine that another process started: who they are, whether they live, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same number; `born` is opaque."""

    pid: int
    born: str


def identify(pid: int) -> Identity | None:
    """Return who has a number now; None if nobody does, or only what is left of a process that ended."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else Identity(pid, fields[19])
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, born = shown.stdout.strip().partition(" ")
    return Identity(pid, born.strip()) if state and not state.startswith("Z") else None


def is_alive(identity: Identity) -> bool:
    """Whether that very process lives."""
    return identify(identity.pid) == identity


def send(identity: Identity, number: signal.Signals) -> None:
    """Signal the process group of that very process, if it lives; it is its group's leader."""
    if is_alive(identity):
        try:
            os.killpg(identity.pid, number)
        except ProcessLookupError:
            return
