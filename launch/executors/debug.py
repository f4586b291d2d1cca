"""In this process, one run after the other: what submit returns from is over."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from kv_align.plans import Plan, SweepDirectory
from kv_align.runs import EXIT_CODES, RunDirectory
from launch.cluster import DebugCluster
from launch.ending import end_attempt
from launch.executors.executor import Executor, JobState
from launch.journal import Place, Setting
from launch.retry import cause_of


class DebugExecutor(Executor):
    """Executes runs here and now; see `Executor`."""

    def __init__(self, sweep: SweepDirectory, setting: Setting) -> None:
        super().__init__(sweep, setting)
        assert isinstance(setting.cluster, DebugCluster)

    def preflight(self, plan: Plan) -> None:
        """Ask for nothing."""

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Do the runs; a failing canary keeps the others from being done, an interruption ends the sweep."""
        from launch.worker import execute

        batches = [[run] for run in runs]
        submission = self.journal.submitting(batches, uuid.uuid4().hex[:12])
        self.journal.submitted(submission.uid, submission.uid)
        for number, name in enumerate(runs):
            print(f"run {number + 1} of {len(runs)}: {name}", flush=True)
            code = execute(str(self.sweep.path), [name], to_log=False)
            cause = cause_of(code, RunDirectory(self.sweep.runs / name).status())
            end_attempt(self.sweep, self.journal, name, cause, self.setting.cluster.retry, code)
            if code == EXIT_CODES["interrupted"] or (code and canary and number == 0):
                return

    def states(self, places: Mapping[str, Place]) -> dict[str, JobState]:
        """Whatever was submitted has ended, one way or the other."""
        ended = {}
        for name in places:
            if self.journal.attempts(name):
                ended[name] = JobState("ended")
        return ended

    def cancel(self, places: Mapping[str, Place]) -> None:
        """Nothing can be running."""
