"""A kind of cluster is one module and one YAML file."""

import launch.executors
from launch.executors.registry import kinds
from tests.launch.sweeps import CONF
from tests.launch.sweeps import launch as run_launch

MODULE = """
from launch.cluster.schema import OwnCluster
from launch.executors.base import Executor, JobState


class EchoCluster(OwnCluster):
    shout: bool


class EchoExecutor(Executor[EchoCluster]):
    schema = EchoCluster

    def preflight(self, plan, runs):
        return [f"{'shouting' if self.cluster.shout else 'speaking'} {len(runs)} runs"]

    def gpus_per_run(self):
        return 0

    def submit(self, plan, runs, *, canary):
        submission = self.journal.submitting([[run] for run in runs], "echo")
        self.journal.submitted(submission.uid, "1")
        return []

    def states(self, jobs, silent=()):
        return {name: JobState("pending", "echo") for name in jobs}

    def cancel(self, jobs):
        print(f"{len(jobs)} echoes end")


EXECUTOR = EchoExecutor
"""


def test_a_new_kind_is_one_module_and_one_yaml_file(tmp_path, monkeypatch):
    modules, conf = tmp_path / "modules", tmp_path / "conf"
    modules.mkdir()
    (modules / "echo.py").write_text(MODULE)
    monkeypatch.setattr(launch.executors, "__path__", [*launch.executors.__path__, str(modules)])
    for group in ("sweep", "cluster"):
        (conf / group).mkdir(parents=True)
    (conf / "sweep" / "tiny.yaml").write_text((CONF / "sweep" / "tiny.yaml").read_text())
    common = "offline: false\nsnapshot_code: false\nstale_after_s: 9.0\nhold_arm: false\n"
    retry = "retry: {interrupted: 0, node_failure: 0, killed: 0, out_of_memory: 0, code_error: 0, diverged: 0}\n"
    (conf / "cluster" / "mine.yaml").write_text(f"kind: echo\nshout: false\n{common}{retry}")
    words = ("sweep=tiny", "cluster=mine", "seeds=1", f"output_dir={tmp_path}", "--config-dir", str(conf))
    told = run_launch("submit", *words, "cluster.shout=loud")
    assert told.err == "launch: cluster.shout=loud is not allowed: set cluster.shout to true or false.\n"
    told = run_launch("submit", *words, "cluster.shout=true")
    assert told.code == 0, told.err
    assert "note: shouting 3 runs" in told.out
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert "3 pending" in run_launch("status", str(sweep)).out
    assert "3 echoes end" in run_launch("cancel", str(sweep)).out
    assert "3 cancelled" not in run_launch("status", str(sweep)).err
    (conf / "cluster" / "mine.yaml").write_text("kind: pbs\n")
    told = run_launch("submit", *words)
    assert told.err == (f"launch: cluster.kind=pbs is not allowed: set cluster.kind to one of {', '.join(kinds())}.\n")
