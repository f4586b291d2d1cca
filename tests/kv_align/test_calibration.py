"""What is measured before training: variances, paired states and similarities, on real models and by hand."""

from contextlib import nullcontext

import pytest
import torch

from kv_align.align.layer_time_map import LayerTimeMap
from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.config.config import Config
from kv_align.config.signals import Signals
from kv_align.data.prepared import PreparedSplit, prepare_split
from kv_align.experiment.calibration import Calibrator
from kv_align.experiment.choices import make_source
from kv_align.experiment.distiller import make_distiller
from kv_align.models.capture.prepare import record
from kv_align.models.load import LanguageModel, load_student, load_teacher
from kv_align.teacher.teacher import Teacher
from tests.short_runs import short_config

CPU = torch.device("cpu")
WARP = SegmentWarp(smoothness=0.0, ratios={})


def components(*overrides: str) -> tuple[Config, LanguageModel, LanguageModel, PreparedSplit]:
    config = short_config("model.student_start=pretrained", "evaluation.calibration_examples=5", *overrides)
    teacher, student = load_teacher(config.model, CPU), load_student(config.model, config.seed, CPU)
    train = prepare_split(make_source(config), "train", config.data, student, teacher, shuffle=False)
    return config, teacher, student, train


def calibrator(
    config: Config, teacher: LanguageModel, student: LanguageModel, train: PreparedSplit, size: int
) -> Calibrator:
    evaluation = config.evaluation.model_copy(update={"batch_size": size})
    return Calibrator(evaluation, teacher, student, train, rotated=False, autocast=nullcontext, kept=itself)


def itself(teacher: Teacher, signals: Signals) -> Teacher:
    return teacher


@pytest.fixture(scope="module")
def pretrained() -> tuple[Config, LanguageModel, LanguageModel, PreparedSplit]:
    return components()


def read(model, tokens):
    with torch.no_grad(), record() as recorder:
        output = model(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            position_ids=tokens.positions,
            use_cache=False,
            output_hidden_states=True,
        )
    return recorder, output.hidden_states


def test_variances_are_those_of_the_tokens_weighted_over_batches(pretrained) -> None:
    _, teacher, _, train = pretrained
    layers = [5, 0, 5]
    reader = Teacher(teacher.model, layers, rotated=False)
    measured = calibrator(*pretrained, size=2)
    key, value = measured.key_value_variance(reader, layers)
    hidden = measured.hidden_variance(reader, layers)
    expected: dict[str, list[torch.Tensor]] = {"k": [], "v": [], "h": []}
    counts: dict[str, list[int]] = {"k": [], "v": [], "h": []}
    for places in ([0, 1], [2, 3], [4]):
        tokens = train.collate(places).teacher
        recorder, hidden_states = read(teacher.model, tokens)
        for kind, states in (
            ("k", recorder.keys(rotated=False)[:, layers]),
            ("v", recorder.values()[:, layers]),
            ("h", torch.stack([hidden_states[layer + 1] for layer in layers], dim=1)[:, :, None]),
        ):
            mask = tokens.mask & (tokens.positions > 0) if kind == "h" else tokens.mask
            counts[kind].append(int(mask.sum()))
            valid = states.permute(0, 3, 1, 2, 4)[mask].double()
            expected[kind].append(valid.var(dim=0, unbiased=False).mean(dim=(1, 2)))
    for found, kind in ((key, "k"), (value, "v"), (hidden, "h")):
        by_hand = sum(n * each for n, each in zip(counts[kind], expected[kind], strict=True)) / sum(counts[kind])
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=1e-6)
        assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("overrides", [(), ("data.rationale=short",)], ids=["same time", "warped"])
def test_pairs_are_what_the_aligner_would_be_given_and_the_student_as_it_is(overrides) -> None:
    given = components(*overrides)
    _, teacher, student, train = given
    layers = [1, 3, 5]
    reader = Teacher(teacher.model, layers, rotated=False)
    layer_time_map = LayerTimeMap([0, 1, 2], WARP)
    student.model.train()
    states = calibrator(*given, size=3).paired(reader, layer_time_map, queries=True)
    assert student.model.training
    student.model.eval()
    pieces = []
    for places in ([0, 1, 2], [3, 4]):
        batch = train.collate(places)
        theirs, _ = read(teacher.model, batch.teacher)
        ours, _ = read(student.model, batch.student)
        same_time = batch.correspondence.same_time
        weights = None if same_time else WARP.matrix(batch.correspondence)
        kinds = []
        for raw, own in (
            (theirs.keys(rotated=False), ours.keys(rotated=False)),
            (theirs.values(), ours.values()),
            (theirs.queries(rotated=False), ours.queries(rotated=False)),
        ):
            placed = raw[:, layers] if weights is None else resample(raw[:, layers], weights)
            kinds += [each.permute(0, 3, 1, 2, 4)[batch.aligned] for each in (placed, own)]
        pieces.append(kinds)
    expected = [torch.cat(both) for both in zip(*pieces, strict=True)]
    found = [each for kind in ("key", "value", "query") for each in vars(states.of(kind)).values()]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert states.layer(1).key.teacher.shape == (len(states.key.teacher), 1, 4, 24)
    assert torch.equal(states.layer(1).query.student[:, 0], states.query.student[:, 1])


def test_planted_layers_are_found(pretrained) -> None:
    config, teacher, _, train = pretrained
    # The teacher as its own student: each layer is most like itself.
    student = load_teacher(config.model, CPU)
    similarity = Calibrator(
        config.evaluation, teacher, student, train, rotated=False, autocast=nullcontext, kept=itself
    ).similarity(WARP)
    assert len(similarity) == len(similarity[0]) == 6
    for layer, row in enumerate(similarity):
        assert row[layer] == pytest.approx(1.0, abs=1e-6)
        assert max(row) == row[layer]
        assert all(each < 0.999 for number, each in enumerate(row) if number != layer)


def test_a_run_uses_the_layers_that_are_most_alike(pretrained) -> None:
    _, teacher, _, train = pretrained
    config = short_config("layer_map=cka", "model.student_start=pretrained")
    student = load_teacher(config.model, CPU)  # the teacher as its own student: every layer is its own best
    distiller, _, layers = make_distiller(config, teacher, student, train, nullcontext, itself)
    assert layers == [0, 1, 2, 3, 4, 5]
    assert distiller.aligner is not None


def test_least_squares_starts_a_run_near_its_target(pretrained) -> None:
    _, teacher, student, train = pretrained
    explained = {}
    for init in ("uniform", "least_squares"):
        config = short_config(f"init={init}", "model.student_start=pretrained")
        distiller, reader, _ = make_distiller(config, teacher, student, train, nullcontext, itself)
        states = calibrator(config, teacher, student, train, 8).paired(
            reader, LayerTimeMap([0, 1, 2], WARP), queries=False
        )
        aligner = distiller.aligner
        assert aligner is not None
        with torch.no_grad():
            projected = aligner.key_map(states.key.teacher.permute(1, 2, 0, 3)[None])[0].permute(2, 0, 1, 3)
        error = (projected - states.key.student).square().sum() / states.key.student.square().sum()
        explained[init] = 1 - error.item()
    assert explained["uniform"] < 0
    assert explained["least_squares"] > 0.3


@pytest.mark.parametrize("init", ["least_squares", "procrustes", "cka_hungarian"])
def test_one_seed_gives_one_informed_start(init, pretrained) -> None:
    _, teacher, student, train = pretrained
    config = short_config(f"init={init}", "loss=kv+struct", "model.student_start=pretrained")
    before = torch.get_rng_state()
    first, second = (make_distiller(config, teacher, student, train, nullcontext, itself)[0].aligner for _ in range(2))
    assert first is not None
    assert second is not None
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert torch.equal(torch.get_rng_state(), before)
