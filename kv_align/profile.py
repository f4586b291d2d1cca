"""What one training step is made of.

Shapes at every stage, parameters, time, memory and arithmetic per stage,
whether everything is finite, and whether the student receives gradient from the
alignment loss. Exit code 1 where something is not finite or none arrives.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from kv_align.config.cli import bad_input_exits
from kv_align.config.compose import compose_config
from kv_align.config.help.describe import described
from kv_align.runs.errors import ConfigError
from kv_align.runs.program import as_a_command, program


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not allowed: set it to a whole number from 1 on")
    return int(word)


def main() -> None:
    """Read the command line, profile, and leave with 0, 1 (not finite, or not taught) or 2 (bad input)."""
    parser = argparse.ArgumentParser(
        program("kv_align.profile"),
        description=__doc__,
        epilog=described("train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as aligner=flat")
    parser.add_argument("--steps", type=_count, default=10, help="optimizer steps to do (default: 10)")
    parser.add_argument("--config-dir", help="a folder whose groups are laid over conf/")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with as_a_command(), bad_input_exits():
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise ConfigError(
                f"WORLD_SIZE={processes} is not allowed: what is profiled is the step of a single process; call "
                "kv_align.profile without torchrun."
            )
        config, notes = compose_config(arguments.overrides, config_dir=arguments.config_dir)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        from kv_align.experiment.profiling import profile
        from kv_align.experiment.quiet import quiet_libraries

        quiet_libraries()
        sound = profile(config, arguments.steps)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
