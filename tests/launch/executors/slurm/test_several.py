"""A job of several runs: each ends by its own exit code, and a job that gets nowhere does not come back for ever."""

import errno
import json
import subprocess
import sys

import pytest

from launch.executors.slurm import ending
from launch.journal.journal import Journal
from launch.worker import worker
from launch.worker.packed import PackedJob
from tests.launch.sweeps import undisturbed

KILLED = 137
REQUEUE = "scontrol requeue 77"


class GoneError(BaseException):
    """The process is killed, so that nothing after it is done."""


def leave(directory, planned, state):
    """Leave what an attempt has written of itself by its third step."""
    with directory.lock():
        begun = directory.begin(planned.config, arm=planned.arm, content_hash=planned.content_hash, total_steps=6)
    directory.update(begun, state=state, step=3)


class Job:
    """The one job of a sweep; `start` is what happens when Slurm starts it once more."""

    def __init__(self, sweep, slurm, monkeypatch):
        self.sweep, self.slurm, self.monkeypatch = sweep, slurm, monkeypatch
        self.journal, self.runs = Journal(sweep.directory), [run.id for run in sweep.runs()]
        self.uid = self.journal.ledger().jobs[self.runs[0]].uid
        self.restarts, self.dies_in, self.trained = -1, "nothing", []
        trained = worker._train
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setattr(ending.signal, "signal", lambda *arguments: None)

        def train(directory, planned, criteria_hash, *, own_process):
            self.trained.append(planned.id)
            if planned.id.startswith(self.dies_in):
                leave(directory, planned, "running")
                raise GoneError
            return trained(directory, planned, criteria_hash, own_process=own_process)

        monkeypatch.setattr(worker, "_train", train)

    def start(self, dies_in="nothing", do=None):
        """Let Slurm start the job; returns its exit code, None where it was killed."""
        self.restarts, self.dies_in, self.trained = self.restarts + 1, dies_in, []
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.restarts))
        try:
            return do() if do is not None else worker.execute(str(self.sweep.path), self.runs, self.uid, to_log=False)
        except GoneError:
            return None

    def packed(self):
        """The job as one that does two runs at once on a node without a GPU, each in a process of its own."""
        self.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        sweep, own = str(self.sweep.path), (sys.executable, "-m", "launch.executors.slurm")
        command = lambda name: (*own, sweep, self.uid, name)  # noqa: E731
        return PackedJob(sweep, self.runs, self.uid, per_gpu=2, cores=2, command=command)

    def end(self, code):
        """Do the job's last line; whether it is queued again."""
        self.slurm.calls()
        ending.end_job(str(self.sweep.path), self.uid, code)
        self.called = self.slurm.calls("scontrol")
        return REQUEUE in self.called

    def ended_before(self, planned, cause):
        """Note that a run was done by the job as Slurm started it first, and how that ended."""
        self.restarts = 0
        leave(self.sweep.directory.run(planned), planned, "failed" if cause == "code_error" else cause)
        self.journal.add_attempt(planned.id, "start", self.uid, restarts="0")
        self.journal.add_attempt(planned.id, "end", self.uid, cause=cause, retry=cause == "interrupted", submissions=1)

    def id_of(self, start):
        return next(name for name in self.runs if name.startswith(start))

    def causes(self, start):
        return [row["cause"] for row in self.journal.attempts(self.id_of(start)) if row["event"] == "end"]

    def done(self):
        return {run.id for run in self.sweep.runs() if self.sweep.directory.run(run).is_complete()}

    def change_code(self):
        file = self.sweep.path / "launch" / "code.json"
        frozen = json.loads(file.read_text())
        frozen["files"]["kv_align/losses/functional.py"] = "other"
        file.write_text(json.dumps(frozen))


@pytest.fixture
def job(fake_slurm, standin, standin_here, monkeypatch):
    """Make a sweep of six runs in one job: `job("cluster.hold_arm=false", behaviour={...})`."""

    def make(*settings, behaviour=None):
        own = ("cluster=slurm", "cluster.require_gpu=false", "cluster.gpus_per_node=0", "seeds=2")
        size = () if any("runs_per_job" in each for each in settings) else ("cluster.runs_per_job=6",)
        sweep = standin(*own, *size, *settings, behaviour=behaviour)
        sweep.submit()
        return Job(sweep, fake_slurm, monkeypatch)

    return make


def test_who_has_finished_is_not_charged_for_nodes_that_die_under_another(job):
    job = job()
    for _ in range(3):
        assert job.start(dies_in="baseline-kv-seed1") is None  # Slurm queues the job again by itself
    assert job.trained == [job.id_of("baseline-kv-seed1")]
    assert job.end(job.start()) is False
    assert job.done() == set(job.runs)
    assert job.causes("baseline-kv-seed0") == ["finished"]
    assert job.causes("baseline-kv-seed1") == ["node_failure"] * 3 + ["finished"]
    assert job.sweep.weights() == {run.id: undisturbed(run) for run in job.sweep.runs()}


def test_a_node_that_dies_after_a_run_had_finished_leaves_it_finished(job):
    job = job()
    job.start()
    file = job.sweep.path / "launch" / "attempts" / f"{job.runs[-1]}.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    checkpoints = job.sweep.directory.run(job.sweep.runs()[-1]).checkpoints
    checkpoints.mkdir()
    assert (job.start(), job.trained) == (0, [])
    assert not checkpoints.exists()
    assert job.end(0) is False
    assert job.causes(job.runs[-1]) == ["finished"]


def test_a_run_that_was_given_up_says_nothing_of_its_arm(job):
    job = job()
    for _ in range(3):
        assert job.start(dies_in="baseline-kv-seed0") is None
        assert job.end(KILLED) is True, "the others have not had their turn"
    assert job.causes("baseline-kv-seed0") == ["killed"] * 3
    code = job.start()
    assert (code, job.end(code)) == (1, False), "the job did not do all that it was to do"
    assert job.trained == job.runs[1:]
    assert job.done() == set(job.runs[1:])
    assert job.causes("baseline-kv-seed0") == ["killed"] * 3


@pytest.mark.parametrize("hold_arm", ["true", "false"])
def test_changed_code_is_bad_input_for_each_run_and_no_reason_to_come_back(job, hold_arm):
    job = job(f"cluster.hold_arm={hold_arm}")
    job.change_code()
    code = job.start()
    assert (code, job.end(code), job.trained) == (2, False, [])
    held = [] if hold_arm == "true" else ["bad_input"]
    for arm in ("baseline", "v4_0_2", "none"):
        assert (job.causes(f"{arm}-"), job.causes(job.runs[job.runs.index(job.id_of(arm)) + 1])) == (
            ["bad_input"],
            held,
        )


def test_what_a_status_file_says_of_an_earlier_attempt_does_not_excuse_changed_code(job):
    job = job()
    for planned in job.sweep.runs():
        job.ended_before(planned, "interrupted")
    job.change_code()
    code = job.start()
    assert (code, job.end(code)) == (2, False)
    assert [job.causes(name) for name in job.runs] == [["interrupted", "bad_input"]] * 6


@pytest.mark.parametrize("code", [1, 143])
def test_a_job_that_cannot_begin_comes_back_as_often_as_the_policy_says(job, code):
    job = job("cluster.retry.interrupted=3")
    job.start(dies_in="baseline-kv-seed1")
    assert job.causes("baseline-kv-seed0") == ["finished"]
    came_back = 0
    while job.end(code if job.start(do=lambda: 0) == 0 else None):
        came_back += 1
        assert came_back < 99
    spent = ["node_failure" if code == 1 else "interrupted"] * 4
    assert [job.causes(name) for name in job.runs[1:]] == [
        ["node_failure", *spent][: 5 if code == 143 else 4],
        *[spent] * 4,
    ]


def test_a_preempted_run_is_not_blamed_for_a_job_that_cannot_begin_again(job):
    job = job("cluster.runs_per_job=1", "sweep.name=alone")
    job.monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    job.runs = job.runs[:1]
    job.start(dies_in="baseline")
    job.start(do=lambda: 0)
    assert job.end(1) is True
    assert job.causes("baseline") == ["node_failure"]


def test_a_held_run_that_was_tried_before_is_no_reason_to_come_back(job):
    job = job("cluster.runs_per_job=1", "sweep.name=alone")
    job.monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    broken, job.runs = job.runs[0], job.runs[1:2]
    job.journal.add_attempt(job.runs[0], "end", job.uid, cause="node_failure", retry=True, submissions=1)
    job.journal.add_attempt(broken, "end", job.uid, cause="code_error", retry=False, submissions=1)
    assert (job.start(), job.trained) == (0, [])
    assert (job.end(0), job.end(75)) == (False, False)


def test_a_run_that_finished_without_its_artefacts_is_not_done_over_and_over(job):
    job = job()
    code = job.start()
    for file in job.sweep.directory.run(job.sweep.runs()[0]).student.iterdir():
        file.unlink()
    assert (code, job.end(code)) == (0, False)


def test_a_failure_of_the_node_is_waited_for_whoever_noted_it(job):
    job = job(behaviour={"break_at": {"baseline-kv-seed0": 3}, "once": True})
    code = job.start()
    assert (code, job.end(code)) == (74, True)
    assert job.called == [REQUEUE, "scontrol update JobId=77 StartTime=now+30"]
    assert job.causes("baseline-kv-seed0") == ["node_failure"]
    assert job.done() == set(job.runs[1:])
    assert job.end(job.start()) is False
    assert job.done() == set(job.runs)


def test_each_run_ends_by_its_own_exit_code_and_an_error_in_the_code_holds_the_rest_of_its_arm(job):
    wrong = {"break_at": {"v4_0_2-kv-seed0": 3}, "diverge_at": {"v4_0_2-kv-seed1": 3}, "raise_at": {"none-ce-seed0": 2}}
    job = job(behaviour={**wrong, "once": True})
    code = job.start()
    assert (code, job.end(code)) == (74, True), "for the one whose disk was broken"
    ended = {name.rpartition("-")[0]: job.causes(name) for name in job.runs}
    assert ended == {
        **{f"baseline-kv-seed{seed}": ["finished"] for seed in (0, 1)},
        **{"v4_0_2-kv-seed0": ["node_failure"], "v4_0_2-kv-seed1": ["diverged"]},
        **{"none-ce-seed0": ["code_error"], "none-ce-seed1": []},
    }
    code = job.start()
    assert (code, job.end(code), job.trained) == (1, False, [job.id_of("v4_0_2-kv-seed0")])


def test_all_processes_of_a_run_pass_over_one_that_was_given_up(job, monkeypatch):
    job = job()
    job.journal.add_attempt(job.runs[0], "end", job.uid, cause="killed", retry=False, submissions=1)
    monkeypatch.setenv("RANK", "1")
    assert (job.start(), job.trained) == (1, job.runs[1:])
    assert job.journal.attempts(job.runs[1]) == [], "the first process keeps the journal"


@pytest.mark.parametrize("hold_arm", ["true", "false"])
def test_a_packed_job_goes_on_beside_a_run_that_was_given_up(job, monkeypatch, hold_arm):
    """Of three runs of one arm the first has an error in the code, the second was interrupted, the third never began."""
    settings = ("cluster.runs_per_gpu=2", f"cluster.hold_arm={hold_arm}", "seeds=3", "cluster.runs_per_job=3")
    job = job(*settings, behaviour={"diverge_at": {"baseline-kv-seed1": 5}})
    first, second, third = job.runs = job.runs[:3]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    for planned, cause in zip(job.sweep.runs(), ("code_error", "interrupted"), strict=False):
        job.ended_before(planned, cause)
    code = job.start(do=job.packed().execute)
    assert (code, job.end(code)) == (1, False)
    assert job.causes(first) == ["code_error"]
    assert job.causes(second) == ["interrupted", "diverged"]
    assert job.causes(third) == ([] if hold_arm == "true" else ["finished"])


def test_a_packed_job_goes_on_where_a_process_cannot_be_started(job, monkeypatch):
    job = job("cluster.runs_per_gpu=2")
    real, refused = subprocess.Popen, []

    def start(command, **options):
        if command[-1] == job.runs[0] and not refused:
            refused.append(command)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(command, **options)

    monkeypatch.setattr("launch.worker.packed.subprocess.Popen", start)
    code = job.start(do=job.packed().execute)
    assert (code, job.end(code)) == (74, True)
    assert job.done() == set(job.runs[1:])
    assert job.journal.attempts(job.runs[0]) == []
