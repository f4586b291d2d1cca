"""python -m analysis collect | report | compare. Imports nothing heavy before it knows that it has something to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kv_align.runs.program import program

if TYPE_CHECKING:
    from analysis.report.report import Report

LEVELS = ("minimum", "ideal", "paper")
BAD_INPUT, NOT_REACHED = 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 2 bad input, 3 the required level was not reached."""
    asked = _parser().parse_args(arguments)
    from kv_align.runs.errors import ConfigError, of_the_system

    try:
        if asked.verb != "compare":
            _refuse_wrong_folder(asked.sweep)
        return {"collect": _collect, "report": _report, "compare": _compare}[asked.verb](asked)
    except ConfigError as error:
        print(f"{program('analysis')}: {error}", file=sys.stderr)
        return BAD_INPUT
    except PermissionError as error:
        print(
            f"{program('analysis')}: {error.filename} may not be written: make it writable, or copy the sweep.",
            file=sys.stderr,
        )
        return BAD_INPUT
    except (FileExistsError, NotADirectoryError) as error:
        print(
            f"{program('analysis')}: {error.filename} is a file where a folder is needed: move it away.",
            file=sys.stderr,
        )
        return BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{program('analysis')}: {of_the_system(error)}", file=sys.stderr)
        return BAD_INPUT


def _refuse_wrong_folder(sweep: Path) -> None:
    """Say what is wrong with a folder before anything heavy is imported."""
    from analysis.read.scan import runs_of_sweep
    from kv_align.runs.sweep_dir import SweepDirectory

    directory = SweepDirectory(sweep)
    if not directory.plan_file.exists():
        runs_of_sweep(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program("analysis"), description="From a folder of runs to a verdict.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    collect = verbs.add_parser("collect", help="read a sweep into tidy tables, Parquet and CSV")
    report = verbs.add_parser("report", help="test, judge and report a sweep")
    for verb in (collect, report):
        verb.add_argument("--verify", action="store_true", help="check every file of a finished run by its digest")
        verb.add_argument("sweep", type=Path, help="folder of a sweep or of a Hydra --multirun")
    report.add_argument("--criteria", type=Path, help="YAML file to judge by, instead of the plan's own criteria")
    report.add_argument("--baseline", metavar="ARM", help="arm to compare with, instead of the plan's")
    report.add_argument("--require", choices=LEVELS, help="exit 3 if this level is not reached")
    compare = verbs.add_parser("compare", help="two runs, or two arms of a sweep, in one Markdown file")
    compare.add_argument("a", metavar="A", help="a run's folder, or SWEEP:ARM, or SWEEP:ARM:LOSS")
    compare.add_argument("b", metavar="B", help="what it is compared with")
    compare.add_argument("--output", type=Path, default=Path("V4_AB_TEST_RESULTS.md"), help="default: %(default)s")
    return parser


def _collect(asked: argparse.Namespace) -> int:
    from analysis.read.collect import collect
    from analysis.read.store import write_csv

    collected = collect(asked.sweep, verify=asked.verify)
    files = write_csv(collected.data, collected.problems)
    print(f"{len(collected.runs)} runs, {collected.num_read} of them read now, in {files[0].parent}")
    if len(collected.problems):
        print(f"{len(collected.problems)} problems, named in {files[-1].with_suffix('.csv')}")
    return 0


def _report(asked: argparse.Namespace) -> int:
    from analysis.report.report import write_report
    from analysis.report.terminal import print_verdict

    report = write_report(asked.sweep, criteria_file=asked.criteria, baseline=asked.baseline, verify=asked.verify)
    print_verdict(report)
    return _required(report, asked.require)


def _required(report: Report, level: str | None) -> int:
    if level is None or report.study.verdict.reached(level):  # type: ignore[arg-type]
        return 0
    print(f"--require={level}: the {level} level was not reached.", file=sys.stderr)
    return NOT_REACHED


def _compare(asked: argparse.Namespace) -> int:
    from analysis.compare.report import write_comparison
    from kv_align.runs.errors import ConfigError

    if asked.output.suffix != ".md" or asked.output.is_dir():
        raise ConfigError(f"--output={asked.output} is not allowed: name a file that ends in .md.")
    print(write_comparison(asked.a, asked.b, asked.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
