"""`python -m launch`: the verbs of a sweep. Reads the command line alone; what a verb needs is imported when it is used."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_align.runs.errors import ConfigError, of_the_system
from kv_align.runs.program import program

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = """\
examples:
  python -m launch submit sweep=expected_results cluster=local --dry-run
  python -m launch submit sweep=full cluster=slurm cluster.partition=gpu
  python -m launch submit sweep=demo cluster=local trainer.lr=1e-3,3e-3 --wait
  python -m launch status outputs/sweeps/demo-1a2b3c4d --watch
  python -m launch resume outputs/sweeps/demo-1a2b3c4d cluster.mem_gb=64

exit codes: 0 done; 1 a run that was waited for (--wait, cluster=debug) did not
finish; 2 bad input, or no answer from the scheduler (one sentence says what;
nothing was queued); 75 only some runs are queued: resume later for the others
"""
_WATCH_S = 2.0
_FULL_WAIT_S = 30.0
PARTLY = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = _parser(sys.argv[1:] if arguments is None else arguments)
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.verb in ("submit", "resume"):  # argparse takes words after an option for unknown ones
        words = parsed.settings if parsed.verb == "submit" else parsed.words
        words += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        run: Any = _VERBS[parsed.verb]
        return run(parsed) or 0
    except ConfigError as error:
        print(f"launch: {error}", file=sys.stderr)
        return PARTLY if getattr(error, "queued", False) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"launch: {of_the_system(error)}", file=sys.stderr)
        return 2


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("launch"),
        description="Fan a sweep out to a Slurm cluster or to this machine, and lose nothing.",
        epilog=_EXAMPLES.replace("python -m launch", program("launch")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    submit = verbs.add_parser(
        "submit",
        help="plan a sweep, check it, freeze it and queue its runs",
        description=_SUBMIT_HELP,
        epilog=_submit_keys(words) if {"-h", "--help"} & set(words) else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submit.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="sweep=NAME cluster=NAME, and what is changed")
    submit.add_argument("--dry-run", action="store_true", help="stop after the plan: write and queue nothing")
    submit.add_argument("--canary", action="store_true", help="one run first, the others only if it succeeds")
    submit.add_argument(
        "--after", type=Path, metavar="SWEEP", help="start when the jobs of this other sweep have ended"
    )
    submit.add_argument("--wait", action="store_true", help="stay until every run has ended, then write the report")
    submit.add_argument(
        "--when-full",
        choices=("leave", "wait"),
        default="leave",
        help="what to do with the runs that the cluster has no room for: leave them to a later resume, or wait for room",
    )
    submit.add_argument("--config-dir", help="a folder whose groups are laid over conf/")
    for verb, text in (
        ("plan", "show what was frozen"),
        ("status", "the truth about each run, or about each sweep of a folder"),
        ("logs", "what a run printed"),
        ("resume", "queue again what is missing, failed, lost, cancelled, held or blocked"),
        ("cancel", "stop runs and helper jobs; a running run keeps its checkpoint"),
        ("extend", "more seeds for the same frozen plan"),
    ):
        verbs.add_parser(verb, help=text, description=text).add_argument("sweep", type=Path, help="the sweep's folder")
    status, logs, resume = verbs.choices["status"], verbs.choices["logs"], verbs.choices["resume"]
    status.add_argument("--watch", action="store_true", help="stay and show it live")
    status.add_argument("--json", action="store_true", help="print it for a program")
    logs.add_argument("run", help="the run's id, or its start")
    logs.add_argument("--follow", action="store_true", help="go on until the run ends")
    resume.add_argument("--retry", choices=("failed", "diverged", "all"), help="these; default: all but diverged")
    resume.add_argument(
        "words", nargs="*", metavar="RUN | cluster.KEY=VALUE", help="these runs alone; what jobs ask for from now on"
    )
    verbs.choices["cancel"].add_argument("run", nargs="*", help="ids, or their starts; default: all")
    verbs.choices["extend"].add_argument("seeds", metavar="seeds=SEEDS", help="a count, or a list: seeds=12")
    return parser


def _submit_keys(words: Sequence[str]) -> str:
    from kv_align.config.help.describe import config_dir_of, described

    return f"{described('submit', config_dir_of(words))}\n\nkeys of every run: {program('kv_align.train')} --help"


_SUBMIT_HELP = """\
Keys: sweep=NAME and cluster=NAME choose a file of conf/sweep and conf/cluster;
sweep.KEY=VALUE and cluster.KEY=VALUE change it (seeds= and losses= are short
for sweep.seeds= and sweep.losses=); output_dir=FOLDER says where the sweep is
put; anything else is a Hydra override of every run, and one with several values
is a further axis."""


def _submit(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from launch import commands
    from launch.arguments import read_request
    from launch.executors.base import ClusterFull, PartlyQueued

    request = read_request(parsed.settings, parsed.config_dir)
    try:
        path, unfinished = commands.submit(
            request, dry_run=parsed.dry_run, canary=parsed.canary, console=_console(), after=parsed.after
        )
    except (PartlyQueued, ClusterFull) as error:
        if parsed.when_full != "wait":
            raise
        print(f"launch: {error}", file=sys.stderr)
        path, _ = commands.submit(request, dry_run=True, canary=parsed.canary, console=Console(quiet=True))
        commands.queue_rest(path, _console(), _FULL_WAIT_S, canary=parsed.canary)
        unfinished = []
    return _wait(path) if parsed.wait and not parsed.dry_run else int(bool(unfinished))


def _wait(path: Path) -> int:
    """Show the sweep until it is over, and its verdict; the sweep itself goes on without this process."""
    from kv_align.runs.sweep_dir import SweepDirectory
    from launch.status.overview import Watcher
    from launch.status.table import watch

    try:
        over = watch(Watcher(SweepDirectory(path)), _console(), _WATCH_S)
    except KeyboardInterrupt:
        print(f"the sweep goes on without this terminal: {program('launch')} status {path}", file=sys.stderr)
        raise
    return write_report(path) or int(set(over.counts()) != {"done"})


def write_report(path: Path) -> int:
    """Write a sweep's report in a process of its own, since launch knows nothing of the analysis; returns its exit code."""
    import subprocess

    from launch.worker.code import code_root, with_code_first

    # Without -P, a folder `analysis` or a file `analysis.py` where this was called would come first.
    command = [sys.executable, "-P", "-m", "analysis", "report", str(path)]
    return subprocess.run(command, env=with_code_first(code_root()), check=False).returncode


def _plan(parsed: argparse.Namespace) -> None:
    from launch.planning.cost import estimate, print_plan
    from launch.status.lookup import open_sweep

    sweep = open_sweep(parsed.sweep)
    plan = sweep.plan()
    if plan is None:
        raise ConfigError(f"{parsed.sweep} has no frozen plan, as a plain Hydra multirun has none: see its status.")
    notes = [f"extended by seeds {', '.join(map(str, extension['seeds']))}" for extension in plan.extensions]
    print_plan(plan, sweep.path, estimate(plan.runs, sweep.path.parent.parent, 0), notes, _console())


def _status(parsed: argparse.Namespace) -> int:
    from launch.status.lookup import open_sweep, sweeps_in
    from launch.status.overview import Watcher, overview, overviews

    several = sweeps_in(parsed.sweep)
    if several:
        looks, sentences = overviews(several)
        if parsed.json:
            print(json.dumps([look.as_json() for look in looks], indent=2))
        elif looks:
            from launch.status.table import show_several

            _console().print(show_several(looks))
        for sentence in sentences:
            print(f"launch: {sentence}", file=sys.stderr)
        return 2 if sentences else 0
    sweep = open_sweep(parsed.sweep)
    if parsed.json:
        print(json.dumps(overview(sweep).as_json(), indent=2))
        return 0
    from launch.status.table import show, watch

    if parsed.watch:
        watch(Watcher(sweep), _console(), _WATCH_S)
    else:
        _console().print(show(overview(sweep)))
    return 0


def _logs(parsed: argparse.Namespace) -> None:
    from launch.executors.base import SchedulerUnavailable
    from launch.status.judgement import WAITING
    from launch.status.logs import follow, log_files
    from launch.status.lookup import find_runs, open_sweep
    from launch.status.overview import Watcher, overview

    sweep = open_sweep(parsed.sweep)
    known = {job.id: job for job in overview(sweep).jobs}
    names = find_runs(list(known), parsed.run, sweep.path)
    if len(names) > 1:
        raise ConfigError(f"{parsed.run} names {len(names)} runs, such as {names[0]} and {names[1]}: give more.")
    run = known[names[0]]

    look = Watcher(sweep)

    def over() -> bool:
        try:
            now = look()
        except SchedulerUnavailable:
            return False
        return next(job.state for job in now.jobs if job.id == run.id) not in WAITING

    files = log_files(sweep, run)
    if not files and not parsed.follow:
        raise ConfigError(f"{run.id} has printed nothing yet: it is {run.state}; --follow waits for it.")
    follow(lambda: log_files(sweep, run), sys.stdout, over if parsed.follow else None, time.sleep)


def _resume(parsed: argparse.Namespace) -> int:
    from launch import commands
    from launch.arguments import read_changes

    changes = read_changes([word for word in parsed.words if "=" in word])
    runs = [word for word in parsed.words if "=" not in word]
    return int(bool(commands.resume(parsed.sweep, parsed.retry, changes, runs, _console())))


def _cancel(parsed: argparse.Namespace) -> None:
    from launch import commands

    commands.cancel(parsed.sweep, parsed.run, _console())


def _extend(parsed: argparse.Namespace) -> int:
    from launch import commands
    from launch.arguments import read_seeds

    return int(bool(commands.extend(parsed.sweep, read_seeds(parsed.seeds), _console())))


def _console() -> Console:
    from rich.console import Console

    return Console()


_VERBS = {
    "submit": _submit,
    "plan": _plan,
    "status": _status,
    "logs": _logs,
    "resume": _resume,
    "cancel": _cancel,
    "extend": _extend,
}

if __name__ == "__main__":
    sys.exit(main())
