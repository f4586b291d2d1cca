"""How many elements of a sweep's arrays run at once, over all arrays of it: those of former submissions and the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.executors.slurm.ending import call_scontrol
from launch.executors.slurm.query import ArrayLeft


def shares(throttle: int, sizes: Sequence[int], had: Sequence[int] = ()) -> list[int]:
    """Return how many elements of each array may run at once, so that together they are no more than `throttle`.

    Each has one at least, and more by its size; no more than it has elements.

    Parameters
    ----------
    throttle
        Of the sweep.
    sizes
        Elements of each array that have not ended.
    had
        What each has already and keeps.
    """
    result = list(had or [1] * len(sizes))
    while sum(result) < throttle:
        room = [index for index, size in enumerate(sizes) if result[index] < size]
        if not room:
            break
        result[max(room, key=lambda index: sizes[index] / result[index])] += 1
    return result


@dataclass(frozen=True)
class Place:
    """An array in the line: its job, its elements that have not ended, and how many of these may run at once."""

    job: str
    elements: int
    share: int


class Line:
    """The arrays of a sweep that share its throttle: those that have not ended, and the new ones in their order.

    Parameters
    ----------
    former
        Elements that are left of each former array, by job, in the order in which they were queued.
    new
        Elements of each new array.
    throttle
        So many elements of all of them may run at once.

    Attributes
    ----------
    wanted
        The share of each new array.
    """

    def __init__(self, former: dict[str, ArrayLeft], new: Sequence[int], throttle: int) -> None:
        self._throttle = throttle
        planned = shares(throttle, [*(left.elements for left in former.values()), *new])
        self.wanted = planned[len(former) :]
        self._former = [
            Place(job, left.elements, share) for (job, left), share in zip(former.items(), planned, strict=False)
        ]
        self._new: list[Place] = []
        # Those that nothing is behind. Of more than the throttle, the first ones have others behind them already.
        self._last = self._former[-throttle:]
        # So many more run of a former array than is its share from now on: their places are not free before they end.
        self._taken = [
            element for left, share in zip(former.values(), planned, strict=False) for element in left.running[share:]
        ]

    def share(self, wanted: int) -> int:
        """Return how many elements of the next array may run at once: what is free, else what the first of the last had."""
        return min(wanted, self._free) if self._free > 0 else self._last[0].share

    def behind(self) -> list[str]:
        """Return the dependencies of the next array: on the elements, or the whole array, whose places it takes."""
        waited_for = [*self._taken, *([] if self._free > 0 else [self._last[0].job])]
        return [f"afterany:{':'.join(waited_for)}"] if waited_for else []

    def add(self, job: str, elements: int, share: int) -> None:
        """Note what the next array became."""
        if self._free <= 0:
            del self._last[0]
        self._new.append(Place(job, elements, share))
        self._last.append(self._new[-1])

    def set_throttles(self) -> None:
        """Give the former arrays the share that is left to them, and all what those have no use for that were not queued."""
        if not self._new:
            return
        places = [*self._former, *self._new]
        had = [place.share for place in places]
        for place, share in zip(places, shares(self._throttle, [place.elements for place in places], had), strict=True):
            if place.elements > 1 and place.job and (place in self._former or share != place.share):
                call_scontrol("update", f"JobId={place.job}", f"ArrayTaskThrottle={share}", pauses_s=())

    @property
    def _free(self) -> int:
        return self._throttle - sum(place.share for place in self._last)
