"""Whole runs of a few steps: every arm runs, arms differ in nothing but what they say, and every end is true."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from kv_align.align.structured import StructuredMap
from kv_align.config.compose import compose_config, compose_raw
from kv_align.config.config import PretrainConfig
from kv_align.config.schema import validate
from kv_align.data.example import Segment
from kv_align.data.prepared import prepare_split
from kv_align.experiment.choices import make_aligner, make_source
from kv_align.experiment.experiment import run as do_run
from kv_align.experiment.start import start
from kv_align.models.capture.prepare import Geometry
from kv_align.models.load import load_teacher, weights_digest
from kv_align.runs.errors import ConfigError
from kv_align.runs.record import read_record_file
from kv_align.runs.run_dir import RunDirectory, file_digest, read_json, read_rows
from kv_align.runs.seeds import derive_seed
from kv_align.training.optimizer import make_schedule
from tests.short_runs import results, short_config

ARMS = ("baseline", "v4_0_1", "v4_0_2", "v4_0_3", "roadmap_literal")
CONTROLS = ("none", "logit_kd", "frozen_random", "shuffled_teacher", "relations", "hidden")
WITHOUT_ALIGNER = ("none", "logit_kd", "relations", "hidden")


def finish(path: Path, *overrides: str) -> RunDirectory:
    assert do_run(short_config(*overrides), path) == "finished"
    return RunDirectory(path)


def provenance(run: RunDirectory) -> dict[str, Any]:
    return json.loads(run.provenance_file.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDirectory]:
    """Does a run once for all tests that look at it; they leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")

    @cache
    def run(*overrides: str) -> RunDirectory:
        return finish(folder / str(len(list(folder.iterdir()))), *overrides)

    return run


Cell = tuple[str, tuple[str, ...]]
# Every arm, each loss with a flat and with a structured one, and every control; the other losses of the arms are `OTHERS`.
LOSSES = ("kv", "kv+struct", "kv+logit", "kv+struct+logit")
CELLS: list[Cell] = [
    *(
        (arm, (f"loss={loss}",))
        for arm, loss in zip(ARMS, ("kv", "kv+struct+logit", "kv", "kv+struct", "kv+logit"), strict=True)
    ),
    ("baseline", ("loss=kv+struct",)),
    *((control, ()) for control in CONTROLS),
]
OTHERS: list[Cell] = [cell for arm in ARMS for loss in LOSSES if (cell := (arm, (f"loss={loss}",))) not in CELLS]


def finished_cells(folder: Path, cells: list[Cell]) -> dict[str, RunDirectory]:
    """Three steps each, one seed."""
    runs = {}
    for arm, overrides in cells:
        name = " ".join([arm, *overrides])
        steps = ("trainer.max_steps=3", "trainer.warmup_steps=1", "seed=2")
        runs[name] = finish(folder / name, f"experiment={arm}", *overrides, *steps)
    return runs


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    return finished_cells(tmp_path_factory.mktemp("matrix"), CELLS)


def check_cells(runs: dict[str, RunDirectory]) -> None:
    for name, run in runs.items():
        assert run.is_complete(), name
        summary = json.loads(run.summary_file.read_text())
        assert summary["steps"] == 3
        assert 1 < summary["validation_perplexity"] < 2 * 497, name  # 497 tokens: not worse than twice guessing
        assert (run.aligner / "aligner.safetensors").exists() == (name not in WITHOUT_ALIGNER)


def test_a_finished_run_leaves_a_record_that_is_bound_to_its_files(matrix: dict[str, RunDirectory]) -> None:
    for name, run in matrix.items():
        record = read_record_file(run.record_file)
        assert record is not None, name
        for file, (size, sha256) in record.files.items():
            assert (size, sha256) == ((run.path / file).stat().st_size, file_digest(run.path / file)), (name, file)
        assert record.summary == read_json(run.summary_file)
        assert record.metrics.num_rows == len(list(read_rows(run.metrics_file)))


def test_every_cell_ends_with_sound_artefacts(matrix: dict[str, RunDirectory]) -> None:
    assert len(matrix) == 12
    check_cells(matrix)


@pytest.mark.slow
def test_every_arm_ends_with_every_loss(matrix: dict[str, RunDirectory], tmp_path: Path) -> None:
    others = finished_cells(tmp_path, OTHERS)
    assert len(others) == 14
    check_cells(others)
    found = [provenance(run) for run in (*matrix.values(), *others.values())]
    for what in ("initial_weights_sha256", "data_order_sha256", "teacher_sha256"):
        assert len({each[what] for each in found}) == 1, what
    assert all(row["kv_grad_norm"] > 0 for run in others.values() for row in read_rows(run.metrics_file))


def test_all_arms_of_a_seed_start_from_the_same_student_and_see_the_same_data(matrix: dict[str, RunDirectory]) -> None:
    found = [provenance(run) for run in matrix.values()]
    for what in ("initial_weights_sha256", "data_order_sha256", "teacher_sha256"):
        assert len({each[what] for each in found}) == 1, what


def test_the_variance_that_losses_are_divided_by_is_the_same_in_all_arms(matrix: dict[str, RunDirectory]) -> None:
    unrotated = [
        provenance(run) for name, run in matrix.items() if name not in WITHOUT_ALIGNER and "literal" not in name
    ]
    assert len({tuple(each["key_variance"]) for each in unrotated}) == 1
    assert len({tuple(each["value_variance"]) for each in unrotated}) == 1
    assert all(value > 0 for value in unrotated[0]["key_variance"])


def test_untrained_students_are_measured_alike_in_all_arms(matrix: dict[str, RunDirectory]) -> None:
    first = {name: read_rows(run.evaluations_file)[0] for name, run in matrix.items()}
    assert len({row["validation_loss"] for row in first.values()}) == 1
    assert len({tuple(row["probe_r2_key_by_layer"]) for row in first.values()}) == 1


def test_the_teacher_teaches_wherever_something_is_aligned(matrix: dict[str, RunDirectory]) -> None:
    for name, run in matrix.items():
        rows = read_rows(run.metrics_file)
        if name in ("none", "logit_kd"):
            assert all("kv_grad_norm" not in row for row in rows), name
        else:
            assert all(row["kv_grad_norm"] > 0 for row in rows), name


def test_a_student_loads_as_any_other_model(matrix: dict[str, RunDirectory]) -> None:
    run = matrix["v4_0_2 loss=kv"]
    model = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    ids = tokenizer("Mia has 3 cups.", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert "kv_align" not in (run.student / "config.json").read_text()


def test_outcomes_have_a_row_for_every_example(matrix: dict[str, RunDirectory]) -> None:
    tables = [pd.read_parquet(run.outcomes_file) for run in matrix.values()]
    for table in tables:
        by_split = table.groupby("split")
        assert by_split.size().to_dict() == {"test": 3, "validation": 8}
        assert table.loc[table["split"] == "validation", "loss_nats"].gt(0).all()
        assert table.loc[table["split"] == "test", "correct"].notna().all()
        assert table["id"].tolist() == tables[0]["id"].tolist()


def test_losses_are_those_that_transformers_computes_of_one_text_at_a_time(matrix: dict[str, RunDirectory]) -> None:
    run, config = matrix["v4_0_2 loss=kv"], short_config()
    reader = load_teacher(config.model, torch.device("cpu"))
    validation = prepare_split(make_source(config), "validation", config.data, reader, reader, shuffle=False)
    student, teacher = AutoModelForCausalLM.from_pretrained(run.student), reader.model
    nats: dict[str, list[float]] = {"student": [], "teacher": []}
    tokens = []
    for text in validation.student:
        assert text.segments.count(Segment.QUESTION) > 3
        labels = torch.tensor([text.ids]).masked_fill(torch.tensor([text.segments]) <= Segment.QUESTION, -100)
        tokens.append(int((labels != -100).sum()))
        for name, model in (("student", student), ("teacher", teacher)):
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([text.ids]), labels=labels).loss.item()
            nats[name].append(mean * tokens[-1])
    table = pd.read_parquet(run.outcomes_file).query("split == 'validation'").set_index("id").loc[validation.ids]
    assert table["tokens"].tolist() == tokens
    assert table["loss_nats"].tolist() == pytest.approx(nats["student"], rel=1e-4)
    summary = json.loads(run.summary_file.read_text())
    assert summary["validation_loss"] == pytest.approx(sum(nats["student"]) / sum(tokens), rel=1e-5)
    # So small that it is a difference of nearly equal numbers.
    assert summary["teacher_validation_loss"] == pytest.approx(sum(nats["teacher"]) / sum(tokens), abs=1e-5)


def test_perplexity_is_that_of_the_per_example_losses(matrix: dict[str, RunDirectory]) -> None:
    run = matrix["baseline loss=kv"]
    table = pd.read_parquet(run.outcomes_file).query("split == 'validation'")
    summary = json.loads(run.summary_file.read_text())
    assert summary["validation_loss"] == pytest.approx(table["loss_nats"].sum() / table["tokens"].sum(), rel=1e-6)
    assert summary["validation_perplexity"] == pytest.approx(
        torch.tensor(summary["validation_loss"]).exp().item(), rel=1e-6
    )


def test_with_a_weight_of_zero_an_arm_is_cross_entropy_alone(tmp_path: Path) -> None:
    plain = finish(tmp_path / "ce", "experiment=none")
    for arm in ("baseline", "v4_0_3"):
        idle = finish(tmp_path / arm, f"experiment={arm}", "loss=kv+struct", "loss.lambda_kv=0", "loss.lambda_struct=0")
        ours, theirs = load_file(idle.student / "model.safetensors"), load_file(plain.student / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), arm


def test_a_frozen_aligner_does_not_move_and_a_joint_one_does(finished: Callable[..., RunDirectory]) -> None:
    for fit, moves in (("frozen", False), ("joint", True)):
        run = finished(f"align.fit={fit}", "trainer.max_steps=3")
        start = provenance(run)["initial_aligner_sha256"]
        end = torch.nn.Module()
        for name, value in load_file(run.aligner / "aligner.safetensors").items():
            end.register_buffer(name.replace(".", "_"), value)
        again = torch.nn.Module()
        config = short_config(f"align.fit={fit}", "trainer.max_steps=3")
        aligner = make_aligner(config, Geometry(6, 8, 4, 24, 24), Geometry(3, 4, 2, 16, 16), queries=False)
        assert aligner is not None
        assert weights_digest(aligner) == start
        for name, value in aligner.state_dict().items():
            again.register_buffer(name.replace(".", "_"), value)
        assert (weights_digest(end) != weights_digest(again)) == moves, fit


@pytest.mark.parametrize("fit", ["fit_then_freeze", "alternate"])
def test_the_student_is_taught_only_in_its_own_phase(tmp_path: Path, fit: str) -> None:
    run = finish(tmp_path, f"align.fit={fit}", "align.fit_steps=2", "align.period=2")
    taught = [row["kv_grad_norm"] > 0 for row in read_rows(run.metrics_file)]
    moved = [row["aligner_grad_norm"] > 0 for row in read_rows(run.metrics_file)]
    student = (
        [False, False, True, True, True, True] if fit == "fit_then_freeze" else [False, False, True, True, False, False]
    )
    assert taught == student
    assert moved == [not each for each in student]


@pytest.mark.parametrize(
    "overrides", [(), ("adapter=lora", "model.student_start=pretrained"), ("loss=hidden",)], ids=str
)
def test_dropout_begins_with_its_own_seed_on_every_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    seeded, seed = [], torch.manual_seed  # it seeds the GPUs too, and nothing puts those back
    monkeypatch.setattr(torch, "manual_seed", lambda number: (seeded.append(number), seed(number))[1])
    run = RunDirectory(tmp_path)
    start(short_config(*overrides, "seed=4"), run, tmp_path / "checkpoints")
    dropout = provenance(run)["seeds"]["dropout"]
    assert seeded[-1] == dropout == derive_seed(4, "dropout")
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(dropout).get_state())


def test_micro_batches_change_rounding_alone(finished: Callable[..., RunDirectory]) -> None:
    whole = results(finished("loss=kv+struct"))
    parts = results(finished("loss=kv+struct", "trainer.micro_batch_size=1"))
    for one, other in zip(whole["metrics"], parts["metrics"], strict=True):
        for name in ("total_loss", "key_loss", "attention_loss", "grad_norm", "kv_grad_norm", "cosine_key"):
            assert one[name] == pytest.approx(other[name], rel=2e-3), name


def test_a_run_that_is_not_finite_ends_as_diverged_with_its_data(tmp_path: Path) -> None:
    config = short_config("trainer.lr=1e30", "trainer.warmup_steps=0")
    assert do_run(config, tmp_path) == "diverged"
    run = RunDirectory(tmp_path)
    status = run.status()
    assert status is not None
    assert status.state == "diverged"
    assert "not finite at step" in status.reason
    rows = read_rows(run.metrics_file)
    assert rows[0]["total_loss"] > 0
    assert rows[-1]["step"] == status.step + 1
    assert "kv_grad_norm" not in rows[-1]  # the step that failed has its losses, and nothing of it was applied
    assert not run.is_complete()


def test_a_directory_with_another_run_is_left_alone(finished: Callable[..., RunDirectory]) -> None:
    run = finished("experiment=none", "trainer.max_steps=3")
    before = run.summary_file.read_bytes(), run.config_file.read_bytes()
    with pytest.raises(ConfigError, match="holds another run"):
        do_run(short_config("experiment=none", "trainer.max_steps=3", "seed=9"), run.path)
    assert (run.summary_file.read_bytes(), run.config_file.read_bytes()) == before


def test_a_command_that_was_refused_can_be_corrected_under_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data"):
        do_run(short_config("trainer.max_steps=2", "data.max_length=4"), tmp_path)
    assert do_run(short_config("trainer.max_steps=2"), tmp_path) == "finished"


@pytest.mark.parametrize("rationale", ["short", "none"])
def test_a_student_that_sees_less_reasoning_is_aligned_through_the_time_warp(tmp_path: Path, rationale: str) -> None:
    run = finish(tmp_path, f"data.rationale={rationale}", "trainer.max_steps=3")
    rows = read_rows(run.metrics_file)
    assert all(row["kv_grad_norm"] > 0 for row in rows)
    table = pd.read_parquet(run.outcomes_file).query("split == 'validation'")
    assert table["tokens"].min() >= 3  # the answer is always scored


def test_gradient_checkpointing_keeps_the_numbers(finished: Callable[..., RunDirectory]) -> None:
    plain = results(finished("loss=kv+struct"))
    saved = results(finished("loss=kv+struct", "model.gradient_checkpointing=true"))
    for one, other in zip(plain["metrics"], saved["metrics"], strict=True):
        assert one["kv_grad_norm"] == pytest.approx(other["kv_grad_norm"], rel=1e-4)
        assert one["total_loss"] == pytest.approx(other["total_loss"], rel=1e-5)


def test_bf16_trains_the_same_arms(finished: Callable[..., RunDirectory]) -> None:
    run = finished("loss=kv+struct", "trainer.mixed_precision=bf16")
    exact = finished("loss=kv+struct")
    for one, other in zip(read_rows(run.metrics_file), read_rows(exact.metrics_file), strict=True):
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=0.02)
        assert one["kv_grad_norm"] > 0
    weights = load_file(run.student / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_pretrained_start_is_the_embedded_students(finished: Callable[..., RunDirectory]) -> None:
    scratch = finished("align.fit=joint", "trainer.max_steps=3")
    pretrained = finished("trainer.max_steps=3", "model.student_start=pretrained")
    untrained = [read_rows(run.evaluations_file)[0]["validation_perplexity"] for run in (scratch, pretrained)]
    assert untrained[0] > 400
    assert untrained[1] < 0.5 * untrained[0]


def test_a_tracker_gets_the_numbers_of_the_metrics_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finish(tmp_path, "trainer.tracker=tensorboard", "trainer.max_steps=3")
    (events,) = (tmp_path / "kv-align").glob("events.*")
    seen = EventAccumulator(str(events)).Reload()
    tracked = {event.step: event.value for event in seen.Scalars("total_loss")}
    assert tracked == pytest.approx({row["step"]: row["total_loss"] for row in read_rows(run.metrics_file)}, rel=1e-6)


def test_two_trackers_at_once_write_into_their_own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    store = (tmp_path / "mlflow").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = finish(tmp_path / "run", "trainer.tracker=[mlflow,wandb]", "trainer.max_steps=3")
    rows = read_rows(run.metrics_file)
    client = MlflowClient(store)
    (seen,) = client.search_runs([client.get_experiment_by_name("kv-align").experiment_id])
    assert {each.step: each.value for each in client.get_metric_history(seen.info.run_id, "total_loss")} == {
        row["step"]: row["total_loss"] for row in rows
    }
    assert (seen.data.params["seed"], seen.data.params["trainer.max_steps"]) == ("0", "3")
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 1000


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = finish(tmp_path, "trainer.tracker=[mlflow,tensorboard]", "trainer.max_steps=3")
    assert "trainer.tracker=mlflow gets nothing more, and the run goes on" in caplog.text
    assert len(read_rows(run.metrics_file)) == 3
    assert list((tmp_path / "kv-align").glob("events.*"))


def test_a_kill_during_the_last_evaluation_does_not_repeat_its_row(
    finished: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    whole = finished("experiment=none", "trainer.max_steps=3")
    before, run = results(whole), RunDirectory(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    run.summary_file.unlink()  # as if killed between the last evaluation's row and the summary
    assert do_run(short_config("experiment=none", "trainer.max_steps=3"), run.path) == "finished"
    assert results(run) == before
    assert [row["step"] for row in read_rows(run.evaluations_file)] == [0, 3]


def test_a_bf16_teacher_teaches_a_float32_student(finished: Callable[..., RunDirectory]) -> None:
    half = finished("loss=kv+struct", "model.teacher_dtype=bfloat16")
    exact = finished("loss=kv+struct")
    for one, other in zip(read_rows(half.metrics_file), read_rows(exact.metrics_file), strict=True):
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=5e-3)
        assert one["kv_loss"] == pytest.approx(other["kv_loss"], rel=5e-2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1.0, 2.0, 1.7071067811865475, 1.0, 0.2928932188134524]),
    ],
)
def test_the_rate_rises_and_falls_as_its_schedule_says(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    run = finish(tmp_path, "experiment=none", f"trainer.lr_schedule={schedule}", "trainer.lr=2e-3")
    rates = [1000 * row["lr"] for row in read_rows(run.metrics_file)]
    assert rates == pytest.approx([0.0, *expected])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(6, 2), (100, 0), (97, 13)])
def test_rates_are_those_of_the_librarys_schedules(schedule: str, steps: int, warmup: int) -> None:
    trainer = short_config(f"trainer.lr_schedule={schedule}").trainer.model_copy(update={"warmup_steps": warmup})

    def rates(make: Callable[[Optimizer], LRScheduler]) -> list[float]:
        optimizer = AdamW([torch.nn.Parameter(torch.ones(1))], lr=5e-5)
        made, found = make(optimizer), []
        for _ in range(steps + 1):
            found += made.get_last_lr()
            optimizer.step()
            made.step()
        return found

    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, warmup, num_training_steps=steps))
    assert rates(lambda optimizer: make_schedule(optimizer, trainer, steps)) == theirs


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.hub_name=openai/gsm8k cannot be loaded \(Couldn't reach 'openai"):
        do_run(compose_config(["data=gsm8k", "experiment=none"])[0], tmp_path)
    status = RunDirectory(tmp_path).status()
    assert status is not None
    assert status.state == "failed"


def test_what_the_limit_takes_from_each_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few, long = "How many pens?", "How many pens and eggs? " * 10
    texts = {"train": [few] * 4, "validation": [few] * 3, "test": [few, few, long]}
    for split, prompts in texts.items():
        rows = [{"prompt": prompt, "completion": "There are 3.\n#### 3"} for prompt in prompts]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("data.prompt_column=prompt", "data.completion_column=completion", "data.train_examples=null")
    config = short_config("data=text", f"data.path={tmp_path}", *columns, "data.max_length=48")
    with caplog.at_level("INFO"):
        start(config, RunDirectory(tmp_path / "text"), tmp_path / "checkpoints")
    said = [record.getMessage() for record in caplog.records if "data.max_length" in record.getMessage()]
    assert said == ["data.max_length=48: of 3 test texts 0 are cut, 0 as the teacher reads them, and 1 left out"]

    caplog.clear()
    problems = ("data.rationale=short", "data.min_steps=5", "data.max_steps=5", "data.max_length=96")
    run = RunDirectory(tmp_path / "short")
    with caplog.at_level("INFO"):
        start(short_config(*problems), run, tmp_path / "checkpoints")
    said = [record.getMessage() for record in caplog.records if "data.max_length" in record.getMessage()]
    assert said == [
        f"data.max_length=96: of {count} {split} texts 0 are cut, {count} as the teacher reads them, and 0 left out"
        for split, count in (("train", 32), ("validation", 8), ("test", 8))
    ]
    facts = provenance(run)["examples"]
    assert facts["train"] == {"used": 32, "cut": 0, "cut_for_teacher": 32, "left_out": 0}


def test_the_recipe_reads_real_text_too() -> None:
    recipe = validate(PretrainConfig, compose_raw(["data=gsm8k"], config_name="pretrain"))
    assert recipe.data.options == {
        **{"path": "", "hub_name": "openai/gsm8k"},
        **{"validation_examples": 512, "train_examples": None},
    }
    assert validate(PretrainConfig, compose_raw([], config_name="pretrain")).data.options["train_examples"] == 40000


def test_what_finds_no_room_in_memory_is_named_with_its_options(tmp_path: Path) -> None:
    sentence = (
        r"^flat is not allowed with mlp_ratio=1000000000000\.0: what it makes finds no room in memory; make it smaller"
    )
    with pytest.raises(ConfigError, match=sentence):
        do_run(short_config("aligner=flat", "aligner.mlp_ratio=1e12"), tmp_path / "run")


def test_a_map_that_gives_other_shapes_than_the_students_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broadcasting would compare one head with all of the student's, and train to the end."""
    forward = StructuredMap.forward
    monkeypatch.setattr(StructuredMap, "forward", lambda self, states: forward(self, states)[:, :, :1])
    with pytest.raises(
        ConfigError, match=r"^the aligner gives k of the shape \[\d+, 3, 1, \d+, 16\] where the student's"
    ):
        do_run(short_config(), tmp_path / "run")
