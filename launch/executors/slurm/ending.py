"""The last line of every Slurm job: notes how it ended, and has it queued again or its arm held.

`python -m launch.executors.slurm.ending SWEEP UID CODE` sees the exit code even where the run could not note anything
itself, because it was killed. A preemption or a node failure, after which it does not get to run, is requeued by Slurm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from kv_align.runs.run_dir import EXIT_CODES, RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from launch.journal.attempts import cause_by_status, end_attempt
from launch.journal.journal import Journal
from launch.journal.ledger import Ledger
from launch.journal.retry import Cause, cause_of, given_up, vanished

_SCONTROL_TIMEOUT_S = 60
PAUSES_S = (1.0, 3.0, 9.0, 27.0)
"""Between the tries of a call of scontrol: the controller may be restarting."""
_OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom.?kill|out of memory", re.IGNORECASE)


def end_job(sweep_path: str, uid: str, exit_code: int) -> None:
    """Note the end of each run of the job that this process is in, then queue the job again or hold its arm.

    Runs that were submitted again since are left to their new job.
    """
    sweep = SweepDirectory(sweep_path)
    journal = Journal(sweep)
    ledger, setting = journal.ledger(), journal.setting()
    assert setting is not None
    submission = ledger.submissions[uid]
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) if len(submission.batches) > 1 else 0
    batch = submission.batches[index]
    again: list[str] = []
    broken: list[str] = []
    blamed = exit_code in (EXIT_CODES["finished"], EXIT_CODES["interrupted"])
    for name in batch:
        directory, attempts = RunDirectory(sweep.runs / name), journal.attempts(name, uid)
        if name in ledger.cancelled or ledger.jobs[name].uid != uid or given_up(attempts):
            blamed = True
            continue
        if vanished(attempts):
            if directory.is_complete():
                cause: Cause = "finished"
            elif len(batch) == 1:
                cause = _as_slurm_says(journal, cause_of(exit_code, directory.status()))
            else:
                cause = cause_by_status(directory.status())
        elif directory.is_complete():
            continue
        elif blamed:  # the job ended before this run's turn
            again.append(name)
            continue
        else:  # the job ended before it could begin: its own code has nothing to do with it
            cause = "interrupted" if cause_of(exit_code, None) == "interrupted" else "node_failure"
        blamed = True
        if end_attempt(sweep, journal, name, uid, cause, setting.cluster.retry, exit_code):
            again.append(name)
        if cause in ("code_error", "bad_input"):
            broken.append(name)
    job = os.environ["SLURM_JOB_ID"]
    if again:
        print(f"kv-align: queueing job {job} again", flush=True)
        refused = _scontrol("requeue", job)
        for name in again if refused else ():
            journal.add_attempt(name, "note", uid, reason=f"it was not queued again: scontrol requeue says: {refused}")
    elif broken and setting.cluster.hold_arm:
        refused = _hold(sweep, ledger, batch)
        for name in broken if refused else ():
            journal.add_attempt(name, "note", uid, reason=f"its arm was not held: scontrol hold says: {refused}")


def _as_slurm_says(journal: Journal, cause: Cause) -> Cause:
    """A kill is an out-of-memory where Slurm's memory watch, or the kernel's, says so in the job's log."""
    if cause != "killed":
        return cause
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    log = journal.folder / "jobs" / f"{job}_0_log.out"
    this_attempt = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2] if log.exists() else ""
    return "out_of_memory" if _OUT_OF_MEMORY.search(this_attempt) else cause


def _hold(sweep: SweepDirectory, ledger: Ledger, batch: tuple[str, ...]) -> str:
    plan = sweep.plan()
    assert plan is not None
    arms = {run.arm for run in plan.runs if run.id in batch}
    waiting = [
        ref.job
        for run in plan.runs
        if run.arm in arms and run.id not in batch and not sweep.run(run).status_file.exists()
        for ref in [ledger.jobs.get(run.id)]
        if ref is not None and ref.job is not None
    ]
    if not waiting:
        return ""
    print(f"kv-align: holding {len(waiting)} jobs of {', '.join(sorted(arms))}", flush=True)
    return _scontrol("hold", ",".join(dict.fromkeys(waiting)))


def _scontrol(*arguments: str) -> str:
    """Call scontrol, several times if need be; returns what it complained of last, empty where it did as it was told."""
    said = ""
    for pause_s in (*PAUSES_S, None):
        try:
            told = subprocess.run(
                ["scontrol", *arguments], check=False, timeout=_SCONTROL_TIMEOUT_S, capture_output=True, text=True
            )
            if told.returncode == 0:
                return ""
            said = (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        print(f"kv-align: scontrol {arguments[0]} failed: {said}", flush=True)
        if pause_s is not None:
            time.sleep(pause_s)
    return said


if __name__ == "__main__":
    end_job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
