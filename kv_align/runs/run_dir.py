"""THE CONTRACT: what a run directory holds, how it is written and how it is read. Imports no torch.

    config.yaml          the effective configuration, frozen: running it again gives the same numbers
    status.json          Status: the truth about the run, replaced atomically; its `updated` is the heartbeat
    metrics.jsonl        one JSON object per logged optimizer step, append-only
    evaluations.jsonl    one JSON object per evaluation, append-only
    outcomes.parquet     one row per evaluated example of the end: split, id, loss_nats, tokens, answered, correct
    summary.json         the numbers of the end, and the sizes of the artefacts in bytes (`artefacts`, by path); written last
                         but for the status, so its presence means a complete run
    provenance.json      git commit and diff, packages, machine, seeds, data-order and initial-weight hashes
    record.arrow         all of the above but the configuration once more in one file, bound to them by size and SHA-256
                         (kv_align.runs.record): the last act of a run that finished
    checkpoints/         step_00000100/, each with a manifest.json of its files' SHA-256, renamed into place when complete
    student/             the student and its tokenizer, for AutoModelForCausalLM.from_pretrained
    student_adapter/     what alone of the student learned, in PEFT's format (only with an adapter; student/ has it merged)
    aligner/             aligner.safetensors (absent where nothing is aligned)
    run.lock             held by the process that is writing; released by the operating system when that dies

A metrics row holds `step` (optimizer steps done, from 1), the losses in nats or as defined in `kv_align.losses.functional`
(task_loss, key_loss, value_loss, kv_loss, ..., total_loss), kv_grad_norm, and alignment by kind (`cosine_key`, ...).
The columns named in `TIMING` are the only ones that differ between a run and its repetition.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from kv_align.runs.errors import ConfigError
from kv_align.runs.files import append_row as append_row
from kv_align.runs.files import file_digest as file_digest
from kv_align.runs.files import give_usual_mode as give_usual_mode
from kv_align.runs.files import read_json as read_json
from kv_align.runs.files import read_last_row as read_last_row
from kv_align.runs.files import read_rows as read_rows
from kv_align.runs.files import write_atomically as write_atomically
from kv_align.runs.files import write_json as write_json
from kv_align.runs.files import write_rows

State = Literal["running", "finished", "failed", "diverged", "interrupted"]
TIMING = ("step_time_s", "tokens_per_s", "elapsed_s")
EXIT_CODES: dict[State, int] = {"finished": 0, "failed": 1, "diverged": 3, "interrupted": 75}
"""Exit code of a run by its end state; 2 is bad input, 75 (EX_TEMPFAIL) means: run the same command again."""


@dataclass(frozen=True)
class Status:
    """What `status.json` holds. Times are seconds since the epoch.

    Attributes
    ----------
    state, reason
        The end state (`running` until then), and one sentence on it where it is not `finished`.
    arm, loss, seed, content_hash
        Which run this is, so that many runs can be told apart without reading their configurations.
    step, total_steps
        Optimizer steps done and to be done.
    attempt
        How often the run was started, 1 at first.
    started, updated
        Of this attempt; `updated` is renewed at least every logged step, and the file stamped in between.
    host, pid, job
        Where it runs; `job` is the scheduler's id, empty without one.
    peak_memory_gb, gpu_memory_gb
        What this attempt has had of its GPU's memory at most so far, and what that has; None without a GPU.
    training_s, overhead_s
        Time in training steps, and time that was none (`kv_align.runs.stopwatch`), over all attempts; 0 until the run ends.
    """

    state: State
    reason: str
    arm: str
    loss: str
    seed: int
    content_hash: str
    step: int
    total_steps: int
    attempt: int
    started: float
    updated: float
    host: str
    pid: int
    job: str
    peak_memory_gb: float | None = None
    gpu_memory_gb: float | None = None
    training_s: float = 0.0
    overhead_s: float = 0.0


class _Inside:
    """A path inside a run directory, made when it is asked for: one who looks at thousands of runs asks for few."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunDirectory, owner: type[RunDirectory]) -> Path:
        return run.path / self._name


class RunDirectory:
    """Reads and writes one run directory; creates nothing until something is written.

    Parameters
    ----------
    path
        The directory; it need not exist.
    """

    config_file = _Inside("config.yaml")
    status_file = _Inside("status.json")
    metrics_file = _Inside("metrics.jsonl")
    evaluations_file = _Inside("evaluations.jsonl")
    outcomes_file = _Inside("outcomes.parquet")
    summary_file = _Inside("summary.json")
    provenance_file = _Inside("provenance.json")
    record_file = _Inside("record.arrow")
    checkpoints = _Inside("checkpoints")
    student = _Inside("student")
    student_adapter = _Inside("student_adapter")
    aligner = _Inside("aligner")

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for writing; raises ConfigError if another living process holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"{error.filename} cannot be written ({error.strerror}): mend that, or choose another output_dir."
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is being written by another process: wait for it, or choose another run_name."
                ) from None
            yield

    def status(self) -> Status | None:
        """Return the status; None where there is none that can be read."""
        return status_of(read_json(self.status_file))

    def observed(self) -> Status | None:
        """Return the status; of a run that is running, `updated` is its last heartbeat (`kv_align.runs.heartbeat`)."""
        status = self.status()
        with suppress(OSError):
            if status is not None and status.state == "running":
                return replace(status, updated=max(status.updated, self.status_file.stat().st_mtime))
        return status

    def earlier_attempt(self, content_hash: str) -> Status | None:
        """Return the status that an earlier attempt of this run left; None where there is none.

        A run of another configuration that was refused before its first step left nothing that could be lost.

        Raises
        ------
        ConfigError
            If the directory holds a run of another configuration, or one that is no longer whole.
        """
        before = self.status()
        if before is not None and before.content_hash != content_hash:
            if self.holds_no_step():
                return None
            raise ConfigError(
                f"{self.path} holds another run ({before.arm}, seed {before.seed}, hash {before.content_hash[:8]}): "
                "nothing was overwritten; choose another run_name or output_dir."
            )
        if before is None and (self.metrics_file.exists() or self.summary_file.exists()):
            raise ConfigError(
                f"{self.path} holds a run whose status.json cannot be read: nothing was overwritten; restore that file, or "
                "choose another run_name or output_dir."
            )
        return before

    def holds_no_step(self) -> bool:
        """Whether no step was trained here: all that an attempt left is what it was told and why it ended."""
        status = self.status()
        left = (self.provenance_file, self.metrics_file, self.summary_file, self.student, self.checkpoints)
        over = status is not None and status.state != "running" and status.step == 0
        return over and not any(file.exists() for file in left)

    def refuse_to_redo(self) -> None:
        """Raise ConfigError for a finished run that lost artefacts which no checkpoint can give back.

        For the command line, where doing it again would overwrite it; a launcher that is told to means it.
        """
        status = self.status()
        finished = status is not None and status.state == "finished" and self.summary_file.exists()
        if finished and not self.is_complete() and not (self.metrics_file.exists() and any(self.checkpoints.glob("*"))):
            raise ConfigError(
                f"{self.path} holds this run, finished, but its student or metrics are gone, and no checkpoint can give them "
                "back: nothing was overwritten; restore them, or choose another run_name or output_dir."
            )

    def begin(self, config: dict[str, Any], *, arm: str, content_hash: str, total_steps: int) -> Status:
        """Write the configuration and a `running` status, and return it; with the lock held. Raises as `earlier_attempt`."""
        before = self.earlier_attempt(content_hash)
        now = time.time()
        status = Status(
            state="running",
            reason="",
            arm=arm,
            loss=config["loss"]["name"],
            seed=config["seed"],
            content_hash=content_hash,
            step=0,
            total_steps=total_steps,
            attempt=1 if before is None else before.attempt + 1,
            started=now,
            updated=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=scheduler_job(),
        )
        self.record_file.unlink(missing_ok=True)
        write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False))
        write_json(self.status_file, asdict(status))
        return status

    def update(self, status: Status, *, state: State = "running", step: int | None = None, reason: str = "") -> Status:
        """Replace the status and renew its heartbeat; returns the new one."""
        new = replace(
            status, state=state, reason=reason, step=status.step if step is None else step, updated=time.time()
        )
        write_json(self.status_file, asdict(new))
        return new

    def read_config(self) -> dict[str, Any]:
        """Return the frozen configuration as plain containers."""
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            raw = yaml.load(self.config_file.read_text(encoding="utf-8"), Loader=loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise ConfigError(f"{self.config_file} cannot be read: restore it, or choose another run_name.")
        return raw

    def rewind(self, step: int, evaluations_step: int | None = None) -> None:
        """Drop metrics after `step`, and evaluations after that or `evaluations_step`: what was done beyond a checkpoint."""
        last_evaluation = step if evaluations_step is None else evaluations_step
        for file, last in ((self.metrics_file, step), (self.evaluations_file, last_evaluation)):
            if file.exists():
                write_rows(file, [row for row in read_rows(file) if row["step"] <= last])

    def is_complete(self) -> bool:
        """Whether the run finished and its artefacts are there, as large as they were when it did."""
        status, summary = self.status(), read_json(self.summary_file)
        return (
            status is not None
            and status.state == "finished"
            and summary is not None
            and any(self.student.glob("*.safetensors"))
            and self.metrics_file.exists()
            and isinstance(artefacts := summary.get("artefacts", {}), dict)
            and all(
                (file := self.path / name).is_file() and file.stat().st_size == artefacts[name] for name in artefacts
            )
        )

    def artefact_sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the artefacts that are there: outcomes, and weights."""
        folders = (self.student, self.student_adapter, self.aligner)
        files = [self.outcomes_file, *(file for folder in folders for file in folder.glob("*.safetensors"))]
        return {str(file.relative_to(self.path)): file.stat().st_size for file in sorted(files) if file.is_file()}


def status_of(raw: dict[str, Any] | None) -> Status | None:
    """Return the status that `status.json` held; None where it is none."""
    with suppress(TypeError):
        status = Status(**raw or {})
        return status if all(isinstance(getattr(status, name), kind) for name, kind in _KINDS) else None
    return None


_HINTS = get_type_hints(Status).items()
_KINDS = [(name, kind | int if "float" in str(kind) else kind) for name, kind in _HINTS if name != "state"]


def scheduler_job() -> str:
    """Return the id of the Slurm job that this process is in, `12_3` of an array's element; empty outside of one."""
    # The last element's SLURM_JOB_ID is the array's own: what is asked of Slurm by that is done to all elements.
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
