"""The throttle of a sweep holds over all its arrays, however many there are and however a limit on jobs cuts them."""

import random

import pytest

from launch.executors.slurm import throttle as throttles
from launch.executors.slurm.query import ArrayLeft
from launch.executors.slurm.submission import _halves
from launch.executors.slurm.throttle import Line, shares


@pytest.mark.parametrize(
    ("throttle", "sizes", "together"),
    [(4, [20], [4]), (8, [25, 2], [7, 1]), (8, [10, 10], [4, 4]), (2, [5, 5, 5], [1, 1, 1]), (64, [3, 2], [3, 2])],
)
def test_the_throttle_is_shared_by_all_arrays_of_a_sweep(throttle, sizes, together):
    assert shares(throttle, sizes) == together


def test_what_an_array_has_it_keeps_when_there_is_more_to_give():
    assert shares(8, [10, 10], [2, 4]) == [4, 4]
    assert shares(8, [10, 10], [2, 6]) == [2, 6]
    assert shares(2, [5, 5], [2, 2]) == [2, 2], "the second is behind the first"


class Sweep:
    """A sweep whose arrays never end: what Slurm was told of each."""

    def __init__(self):
        self.elements, self.share, self.behind = {}, {}, {}

    def queue(self, sizes, throttle, refused):
        line = Line({job: ArrayLeft(left, ()) for job, left in self.elements.items()}, sizes, throttle)
        waiting = list(zip(sizes, line.wanted, strict=True))
        while waiting:
            size, wanted = waiting.pop(0)
            if size > 1 and refused(size):
                waiting[:0] = zip((size // 2, size - size // 2), _halves(wanted), strict=True)
                continue
            job, share, needs = str(100 + len(self.elements)), line.share(wanted), line.behind()
            self.behind[job] = needs[0].removeprefix("afterany:") if needs else None
            self.elements[job], self.share[job] = size, share
            line.add(job, size, share)
        line.set_throttles()

    def most_at_once(self, parent=None):
        """The most elements that may run at once, of what is behind an array: any of these arrays may end at any time."""
        own = [job for job, first in self.behind.items() if first == parent]
        return sum(max(min(self.share[job], self.elements[job]), self.most_at_once(job)) for job in own)


@pytest.fixture
def sweep(monkeypatch):
    """A sweep that does what scontrol is told to do."""
    sweep = Sweep()

    def scontrol(_, job, share, **options):
        sweep.share[job.partition("=")[2]] = int(share.partition("=")[2])

    monkeypatch.setattr(throttles, "call_scontrol", scontrol)
    return sweep


def test_of_an_array_that_is_cut_no_more_run_at_once_than_of_the_whole(sweep):
    sweep.queue([40], 1, lambda size: size > 10)
    assert list(sweep.elements.values()) == [10] * 4
    assert list(sweep.share.values()) == [1] * 4
    assert list(sweep.behind.values()) == [None, "100", "101", "102"]


def test_what_is_cut_later_takes_the_places_of_what_was_queued_first(sweep):
    sweep.queue([8], 3, lambda size: size == 8)
    assert (list(sweep.share.values()), list(sweep.behind.values())) == ([1, 2], [None, None])
    sweep.queue([4], 3, lambda size: size > 2)
    assert list(sweep.behind.values()) == [None, None, None, "100"]
    assert sweep.most_at_once() == 3


@pytest.mark.parametrize("seed", range(200))
def test_the_throttle_holds_whatever_is_cut_and_queued_later(sweep, seed):
    draw = random.Random(seed)
    throttle = draw.randint(1, 8)
    for _ in range(draw.randint(1, 4)):
        sizes = [draw.randint(1, 30) for _ in range(draw.randint(1, 4))]
        sweep.queue(sizes, throttle, lambda size: draw.random() < 0.4)
        assert sweep.most_at_once() <= throttle, (seed, sweep.behind, sweep.share)
