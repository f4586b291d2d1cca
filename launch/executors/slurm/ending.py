"""The last line of every Slurm job: notes how it ended, and has it queued again or its arm held.

`python -m launch.executors.slurm.ending SWEEP UID CODE` sees the exit code even where the run could not note anything
itself, because it was killed. A preemption or a node failure, after which it does not get to run, is requeued by Slurm.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, scheduler_job
from kv_align.runs.sweep_dir import SweepDirectory
from launch.executors.slurm.query import scancel
from launch.journal.attempts import cause_of_vanished, end_attempt, own_status, started_since_requeue
from launch.journal.holds import held_runs
from launch.journal.journal import Journal
from launch.journal.pause import tell
from launch.journal.retry import DISK_FULL, Cause, cause_of, delay_s, ending, given_up, vanished

_SCONTROL_TIMEOUT_S = 60
PAUSES_S = (1.0, 3.0, 9.0, 27.0)
"""Between the tries of a call of scontrol: the controller may be restarting."""
_BROKEN = ("code_error", "bad_input")
_OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom.?kill|out of memory", re.IGNORECASE)


def end_job(sweep_path: str, uid: str, exit_code: int) -> None:
    """Note the end of each run of the job that this process is in, then queue the job again or hold its arm.

    Runs that were submitted again since are left to their new job.
    """
    ending = Ending(Journal(SweepDirectory(sweep_path)), uid, exit_code)
    if exit_code == DISK_FULL:  # nothing can be written, and nothing has failed
        ending.come_back(delay_s("disk_full", [], ending.cluster.retry))
    else:
        ending.conclude()


class Ending:
    """The end of one job, or of one element of an array, for one submission.

    Parameters
    ----------
    journal
        Of the sweep.
    uid
        Of the submission.
    exit_code
        Of the job.
    """

    def __init__(self, journal: Journal, uid: str, exit_code: int) -> None:
        self.journal, self.uid, self.exit_code = journal, uid, exit_code
        setting = journal.frozen_setting()
        self.cluster, self.ledger = setting.cluster, journal.ledger()
        submission = self.ledger.submissions[uid]
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) if len(submission.batches) > 1 else 0
        self.batch = submission.batches[index]
        self.wait_s = 0.0

    def conclude(self) -> None:
        """Note the ends, and queue the job again or hold the arms that are broken."""
        again, broken = self._note_ends()
        if again:
            refusal = self.come_back(self.wait_s)
            for name in again if refusal else ():
                reason = f"it was not queued again: scontrol requeue says: {refusal}"
                self.journal.add_attempt(name, "note", self.uid, reason=reason)
        elif broken and self.cluster.hold_arm:
            self._hold()

    def come_back(self, wait_s: float) -> str:
        """Queue this job again, not to start before `wait_s` seconds have passed; returns what scontrol complained of.

        A job that was cancelled, or whose runs were submitted again, stays away. Slurm would bring back even one that scancel
        has just ended, so the journal, which is written before scancel is called, is read once more after that.
        """
        refusal = ""
        if self._is_wanted():
            refusal = _requeue(wait_s)
            if not self._is_wanted():
                scancel([scheduler_job()])
        return refusal

    def _is_wanted(self) -> bool:
        """Whether a run of this job is to be done by it, by the journal as it is now."""
        ledger = self.journal.ledger()
        return any(name not in ledger.cancelled and ledger.jobs[name].uid == self.uid for name in self.batch)

    def _note_ends(self) -> tuple[list[str], list[str]]:
        """Return the runs that are to be done again, and those whose code is broken.

        A run that has neither ended for good nor is held is done again. A job that comes back without having made an attempt
        would do so for ever, so one is noted then all the same.
        """
        again: list[str] = []
        broken: list[str] = []
        attempts = {name: self.journal.attempts(name, self.uid) for name in self.batch}
        explained = self.exit_code == EXIT_CODES["interrupted"] or any(map(started_since_requeue, attempts.values()))
        for name, rows in attempts.items():
            if name in self.ledger.cancelled or self.ledger.jobs[name].uid != self.uid:
                continue
            if vanished(rows):
                cause = self._cause(name, rows)
            elif given_up(rows):
                broken += [name] if ending(rows)["cause"] in _BROKEN else []
                continue
            elif self.exit_code == EXIT_CODES["finished"] or self._directory(name).is_complete() or self._is_held(name):
                continue
            elif explained:
                again.append(name)
                if started_since_requeue(rows):  # its end was noted, and its wait begins now
                    end = ending(rows)
                    self._wait(delay_s(end["cause"], rows[: rows.index(end)], self.cluster.retry))
                continue
            else:  # the job ended before it could begin: its own code has nothing to do with it
                cause = "interrupted" if cause_of(self.exit_code, None) == "interrupted" else "node_failure"
            explained = True
            self._wait(delay_s(cause, rows, self.cluster.retry))
            if self._end(name, cause):
                again.append(name)
            elif cause in _BROKEN:
                broken.append(name)
        return again, broken

    def _wait(self, seconds: float) -> None:
        self.wait_s = max(self.wait_s, seconds)

    def _cause(self, name: str, attempts: Sequence[dict[str, Any]]) -> Cause:
        """Return what ended an attempt whose end nobody noted: it was killed, or the only one of this job."""
        directory = self._directory(name)
        if directory.is_complete() or not started_since_requeue(attempts):
            return cause_of_vanished(directory, attempts)
        return _as_slurm_says(self.journal, cause_of(self.exit_code, own_status(directory, attempts)))

    def _end(self, name: str, cause: Cause) -> bool:
        """Note an end; where that cannot be written, the run is done again rather than forgotten."""
        if cause == "disk_full":
            return True
        try:
            return end_attempt(
                self.journal.sweep, self.journal, name, self.uid, cause, self.cluster.retry, self.exit_code
            )
        except OSError as error:
            tell(f"kv-align: the end of {name} ({cause}) could not be noted: {error}")
            return cause != "finished"

    def _is_held(self, name: str) -> bool:
        plan = self.journal.sweep.frozen_plan()
        held = held_runs(plan, self.journal, self.ledger, hold_arm=self.cluster.hold_arm, among=[name])
        return name in held and not self._directory(name).status_file.exists()

    def _hold(self) -> None:
        """Keep jobs in the queue that would start for nothing: all of whose runs are held by now.

        A job that starts all the same passes over its held runs by itself.
        """
        plan = self.journal.sweep.frozen_plan()
        held = held_runs(plan, self.journal, self.ledger, hold_arm=True)
        waiting = {name for name in held if not self._directory(name).status_file.exists()}
        jobs = {
            ref.job
            for name in waiting
            for ref in [self.ledger.jobs[name]]
            if ref.job is not None and set(ref.submission.batches[ref.index]) <= waiting
        }
        if jobs:
            tell(f"kv-align: holding {len(jobs)} jobs")
            call_scontrol("hold", ",".join(sorted(jobs)), pauses_s=())

    def _directory(self, name: str) -> RunDirectory:
        return RunDirectory(self.journal.sweep.runs / name)


def _as_slurm_says(journal: Journal, cause: Cause) -> Cause:
    """A kill is an out-of-memory where Slurm's memory watch, or the kernel's, says so in the job's log."""
    if cause != "killed":
        return cause
    log = journal.folder / "jobs" / f"{scheduler_job()}_0_log.out"
    this_attempt = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2] if log.exists() else ""
    return "out_of_memory" if _OUT_OF_MEMORY.search(this_attempt) else cause


def _requeue(wait_s: float) -> str:
    """Have Slurm end this job and queue it again; see `Ending.come_back`."""
    job = scheduler_job()
    tell(f"kv-align: queueing job {job} again")
    # The requeue ends this process too, which has something left to do.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        refusal = call_scontrol("requeue", job)
        if wait_s and not refusal:
            # Without it Slurm waits for some minutes of its own.
            call_scontrol("update", f"JobId={job}", f"StartTime=now+{wait_s:.0f}", pauses_s=(0.5, 1.0))
    finally:
        signal.signal(signal.SIGTERM, before)
    return refusal


def call_scontrol(*arguments: str, pauses_s: Sequence[float] | None = None) -> str:
    """Call scontrol, several times if need be; returns what it complained of last, empty where it did as it was told."""
    complaint = ""
    for pause_s in (*(PAUSES_S if pauses_s is None else pauses_s), None):
        try:
            result = subprocess.run(
                ["scontrol", *arguments], check=False, timeout=_SCONTROL_TIMEOUT_S, capture_output=True, text=True
            )
            if result.returncode == 0:
                return ""
            complaint = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            complaint = f"nothing within {_SCONTROL_TIMEOUT_S} s"
        except OSError as error:
            complaint = str(error)
        tell(f"kv-align: scontrol {arguments[0]} failed: {complaint}")
        if pause_s is not None:
            time.sleep(pause_s)
    return complaint


if __name__ == "__main__":
    end_job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
