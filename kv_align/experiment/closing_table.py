"""The table that closes a finished run, and what it is made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_json, read_last_row

_LEARNED = (
    ("validation_perplexity", "validation perplexity", "{:.3f}"),
    ("untrained_validation_perplexity", "  of the untrained student", "{:.1f}"),
    ("teacher_validation_perplexity", "  of the teacher", "{:.3f}"),
    ("exact_match", "exact match", "{:.1%}"),
)
_INSIDE = (
    ("cosine_key", "cosine of keys, through its own aligner", "{:.3f}"),
    ("cosine_value", "cosine of values, through its own aligner", "{:.3f}"),
    ("probe_r2_key", "probe R² of keys", "{:.3f}"),
    ("probe_r2_value", "probe R² of values", "{:.3f}"),
    ("kv_grad_norm_median", "gradient from the alignment loss", "{:.2e}"),
    ("step_time_s_median", "seconds per step", "{:.3f}"),
)


def print_summary(directory: RunDirectory) -> None:
    """Print the numbers of a finished run's end on standard output."""
    summary = read_summary(directory) or {}
    table = Table(
        title=f"{summary.get('arm')}, {summary.get('loss')}, seed {summary.get('seed')}", title_justify="left"
    )
    table.add_column("")
    table.add_column(f"after {summary.get('steps')} steps", justify="right")
    terms = [(f"validation_{term}", f"{term} (validation)", "{:.4f}") for term in summary.get("terms", ())]
    for key, label, form in (*_LEARNED, *terms, *_INSIDE):
        if summary.get(key) is not None:
            table.add_row(label, form.format(summary[key]))
    table.add_row("collapsed", collapses([summary]))
    console = Console()
    console.print(table)
    console.print(f"in {directory.path}", soft_wrap=True)


def read_summary(directory: RunDirectory) -> dict[str, Any] | None:
    """Return what a run wrote at its end, its loss's `terms`, whether it is `aligned`, and the `basis` of comparisons."""
    summary = read_json(directory.summary_file)
    if summary is None:
        return None
    config, provenance = directory.read_config(), read_json(directory.provenance_file) or {}
    if not all(isinstance(summary.get(name), str) for name in ("content_hash", "arm", "loss")):
        raise ConfigError(f"{directory.summary_file} is damaged: restore it, or take its run out of the folder.")
    parts = [config.get("aligner"), config.get("data") or {}, config.get("model") or {}]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{directory.config_file} is damaged: restore it, or take its run out of the folder.")
    data = {key: value for key, value in (config.get("data") or {}).items() if key != "name"}
    basis = {
        "steps": summary.get("steps"),
        "data": provenance.get("texts_sha256") or data,  # version 0.1.0 did not record the texts
        "teacher": provenance.get("teacher_sha256") or (config.get("model") or {}).get("teacher"),
    }
    last = (read_last_row(directory.metrics_file) if directory.metrics_file.is_file() else None) or {}
    terms = [key.removeprefix("weight_") for key in last if key.startswith("weight_")]
    return {**summary, "terms": terms, "aligned": bool(config["aligner"].get("_target_")), "basis": basis}


def collapses(runs: Sequence[dict[str, Any]]) -> str:
    """Say in how many of these runs a variance collapsed."""
    number = sum(bool(each.get("collapses")) for each in runs)
    return "no" if not number else f"{number}/{len(runs)}"
