"""Tasks of lm-eval on the saved student: right numbers from local data, and nothing that ends a run which trained."""

import importlib.util
import json
import logging

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_align.config.compose import compose_config
from kv_align.config.identity import content_hash
from kv_align.evaluation import harness
from kv_align.evaluation.evaluate import Evaluator
from kv_align.evaluation.harness import check_tasks, scores_of, task_scores
from kv_align.experiment import conclusion, start
from kv_align.experiment.experiment import run as do_run
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from tests.short_runs import results, short_config

SUMS = [(a, b) for a in range(2, 8) for b in range(3, 6)]


@pytest.fixture
def task(tmp_path):
    """A task of one's own: which of four numbers is the sum?"""
    rows = [
        {"question": f"{a} + {b} =", "choices": [str(a + b + off) for off in (-2, 0, 1, 3)], "gold": 1} for a, b in SUMS
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    file = tmp_path / "sums.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(autouse=True)
def _data_sets_are_kept_here(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@torch.no_grad()
def likeliest(folder):
    """The share of sums whose right answer has the highest likelihood, by a loop over all texts."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for a, b in SUMS:
        scores = []
        for off in (-2, 0, 1, 3):
            question = tokenizer(f"{a} + {b} =", add_special_tokens=False).input_ids
            whole = tokenizer(f"{a} + {b} = {a + b + off}", add_special_tokens=False).input_ids
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[at - 1, whole[at]].item() for at in range(len(question), len(whole))))
        right += scores.index(max(scores)) == 1
    return right / len(SUMS)


def test_a_run_ends_with_the_scores_of_its_saved_student(task, tmp_path):
    config = short_config("experiment=none", "trainer.max_steps=2", f"evaluation.lm_eval=[{task}]")
    assert do_run(config, tmp_path / "run") == "finished"
    run = RunDirectory(tmp_path / "run")
    summary = json.loads(run.summary_file.read_text())
    assert summary["lm_eval_sums_acc"] == pytest.approx(likeliest(run.student))
    assert 0 < summary["lm_eval_sums_acc"] < 1
    assert do_run(short_config("experiment=none", "trainer.max_steps=2"), tmp_path / "without") == "finished"
    without = RunDirectory(tmp_path / "without")
    assert results(run) | {"summary": None} == results(without) | {"summary": None}, "no other number hangs on it"
    assert summary["overhead_s_by_part"]["harness"] > 0
    assert "lm_eval" in json.loads(run.provenance_file.read_text())["attempts"][0]["extras"]


def test_the_tasks_come_after_all_that_processes_do_together(tmp_path, monkeypatch):
    done, last = [], Evaluator.teacher_loss
    monkeypatch.setattr(Evaluator, "teacher_loss", lambda self: (done.append("teacher"), last(self))[1])
    monkeypatch.setattr(conclusion, "task_scores", lambda *_: done.append("tasks") or {"lm_eval_x_acc": 0.5})
    monkeypatch.setattr(start, "check_tasks", lambda tasks: None)
    config = short_config("experiment=none", "trainer.max_steps=1", "evaluation.lm_eval=[arc_easy]")
    assert do_run(config, tmp_path / "run") == "finished"
    assert done == ["teacher", "tasks"]
    assert json.loads(RunDirectory(tmp_path / "run").summary_file.read_text())["lm_eval_x_acc"] == 0.5


def test_a_task_of_ones_own_is_an_input_and_its_place_is_none(task, tmp_path):
    def hashed(file):
        return content_hash(compose_config(["experiment=none", f"evaluation.lm_eval={file}"])[0])

    before, moved = hashed(task), tmp_path / "moved" / "sums.yaml"
    moved.parent.mkdir()
    moved.write_text(task.read_text())
    assert hashed(moved) == before
    moved.write_text(task.read_text().replace("acc", "acc_norm"))
    assert hashed(moved) != before
    without = content_hash(compose_config(["experiment=none"])[0])
    assert content_hash(compose_config(["experiment=none", "evaluation.lm_eval=[]"])[0]) == without != before


def test_what_cannot_be_done_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^evaluation\.lm_eval=no_such_task is not allowed: it is no task of"):
        check_tasks(["no_such_task"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n")
    with pytest.raises(ConfigError, match=r"^evaluation\.lm_eval=.*broken\.yaml cannot be loaded \(Unable to find"):
        check_tasks([str(broken)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package lm_eval is not installed; install kv-align\[lm_eval\] or use"):
        compose_config(["experiment=none", "evaluation.lm_eval=[gsm8k]"])


def test_a_task_that_fails_ends_no_run_and_no_other_task(task, tmp_path, monkeypatch, caplog):
    assert do_run(short_config("experiment=none", "trainer.max_steps=1"), tmp_path / "run") == "finished"
    student, done = RunDirectory(tmp_path / "run").student, []

    def evaluate(model, tasks, **options):
        done.extend(tasks)
        if tasks == ["first"]:
            raise ValueError("no data\nand a long story")
        return {"results": {"second": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "second"}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    with caplog.at_level(logging.WARNING, harness.__name__):
        scores = task_scores(["first", "second"], student, torch.device("cpu"), 4)
    assert (scores, done) == ({"lm_eval_second_acc": 0.5}, ["first", "second"])
    assert "evaluation.lm_eval=first failed (no data): it is missing in the summary" in caplog.text


def test_a_student_that_the_harness_cannot_load_ends_no_run(task, tmp_path, caplog):
    (tmp_path / "student").mkdir()
    with caplog.at_level(logging.WARNING, harness.__name__):
        assert task_scores([str(task)], tmp_path / "student", torch.device("cpu"), 4) == {}
    assert "sums.yaml failed (" in caplog.text


def test_of_a_group_what_is_said_of_the_whole():
    results = {
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "mmlu"},
        "mmlu_law": {"acc,none": 0.5},
    }
    assert scores_of("mmlu", results) == {"lm_eval_mmlu_acc": 0.25}
    gsm8k = {"gsm8k": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2, "sample_len": 9}}
    assert scores_of("gsm8k", gsm8k) == {
        "lm_eval_gsm8k_exact_match_strict-match": 0.1,
        "lm_eval_gsm8k_exact_match_flexible-extract": 0.2,
    }
    assert scores_of("/mine/sums.yaml", {"sums": {"acc,none": 1}}) == {"lm_eval_sums_acc": 1.0}
