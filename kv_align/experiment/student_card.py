"""The model card of a trained student, and its way to the hub where one is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from kv_align import __version__
from kv_align.config.compose import arm_name
from kv_align.config.config import Config, HubConfig
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory

LOGGER = logging.getLogger(__name__)


def student_card(config: Config, directory: RunDirectory, summary: dict[str, Any]) -> str:
    """Return what `student/README.md` says: what taught the student and how, what came out, and what that does not show.

    Parameters
    ----------
    config, directory
        Of the run.
    summary
        What the run measured at its end (`summary.json`).
    """
    start = config.model.student if config.model.student_start == "pretrained" else None
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if start is not None and not Path(start).exists() and start != "embedded":
        head["base_model"] = start  # a name on the hub
    head["tags"] = ["kv-align", "knowledge-distillation"]
    teacher = _shown(config.model.teacher)
    rows = [
        ("validation perplexity", f"{summary['validation_perplexity']:.3f}"),
        ("of the untrained student", f"{summary['untrained_validation_perplexity']:.3f}"),
        ("of the teacher", f"{summary['teacher_validation_perplexity']:.3f}"),
    ]
    if summary.get("exact_match") is not None:
        rows.append((f"exact match, {summary['exact_match_examples']} questions", f"{summary['exact_match']:.1%}"))
    taught = "taught by no one" if config.loss.name == "ce" else f"taught by {teacher}"
    how = {
        "arm": arm_name(config),
        "loss": config.loss.name,
        **{group: getattr(config, group).name for group in ("aligner", "init") if getattr(config, group) is not None},
        "data": config.data.name,
        "student_start": config.model.student_start,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "seed": config.seed,
        "content_hash": summary["content_hash"],
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            f"# A student {taught}",
            "",
            f"Trained by kv-align {__version__}; how exactly is in the run's `config.yaml` and `provenance.json`.",
            "",
            f"```yaml\n{yaml.safe_dump(how, sort_keys=False)}```",
            "",
            "| on the validation split | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            f"This is a single run, which shows nothing of a method. {_of_sweep(directory)}".strip(),
            "",
            "## Licence",
            "",
            f"Its weights come of {_shown(config.model.student)} ({config.model.student_start}), of the teacher "
            f"{teacher} and of the data {config.data.name}; the terms of each of them apply to what is made of it.",
            "",
        ]
    )


def push_to_hub(folder: Path, hub: HubConfig) -> None:
    """Upload a student and its card; what goes wrong is said, and ends no run that trained."""
    if hub.repo is None:
        return
    try:
        api = HfApi()
        api.create_repo(hub.repo, private=hub.private, exist_ok=True)
        api.upload_folder(repo_id=hub.repo, folder_path=folder, commit_message="Student of kv-align")
    except Exception as error:  # whatever a network or a service does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        LOGGER.warning(
            "hub.repo=%s did not get the student (%s); later: hf upload %s %s", hub.repo, reason, hub.repo, folder
        )
    else:
        LOGGER.info("hub.repo=%s holds the student and its card", hub.repo)


def _shown(model: str) -> str:
    """Name a model as others know it: a path of this machine says nothing elsewhere."""
    if model == "embedded":
        return "the embedded model of kv-align"
    return f"a local model ({Path(model).name})" if Path(model).exists() else model


def _of_sweep(directory: RunDirectory) -> str:
    """Say to which sweep the run belongs, if to one: its verdict is that sweep's."""
    sweep = SweepDirectory(directory.path.absolute().parents[1])
    plan = sweep.plan() if sweep.plan_file.exists() else None
    if plan is None:
        return ""
    return f"It belongs to the sweep {plan.name} (plan {plan.plan_hash[:12]}), whose report says what was shown."
