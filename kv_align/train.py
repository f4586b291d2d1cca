"""The single training entry point: `python -m kv_align.train aligner=structured init=uniform loss=kv+struct seed=3`.

It only reads the command line, so that a wrong one is refused before torch is imported; the run itself, from building to
evaluation, is `kv_align.experiment.experiment.run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kv_align.runs.program import as_a_command
from kv_align.runs.stopwatch import process_began

if TYPE_CHECKING:
    from kv_align.config.config import Config
    from kv_align.runs.run_dir import State


def train(config: Config, directory: Path) -> State:
    """Run one experiment in `directory` and return its end state."""
    from kv_align.experiment.experiment import run

    return run(config, directory, began=process_began())


def main() -> None:
    """Read the command line, do one run or several, and leave."""
    with as_a_command():
        from kv_align.config.cli import train_main

        train_main(train)


if __name__ == "__main__":
    main()
