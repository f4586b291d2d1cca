"""The command lines: everything is checked before anything starts, and every end has its exit code.

Hydra runs the jobs (`--multirun`, launchers, `--help`, `--cfg`, ... are its own); this module composes and validates each
of them first, prints one sentence and leaves with 2 if one is wrong. Imports no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kv_align.config.compose import (
    check_hydra,
    compose_config,
    compose_raw,
    default_run_name,
    expand_sweep,
    no_config,
)
from kv_align.config.config import Config, PretrainConfig
from kv_align.config.help.describe import described
from kv_align.config.identity import going_on
from kv_align.config.resolve import resolve
from kv_align.config.schema import validate
from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError, no_config_dir, of_the_system
from kv_align.runs.program import program
from kv_align.runs.progress import progress_bar
from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, State
from kv_align.runs.values import check_own_file

Task = Callable[[Config, Path], State]
_TRAIN_HELP = """\
usage: {program} [GROUP=CHOICE] [KEY=VALUE]
       [--multirun] [--config-dir DIR] [--cfg job] [--hydra-help]

One run. A group's choice is a file of conf/, * what is taken where none is
named; --multirun does each combination of several values (seed=0,1,2).
--cfg job shows the configuration that comes of a command line.
"""
_SHOWN = 40  # letters of a name that is too long
_SHOWN_BY_HYDRA = ("hydra_help", "cfg", "info")


def train_main(task: Task) -> None:
    """Run `task` for the command line, once or, with `--multirun`, for each combination; leaves the process.

    Exit codes are `kv_align.runs.run_dir.EXIT_CODES`, and 2 for bad input.
    """
    with bad_input_exits():
        _check_processes()
        arguments = _arguments()
    end: list[State] = []

    def job(composed: DictConfig) -> str:
        try:
            return run(composed)
        except ConfigError:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the other runs go on, and Hydra leaves with 1 in the end
            with bad_input_exits():  # in here: Hydra would show it as a traceback and leave with 1
                raise

    def run(composed: DictConfig) -> str:
        raw = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(raw, dict)
        config, _ = resolve({str(key): value for key, value in raw.items()})
        if config.run_name is None:
            config = config.model_copy(update={"run_name": default_run_name(config)})
        state = task(config, Path(HydraConfig.get().runtime.output_dir))
        end.append(state)
        if state == "interrupted":  # the whole sweep was asked to leave, not only this run of it
            sys.exit(EXIT_CODES[state])
        if state in ("failed", "diverged") and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise RuntimeError(f"the run {state}; its status.json says why")
        return state

    if arguments is not None:
        with bad_input_exits():
            names = _check(arguments)
        sys.argv += names
    with bad_input_exits():
        hydra.main(config_path=str(config_directory()), config_name="train", version_base="1.3")(job)()
    sys.exit(EXIT_CODES[end[0]] if len(end) == 1 else 0)


def pretrain_main(task: Callable[[PretrainConfig], None]) -> None:
    """Run the pretraining recipe for the command line's overrides; leaves the process."""
    parser = argparse.ArgumentParser(
        program("kv_align.pretrain"),
        description="Make a tokenizer, a teacher and a student start from texts, as the\nembedded pair was made.",
        epilog=described("pretrain"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of conf/pretrain.yaml, such as data=gsm8k")
    parser.add_argument("--config-dir", help="a folder whose groups are laid over conf/")
    arguments = parser.parse_intermixed_args()
    with bad_input_exits():
        raw = compose_raw(arguments.overrides, config_name="pretrain", config_dir=arguments.config_dir)
        config = validate(PretrainConfig, raw)
        path = config.data.options.get("path")
        if path and not Path(path).expanduser().exists():
            raise ConfigError(f"data.path={path} is not allowed: there is no such file or folder; correct the path.")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        task(config)


class bad_input_exits:  # noqa: N801 - a context manager, read as a statement
    """Print a `ConfigError`, or what the system has against a file, as one sentence and leave with exit code 2."""

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Leave if the body raised one of them."""
        if isinstance(error, OSError) and error.filename is not None:
            error = of_the_system(error)
        if isinstance(error, ConfigError):
            print(f"kv-align: {error}", file=sys.stderr)
            sys.exit(2)


class FailVisibly(Callback):  # type: ignore[misc]
    """Hydra callback: inside a scheduler's job, a run that raised makes the job fail too.

    Without it the submitit launcher stores the exception as a result and the scheduler says COMPLETED.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave the process with exit code 1 if the job failed under submitit."""
        if job_return.status == JobStatus.FAILED and "SUBMITIT_EXECUTOR" in os.environ:
            print(f"kv-align: the run failed: {job_return._return_value}", file=sys.stderr)
            sys.exit(1)


def _check_processes() -> None:
    """Refuse an environment that says half of which process of how many this is: it would wait for others for ever."""
    world, rank = (os.environ.get(name) for name in ("WORLD_SIZE", "RANK"))
    if world in (None, "1") and rank in (None, "0"):
        return
    if world is None or rank is None:
        said, missing = (f"WORLD_SIZE={world}", "RANK") if rank is None else (f"RANK={rank}", "WORLD_SIZE")
        raise ConfigError(f"{said} is not allowed without {missing}: start the processes with torchrun, or unset it.")
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise ConfigError(f"RANK={rank} is not allowed with WORLD_SIZE={world}: start the processes with torchrun.")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        if not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE={world} is not allowed without {name}: start the processes with torchrun.")
    for name in ("MASTER_PORT", "LOCAL_RANK"):
        if not os.environ[name].isdecimal():
            raise ConfigError(f"{name}={os.environ[name]} is no number: start the processes with torchrun.")


def _arguments() -> argparse.Namespace | None:
    """Hydra's own arguments; None where it will only show something."""
    from hydra._internal.utils import get_args_parser

    arguments = get_args_parser().parse_intermixed_args()
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise no_config_dir(arguments.config_dir)
    if arguments.help:
        print(_TRAIN_HELP.format(program=program("kv_align.train")) + described("train", arguments.config_dir))
        sys.exit(0)
    # Hydra reads them again, and takes overrides on both sides of an option for unknown words.
    options = [word for word in sys.argv[1:] if word not in arguments.overrides]
    sys.argv[1:] = [*options, *arguments.overrides]
    if arguments.experimental_rerun is not None:
        raise ConfigError(
            f"--experimental-rerun={arguments.experimental_rerun} is not allowed: the same command again goes on with its "
            "run, and config.yaml in its folder says what it was."
        )
    if arguments.shell_completion or (arguments.resolve and not arguments.cfg):
        said = "--resolve is not allowed: add --cfg job." if arguments.resolve else ""
        raise ConfigError(said or "--shell-completion is not allowed: use kv-align completion.")
    if arguments.cfg and not arguments.multirun and arguments.config_name in (None, "train"):
        words = [override for override in arguments.overrides if not override.lstrip("+~").startswith("hydra")]
        compose_raw(words, config_dir=arguments.config_dir)  # what is wrong is said here
    if any(getattr(arguments, name) for name in _SHOWN_BY_HYDRA):
        return None
    if arguments.config_path is not None:
        raise ConfigError(
            f"--config-path={arguments.config_path} is not allowed: conf/ is where it is; lay your own groups over it with "
            "--config-dir."
        )
    if arguments.config_name not in (None, "train"):
        own = Path(arguments.config_dir or "") / f"{arguments.config_name}.yaml"
        if arguments.config_dir is None or not own.is_file():
            raise no_config(arguments.config_name)
        check_own_file(own, named=False)
        return None  # a primary configuration of the user's own: each run of it is checked as it starts
    result: argparse.Namespace = arguments
    return result


def _check(arguments: argparse.Namespace) -> list[str]:
    """Validate every run of the command line; returns overrides to add to it (the run's name)."""
    overrides, config_dir = arguments.overrides, arguments.config_dir
    own = [override for override in overrides if not override.lstrip("+~").startswith("hydra")]
    folders: dict[str, Path] = {}
    if len(own) < len(overrides):
        folders = check_hydra([override for override in overrides if override not in own], config_dir=config_dir)
    if not arguments.multirun:
        config, notes = compose_config(own, config_dir=config_dir)
        _check_places(config)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        name = config.run_name or _folder_name(config)
        if not any("hydra.run.dir=" in override for override in overrides):
            # Before Hydra writes its own files there.
            directory = RunDirectory(Path(config.output_dir) / name)
            going_on(directory, config)
            directory.refuse_to_redo()
            folders["output_dir"] = Path(config.output_dir) / name
        folders.pop("hydra.sweep.dir", None)
        _make_folders(folders)
        quoted = name.replace("\\", r"\\").replace("'", r"\'")
        return [f"run_name='{quoted}'"] if config.run_name is None else []
    runs = expand_sweep(own)
    # A seed is right or wrong whatever stands beside it, and composing takes a tenth of a second.
    by_choices = {tuple(each for each in run if not each.startswith("seed=")): run for run in runs}
    by_seed = {tuple(each for each in run if each.startswith("seed=")): run for run in runs}
    distinct = {tuple(run): run for run in (*by_choices.values(), *by_seed.values())}
    seen: set[str] = set()
    with progress_bar("checking", len(distinct)) as advance:
        for run in distinct.values():
            config, notes = compose_config(run, config_dir=config_dir)
            _check_places(config)
            for note in notes:
                if note not in seen:
                    print(f"note: {note}", file=sys.stderr)
                seen.add(note)
            advance(1)
    folders.pop("hydra.run.dir", None)
    _make_folders(folders or {"output_dir": Path(config.output_dir)})
    return []


def _folder_name(config: Config) -> str:
    """Return the folder of a run that was given no name: that of version 0.1.0 where it began there."""
    former = default_run_name(config.model_copy(update={"inputs": None}))
    return former if (Path(config.output_dir) / former).is_dir() else default_run_name(config)


def _make_folders(folders: dict[str, Path]) -> None:
    """Make the folders that Hydra is about to write to, by key; it would end in a traceback where they cannot be."""
    for key, path in folders.items():
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{key}={path} is not allowed: {error.filename} cannot be made ({error.strerror}); name a folder that can "
                "be written to."
            ) from None


def _check_places(config: Config) -> None:
    places = {"output_dir": config.output_dir}
    if config.teacher_cache not in ("auto", "off"):
        places["teacher_cache"] = config.teacher_cache
    for key, name in places.items():
        path = Path(name)
        try:
            existing = next(folder for folder in (path, *path.parents) if folder.exists())
        except OSError as error:
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            raise ConfigError(f"{key}={shown} is not allowed: {error.strerror}; name another folder.") from None
        if not existing.is_dir():
            raise ConfigError(f"{key}={path} is not allowed: {existing} is a file; name a folder.")
