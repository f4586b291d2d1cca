"""What the tests of launch share: the command line in this process, and a sweep with the stand-in trainer."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kv_align.config.compose import compose_config
from kv_align.runs.run_dir import RunDirectory, write_json
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from launch.__main__ import main
from launch.journal.processes import Identity, send
from launch.status.judgement import RunState
from launch.status.overview import overview

HERE = Path(__file__).parent
CONF = HERE / "conf"
STANDIN = HERE / "standin"
PATIENCE = float(os.environ.get("KV_ALIGN_PATIENCE", "1"))  # factor on every time limit, for a busy machine


@pytest.fixture(scope="session", autouse=True)
def _composed_once():
    """Let what was composed once be composed: of the same words and files the same configuration comes."""
    composed = {}

    def once(overrides, *, config_dir=None):
        files = () if config_dir is None else sorted(Path(config_dir).rglob("*.yaml"))
        key = (tuple(overrides), config_dir, tuple((str(file), file.read_bytes()) for file in files))
        if key not in composed:
            composed[key] = compose_config(overrides, config_dir=config_dir)
        config, notes = composed[key]
        return config, list(notes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.planning.plan.compose_config", once)
        yield


@dataclass
class Told:
    """What a command said."""

    code: int
    out: str
    err: str


def launch(*words: str) -> Told:
    """Run `python -m launch` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return Told(code, out.getvalue(), err.getvalue())


class Sweep:
    """The sweep that a `submit` command makes; `settings` are its words.

    With `behaviour` its runs are done by the stand-in (`standin_experiment`), which behaves so; without, by the trainer.
    """

    def __init__(self, *settings: str, behaviour: dict | None = None, config_dir: Path = CONF) -> None:
        self.words = ("submit", *settings, "--config-dir", str(config_dir))
        told = launch(*self.words, "--dry-run")
        assert told.code == 0, told.err
        self.directory = SweepDirectory(told.out.strip().rpartition("\nin ")[2])
        self.path = self.directory.path
        self.behave(behaviour)

    def behave(self, behaviour: dict | None) -> None:
        if behaviour is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "standin.json.tmp"
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(self.path / "standin.json")

    def submit(self, *more: str) -> Told:
        told = launch(*self.words, *more)
        assert told.code == 0, told.err
        return told

    def runs(self) -> tuple[PlannedRun, ...]:
        plan = self.directory.plan()
        assert plan is not None
        return plan.runs

    def id_of(self, start: str) -> str:
        return next(run.id for run in self.runs() if run.id.startswith(start))

    def state(self, start: str) -> RunState:
        return next(run for run in overview(self.directory).runs if run.id.startswith(start))

    def counts(self) -> dict[str, int]:
        return overview(self.directory).counts()

    def wait(self, condition: Callable[[dict[str, int]], bool], timeout_s: float = 60.0) -> dict[str, int]:
        """Wait until the counts satisfy a condition."""
        deadline = time.monotonic() + PATIENCE * timeout_s
        while True:
            counts = self.counts()
            if condition(counts):
                return counts
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout_s:.0f} s: {overview(self.directory)}")
            time.sleep(0.1)

    def wait_done(self, timeout_s: float = 60.0) -> None:
        self.wait(lambda counts: set(counts) == {"done"}, timeout_s)

    def wait_step(self, start: str, step: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + PATIENCE * timeout_s
        directory = self.directory.path / "runs" / self.id_of(start)
        while True:
            try:
                if json.loads((directory / "status.json").read_text())["step"] >= step:
                    return
            except (OSError, ValueError):
                pass
            assert time.monotonic() < deadline, f"{start} did not reach step {step}: {self.state(start)}"
            time.sleep(0.02)

    def weights(self) -> dict[str, str]:
        """The end weights of each run, as bytes on disk."""
        return {run.id: self.weights_of(run.id) for run in self.runs()}

    def weights_of(self, start: str) -> str:
        """The end weights of one run."""
        return (self.path / "runs" / self.id_of(start) / "student" / "model.safetensors").read_bytes().hex()

    def starts(self, start: str) -> int:
        """How often the trainer really began this run."""
        return len((self.path / "runs" / self.id_of(start) / "attempts.txt").read_text().splitlines())

    def workers(self) -> dict[str, Identity]:
        try:
            raw = json.loads((self.path / "launch" / "workers.json").read_text())["workers"]
        except (OSError, ValueError):
            return {}
        return {name: Identity(each["pid"], each["born"]) for name, each in raw.items()}

    def supervisor(self) -> int | None:
        """The process that works on this sweep, if there is one: the one whose command names it."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "launch.executors.local.supervisor" in command and str(self.path) in command:
                return int(folder.name)
        return None

    def end(self) -> None:
        """End whatever of this sweep still runs here."""
        import signal

        pid = self.supervisor()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        for identity in self.workers().values():
            send(identity, signal.SIGKILL)


def undisturbed(run: PlannedRun) -> str:
    """The end weights of a run that the stand-in does in one go, as `Sweep.weights` gives them."""
    import hashlib

    weights = run.content_hash
    for step in range(1, run.config["trainer"]["max_steps"] + 1):
        weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
    return weights.encode().hex()


def finish(directory: RunDirectory, config, steps=6):
    """Leave what a run that is done leaves."""
    with directory.lock():
        begun = directory.begin(config, arm="a", content_hash="h", total_steps=steps)
        directory.update(begun, state="finished", step=steps)
    write_json(directory.summary_file, {"steps": steps})
    directory.metrics_file.write_text('{"step": 6, "elapsed_s": 3.0}\n')
    directory.student.mkdir()
    (directory.student / "model.safetensors").write_text("")
