"""The commands of `kv-align`."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A command: the module whose `main` does it, words that come before the user's, and what it does."""

    module: str
    first: tuple[str, ...]
    meaning: str


VERBS = {
    "train": Verb("kv_align.train", (), "one run: kv-align train aligner=structured loss=kv+struct seed=3"),
    "profile": Verb("kv_align.profile", (), "what a training step is made of, and whether the student is taught"),
    "pretrain": Verb("kv_align.pretrain", (), "make a teacher and a student start from texts"),
    "summary": Verb("kv_align.summary", (), "finished runs of a folder, side by side"),
    "launch": Verb("launch.__main__", (), "many runs: submit, plan, status, logs, resume, cancel, extend"),
    "collect": Verb("analysis.__main__", ("collect",), "read a sweep into tidy tables"),
    "report": Verb("analysis.__main__", ("report",), "test, judge and report a sweep"),
    "compare": Verb("analysis.__main__", ("compare",), "two runs, or two arms of a sweep"),
    "completion": Verb("kv_align.config.help.completion", (), 'completion for bash: eval "$(kv-align completion)"'),
}
