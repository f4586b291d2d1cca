"""What the supervisor makes of ends that nobody wrote down, and of a machine that has nothing left for a moment."""

from launch.journal.journal import Journal
from tests.launch.sweeps import launch


def ends(sweep, start):
    rows = Journal(sweep.directory).attempts(sweep.id_of(start))
    return [(row["cause"], row["retry"]) for row in rows if row["event"] == "end"]


def test_an_error_before_a_run_begins_is_none_that_it_had_before_and_is_not_tried_again(standin):
    """Its last attempt was out of memory; after a resume something fails before the run has begun."""
    more = ("seeds=1", "cluster.slots=1", "cluster.retry.out_of_memory=1")
    sweep = standin(*more, behaviour={"out_of_memory_at": {"baseline": 3}})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    assert ends(sweep, "baseline") == [("out_of_memory", True), ("out_of_memory", False)]
    (sweep.path / "standin.json").unlink()
    assert launch("resume", str(sweep.path)).code == 0
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    assert ends(sweep, "baseline")[2:] == [("code_error", False)]
