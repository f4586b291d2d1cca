"""The one training step on tiny models: who is computed, who learns, and that the shares of micro-batches add up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kv_align.align.aligner import Aligner, map_generator
from kv_align.align.flat import FlatMap
from kv_align.align.head_map import HeadMap, MapInit, MapShape
from kv_align.align.init.fixed import uniform
from kv_align.align.layer_map.fixed import proportional
from kv_align.align.layer_time_map import LayerTimeMap
from kv_align.align.schedule import Phase, phase_at
from kv_align.align.structured import StructuredMap
from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.config.config import AlignConfig, ModelConfig
from kv_align.config.signals import KEYS_VALUES, KEYS_VALUES_QUERIES
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.batch import Batch, Collator
from kv_align.data.encode import Encoded, encode
from kv_align.losses.base import Loss, Pairing
from kv_align.losses.ce import CrossEntropy
from kv_align.losses.comparison import AttentionComparison, StateComparison
from kv_align.losses.hidden import Hidden
from kv_align.losses.kv import KeyValue, KeyValueStruct
from kv_align.losses.logit_kd import LogitDistillation
from kv_align.losses.relations import Relations
from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.prepare import Geometry, prepare, record
from kv_align.models.load import LanguageModel, load_teacher
from kv_align.teacher.teacher import Teacher, TeacherStates
from kv_align.training.step import Counts, Distiller, StepResult
from tests.tiny import make_llama

JOINT, STUDENT_ALONE, ALIGNER_ALONE = Phase(True, True), Phase(True, False), Phase(False, True)
KV = {"lambda_kv": 0.5, "lambda_kv_decay": "constant", "lambda_kv_warmup_steps": 0}
STRUCT = {
    "lambda_struct": 0.1,
    "lambda_struct_decay": "constant",
    "lambda_struct_warmup_steps": 0,
    "alpha_k": 1.0,
    "alpha_v": 1.0,
    "alpha_attn": 0.5,
    "temperature": 2.0,
}


def pairing() -> Pairing:
    """Of `make_teacher` and `make_student`."""
    shapes = Geometry(4, 4, 4, 8, 8), Geometry(3, 4, 2, 12, 12)
    return Pairing(*shapes, 40, 32, lambda: torch.tensor([0.5, 1.0, 2.0]), torch.Generator().manual_seed(0), 64)


OBJECTIVES: dict[str, Loss] = {
    "ce": CrossEntropy(),
    "logit_kd": LogitDistillation(pairing(), lambda_logit=0.5, temperature=2.0),
    "logit_kd-top": LogitDistillation(pairing(), lambda_logit=0.5, temperature=2.0, top_k=5),
    "kv": KeyValue(metric="mse", **KV),
    "kv-cosine": KeyValue(metric="cosine", **KV),
    "kv+struct": KeyValueStruct(metric="mse", **KV, **STRUCT),
    "relations": Relations(pairing(), lambda_relations=0.5, relation_heads=4, layers=[0, 2]),
}
MAPS = {
    "flat": (FlatMap, {"mlp_ratio": 1.0, "share_layers": False, "elastic": False}),
    "structured": (StructuredMap, {"share_dim_proj": True, "share_layers": False, "elastic": False}),
}
GEOMETRY_FIELDS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "head_dim")
NAMES = [*OBJECTIVES, "hidden"]
every_loss = pytest.mark.parametrize("name", NAMES)
every_map = pytest.mark.parametrize("kind", MAPS)


def make_teacher(seed: int = 11, **shape: int) -> PreTrainedModel:
    model = make_llama(
        seed=seed, **({"hidden_size": 40, "num_layers": 4, "num_key_value_heads": 4, "head_dim": 8} | shape)
    )
    return model.requires_grad_(False)


def make_student(seed: int = 12, **shape: int) -> PreTrainedModel:
    return make_llama(seed=seed, **shape)


@dataclass
class Rig:
    """A teacher and a distiller that fit each other."""

    teacher: Teacher
    distiller: Distiller
    layers: list[int]

    def step(self, batch: Batch, counts: Counts | None = None, phase: Phase = JOINT) -> StepResult:
        loss = self.distiller.loss
        states = self.teacher.read(batch, loss.requests)
        return self.distiller(batch, states, counts or Counts.of([batch]), loss.weights(0, 1), phase)

    def gradients(self, batches: Sequence[Batch], phase: Phase = JOINT) -> dict[str, Tensor]:
        """Of the whole optimizer step's total, by parameter; zeros where there is none."""
        self.distiller.zero_grad()
        counts = Counts.of(batches)
        for batch in batches:
            self.step(batch, counts, phase).total.backward()
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in self.distiller.named_parameters()
        }


def make_rig(
    name: str,
    *,
    kind: str = "structured",
    rotated: bool = False,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
) -> Rig:
    teacher, student = teacher or make_teacher(), student or make_student()
    # It learns a projection: each rig has its own.
    loss = Hidden(pairing(), lambda_hidden=0.5, layers=None) if name == "hidden" else OBJECTIVES[name]
    t, s = (Geometry(*(getattr(model.config, field) for field in GEOMETRY_FIELDS)) for model in (teacher, student))
    layers = proportional(t.num_layers, s.num_layers, 0)
    aligner, layer_time_map = None, None
    aligned = {name for signal in loss.requests if signal.through_aligner for name in signal.fields}
    if any(signal.concerns and not signal.through_aligner for signal in loss.requests):
        layer_time_map = LayerTimeMap([0, 1, 2], SegmentWarp(smoothness=0.0, ratios={}))
    if aligned:
        places = {layer: place for place, layer in enumerate(sorted(set(layers)))}

        def make_map(what: str, heads_in: int, heads_out: int) -> HeadMap:
            shape = MapShape(s.num_layers, heads_in, t.key_width, heads_out, s.key_width)
            start = MapInit(uniform, map_generator(0, f"{what} mix"), map_generator(0, f"{what} width"))
            map_class, options = MAPS[kind]
            return map_class(shape, start, **options)

        aligner = Aligner(
            [places[layer] for layer in layers],
            SegmentWarp(smoothness=0.0, ratios={}),
            make_map("key", t.num_key_value_heads, s.num_key_value_heads),
            make_map("value", t.num_key_value_heads, s.num_key_value_heads),
            make_map("query", t.num_query_heads, s.num_query_heads) if "q" in aligned else None,
        )
    variances = torch.linspace(0.5, 2.0, s.num_layers), torch.linspace(1.0, 3.0, s.num_layers)
    distiller = Distiller(
        student,
        aligner,
        loss,
        rotated=rotated,
        key_variance=variances[0],
        value_variance=variances[1],
        layer_time_map=layer_time_map,
    )
    return Rig(Teacher(teacher, layers, rotated=rotated), distiller, layers)


def text(seed: int, question: int, reasoning: int, answer: int) -> Encoded:
    count = question + reasoning + answer
    ids = torch.randint(2, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, [1] * question + [2] * reasoning + [3] * answer, cut=False)


TEXTS = [text(0, 3, 4, 2), text(1, 2, 7, 1), text(2, 4, 1, 1), text(3, 1, 2, 2)]
# What the student is shown of the same texts: reasoning shortened, and left out in one.
SHORT = [
    Encoded(full.ids[:-cut] if cut else full.ids, full.segments[:question] + kept, cut=False)
    for full, question, cut, kept in zip(
        TEXTS, (3, 2, 4, 1), (2, 4, 1, 0), ([2] * 2 + [3] * 2, [2] * 3 + [3], [3], [2, 2, 3, 3]), strict=True
    )
]


def collator(student: list[Encoded] = TEXTS, teacher: list[Encoded] = TEXTS, *, shuffle: bool = False) -> Collator:
    return Collator(student, teacher, student_pad_id=0, teacher_pad_id=1, shuffle_teacher=shuffle)


BATCH = collator()([0, 1, 2, 3])


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.norm().clamp(min=1e-6)
        assert (found[name] - gradient).norm() / scale < 1e-4, name


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[3], [0, 1, 2]], [[0], [1], [2], [3]]], ids=["2+2", "1+3", "4x1"])
@pytest.mark.parametrize(
    ("name", "student"),
    # Logits are compared token by token, of one text alone.
    [*((name, TEXTS) for name in NAMES), *((name, SHORT) for name in NAMES if not name.startswith("logit_kd"))],
    ids=[*NAMES, *(f"{name}-short" for name in NAMES if not name.startswith("logit_kd"))],
)
def test_micro_batches_add_up_to_the_gradient_of_one_batch(name, split, student):
    rig, collate = make_rig(name), collator(student, TEXTS)
    whole = collate([0, 1, 2, 3])
    micro = [collate(places) for places in split]
    assert len({batch.student.ids.shape[1] for batch in micro}) > 1  # padded to different lengths
    expected = rig.gradients([whole])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_same_gradients(rig.gradients(micro), expected)
    counts = Counts.of(micro)
    shares = [rig.step(batch, counts).losses for batch in micro]
    for loss, value in rig.step(whole).losses.items():
        assert sum(share[loss] for share in shares).item() == pytest.approx(value.item(), rel=1e-5), loss


def test_counts_by_hand():
    # Reasoning and answer are scored; every token of a segment that the teacher has too is aligned.
    assert Counts.of([BATCH]) == Counts(scored=6 + 8 + 2 + 4, aligned=9 + 10 + 6 + 5)
    # The second text's teacher lacks reasoning: its seven tokens of it have no target.
    lacking = [TEXTS[0], Encoded([5, 6, 7], [1, 1, 3], cut=False), *TEXTS[2:]]
    assert Counts.of([collator(TEXTS, lacking)([0, 1]), collator(TEXTS, lacking)([2])]) == Counts(16, 9 + 3 + 6)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["kv", "kv-cosine", "kv+struct"])
def test_the_alignment_moves_whom_the_phase_says(name, kind):
    rig = make_rig(name, kind=kind)
    student = dict(rig.distiller.student.named_parameters())
    aligner = dict(rig.distiller.aligner.named_parameters())

    def gradients(phase: Phase) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        found = []
        for parameters in (student, aligner):
            alignment = rig.step(BATCH, phase=phase).alignment
            grads = torch.autograd.grad(alignment, list(parameters.values()), allow_unused=True)
            found.append(dict(zip(parameters, grads, strict=True)))
        return tuple(found)

    student_joint, aligner_joint = gradients(JOINT)
    # Keys and values of all layers; what stands above the last attention is not concerned.
    above = ("layers.2.self_attn.o_proj", "layers.2.mlp", "layers.2.post", "model.norm", "lm_head")
    unqueried = () if name == "kv+struct" else ("layers.2.self_attn.q_proj",)
    for parameter, gradient in student_joint.items():
        reached = not any(part in parameter for part in (*above, *unqueried))
        assert (gradient is not None and gradient.abs().max() > 0) == reached, parameter
    assert all(gradient.abs().max() > 0 for gradient in aligner_joint.values())

    student_alone, nothing = gradients(STUDENT_ALONE)
    assert all(gradient is None for gradient in nothing.values())
    for parameter, gradient in student_alone.items():
        assert (gradient is None) == (student_joint[parameter] is None)
        assert gradient is None or torch.equal(gradient, student_joint[parameter])

    nothing, aligner_alone = gradients(ALIGNER_ALONE)
    assert all(gradient is None for gradient in nothing.values())
    for parameter, gradient in aligner_alone.items():
        assert torch.equal(gradient, aligner_joint[parameter])


@pytest.mark.parametrize("name", ["kv", "kv+struct"])
def test_while_the_aligner_is_fitted_the_student_learns_from_the_cross_entropy_alone(name):
    rig, plain = make_rig(name), make_rig("ce")
    assert rig.distiller.student is not plain.distiller.student
    expected = plain.gradients([BATCH])
    found = rig.gradients([BATCH], ALIGNER_ALONE)
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter
    joint = rig.gradients([BATCH], JOINT)
    assert not torch.equal(joint["student.model.embed_tokens.weight"], expected["student.model.embed_tokens.weight"])


def test_phases_by_hand():
    def phases(fit: str, **settings: int) -> list[Phase]:
        align = AlignConfig(**({"fit": fit, "fit_steps": None, "period": None} | settings))
        return [phase_at(step, align) for step in range(5)]

    assert phases("joint") == [JOINT] * 5
    assert phases("frozen") == [STUDENT_ALONE] * 5
    assert phases("fit_then_freeze", fit_steps=2) == [ALIGNER_ALONE] * 2 + [STUDENT_ALONE] * 3
    assert phases("alternate", period=2) == [ALIGNER_ALONE] * 2 + [STUDENT_ALONE] * 2 + [ALIGNER_ALONE]
    assert phase_at(3, None) == JOINT


@every_loss
def test_the_teacher_gets_no_gradient(name):
    teacher = make_teacher().requires_grad_(True)  # even if somebody forgot to freeze it
    rig = make_rig(name, teacher=teacher)
    states = rig.teacher.read(BATCH, rig.distiller.loss.requests)
    assert not any(each.requires_grad for each in states.tensors.values())
    rig.gradients([BATCH])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not set(teacher.parameters()) & set(rig.distiller.parameters())


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    """The teacher that comes with the package."""
    config = ModelConfig(
        name="embedded",
        teacher="embedded",
        student="embedded",
        student_start="scratch",
        teacher_dtype="float32",
        gradient_checkpointing=False,
        remote_code=[],
    )
    return load_teacher(config, torch.device("cpu"))


def test_a_loaded_teacher_is_frozen(embedded):
    model = embedded.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert embedded.geometry == Geometry(*(getattr(model.config, field) for field in GEOMETRY_FIELDS))


def calls_of(model: PreTrainedModel) -> list[str]:
    """Notes the modules that finish a forward pass, by path."""
    calls: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, ___, path=path: calls.append(path))
    return calls


@every_loss
def test_of_the_teacher_only_what_the_objective_needs_is_computed(name):
    teacher = make_teacher()
    rig = make_rig(name, teacher=teacher)
    assert rig.layers == [1, 2, 3]
    assert rig.teacher.head is not None  # it is looked for once, on two tokens
    calls = calls_of(teacher)
    result = rig.step(BATCH)
    result.total.backward()
    mlps = [f"model.layers.{layer}.mlp" for layer in range(4)]
    if name == "ce":
        assert calls == []
        assert rig.teacher.read(BATCH, ()) == TeacherStates()
        assert result.comparison.parts == ()
    elif name.startswith("logit_kd"):
        assert "model.norm" in calls
        assert [path for path in calls if path in mlps] == mlps
    elif name == "hidden":
        assert "lm_head" not in calls
        assert "model.norm" in calls
    else:
        # Nothing above the attention of the last layer that is wanted.
        assert [path for path in calls if path in mlps] == mlps[:3]
        assert "lm_head" not in calls
        below = Teacher(teacher, [0, 0], rotated=False)
        calls.clear()
        states = below.read(BATCH, (KEYS_VALUES,))
        assert states["k"].shape[1] == 1
        assert not [path for path in calls if path.startswith("model.layers.1") or path in mlps]


@pytest.mark.parametrize("name", ["kv", "kv-cosine"])
def test_kv_asks_for_no_queries(name):
    rig = make_rig(name)
    states = rig.teacher.read(BATCH, rig.distiller.loss.requests)
    assert set(states.tensors) == {"k", "v"}
    comparison = rig.step(BATCH).comparison
    assert [type(part) for part in comparison.parts] == [StateComparison]
    compared = comparison.of(StateComparison)
    assert compared.student.q is None
    assert compared.target.q is None
    with pytest.raises(LookupError, match="there is no AttentionComparison: the loss names no signal that gives it"):
        comparison.of(AttentionComparison)
    assert make_rig("kv+struct").teacher.read(BATCH, (KEYS_VALUES_QUERIES,))["q"].shape == (4, 3, 4, 10, 8)


def test_the_total_is_the_task_and_the_weighted_terms():
    rig = make_rig("kv+struct")
    result = rig.step(BATCH)
    losses = {name: loss.item() for name, loss in result.losses.items()}
    assert losses["kv_loss"] == pytest.approx(losses["key_loss"] + losses["value_loss"])
    struct = losses["struct_key_loss"] + losses["struct_value_loss"] + 0.5 * losses["attention_loss"]
    assert losses["struct_loss"] == pytest.approx(struct)
    alignment = 0.5 * losses["kv_loss"] + 0.1 * losses["struct_loss"]
    assert result.alignment.item() == pytest.approx(alignment)
    assert result.total.item() == pytest.approx(losses["task_loss"] + alignment) == pytest.approx(losses["total_loss"])
    assert min(losses.values()) > 0.02
    assert not any(loss.requires_grad for loss in result.losses.values())
    weighted = rig.distiller(
        BATCH,
        rig.teacher.read(BATCH, (KEYS_VALUES_QUERIES,)),
        Counts.of([BATCH]),
        {"kv_loss": 0.0, "struct_loss": 2.0},
        JOINT,
    )
    assert weighted.total.item() == pytest.approx(losses["task_loss"] + 2 * losses["struct_loss"])


def test_the_task_loss_is_the_librarys_causal_one():
    rig = make_rig("ce")
    tokens = BATCH.student
    labels = tokens.ids.masked_fill(~BATCH.scored, -100)
    expected = rig.distiller.student(
        input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=tokens.positions, labels=labels
    ).loss
    assert rig.step(BATCH).losses["task_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rotated", [False, True], ids=["unrotated", "rotated"])
@every_map
def test_what_is_compared_is_recorded_and_projected_as_keys_says(kind, rotated):
    rig = make_rig("kv+struct", kind=kind, rotated=rotated)
    student, aligner = rig.distiller.student, rig.distiller.aligner
    tokens = BATCH.student
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "position_ids": tokens.positions}
    with torch.no_grad():
        comparison = rig.step(BATCH).comparison
        with record() as ours:
            student(**inputs, use_cache=False)
        with record([1, 2, 3]) as theirs:
            rig.teacher.model(**inputs, use_cache=False)
        k = aligner.key_map(theirs.keys(rotated=rotated))
        q = aligner.query_map(theirs.queries(rotated=rotated))
    compared, attention = comparison.of(StateComparison), comparison.of(AttentionComparison)
    assert torch.equal(compared.student.k, ours.keys(rotated=rotated))
    assert torch.equal(compared.student.v, ours.values())
    assert torch.equal(compared.student.q, ours.queries(rotated=rotated))
    assert torch.equal(compared.target.k, k)
    assert torch.equal(compared.target.v, aligner.value_map(theirs.values()))
    assert torch.equal(compared.target.q, q)
    # Attention always compares rotated states; what was mapped before its rotation is rotated as the student does.
    assert torch.equal(attention.student_q, ours.queries(rotated=True))
    assert torch.equal(attention.student_k, ours.keys(rotated=True))
    rotation = ours.layers[0].rotation
    for found, expected in zip((attention.target_q, attention.target_k), (q, k), strict=True):
        for layer in range(3):
            turned = expected[:, layer] if rotated else rotation.rotate(expected[:, layer])
            assert torch.equal(found[:, layer], turned)
    assert attention.forms == (AttentionSpec(scaling=12**-0.5),) * 3


def test_the_compared_attention_is_the_one_the_student_computes():
    rig = make_rig("kv+struct")
    tokens = BATCH.student
    with torch.no_grad():
        attention = rig.step(BATCH).comparison.of(AttentionComparison)
        q, k = attention.student_q, attention.student_k
        eager = make_student()
        eager.set_attn_implementation("eager")
        weights = eager(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            position_ids=tokens.positions,
            output_attentions=True,
            use_cache=False,
        ).attentions
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    allowed = causal & tokens.mask[:, None, None, :]
    for layer in range(3):
        scores = q[:, layer] @ k[:, layer].repeat_interleave(2, dim=1).transpose(-1, -2) * 12**-0.5
        ours = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        valid = tokens.mask[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[valid], weights[layer][valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rotated", [False, True], ids=["unrotated", "rotated"])
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(rotated):
    rig = make_rig("kv+struct", rotated=rotated, teacher=make_student().requires_grad_(False), student=make_student())
    with torch.no_grad():
        aligner = rig.distiller.aligner
        for head_map in (aligner.key_map, aligner.value_map, aligner.query_map):
            assert torch.equal(head_map.mix, torch.eye(head_map.mix.shape[1]).expand_as(head_map.mix))
            head_map.width.copy_(torch.eye(12).expand_as(head_map.width))
    result = rig.step(BATCH)
    attention = result.comparison.of(AttentionComparison)
    torch.testing.assert_close(attention.target_q, attention.student_q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.target_k, attention.student_k, atol=1e-5, rtol=1e-5)
    parts = ("key_loss", "value_loss", "struct_key_loss", "struct_value_loss", "attention_loss")
    assert {name: result.losses[name].item() for name in parts} == pytest.approx(dict.fromkeys(parts, 0.0), abs=1e-5)
    # Another teacher, through the same maps, leaves something.
    other = make_student(seed=13).requires_grad_(False)
    rig.teacher = Teacher(other, rig.layers, rotated=rotated)
    assert min(rig.step(BATCH).losses[name].item() for name in parts) > 0.02


def test_the_shuffled_teacher_changes_the_targets_and_nothing_else():
    # Texts of one layout, so that a target can be followed to the text that it was made of.
    texts = [text(seed, 3, 4, 2) for seed in range(4)]
    rig = make_rig("kv+struct")
    plain, shuffled = (collator(texts, texts, shuffle=on)([0, 1, 2, 3]) for on in (False, True))
    assert torch.equal(shuffled.teacher.ids, plain.teacher.ids[[1, 2, 3, 0]])
    for field in ("ids", "mask", "positions", "segments"):
        assert torch.equal(getattr(shuffled.student, field), getattr(plain.student, field))
    with torch.no_grad():
        ours, theirs = rig.step(shuffled), rig.step(plain)
    a, b = ours.comparison, theirs.comparison
    assert torch.equal(a.predictions.states, b.predictions.states)
    assert torch.equal(a.aligned, b.aligned)
    a, b = a.of(StateComparison), b.of(StateComparison)
    for field in ("key_variance", "value_variance"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    for kind in ("k", "v", "q"):
        assert torch.equal(getattr(a.student, kind), getattr(b.student, kind))
        target, matched = getattr(a.target, kind), getattr(b.target, kind)
        torch.testing.assert_close(target, matched[[1, 2, 3, 0]], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(target, matched, atol=0.1)
    assert ours.losses["task_loss"] == theirs.losses["task_loss"]
    assert ours.losses["key_loss"] != theirs.losses["key_loss"]


@every_map
def test_more_student_layers_than_teacher_layers(kind):
    rig = make_rig("kv+struct", kind=kind, teacher=make_teacher(num_layers=2), student=make_student(num_layers=5))
    assert rig.layers == [0, 0, 1, 1, 1]
    result = rig.step(BATCH)
    compared = result.comparison.of(StateComparison)
    assert compared.target.k.shape == compared.student.k.shape == (4, 5, 2, 10, 12)
    states = rig.teacher.read(BATCH, (KEYS_VALUES,))
    assert states["k"].shape[1] == 2  # each teacher layer once
    torch.testing.assert_close(compared.target.k, rig.distiller.aligner.key_map(states["k"][:, [0, 0, 1, 1, 1]]))
    for name, parameter in rig.distiller.aligner.named_parameters():
        (gradient,) = torch.autograd.grad(result.alignment, [parameter], retain_graph=True)
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all(), name


@pytest.mark.parametrize("rationale", ["short", "none"])
@every_map
def test_a_shortened_rationale_is_aligned_through_the_time_warp(kind, rationale, embedded):
    examples = Arithmetic(train_examples=6).examples("train")
    full = encode(examples, embedded.tokenizer, 256)
    seen = encode((example.with_rationale(rationale, 2) for example in examples), embedded.tokenizer, 256)
    pad_id = embedded.pad_id
    batch = Collator(seen, full, student_pad_id=pad_id, teacher_pad_id=pad_id)(list(range(6)))
    assert not batch.correspondence.same_time
    assert batch.student.ids.shape[1] < batch.teacher.ids.shape[1]
    rig = make_rig(
        "kv+struct", kind=kind, teacher=embedded.model, student=make_student(vocab_size=len(embedded.tokenizer))
    )
    result = rig.step(batch)
    assert result.total.isfinite()
    with torch.no_grad():
        states = rig.teacher.read(batch, (KEYS_VALUES_QUERIES,))
        weights = SegmentWarp(smoothness=0.0, ratios={}).matrix(batch.correspondence)
        expected = rig.distiller.aligner.key_map(resample(states["k"], weights))
    target = result.comparison.of(StateComparison).target
    torch.testing.assert_close(target.k, expected)
    # The question stands in both and is not resampled.
    prompt = len(seen[0].prompt)
    question = rig.distiller.aligner.key_map(states["k"])[0, ..., :prompt, :]
    torch.testing.assert_close(target.k[0, ..., :prompt, :], question, atol=1e-5, rtol=1e-4)
    assert torch.equal(batch.aligned, batch.student.mask)
    gradients = rig.gradients([batch])
    assert gradients["student.model.layers.2.self_attn.k_proj.weight"].abs().max() > 0
    assert gradients["student.model.layers.0.self_attn.v_proj.weight"].abs().max() > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["kv", "kv+struct", "relations", "hidden"])
def test_gradients_of_a_checkpointed_student_are_those_of_a_plain_one(name):
    expected = make_rig(name).gradients([BATCH])
    rig = make_rig(name)
    rig.distiller.student.train().activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    assert_same_gradients(rig.gradients([BATCH]), expected)


@every_map
@every_loss
def test_a_teacher_in_bfloat16_beside_a_student_in_float32(name, kind):
    exact = make_rig(name, kind=kind).step(BATCH)
    rough = make_rig(name, kind=kind, teacher=make_teacher().bfloat16()).step(BATCH)
    assert rough.total.dtype == torch.float32
    for loss, value in exact.losses.items():
        assert rough.losses[loss].item() == pytest.approx(value.item(), rel=0.05), loss


def test_a_student_without_rotary_embedding():
    torch.manual_seed(0)
    student = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).eval()
    assert prepare(student, "student") == Geometry(3, 4, 4, 12, 12)
    student.config.update({"num_key_value_heads": 4, "head_dim": 12})  # for this file's `make_rig`
    rig = make_rig("kv+struct", student=student)
    comparison = rig.step(BATCH).comparison
    states, attention = comparison.of(StateComparison), comparison.of(AttentionComparison)
    assert torch.equal(attention.target_q, states.target.q)
    assert torch.equal(attention.target_k, states.target.k)
    assert torch.equal(attention.student_k, states.student.k)
    gradients = rig.gradients([BATCH])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@every_loss
def test_padding_does_not_reach_the_loss(name):
    rig = make_rig(name)
    ids = torch.where(BATCH.student.mask, BATCH.student.ids, 33)
    other = type(BATCH.student)(ids, BATCH.student.mask, BATCH.student.positions, BATCH.student.segments)
    dirty = replace(BATCH, student=other, teacher=other)
    for loss, value in rig.step(BATCH).losses.items():
        assert rig.step(dirty).losses[loss].item() == pytest.approx(value.item(), rel=1e-6), loss


@pytest.mark.parametrize("name", ["kv", "kv+struct", "relations", "hidden"])
def test_a_batch_without_any_target_still_gives_a_gradient(name):
    # No segment of the student's text is one that the teacher has.
    batch = collator([Encoded([5, 6, 7], [2, 2, 2], cut=False)], [Encoded([5, 6, 7], [1, 1, 1], cut=False)])([0])
    assert Counts.of([batch]) == Counts(scored=2, aligned=0)
    rig = make_rig(name)
    result = rig.step(batch)
    assert result.alignment.item() == 0
    gradients = rig.gradients([batch])
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    trainable_projection = rig.distiller.trainable_projection
    assert all(
        parameter.grad is not None
        for parameter in (() if trainable_projection is None else trainable_projection.parameters())
    )
