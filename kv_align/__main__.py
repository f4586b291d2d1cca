"""`kv-align`, or `python -m kv_align`: one command for a run, for many runs, and for the answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from kv_align import __version__
from kv_align.config.help.commands import VERBS, Verb
from kv_align.config.targets import config_directory
from kv_align.runs.program import COMMAND, as_a_command


def main() -> None:
    """Run the verb that the command line begins with; leaves the process."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"{COMMAND} {__version__}, whose groups are in {config_directory()}")
        sys.exit(0)
    verb = VERBS.get(words[0])
    if verb is None:
        print(f"{COMMAND}: {words[0]} is no command; use one of {', '.join(VERBS)}.", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(words[0], verb, words[1:]))


def run(name: str, verb: Verb, words: Sequence[str]) -> int | None:
    """Call a verb's `main` as if it had been called by name; returns its exit code."""
    sys.argv = [f"{COMMAND} {name}", *verb.first, *words]
    with as_a_command():
        code: int | None = importlib.import_module(verb.module).main()
    return code


def usage() -> str:
    """Return what there is, a line each."""
    lines = [f"usage: {COMMAND} COMMAND ...", "", __doc__.splitlines()[0].partition(": ")[2].capitalize(), ""]
    lines += [f"  {name:<12}{verb.meaning}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", f"{COMMAND} COMMAND --help explains every group and key of it."])


if __name__ == "__main__":
    main()
