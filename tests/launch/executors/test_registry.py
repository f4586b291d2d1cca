"""A kind of cluster is one module and one YAML file."""

import launch.executors
from launch.executors.registry import kinds
from tests.launch.sweeps import CONF, undisturbed
from tests.launch.sweeps import launch as run_launch

MODULE = """
import os, signal, subprocess, sys, uuid
from pathlib import Path

from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.schema import OwnCluster
from launch.executors.base import Executor, JobState
from launch.journal.attempts import end_attempt
from launch.journal.journal import Journal
from launch.journal.processes import identify, living
from launch.journal.retry import cause_of, given_up, vanished
from launch.worker.code import with_code_first


class LineCluster(OwnCluster):
    shout: bool


class LineExecutor(Executor[LineCluster]):
    schema = LineCluster

    def preflight(self, plan, runs):
        return [f"{'shouting' if self.cluster.shout else 'speaking'} {len(runs)} runs"]

    def gpus_per_run(self):
        return 0

    def most_at_once(self):
        return 1

    def submit(self, plan, runs, *, canary):
        submission = self.journal.submitting([runs], uuid.uuid4().hex[:12])
        job = subprocess.Popen(
            [sys.executable, __file__, str(self.sweep.path), submission.uid],
            env=with_code_first(Path(self.setting.code)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        job.returncode = 0  # it is not waited for
        self.journal.submitted(submission.uid, str(job.pid))

    def states(self, jobs, silent=()):
        return {name: self.state(name, ref) for name, ref in jobs.items()}

    def state(self, name, ref):
        attempts = self.journal.attempts(name, ref.uid)
        if living(attempts) is not None:
            return JobState("running")
        if given_up(attempts):
            return JobState("ended")
        return JobState("gone" if identify(int(ref.job)) is None else "pending")

    def cancel(self, jobs):
        for name, ref in jobs.items():
            process = living(self.journal.attempts(name, ref.uid))
            if process is not None:
                os.kill(process.pid, signal.SIGTERM)


EXECUTOR = LineExecutor

if __name__ == "__main__":  # the job: its runs, one after the other
    sweep, uid = SweepDirectory(sys.argv[1]), sys.argv[2]
    journal = Journal(sweep)
    for name in journal.ledger().submissions[uid].names:
        while True:
            worker = [sys.executable, "-m", "launch.worker", str(sweep.path), uid, name]
            code = subprocess.run(worker, check=False).returncode
            if not vanished(journal.attempts(name, uid)):
                break  # it was passed over
            cause = cause_of(code, RunDirectory(sweep.runs / name).status())
            retry = end_attempt(sweep, journal, name, uid, cause, journal.frozen_setting().cluster.retry, code)
            if not retry or name in journal.ledger().cancelled:
                break
"""


def test_a_new_kind_is_one_module_and_one_yaml_file(tmp_path, monkeypatch, standin):
    modules, conf = tmp_path / "modules", tmp_path / "conf"
    modules.mkdir()
    (modules / "line.py").write_text(MODULE)
    monkeypatch.setattr(launch.executors, "__path__", [*launch.executors.__path__, str(modules)])
    for group in ("sweep", "cluster"):
        (conf / group).mkdir(parents=True)
    (conf / "sweep" / "tiny.yaml").write_text((CONF / "sweep" / "tiny.yaml").read_text())
    common = "offline: false\nsnapshot_code: false\nstale_after_s: 9.0\nhold_arm: false\n"
    retry = "retry: {interrupted: 0, node_failure: 1, killed: 0, out_of_memory: 0, code_error: 0, diverged: 0}\n"
    (conf / "cluster" / "mine.yaml").write_text(f"kind: line\nshout: false\n{common}{retry}")
    words = ("sweep=tiny", "cluster=mine", "seeds=1", f"output_dir={tmp_path}", "--config-dir", str(conf))
    told = run_launch("submit", *words, "cluster.shout=loud")
    assert told.err == "launch: cluster.shout=loud is not allowed: set cluster.shout to true or false.\n"
    behaviour = {"break_at": {"baseline": 3}, "hang_at": {"none": 3}, "once": True}
    sweep = standin("cluster=mine", "cluster.shout=true", "seeds=1", behaviour=behaviour, config_dir=conf)
    assert "note: shouting 3 runs" in sweep.submit().out
    sweep.wait_step("none", 2)
    assert sweep.counts() == {"done": 2, "running": 1}
    assert sweep.starts("baseline") == 2, "a failure of its disk is retried by the policy"
    assert run_launch("cancel", str(sweep.path)).out == "1 runs cancelled\n"
    sweep.wait(lambda counts: counts == {"done": 2, "cancelled": 1})
    assert "queueing 1 runs on cluster=mine" in run_launch("resume", str(sweep.path)).out
    sweep.wait_done()
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}
    (conf / "cluster" / "mine.yaml").write_text("kind: pbs\n")
    told = run_launch("submit", *words)
    assert told.err == (f"launch: cluster.kind=pbs is not allowed: set cluster.kind to one of {', '.join(kinds())}.\n")
