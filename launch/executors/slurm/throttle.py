"""How many elements of a sweep's arrays run at once, over all arrays of it: those of former submissions and the new ones."""

from __future__ import annotations

from collections.abc import Sequence

from launch.executors.slurm.ending import call_scontrol
from launch.executors.slurm.query import ArrayLeft
from launch.journal.ledger import Submission


def shares(throttle: int, sizes: Sequence[int]) -> list[int]:
    """Return how many elements of each array may run at once, so that together they are no more than `throttle`.

    Each has one at least, and more by its size; no more than it has elements.

    Parameters
    ----------
    throttle
        Of the sweep.
    sizes
        Elements of each array that have not ended.
    """
    result = [1] * len(sizes)
    while sum(result) < throttle:
        room = [index for index, size in enumerate(sizes) if result[index] < size]
        if not room:
            break
        result[max(room, key=lambda index: sizes[index] / result[index])] += 1
    return result


class Line:
    """The arrays of a sweep that share its throttle: those that have not ended, and the new ones in their order.

    Parameters
    ----------
    former
        Elements that are left of each former array, by job.
    new
        Elements of each new array.
    throttle
        So many elements of all of them may run at once.
    """

    def __init__(self, former: dict[str, ArrayLeft], new: Sequence[int], throttle: int) -> None:
        self._former, self._throttle = former, throttle
        self._shares = shares(throttle, [*(left.elements for left in former.values()), *new])
        self._jobs = list(former)
        # So many more run of a former array than is its share from now on: their places are not free before they end.
        self._taken = [
            element
            for left, share in zip(former.values(), self._shares, strict=False)
            for element in left.running[share:]
        ]

    def share(self, number: int) -> int:
        """Return how many elements of a new array may run at once."""
        return self._shares[len(self._former) + number]

    def behind(self, number: int) -> list[str]:
        """Return the dependencies of a new array: on the elements whose places it takes.

        An array that is one too many to have an element running beside the others' waits for one of these.
        """
        position = len(self._former) + number - self._throttle
        ahead = [self._jobs[position]] if 0 <= position < len(self._jobs) else []
        waited_for = [*self._taken, *ahead]
        return [f"afterany:{':'.join(waited_for)}"] if waited_for else []

    def add(self, submissions: Sequence[Submission]) -> None:
        """Note what a new array became."""
        self._jobs += [submission.job or "" for submission in submissions][:1]

    def throttle_former(self) -> None:
        """Give the former arrays the share that is left to them."""
        for (job, left), share in zip(self._former.items(), self._shares, strict=False):
            if left.elements > 1:
                call_scontrol("update", f"JobId={job}", f"ArrayTaskThrottle={share}", pauses_s=())
