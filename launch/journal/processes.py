"""Processes of this machine that another process started: who they are, whether they live, and how they are ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

_GPU = re.compile(r"\d+|(GPU|MIG)-.+")


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


def this_process() -> dict[str, Any]:
    """Return `host`, `pid` and `born` of this process, as the journal notes them."""
    return {"host": socket.gethostname(), **asdict(identify(os.getpid()) or Identity(os.getpid(), ""))}


def ended_here(process: dict[str, Any]) -> bool:
    """Whether a process that was noted by `this_process` was one of this machine and is gone."""
    if process.get("host") != socket.gethostname():
        return False
    return not is_alive(Identity(process["pid"], process["born"]))


def is_alive(identity: Identity) -> bool:
    """Whether that very process lives."""
    return identify(identity.pid) == identity


def living(attempts: Sequence[dict[str, Any]]) -> Identity | None:
    """Return the process of the attempt that started last, if it has not ended and lives on this machine."""
    rows = [row for row in attempts if row["event"] in ("start", "end")][-1:]
    if not rows or rows[0]["event"] != "start" or rows[0].get("host") != socket.gethostname():
        return None
    identity = Identity(rows[0]["pid"], rows[0].get("born", ""))
    return identity if is_alive(identity) else None


def send(identity: Identity, number: signal.Signals) -> None:
    """Signal the process group of that very process, if it lives; it is its group's leader."""
    if is_alive(identity):
        try:
            os.killpg(identity.pid, number)
        except ProcessLookupError:
            return


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES can name on this machine; empty without a GPU.

    As CUDA reads it: what comes after the first word that names no GPU, such as -1 or NoDevFiles, does not count.
    """
    declared = os.environ.get("CUDA_VISIBLE_DEVICES")
    if declared is not None:
        return list(takewhile(_GPU.fullmatch, (word.strip() for word in declared.split(","))))
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index, line in enumerate(shown.stdout.splitlines()) if line.startswith("GPU ")]


def processes_with(*words: str) -> list[int]:
    """Return the processes of this machine whose command has all of these words in it; none where there is no /proc."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in command for word in words):
            pids.append(int(folder.name))
    return pids
