"""Every family of decoders against itself: its own cache, its own projections, its own attention weights."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kv_align.config.signals import KEYS_VALUES_QUERIES
from kv_align.data.batch import Batch, Tokens
from kv_align.data.correspondence import Correspondence
from kv_align.models.capture.attention import attention_of
from kv_align.models.capture.prepare import Geometry, Recorder, prepare, record
from kv_align.models.capture.probe_rotary import hooks
from kv_align.teacher.teacher import Teacher
from tests.families import FAMILIES, Family, heads_first

IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 33, 12, 7], [4, 62, 44, 18, 7, 7, 29, 50, 11, 6, 21]])
RIGHT = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
KNOWN = {name: family for name, family in FAMILIES.items() if family.known}


@cache
def prepared(family_name: str) -> PreTrainedModel:
    """One model for all tests that only read it."""
    model = FAMILIES[family_name].make()
    prepare(model, "student")
    return model


def ready(family: Family) -> PreTrainedModel:
    return prepared(next(name for name, each in FAMILIES.items() if each is family))


def inputs(mask: Tensor | None) -> dict[str, Tensor | None]:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": IDS, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def recorded(model: PreTrainedModel, mask: Tensor | None = None) -> Recorder:
    with record() as recorder:
        model(**inputs(mask), use_cache=False)
    return recorder


@EVERY
def test_geometry_is_what_the_model_really_has(family):
    geometry = prepare(family.make(), "student")
    assert geometry == Geometry(3, 4, family.kv_heads, family.width, family.width, True, family.known)


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["full", "right", "left"])
@EVERY
def test_rotated_keys_and_values_are_those_of_a_plain_cache(family, mask):
    cache = DynamicCache()  # not told of the model, so that sliding layers keep all tokens
    with torch.no_grad():
        expected = family.make()(**inputs(mask), past_key_values=cache, use_cache=True).logits
        recorder = recorded(ready(family), mask)
        logits = ready(family)(**inputs(mask), use_cache=False).logits
    real = slice(None) if mask is None else mask.bool()
    for number, layer in enumerate(recorder.ordered()):
        held = cache.layers[number]
        assert layer.k.shape == (2, family.kv_heads, 11, family.width)
        for ours, theirs in ((layer.k, held.keys), (layer.v, held.values)):
            torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=1e-5)
        assert layer.k.std() > 0.1
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@EVERY
def test_unrotated_keys_are_the_outputs_of_the_models_own_projections(family):
    model, found = family.make(), {}
    names = ("k_proj", "k_norm", "k_layernorm") if family.keys is None else (family.keys[0],)
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            # A norm runs after the projection, and so takes its place.
            module.register_forward_hook(lambda _, __, out, layer=layer: found.__setitem__(layer, out.detach()))
    prepare(model, "teacher")
    found.clear()
    recorder = recorded(model)
    for number, layer in enumerate(recorder.ordered()):
        keys = found[number] if family.keys is None else family.keys[1](found[number])
        torch.testing.assert_close(layer.k_unrotated, heads_first(keys, family.width), atol=1e-4, rtol=1e-5)


@EVERY
def test_rotating_the_unrotated_gives_the_rotated_and_turns_what_is_expected(family):
    for number, layer in enumerate(recorded(ready(family)).ordered()):
        moved = (layer.k_unrotated != layer.k).any(dim=2).any(dim=0).any(dim=0)
        if family.turned[number] == 0:
            assert layer.k_unrotated is layer.k
        else:
            assert layer.rotation.cos.shape[-1] == family.turned[number] >= int(moved.sum()) > 0
            assert int((layer.k_unrotated - layer.k).abs().amax(dim=(0, 1, 2)).argmax()) < family.turned[number]
            torch.testing.assert_close(layer.rotation.rotate(layer.k_unrotated), layer.k, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(layer.rotation.rotate(layer.q_unrotated), layer.q, atol=1e-4, rtol=1e-5)


@EVERY
def test_left_padding_with_position_ids_gives_the_states_of_no_padding(family):
    model = ready(family)
    padded = torch.cat((IDS[1:, 7:], IDS[1:, :7]), dim=1)
    with torch.no_grad():
        with record() as alone:
            model(input_ids=IDS[1:, :7], position_ids=torch.arange(7)[None], use_cache=False)
        with record() as left:
            positions = (LEFT[1:].cumsum(1) - 1).clamp(min=0)
            model(input_ids=padded, attention_mask=LEFT[1:], position_ids=positions, use_cache=False)
    for ours, theirs in (
        (left.keys(rotated=True), alone.keys(rotated=True)),
        (left.keys(rotated=False), alone.keys(rotated=False)),
        (left.values(), alone.values()),
    ):
        torch.testing.assert_close(ours[..., 4:, :], theirs, atol=2e-3, rtol=1e-3)


WITH_KNOWN_ATTENTION = pytest.mark.parametrize("family", KNOWN.values(), ids=KNOWN)


@WITH_KNOWN_ATTENTION
def test_attention_of_recorded_queries_and_keys_is_the_models_own(family):
    model = family.make(attention="eager")
    with torch.no_grad():
        expected = model(**inputs(RIGHT), use_cache=False, output_attentions=True).attentions
    prepare(model, "student")
    for layer, theirs, window in zip(recorded(model, RIGHT).ordered(), expected, family.windows, strict=True):
        assert layer.form.window == window
        assert (
            tuple(name for name in ("cap", "sinks", "slopes") if getattr(layer.form, name) is not None) == family.beyond
        )
        ours = attention_of(layer.q, layer.k, RIGHT.bool(), layer.form)
        for row, length in ((0, 11), (1, 7)):
            torch.testing.assert_close(
                ours[row, :, :length, :length], theirs[row, :, :length, :length], atol=1e-4, rtol=1e-3
            )
    assert any(theirs.amax() > 0.5 for theirs in expected)


@WITH_KNOWN_ATTENTION
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_recorded_states_give_what_the_models_heads_give(family, mask):
    # With the attention that the model has unless another is asked for: Falcon's eager one adds its ALiBi twice.
    model, heads = ready(family), {}
    modules = recorded(model).modules
    outputs = {
        number: module.get_submodule(next(name for name in OUTPUTS if hasattr(module, name)))
        for number, module in modules.items()
    }
    with hooks(
        output.register_forward_pre_hook(lambda _, args, number=number: heads.__setitem__(number, args[0]))
        for number, output in outputs.items()
    ):
        recorder = recorded(model, mask)
    for number, layer in enumerate(recorder.ordered()):
        weights = attention_of(layer.q, layer.k, mask.bool(), layer.form)
        ours = weights @ layer.v.repeat_interleave(layer.q.shape[1] // layer.v.shape[1], dim=1)
        ours, theirs = ours.transpose(1, 2).flatten(2)[mask.bool()], heads[number][mask.bool()]
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


@EVERY
def test_loaded_with_eager_attention_the_same_is_recorded(family):
    model = family.make(attention="eager")
    for mask in (None, LEFT):
        cache = DynamicCache()
        with torch.no_grad():
            model(**inputs(mask), past_key_values=cache, use_cache=True)
        again = family.make(attention="eager")
        assert prepare(again, "student") == prepare(family.make(), "student")
        real = slice(None) if mask is None else mask.bool()
        for number, layer in enumerate(recorded(again, mask).ordered()):
            for ours, theirs in ((layer.k, cache.layers[number].keys), (layer.v, cache.layers[number].values)):
                torch.testing.assert_close(
                    ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-3, rtol=1e-3
                )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of a loss on recorded states of all layers alone, by parameter."""
    model.zero_grad()
    torch.manual_seed(1)  # of the dropout
    with record() as recorder:
        model(**inputs(RIGHT), use_cache=False)
    loss = recorder.keys(rotated=False).square().mean() + recorder.values().pow(3).mean()
    (loss + recorder.queries(rotated=True).abs().mean()).backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }


@EVERY
def test_gradients_reach_the_model_and_checkpointing_does_not_change_them(family):
    model, runs = family.make().train(), []
    prepare(model, "student")
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)
    next(iter(blocks[0].children())).register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(model)
    once = len(runs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model)
    assert len(runs) == 3 * once
    assert checkpointed.keys() == plain.keys()
    reached = {id(parameter) for name, parameter in model.named_parameters() if name in plain}
    assert id(model.get_input_embeddings().weight) in reached
    for block in blocks:
        assert any(id(parameter) in reached for parameter in block.parameters())
    for name, gradient in plain.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4, msg=name
        )


@EVERY
def test_bfloat16(family):
    model = family.make(dtype=torch.bfloat16)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs(None), past_key_values=cache, use_cache=True)
    geometry = prepare(model, "teacher")
    assert (geometry.num_key_value_heads, geometry.key_width) == (family.kv_heads, family.width)
    recorder, exact = recorded(model), recorded(ready(family))
    for number, (layer, reference) in enumerate(zip(recorder.ordered(), exact.ordered(), strict=True)):
        assert layer.k.dtype == layer.v.dtype == layer.k_unrotated.dtype == torch.bfloat16
        assert torch.equal(layer.k, cache.layers[number].keys)
        assert torch.equal(layer.v, cache.layers[number].values)
        if number == 0:
            difference = (layer.k_unrotated.float() - reference.k_unrotated).norm() / reference.k_unrotated.norm()
            assert difference < 0.02


@EVERY
def test_a_teacher_reads_no_further_than_it_must_and_the_same(family):
    model, mask = ready(family), RIGHT.bool()
    tokens = Tokens(IDS, mask, (RIGHT.cumsum(1) - 1).clamp(min=0), RIGHT)
    batch = Batch(tokens, tokens, mask, Correspondence(tokens.segments, tokens.segments, True), (0, 1))
    states = Teacher(model, [0, 1], rotated=False).read(batch, (KEYS_VALUES_QUERIES,))
    whole = recorded(model, RIGHT)
    torch.testing.assert_close(states["k"], whole.keys(rotated=False)[:, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states["v"], whole.values()[:, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states["q"], whole.queries(rotated=False)[:, :2], atol=1e-5, rtol=1e-5)


@EVERY
def test_generation_is_that_of_the_plain_model(family):
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = family.make().generate(IDS, attention_mask=LEFT, **greedy)
    assert torch.equal(ready(family).generate(IDS, attention_mask=LEFT, **greedy), expected)
    assert expected.shape == (2, 15)
