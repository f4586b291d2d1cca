"""The one error that users cause, and how pydantic's findings become one sentence. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


class ConfigError(ValueError):
    """Something the user asked for cannot be done: one sentence with the key, the value, what is allowed, what to do.

    The command line prints it and leaves with exit code 2.
    """

    def __str__(self) -> str:
        """Return the sentence on one line, whatever line breaks and control characters stand in what it quotes."""
        text = super().__str__()
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "finite_number": "a finite number",
}


def first_error(error: ValidationError, section: str = "") -> ConfigError:
    """Return pydantic's first finding as a sentence; `section` is put before the key."""
    finding = error.errors(include_url=False)[0]
    location = [str(part) for part in finding["loc"]]
    # An Optional or Union adds the member's name to the location; keys are what the user knows.
    key = ".".join(part for part in [section, *location] if part and not part.endswith("]") and part not in _WANTED)
    if finding["type"] == "missing":
        return ConfigError(f"{key} is missing: add it to the configuration.")
    if location[-1:] == ["[key]"] and finding["type"] == "literal_error":
        return unknown_key(key, re.findall("'(.*?)'", finding["ctx"]["expected"]), key.rpartition(".")[0])
    return invalid_value(key, finding["input"], _allowed(finding))


def _allowed(finding: Any) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    bounds = {
        "greater_than": "a number above {gt:g}",
        "greater_than_equal": "a number of at least {ge:g}",
        "less_than": "a number below {lt:g}",
        "less_than_equal": "a number of at most {le:g}",
        "literal_error": "one of {expected}",
        "too_short": "a list of at least {min_length} entries",
    }
    if kind in bounds:
        return bounds[kind].format(**context).replace("'", "")
    return str(_WANTED.get(kind, finding["msg"]))


def of_the_system(error: OSError) -> ConfigError:
    """Return the sentence for what the system has against a file or a program."""
    what = error.filename or "a file or a program"
    return ConfigError(f"{what} cannot be used: {error.strerror or error}; see to that and run this again.")


def invalid_value(key: str, value: object, allowed: str) -> ConfigError:
    """Return the sentence for a value outside what is allowed."""
    shown = {True: "true", False: "false", None: "null"}.get(value, value) if isinstance(value, bool | None) else value
    return ConfigError(f"{key}={shown} is not allowed: set {key} to {allowed}.")


def unknown_key(key: str, valid: Iterable[str], where: str) -> ConfigError:
    """Return the sentence for a key that does not exist, with the valid names and the nearest of them."""
    names = sorted(name for name in valid if name not in ("name", "target", "_target_"))
    near = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    advice = f"did you mean {near[0]}" if near else "remove it or use one of these"
    listed = ", ".join(names) if names else "none"
    return ConfigError(f"{key} is an unknown key: {where} has the keys {listed}; {advice}.")


def no_config_dir(folder: str) -> ConfigError:
    """Return the sentence for a folder of the user's own groups that does not exist."""
    return ConfigError(f"--config-dir={folder} is not allowed: there is no such folder; correct the path.")
