"""What every adapter has in common: it is made of a student, learns in its place, and is merged into it at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class Adapter(ABC):
    """What `conf/adapter/*.yaml` names: called with a pretrained student and a seed, and with its options.

    Making one changes the student in place: its own weights are frozen, and the adapter's parameters are among its
    modules, so that whatever runs, records, wraps or saves the student sees them. The start is drawn from the seed alone.

    Attributes
    ----------
    requires
        The package that it is made with, a literal.
    """

    requires: str

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter alone, in the format of its package."""

    @abstractmethod
    def merge(self) -> None:
        """Add what was learned to the student's own weights and take the adapter out of it; it cannot be trained further."""
