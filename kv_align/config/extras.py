"""Packages that only some choices need, and that are therefore no dependencies. Imports no torch, and none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from kv_align.config.config import Config
from kv_align.config.signals import declared
from kv_align.runs.errors import ConfigError

_BROUGHT_BY = {"peft": "kv-align[lora]", "bitsandbytes": "kv-align[quantized]", "lm_eval": "kv-align[lm_eval]"}


@dataclass(frozen=True)
class Extra:
    """A package that a run needs, why, and how to do without.

    Attributes
    ----------
    package
        Its name.
    asked
        What asks for it, as `key=value`.
    otherwise
        What asks for none, as `key=value`.
    """

    package: str
    asked: str
    otherwise: str


def extras_of(config: Config) -> list[Extra]:
    """Return what a run's choices need beside the dependencies."""
    extras = []
    if config.adapter.target:
        package = str(declared("adapter", config.adapter, "requires"))
        extras.append(Extra(package, f"adapter={config.adapter.name}", "adapter=none"))
    if config.model.teacher_quantization is not None:
        asked = f"model.teacher_quantization={config.model.teacher_quantization}"
        extras.append(Extra("bitsandbytes", asked, "model.teacher_quantization=null"))
    if config.evaluation.lm_eval:
        asked = f"evaluation.lm_eval=[{','.join(config.evaluation.lm_eval)}]"
        extras.append(Extra("lm_eval", asked, "evaluation.lm_eval=null"))
    return extras


def extras_versions(config: Config) -> dict[str, str]:
    """Return the versions of what a run needs beside the dependencies."""
    return {each.package: importlib.metadata.version(each.package) for each in extras_of(config)}


def check_extras(config: Config) -> None:
    """Refuse what needs a package that is not installed."""
    for each in extras_of(config):
        if importlib.util.find_spec(each.package) is None:
            raise ConfigError(
                f"{each.asked} is not allowed: the package {each.package} is not installed; "
                f"install {_BROUGHT_BY.get(each.package, each.package)} or use {each.otherwise}."
            )
