"""From a command line to configurations: Hydra composes, and what it finds wrong becomes one sentence.

Everything here happens before a run starts, so that nothing is queued and nothing written when an override is wrong.
Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from kv_align.config.config import Config
from kv_align.config.identity import content_hash
from kv_align.config.resolve import resolve
from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError, invalid_value, no_config_dir, unknown_key
from kv_align.runs.values import check_own_file

_MOST_RUNS = 10_000
_READ_BY_LAUNCH = ("cluster", "sweep", "criteria")  # in decimal numbers


def compose_raw(
    overrides: Sequence[str], *, config_name: str = "train", config_dir: str | None = None
) -> dict[str, Any]:
    """Compose a configuration and resolve its interpolations.

    Parameters
    ----------
    overrides
        Hydra's override grammar, one value each.
    config_name
        The primary configuration.
    config_dir
        A folder of the user's whose groups are laid over `conf/`.

    Raises
    ------
    ConfigError
        For an override that cannot be parsed, a choice or a key that does not exist, or a value that is missing.
    """
    with _hydra(config_dir) as search:
        _refuse_wrong_groups(overrides)
        with _explained():
            composed = compose(config_name, overrides=[*search, *overrides])
    return _to_container(composed)


def compose_config(overrides: Sequence[str], *, config_dir: str | None = None) -> tuple[Config, list[str]]:
    """Compose one run and make it canonical; see `resolve` for what is returned and raised."""
    return resolve(compose_raw(overrides, config_dir=config_dir))


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expand Hydra's sweep grammar (`seed=0,1,2 aligner=flat,structured`) into one list of overrides per run.

    Raises
    ------
    ConfigError
        For an override that cannot be parsed, or too many runs.
    """
    axes = []
    with _hydra(None):  # a glob over a group's choices asks it which there are
        for override in _parse(overrides):
            key = override.input_line.split("=", 1)[0] if override.input_line else override.key_or_group
            if override.is_sweep_override():
                axes.append([f"{key}={value}" for value in _swept_values(override)])
            else:
                axes.append([str(override.input_line)])
    number = math.prod(len(axis) for axis in axes)
    if number > _MOST_RUNS:
        raise ConfigError(f"{' '.join(overrides)} are {number} runs, and at most {_MOST_RUNS} are allowed; name fewer.")
    runs: list[list[str]] = [[]]
    for axis in axes:
        runs = [[*run, choice] for run in runs for choice in axis]
    return runs


def check_hydra(overrides: Sequence[str], *, config_dir: str | None = None) -> dict[str, Path]:
    """Refuse overrides of Hydra's own settings that it could not follow; returns the folders that they name, by key.

    Raises
    ------
    ConfigError
        For a launcher, sweeper or key that does not exist, or for a run without a folder of its own.
    """
    folders = {}
    with _hydra(config_dir) as search:
        for override in _parse(overrides):
            if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir"):
                name = str(override.value()).strip()
                if not name:
                    raise invalid_value(override.key_or_group, "''", "the name of a folder")
                if "${" not in name:
                    folders[override.key_or_group] = Path(name)
        with _explained():
            settings = compose("train", overrides=[*search, *overrides], return_hydra_config=True).hydra
        verbose, below = settings.verbose, settings.output_subdir
        if below is not None and not re.fullmatch(r"[\w.-]*\w[\w.-]*", str(below)):
            raise invalid_value(
                "hydra.output_subdir", repr(below), "the plain name of a folder in the run's own, or null"
            )
        if not (isinstance(verbose, bool | str) or OmegaConf.is_list(verbose)):
            raise invalid_value("hydra.verbose", verbose, "true, false, the name of a logger, or a list of such names")
    return folders


def default_run_name(config: Config) -> str:
    """Return a folder name that says the choices and identifies the run: the same command gives the same name."""
    return f"{arm_name(config)}-{config.loss.name}-seed{config.seed}-{content_hash(config)[:8]}"


def arm_name(config: Config) -> str:
    """Return what a run is tabulated under: its declared arm, else its aligner and what tells it from others."""
    if config.arm is not None:
        return config.arm
    adapter = [config.adapter.name] if config.adapter.target else []
    if not config.aligner.target:
        return "-".join([config.loss.name, *adapter])
    marks = [config.aligner.name]
    if config.aligner.options.get("share_dim_proj") is False:
        marks.append("per_head")
    if config.init is not None:
        marks.append(config.init.name)
    return "-".join(marks + adapter)


def no_config(name: str) -> ConfigError:
    """Return the sentence for a primary configuration that does not exist."""
    return ConfigError(
        f"--config-name={name} is not allowed: this command's own is train, and --config-dir names no folder with a "
        f"{name}.yaml; leave it out, or name such a folder."
    )


def explain(error: Exception) -> ConfigError:
    """Return what Hydra or OmegaConf found as one sentence."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if not group:
            return no_config(choice)
        options = ", ".join(error.options or ())
        return ConfigError(f"{group}={choice} is not allowed: {group} must be one of {options}; choose one of these.")
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override} is not an override: overrides are written key=value, group=choice, +key=value or ~key, and a "
            "value with spaces, quotes, commas, ; or brackets has quotes of its own, as in 'run_name=\"a b\"'; correct it."
        )
    ambiguous = re.match(r"Ambiguous value for argument '([^=']+)=(.*)'", str(error))
    if ambiguous is not None:
        key, value = ambiguous.groups()
        return ConfigError(
            f"{key}={value} is not allowed: it names several values and this is one run; add --multirun for a run of each, "
            f"or write a list as {key}=[{value}]."
        )
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        parent = cause.parent_node
        if isinstance(cause, MissingMandatoryValue):
            return ConfigError(f"{cause.full_key} is missing: give it a value with {cause.full_key}=VALUE.")
        if isinstance(cause, InterpolationResolutionError):
            what = str(cause).splitlines()[0].rstrip(".")
            return ConfigError(f"{cause.full_key} cannot be resolved: {what}; correct what stands in its ${{}}.")
        if isinstance(parent, DictConfig) and cause.full_key.rpartition(".")[2] in parent:
            what = str(cause).splitlines()[0].rstrip(".")
            return ConfigError(f"{cause.full_key} cannot have that value ({what}); correct that override.")
        if isinstance(parent, DictConfig):
            where = cause.full_key.rpartition(".")[0] or "the configuration"
            return unknown_key(cause.full_key, map(str, parent), where)
    first_line = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    return ConfigError(f"The configuration cannot be composed: {first_line}; correct that override.")


def _swept_values(override: Override) -> list[str]:
    if override.is_interval_sweep():
        raise ConfigError(
            f"{override.input_line} is not allowed: an interval holds no values to run one by one; list them, as in "
            "seed=0,1,2, or use range(0,3)."
        )
    try:
        values = list(islice(override.sweep_string_iterator(), _MOST_RUNS + 1))
    except ValueError as error:  # of a range whose step is zero
        raise ConfigError(f"{override.input_line} is not allowed: {error}; correct it.") from None
    if len(values) > _MOST_RUNS:
        raise ConfigError(
            f"{override.input_line} is not allowed: it names more than {_MOST_RUNS} values, each of them a run; name fewer."
        )
    if not values:
        group = override.key_or_group
        choices = GlobalHydra.instance().config_loader().get_group_options(group)
        raise ConfigError(
            f"{override.input_line} is not allowed: it matches no choice of {group}, which are {', '.join(choices)}; correct "
            "the pattern."
        )
    return values


def _parse(overrides: Sequence[str]) -> list[Override]:
    """Parse with the configuration that `_hydra` has made current."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    try:
        return list(parser.parse_overrides(overrides=list(overrides)))
    except OverrideParseException as error:
        raise explain(error) from None


def _refuse_wrong_groups(overrides: Sequence[str]) -> None:
    """Refuse what can name no choice, in which Hydra itself ends in an error of Python."""
    for override in _parse(overrides):
        group = override.key_or_group
        if not group:
            raise ConfigError(f"{override.input_line} is not an override: it has no key; write key=value.")
        chosen, _, key = group.partition(".")
        if key == "name" and GlobalHydra.instance().config_loader().get_group_options(chosen):
            raise ConfigError(f"{override.input_line} is not allowed: {chosen}=NAME chooses what has it; take it out.")
        if override.is_delete() or override.is_sweep_override():
            continue
        value = override.value()
        names = value if isinstance(value, list) else [value]
        if all(isinstance(name, str | dict) for name in names):
            continue  # Hydra looks at its whole search path for a group's choices
        choices = GlobalHydra.instance().config_loader().get_group_options(group)
        if choices:
            shown = str(override.input_line).partition("=")[2]
            raise ConfigError(
                f"{group}={shown} is not allowed: {group} must be one of {', '.join(choices)}; choose one of these."
            )


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ConfigError(
            "The configuration cannot be composed: the defaults of a choice lead back to it, or a value is nested too "
            "deeply; correct that file or override."
        ) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise explain(error) from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise ConfigError(
            f"The configuration cannot be composed: a file is no mapping ({error}); correct it."
        ) from None


@cache
def _check_once(file: Path, mtime_ns: int, size: int) -> None:
    """Check a file of the user's once, and again where it was changed: a sweep composes hundreds of runs."""
    check_own_file(file)


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[list[str]]:
    """Make `conf/` the configuration, whatever Hydra was doing before; yields overrides that add the user's folder."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise no_config_dir(config_dir)
    for file in [] if config_dir is None else sorted(Path(config_dir).glob("*/*.yaml")):
        if (config_directory() / file.parent.name).is_dir() and file.parent.name not in _READ_BY_LAUNCH:
            about = file.stat()
            _check_once(file, about.st_mtime_ns, about.st_size)
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            yield [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    finally:
        GlobalHydra.instance().hydra = before


def _to_container(composed: DictConfig) -> dict[str, Any]:
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is missing: give it a value with {missing[0]}=VALUE.")
        raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from None
    return {str(key): value for key, value in raw.items()} if isinstance(raw, dict) else {}
