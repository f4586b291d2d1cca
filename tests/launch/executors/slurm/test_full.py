"""A cluster that takes no more jobs: what is queued stays as it was, and what is queued later waits for the same."""

import pytest

from launch.journal.journal import Journal
from launch.journal.ledger import PREPARE
from tests.launch.sweeps import launch

UNANSWERED = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


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
