"""Finished runs of a folder side by side: `python -m kv_align.summary FOLDER`. Imports no torch.

It only shows what the runs wrote; tests of significance and verdicts are the analysis's. Runs are compared where they did
equally many steps on the same texts with the same teacher, and nowhere else.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kv_align.experiment.closing_table import collapses, read_summary
from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program
from kv_align.runs.run_dir import RunDirectory

Cell = tuple[str, str]


def collect(folder: Path) -> tuple[dict[Cell, list[dict[str, Any]]], list[str]]:
    """Return the summaries of finished runs below a folder by (arm, loss), and a line for each run without one."""
    runs: dict[str, dict[str, Any]] = {}
    others = []
    for file in sorted(folder.rglob("status.json")):
        directory = RunDirectory(file.parent)
        try:
            status, summary = directory.status(), read_summary(directory)
        except ConfigError as error:
            others.append(str(error))
            continue
        if summary is not None and status is not None and status.state == "finished":
            runs.setdefault(summary["content_hash"], summary)  # a run that was done twice counts once
        else:
            state = "unreadable" if status is None else f"{status.state} at step {status.step} {status.reason}".strip()
            others.append(f"{file.parent}: {state}")
    return _cells(list(runs.values())), others


def _cells(runs: list[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """Group runs that differ in nothing but their seed; arms of one name with several settings are told apart."""
    settings: dict[Cell, set[str]] = {}
    for run in runs:
        settings.setdefault((run["arm"], run["loss"]), set()).add(run.get("settings_hash", ""))
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for run in runs:
        arm, loss = run["arm"], run["loss"]
        mark = f"@{run.get('settings_hash', '')[:4]}" if len(settings[arm, loss]) > 1 else ""
        cells.setdefault((arm + mark, loss), []).append(run)
    return cells


def print_comparison(folder: Path, baseline: str, console: Console) -> None:
    """Print all finished runs below a folder, arm by arm, and what so many seeds cannot show.

    Parameters
    ----------
    folder
        Searched for run directories.
    baseline
        The arm that others are compared with, within each loss and paired by seed; controls, which have a loss of their
        own, are compared with it in every loss.
    console
        Where to print.
    """
    cells, others = collect(folder)
    if not cells:
        console.print(f"no finished run in {folder}")
    else:
        console.print(_outcome_table(cells, baseline))
        console.print(_inside_table(cells))
        console.print(_what_seeds_show(cells, baseline))
    for line in _apart(cells, baseline):
        console.print(f"not compared: {line}", soft_wrap=True)
    for line in others:
        console.print(f"not finished: {line}", soft_wrap=True)


def _outcome_table(cells: dict[Cell, list[dict[str, Any]]], baseline: str) -> Table:
    title = "what the students learned (mean over seeds)"
    reference = f"against {'flat' if baseline == 'baseline' else baseline[:12]}"
    table = _table(
        title,
        "seeds",
        "perplexity",
        reference,
        "better",
        "right",
        "s/step",
    )
    everyone = [run for runs in cells.values() for run in runs]
    if all({**run["basis"], "steps": 0} == {**everyone[0]["basis"], "steps": 0} for run in everyone):
        table.add_row("teacher", "", f"{everyone[0]['teacher_validation_perplexity']:.3f}")
        untrained = statistics.mean(run["untrained_validation_perplexity"] for run in everyone)
        table.add_row("untrained", "", f"{untrained:.1f}", end_section=True)
    for (arm, loss), runs in cells.items():
        references = _references(cells, baseline, loss, runs)
        differences = _paired_log_differences(runs, references) if arm != baseline else []
        change = f"{100 * (math.exp(statistics.mean(differences)) - 1):+.1f} %" if differences else ""
        wins = f"{sum(d < 0 for d in differences)}/{len(differences)}" if differences else ""
        perplexity, right = _mean(runs, "validation_perplexity", "{:.3f}"), _mean(runs, "exact_match", "{:.1%}")
        step_time_s = _mean(runs, "step_time_s_median", "{:.3f}")
        table.add_row(_label(arm, loss), str(len(runs)), perplexity, change, wins, right, step_time_s)
    return table


def _references(
    cells: dict[Cell, list[dict[str, Any]]], baseline: str, loss: str, runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The baseline's runs; controls without an aligner have losses of their own, and are compared with its `kv`."""
    control = not any(run["aligned"] for run in runs)
    wanted = "kv" if control else loss
    return [
        run for (arm, of), each in cells.items() if of == wanted and arm.partition("@")[0] == baseline for run in each
    ]


def _apart(cells: dict[Cell, list[dict[str, Any]]], baseline: str) -> list[str]:
    """A line for each arm with runs whose seed the baseline has, on another basis."""
    lines = []
    for (arm, loss), runs in cells.items():
        references = _references(cells, baseline, loss, runs)
        differing: set[str] = set()
        for run in runs:
            same_seed = [each["basis"] for each in references if each["seed"] == run["seed"]]
            if same_seed and run["basis"] not in same_seed:
                differing |= {key for key, value in run["basis"].items() if value != same_seed[0][key]}
        if differing and arm.partition("@")[0] != baseline:
            what = " and ".join(sorted(differing))
            lines.append(f"{_label(arm, loss)}: other {what} than {baseline} has with the same seed")
    return lines


def _inside_table(cells: dict[Cell, list[dict[str, Any]]]) -> Table:
    title = "what happened inside (mean over seeds; keys and values)"
    table = _table(title, "terms", "cosine", "target", "probe R²", "reach", "lost")
    for (arm, loss), runs in cells.items():
        table.add_row(
            _label(arm, loss),
            "\n".join(
                f"{term.removesuffix('_loss')} {_mean(runs, f'validation_{term}', '{:.3f}')}"
                for term in runs[0]["terms"]
            ),
            _both(runs, "cosine_{}", "{:.2f}"),
            _both(runs, "target_variance_share_{}", "{:.2g}"),
            _both(runs, "probe_r2_{}", "{:.2f}"),
            _mean(runs, "kv_grad_norm_median", "{:.2g}"),
            collapses(runs),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm, loss", overflow="fold", max_width=26)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _what_seeds_show(cells: dict[Cell, list[dict[str, Any]]], baseline: str) -> str:
    others = [(loss, runs) for (arm, loss), runs in cells.items() if arm.partition("@")[0] != baseline]
    seeds = max(
        (len(_paired_log_differences(runs, _references(cells, baseline, loss, runs))) for loss, runs in others),
        default=0,
    )
    floor = 2 / 2**seeds
    if len(others) == len(cells):
        names = ", ".join(sorted({arm for arm, _ in cells}))
        cannot = f"Nothing is compared: no arm is called {baseline}; name one with --baseline: {names}."
    elif not seeds:
        cannot = f"Nothing is compared: no other arm has a seed in common with {baseline}."
    elif floor >= 0.05:
        cannot = (
            f"{seeds} {'seed' if seeds == 1 else 'seeds'} cannot show a difference: the smallest p that a two-sided "
            f"sign-flip test of them can reach is {floor:.3g}. Six seeds can reach p < .05; eight are recommended."
        )
    else:
        cannot = (
            f"{seeds} seeds can reach p = {floor:.2g}; whether they do is for `{program('analysis')} report` to say."
        )
    return (
        f"{cannot}\n\n"
        "perplexity: on validation text, less is better. right: exact match. cosine: seen through each arm's own aligner, "
        "so it compares no arms. target: variance of the projected teacher over the raw teacher's; where it is small, so "
        "is the KV loss. probe R²: measured alike in all arms. reach: gradient norm from the alignment loss into the "
        "student. lost: runs in which a variance collapsed."
    )


def _paired_log_differences(runs: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> list[float]:
    """Differences of validation loss (log perplexity) in nats, run minus reference of the same seed and basis."""
    return [
        run["validation_loss"] - reference["validation_loss"]
        for run in runs
        for reference in references
        if reference["seed"] == run["seed"] and reference["basis"] == run["basis"]
    ]


def _mean(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = [each[key] for each in runs if each.get(key) is not None]
    return form.format(statistics.mean(values)) if values else ""


def _label(arm: str, loss: str) -> str:
    return arm if arm == loss or (arm, loss) == ("none", "ce") else f"{arm} {loss}"


def _both(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Means of keys and of values."""
    return " ".join(_mean(runs, key.format(kind), form) for kind in ("key", "value")).strip()


def main() -> None:
    """Print the runs below the folder that the command line names."""
    parser = argparse.ArgumentParser(
        program("kv_align.summary"), description="All finished runs of a folder, arm by arm."
    )
    parser.add_argument("folder", type=Path, help="a folder that holds runs, at any depth, such as outputs")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="one row for each finished run, as CSV")
    form.add_argument("--json", action="store_true", help="what each finished run wrote at its end, as JSON")
    parser.add_argument("--baseline", default="baseline", metavar="ARM", help="compared with (default: %(default)s)")
    asked = parser.parse_args()
    try:
        there = asked.folder.is_dir()
    except OSError:  # a name that is too long
        there = False
    if not there:
        print(f"kv-align: {asked.folder} is no folder: name one that holds runs, such as outputs.", file=sys.stderr)
        sys.exit(2)
    if not (asked.csv or asked.json):
        print_comparison(asked.folder, asked.baseline, Console())
        return
    runs = [run for cell in collect(asked.folder)[0].values() for run in cell]
    if asked.json:
        print(json.dumps(runs, indent=1))
        return
    simple = [{key: value for key, value in run.items() if not isinstance(value, dict | list)} for run in runs]
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(key for run in simple for key in run)))
    writer.writeheader()
    writer.writerows(simple)


if __name__ == "__main__":
    main()
