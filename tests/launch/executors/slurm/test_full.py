"""A cluster that takes no more jobs: what is queued stays as it was, and what is queued later waits for the same."""

from types import SimpleNamespace

import pytest

from launch import commands
from launch.journal.journal import Journal
from launch.journal.ledger import PREPARE
from tests.launch.sweeps import finish, launch

UNANSWERED = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@pytest.fixture
def meanwhile(monkeypatch):
    """Have something happen, and then another thing, while `--when-full wait` waits: `meanwhile(one, other)`."""

    def give(*events):
        left = list(events)
        monkeypatch.setattr(commands, "time", SimpleNamespace(sleep=lambda _: left.pop(0)()))
        return left

    return give


@pytest.fixture
def full(fake_slurm, standin):
    """Make a sweep of six runs for a Slurm that has room for so many jobs: `full(3, "cluster.throttle=2")`."""

    def make(room, *settings, otherwise=None):
        fake_slurm.has_room(room, **({} if otherwise is None else {"otherwise": otherwise}))
        own = ("cluster=slurm", "cluster.require_gpu=false", "cluster.stale_after_s=5", "seeds=2")
        return standin(*own, *settings, behaviour={})

    return make


def test_a_refused_submission_leaves_the_prepare_job_that_queued_runs_wait_for(full, fake_slurm):
    sweep = full(3, "cluster.prepare=make data")
    assert launch(*sweep.words).err.startswith(
        "launch: 2 of 6 runs are queued, the others are not: cluster=slurm takes"
    )
    assert [job.get("dependency") for job in fake_slurm.taken().values()] == [None, "afterok:77", "afterok:77"]
    fake_slurm.says("sacct", "77|PENDING|None\n78|PENDING|None\n79|PENDING|None\n")
    fake_slurm.says("squeue", "77|PENDING|Priority\n78|PENDING|Dependency\n79|PENDING|Dependency\n")
    told = launch("resume", str(sweep.path))
    assert (told.code, "takes no more jobs of yours now" in told.err) == (2, True)
    assert fake_slurm.calls("scancel") == []
    assert PREPARE not in Journal(sweep.directory).ledger().cancelled
    assert sweep.counts() == {"pending": 2, "missing": 4}


@pytest.mark.parametrize(("otherwise", "withdrawn"), [(None, ["scancel 77"]), (UNANSWERED, [])])
def test_a_prepare_job_is_withdrawn_only_where_nothing_can_wait_for_it(full, fake_slurm, otherwise, withdrawn):
    sweep = full(1, "cluster.prepare=make data", otherwise=otherwise)
    assert launch(*sweep.words).code == 2
    assert fake_slurm.calls("scancel") == withdrawn, "what was not answered may have come through"
    assert (PREPARE in Journal(sweep.directory).ledger().cancelled) == bool(withdrawn)


def behind(fake_slurm):
    """What each job that was taken waits for."""
    return {job: options.get("dependency") for job, options in fake_slurm.taken().items()}


def test_what_waits_for_room_goes_behind_the_canary_that_is_queued(full, fake_slurm, meanwhile):
    sweep = full(1)

    def none_ends():
        fake_slurm.says("sacct", "77|RUNNING|None\n")
        fake_slurm.has_room(5)

    left = meanwhile(fake_slurm.calls, none_ends)
    sweep.submit("--canary", "--when-full", "wait")
    assert left == []
    assert behind(fake_slurm) == {"77": None, "78": "afterok:77"}
    submissions = Journal(sweep.directory).ledger().submissions.values()
    canary, rest = [each for each in submissions if each.job is not None]
    assert (canary.after, rest.after, len(rest.names)) == (None, canary.uid, 5)


def test_who_waits_for_room_waits_for_an_answer_too(full, fake_slurm, meanwhile, monkeypatch):
    sweep = full(1)
    config = (fake_slurm.folder / "scontrol.out").read_text()

    def no_answer():
        sacct = '#!/bin/bash\n[[ "$*" = *--name* ]] || echo "77|RUNNING|None"\n'
        (fake_slurm.folder / "sacct").write_text(sacct)
        fake_slurm.has_room(0, UNANSWERED)

    def nothing_came_of_it():
        monkeypatch.setattr("launch.executors.slurm.executor.is_being_submitted", lambda *_: False)
        fake_slurm.says("scontrol", "")

    def all_is_well():
        fake_slurm.says("scontrol", config)
        fake_slurm.has_room(5)

    left = meanwhile(no_answer, fake_slurm.calls, nothing_came_of_it, all_is_well)
    told = sweep.submit("--when-full", "wait")
    assert left == []
    said = [line for line in told.out.splitlines() if line.startswith("note: ")]
    assert len(said) == 3
    for line, words in zip(
        said, ("sbatch says:", "was being submitted a moment ago", "no Slurm controller answers"), strict=True
    ):
        assert words in line
    assert [options.get("array") for options in fake_slurm.taken().values()] == [None, "0-4%5"]


def test_a_canary_that_had_no_room_goes_first_when_there_is_some(full, fake_slurm, meanwhile):
    sweep = full(0)
    meanwhile(lambda: fake_slurm.has_room(6))
    sweep.submit("--canary", "--when-full", "wait")
    assert behind(fake_slurm) == {"77": None, "78": "afterok:77"}


def test_nothing_follows_a_canary_that_did_not_finish(full, fake_slurm, meanwhile):
    sweep = full(1)
    journal = Journal(sweep.directory)

    def canary_fails():
        fake_slurm.says("sacct", "77|FAILED|None\n")
        (name, ref) = next((name, ref) for name, ref in journal.ledger().jobs.items() if ref.job == "77")
        journal.add_attempt(name, "end", ref.uid, cause="code_error", exit_code=1, retry=False, submissions=1)
        fake_slurm.has_room(6)

    meanwhile(canary_fails)
    told = launch(*sweep.words, "--canary", "--when-full", "wait")
    assert told.code == 2
    name = next(name for name, ref in journal.ledger().jobs.items() if ref.job == "77")
    assert told.err.splitlines()[-1] == (
        f"launch: the canary {name} did not finish, and the others are to start only if it does: mend what ended it, then "
        "run resume, which queues both again."
    )
    assert behind(fake_slurm) == {"77": None}
    assert "queueing 6 runs" in launch("resume", str(sweep.path)).out
    assert behind(fake_slurm) == {"77": None, "78": None}


@pytest.mark.parametrize("words", [("resume",), ("extend", "seeds=3")])
def test_other_verbs_queue_behind_a_canary_while_it_is_not_over_and_freely_then(full, fake_slurm, words):
    sweep = full(1)
    assert launch(*sweep.words, "--canary").code == 75
    fake_slurm.says("sacct", "77|RUNNING|None\n")
    fake_slurm.has_room(6)
    assert launch(words[0], str(sweep.path), *words[1:]).code == 0
    assert behind(fake_slurm) == {"77": None, "78": "afterok:77"}
    fake_slurm.says("sacct", "77|COMPLETED|None\n78_[0-8]|PENDING|None\n")
    fake_slurm.says("squeue", "78_[0-8]|PENDING|None\n")
    ledger = Journal(sweep.directory).ledger()
    canary = next(run for run in sweep.runs() if ledger.jobs[run.id].job == "77")
    finish(sweep.directory.run(canary), canary.config)
    fake_slurm.has_room(9)
    assert launch("extend", str(sweep.path), "seeds=4").code == 0
    assert behind(fake_slurm) == {"77": None, "78": "afterok:77", "79": None}


def test_what_is_refused_leaves_the_throttle_of_what_runs_and_what_is_queued_in_part_takes_its_part_of_it(
    full, fake_slurm
):
    sweep = full(6, "cluster.throttle=4")
    sweep.submit()
    assert fake_slurm.taken()["77"]["array"] == "0-5%4"
    fake_slurm.says("sacct", "77_[0-5]|RUNNING|None\n")
    fake_slurm.says("squeue", "".join(f"77|77_{index}|RUNNING\n" for index in range(4)) + "77|77_4|PENDING\n" * 2)
    fake_slurm.has_room(0)
    fake_slurm.calls()
    assert launch("extend", str(sweep.path), "seeds=4").code == 2
    assert [call for call in fake_slurm.calls("scontrol") if "update" in call] == []
    fake_slurm.has_room(3)
    assert launch("resume", str(sweep.path)).err.startswith("launch: 3 of 6 runs are queued, the others are not")
    new = fake_slurm.taken()["78"]
    assert (new["array"], new["dependency"]) == ("0-2%1", "afterany:77_2:77_3"), "so many run beyond the share of 77"
    changed = [call for call in fake_slurm.calls("scontrol") if "update" in call]
    assert changed == ["scontrol update JobId=77 ArrayTaskThrottle=3"]


def test_an_array_that_may_have_come_through_has_its_part_of_the_throttle(full, fake_slurm):
    sweep = full(6, "cluster.throttle=4")
    sweep.submit()
    fake_slurm.says("sacct", "77_[0-5]|RUNNING|None\n")
    fake_slurm.says("squeue", "77|77_0|RUNNING\n77|77_1|PENDING\n77|77_2|PENDING\n")
    fake_slurm.has_room(0, UNANSWERED)
    fake_slurm.calls()
    assert "Slurm does not answer: sbatch says" in launch("extend", str(sweep.path), "seeds=4").err
    changed = [call for call in fake_slurm.calls("scontrol") if "update" in call]
    assert changed == ["scontrol update JobId=77 ArrayTaskThrottle=2"]


def test_the_parts_of_an_array_are_one_behind_the_other_where_one_run_is_allowed_at_once(full, fake_slurm):
    sweep = full(5, "cluster.throttle=1")
    assert launch(*sweep.words).err.startswith("launch: 5 of 6 runs are queued, the others are not")
    assert behind(fake_slurm) == {"77": None, "78": "afterany:77", "79": "afterany:78"}


@pytest.mark.parametrize("after", [True, False])
def test_a_slurm_that_does_not_say_what_is_left_is_not_one_with_nothing_left(full, fake_slurm, tmp_path, after):
    first = full(6)
    first.submit()
    fake_slurm.says("sacct", "77_[0-5]|RUNNING|None\n")
    fake_slurm.says("squeue", err="Socket timed out\n", code=1)
    words = ("submit", *full(9, "sweep.name=second").words[1:], "--after", str(first.path))
    told = launch(*words) if after else launch("extend", str(first.path), "seeds=3")
    assert (told.code, told.err) == (
        2,
        "launch: Slurm does not answer: squeue says: Socket timed out; try again when it does.\n",
    )
    assert behind(fake_slurm) == {"77": None}
