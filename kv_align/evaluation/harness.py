"""Tasks of the Language Model Evaluation Harness (`lm-eval`) on a saved student: secondary numbers, `evaluation.lm_eval`.

The harness is an extra (`kv-align[lm_eval]`), imported only where tasks are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_align.runs.errors import ConfigError
from kv_align.runs.preemption import leave_if_asked

LOGGER = logging.getLogger(__name__)


def check_tasks(tasks: Sequence[str]) -> None:
    """Load the tasks and their data once, before anything is trained.

    Parameters
    ----------
    tasks
        Names that the harness knows, or YAML files of tasks of one's own.

    Raises
    ------
    ConfigError
        If one of them cannot be loaded.
    """
    if not tasks:
        return
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        if not Path(task).is_file() and task not in manager.all_tasks:
            raise ConfigError(
                f"evaluation.lm_eval={task} is not allowed: it is no task of the installed lm_eval and no YAML file; choose "
                "one that `lm-eval ls tasks` shows."
            )
        try:
            manager.load([task])
        except Exception as error:
            raise ConfigError(
                f"evaluation.lm_eval={task} cannot be loaded ({_one_line(error)}): see that its data can be reached, or "
                "leave it out."
            ) from None


def task_scores(tasks: Sequence[str], student: Path, device: torch.device, batch_size: int) -> dict[str, float]:
    """Do the tasks with a saved student, one after the other.

    Parameters
    ----------
    tasks
        See `check_tasks`.
    student
        The folder of the student and its tokenizer.
    device, batch_size
        Where, and how many requests at once.

    Returns
    -------
    dict
        `lm_eval_TASK_METRIC` with the harness's own value (shares from 0 to 1 for accuracies); a filter's name follows its
        metric. A task that fails is left out with a warning: the run that trained the student goes on.

    Raises
    ------
    Preempted
        If the run is asked to leave.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        leave_if_asked()
        try:
            scores |= scores_of(task, _results(task, student, device, batch_size))
        except Exception as error:
            LOGGER.warning(
                "evaluation.lm_eval=%s failed (%s): it is missing in the summary; the student in %s can be given to lm-eval "
                "by hand",
                task,
                _one_line(error),
                student,
            )
    return scores


def scores_of(task: str, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flatten what the harness found for a task; of a group, what it says of the whole.

    Parameters
    ----------
    task
        What was asked for.
    results
        By task, its numbers as `metric,filter`.
    """
    asked = {task: results[task]} if task in results else results
    scores = {}
    for name, numbers in asked.items():
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                suffix = "" if filtered == "none" else f"_{filtered}"
                scores[f"lm_eval_{name}_{metric}{suffix}"] = float(value)
    return scores


def _results(task: str, student: Path, device: torch.device, batch_size: int) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(student).to(device).eval()
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(student), batch_size=batch_size)
    result = simple_evaluate(harness, tasks=[task], bootstrap_iters=0, log_samples=False)
    return {} if result is None else result["results"]


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
