"""Completion of `kv-align` in bash: commands, verbs, groups, choices and keys.

`eval "$(kv-align completion)"` in a shell, or in its start-up file, turns it on. Imports nothing but the standard library
and the comments of `conf/`.
"""

from __future__ import annotations

import re
import sys

from kv_align.config.help.commands import VERBS
from kv_align.config.help.describe import choices, config_dir_of, groups_of, keys_of_entry
from kv_align.runs.program import COMMAND

_SCRIPT = """\
_kv_align() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }" IFS=$'\\n'
    COMPREPLY=($(kv-align completion -- "$line" 2>/dev/null))
    # Bash takes what follows the last = or : for a word of its own.
    local before="${word%"${word##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o nospace -o default -F _kv_align kv-align
"""
_ENTRIES = {"train": "train", "profile": "train", "pretrain": "pretrain"}
_OPTIONS = {
    "train": ("--multirun", "--help", "--cfg", "--config-dir"),
    "profile": ("--steps", "--help", "--config-dir"),
    "pretrain": ("--help", "--config-dir"),
    "summary": ("--baseline", "--csv", "--json", "--help"),
    "report": ("--criteria", "--baseline", "--require", "--verify", "--help"),
    "collect": ("--verify", "--help"),
    "compare": ("--output", "--help"),
}
_VERBS = ("submit", "plan", "status", "logs", "resume", "cancel", "extend")
_LAUNCH_OPTIONS = {
    "submit": ("--dry-run", "--canary", "--after", "--wait", "--when-full", "--config-dir", "--help"),
    "status": ("--watch", "--json", "--help"),
    "logs": ("--follow", "--help"),
    "resume": ("--retry", "--help"),
}


def complete(line: str) -> list[str]:
    """Return what the last word of a command line can become; a finished word ends with a space."""
    words = line.split(" ")[1:] or [""]
    last, before = words[-1], [word for word in words[:-1] if word]
    if not before:
        return _matching([f"{verb} " for verb in VERBS], last)
    command = before[0]
    if command == "launch" and len(before) == 1:
        return _matching([f"{verb} " for verb in (*_VERBS, "--help")], last)
    if command == "launch":
        verb = before[1]
        entries: tuple[str, ...] = ("submit", "train") if verb == "submit" else ()
        options = _LAUNCH_OPTIONS.get(verb, ("--help",))
    else:
        entries = (_ENTRIES[command],) if command in _ENTRIES else ()
        options = _OPTIONS.get(command, ())
    if last.startswith("-"):
        if last.startswith("--config-dir="):
            return []  # bash itself completes folders
        return _matching([f"{option} " for option in options], last)
    config_dir = config_dir_of(before)
    return [each for entry in entries for each in _settings(entry, last, config_dir)]


def _settings(entry: str, last: str, config_dir: str | None) -> list[str]:
    """Return groups and keys, or after `=` the choices of a group and the values that a comment lists."""
    keys = keys_of_entry(entry, config_dir)
    key, equals, _ = last.partition("=")
    if not equals:
        return _matching([f"{name}=" for name in (*groups_of(entry), *(each.path for each in keys))], last)
    if key in groups_of(entry):
        return _matching([f"{key}={choice} " for choice in choices(key, config_dir)], last)
    for each in keys:
        if each.path == key:
            return _matching([f"{key}={value} " for value in _values(each.value, each.meaning)], last)
    return []


def _values(value: str, meaning: str) -> list[str]:
    """Return the values that a meaning begins with (`mse | cosine`), or both of a switch."""
    listed = re.match(r"[\w.]+(?: \| [\w.]+)+", meaning)
    if listed:
        return listed[0].split(" | ")
    return ["true", "false"] if value in ("true", "false") else []


def _matching(candidates: list[str], last: str) -> list[str]:
    return sorted({each for each in candidates if each.startswith(last)})


def main() -> None:
    """Print the shell's script, or the completions of a line."""
    if sys.argv[1:2] == ["--"]:
        print("\n".join(complete(" ".join(sys.argv[2:]))))
    elif sys.argv[1:] in (["-h"], ["--help"]):
        print(
            f'usage: eval "$({COMMAND} completion)"\n\nCompletes the command {COMMAND} in bash, --config-dir included.'
        )
    elif sys.argv[1:]:
        print(f"{COMMAND}: completion takes no words: it writes for bash; put its output into eval.", file=sys.stderr)
        sys.exit(2)
    else:
        print(_SCRIPT, end="")


if __name__ == "__main__":
    main()
