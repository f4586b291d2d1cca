"""Every decoder that the installed library can build small: accepted and right, or refused with a reason that is true.

Right is what a model without any of this is seen to multiply: a spy on PyTorch's own products and attention. Texts are
longer than every window and chunk, and padded on either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from kv_align.losses.attention_divergence import attention_divergence
from kv_align.losses.functional import scaled_mse
from kv_align.models.capture.attention import attention_of
from kv_align.models.capture.prepare import Geometry, Recorder, prepare, record
from kv_align.runs.errors import ConfigError
from tests.every_decoder import DECODERS, tiny

TOKENS, PADDING = 48, 7
IDS = torch.randint(4, 60, (2, TOKENS), generator=torch.Generator().manual_seed(0))
MASKS = {side: torch.ones(2, TOKENS, dtype=torch.long) for side in ("none", "right", "left")}
MASKS["right"][1, -PADDING:] = 0
MASKS["left"][1, :PADDING] = 0
# One of each kind of attention, rotation, cache and module.
CHOSEN = (
    "bloom",
    "deepseek_v3",
    "diffllama",
    "falcon_h1",
    "gemma3_text",
    "git",
    "gpt_neo",
    "gpt_oss",
    "llama4_text",
    "nanochat",
    "qwen2_moe",
    "qwen3_next",
)


class Spy(TorchFunctionMode):
    """Notes what is multiplied by what, and what comes of it, in PyTorch's products and attention."""

    _PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []
        self.results: list[Tensor] = []
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        if func.__name__ in self._PRODUCTS:
            self.operands += [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        if func.__name__ in (*self._PRODUCTS, "mul", "__mul__") and isinstance(result, Tensor):
            self.results.append(result)  # some give a sink its share behind the product
        return result


def inputs(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def is_among(states: Tensor, seen: list[Tensor], mask: Tensor) -> bool:
    """Whether states [B, H, T, D] are among tensors, in any of the layouts that attention uses, at real tokens."""
    batch, heads, tokens, width = states.shape
    real = mask.bool()

    def layouts(each: Tensor) -> Iterator[Tensor]:
        shape = tuple(each.shape)
        if len(shape) == 4 and shape[0] == batch:
            for axes in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
                yield each.permute(axes)
        if len(shape) == 3 and shape[0] == batch * heads:
            yield each.unflatten(0, (batch, heads))
            yield each.unflatten(0, (batch, heads)).transpose(-1, -2)
        if len(shape) == 3 and shape[0] == batch and shape[1] in (tokens, heads * tokens, tokens * heads):
            if each.numel() == states.numel():
                yield each.reshape(batch, tokens, heads, width).transpose(1, 2)
            yield each[:, None] if heads == 1 else each.reshape(batch, -1, *shape[1:])
        if len(shape) == 3 and shape[0] == batch and heads == 1:
            yield each.transpose(-1, -2)[:, None]
        if len(shape) == 5 and shape[0] == batch:
            yield each.flatten(1, 2)

    # A product may have its scaling in one of its factors, so that directions and proportions are compared.
    def same(found: Tensor) -> bool:
        if found.shape[1] != heads and found.shape[1] % heads == 0 and found.dim() == 4:
            found = found[:, :: found.shape[1] // heads]  # repeated for the query heads of each
        if found.shape != states.shape:
            return False
        ours, theirs = states.transpose(1, 2)[real].float(), found.transpose(1, 2)[real].float()
        scale = (ours * theirs).sum() / theirs.square().sum().clamp(min=1e-20)
        return torch.allclose(scale * theirs, ours, atol=2e-4 * float(ours.abs().max()), rtol=1e-3)

    return any(same(layout) for each in seen for layout in layouts(each))


@contextmanager
def spying() -> Iterator[Spy]:
    with torch.no_grad(), Spy() as spy:
        yield spy


def recorded(model: PreTrainedModel, mask: Tensor) -> Recorder:
    with torch.no_grad(), record() as recorder:
        model(**inputs(mask), use_cache=False)
    return recorder


def faults(model_type: str) -> tuple[Geometry | None, str, list[str]]:
    """What a family is taken for, the reason if it is refused, and what of its states is not as a plain model has it."""
    model, found = tiny(model_type), []
    try:
        geometry = prepare(model, "student", longest=TOKENS)
    except ConfigError as error:
        return None, str(error), []
    for side, mask in MASKS.items():
        with spying() as spy:
            plain = tiny(model_type)(**inputs(mask), use_cache=False).logits
        recorder = recorded(model, mask)
        with torch.no_grad():
            logits = model(**inputs(mask), use_cache=False).logits
        if not torch.allclose(logits[mask.bool()], plain[mask.bool()], atol=1e-3, rtol=1e-3):
            found.append(f"{side}: the model's predictions are changed")
        for number, layer in enumerate(recorder.ordered()):
            states = {"keys": layer.k, "values": layer.v} | ({"queries": layer.q} if geometry.gives_queries else {})
            for kind, each in states.items():
                if not is_among(each, spy.operands, mask):
                    found.append(f"{side}: {kind} of layer {number}")
            if geometry.plain_attention:
                weights = attention_of(layer.q, layer.k, mask.bool(), layer.form)
                heads = weights @ layer.v.repeat_interleave(layer.q.shape[1] // layer.v.shape[1], dim=1)
                if not is_among(heads, spy.results, mask):
                    found.append(f"{side}: heads of layer {number}")
            if geometry.fixed_rotation is None and layer.rotation is not None:
                turned = layer.rotation.rotate(layer.k_unrotated)
                if not torch.allclose(turned, layer.k, atol=1e-3 * float(layer.k.abs().max())):
                    found.append(f"{side}: rotation of layer {number}")
    if geometry.fixed_rotation is None:
        found += unrotated_faults(model)
    return geometry, "", found + loss_faults(model_type, model, geometry)


def unrotated_faults(model: PreTrainedModel) -> list[str]:
    """Keys of the first layer before rotation are the same at other positions, where positions are not in the inputs."""
    keys = []
    for offset in (0, 9):
        with torch.no_grad(), record() as recorder:
            model(input_ids=IDS, position_ids=torch.arange(TOKENS)[None] + offset, use_cache=False)
        keys.append(recorder.layers[0])
    near, far = keys
    if near.rotation is None:
        return []
    alike = torch.allclose(near.k_unrotated, far.k_unrotated, atol=1e-3 * float(near.k.abs().max()))
    return [] if alike else ["unrotated keys depend on positions"]


def loss_faults(model_type: str, student: PreTrainedModel, geometry: Geometry) -> list[str]:
    """The losses between two models of the family are those of what plain ones are seen to attend with."""
    mask = MASKS["right"].bool()
    teacher = tiny(model_type, seed=1)
    prepare(teacher, "teacher", longest=TOKENS)
    ours, theirs = (recorded(model, MASKS["right"]) for model in (student, teacher))
    layers = len(ours.layers)
    k, v, tk, tv = ours.keys(rotated=True), ours.values(), theirs.keys(rotated=True), theirs.values()
    found = []
    for kind, mine, other in (("key", k, tk), ("value", v, tv)):
        loss = scaled_mse(mine, other, mask, torch.ones(layers)).total / mask.sum()
        reference = (mine - other).square().mean(dim=(1, 2, 4))[mask].mean()
        if not torch.allclose(loss, reference, rtol=1e-4):
            found.append(f"{kind} loss")
    if geometry.plain_attention:
        forms = tuple(layer.form for layer in ours.ordered())
        q, tq = ours.queries(rotated=True), theirs.queries(rotated=True)
        divergence = attention_divergence(q, k, tq, tk, mask, forms=forms, temperature=1.0)
        total = torch.zeros((), dtype=torch.float64)
        for layer, form in enumerate(forms):
            log_s, log_t = (
                attention_of(queries[:, layer].double(), keys[:, layer].double(), mask, form).clamp(min=1e-300).log()
                for queries, keys in ((q, k), (tq, tk))
            )
            rows = (log_t.exp() * (log_t - log_s)).sum(-1)
            if form.sinks is not None:
                rest_s, rest_t = (1 - each.exp().sum(-1).clamp(max=1 - 1e-12) for each in (log_s, log_t))
                rows = rows + rest_t * (rest_t / rest_s).log()
            total = total + rows.mean(1)[mask].sum()
        if not torch.allclose(divergence.total.double(), total / layers, rtol=2e-3, atol=1e-3):
            found.append("attention loss")
    return found


def refusal_faults(model_type: str, reason: str) -> list[str]:
    """Whether the reason for a refusal is what a plain model is seen to do; empty if it is."""
    model = tiny(model_type)
    if "it fails on a few tokens" in reason:
        with pytest.raises(Exception), torch.no_grad():  # noqa: B017, PT011 - whatever it raises
            model(input_ids=IDS[:, :8], use_cache=False)
        return []
    other = IDS.clone()
    other[:, -1] += 1
    with spying() as spy:
        logits, changed = (model(input_ids=ids, use_cache=False).logits for ids in (IDS, other))
    if "its tokens see later tokens" in reason:
        return [] if (logits - changed)[:, :-1].abs().max() > 1e-3 else ["it does not see later tokens"]
    if "do not attend by softmax" in reason:
        return [] if "softmax" not in spy.names and "scaled_dot_product_attention" not in spy.names else ["it attends"]
    if "attends" in reason and "times" in reason:
        layers = sum(hasattr(each, "k_proj") or hasattr(each, "qkv_proj") for each in model.modules())
        calls = sum(name in ("softmax", "scaled_dot_product_attention") for name in spy.names) / 2
        return [] if calls > layers else [f"{calls} attentions of {layers} modules"]
    if "that are not one for each token" in reason:
        # A prompt of its own stands before the tokens as keys alone, or as keys and queries.
        squares = [each for each in spy.results if each.dim() == 4 and each.shape[-2] in (TOKENS, each.shape[-1])]
        wider = [each for each in squares if each.shape[-1] > TOKENS]
        return [] if wider else ["it attends to a key of each token"]
    cache = getattr(held_by(model), "layers", [])
    shapes = [each.keys.shape for each in cache if getattr(each, "keys", None) is not None and each.keys.dim() == 4]
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if found := re.search(r"only (\d+) of its (\d+) layers show keys", reason):
        kinds = [str(kind) for kind in getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []]
        counts = {len(shapes), sum(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)}
        return [] if int(found[1]) in counts and int(found[2]) == layers else [f"{counts} of {layers} attend"]
    if found := re.search(r"made of (\d+) x (\d+) that its cache holds", reason):
        sizes = {(shape[1], shape[3]) for each in cache for shape in (each.keys.shape, each.values.shape)}
        return [] if tuple(map(int, found.groups())) in sizes else [f"its cache holds {sizes}"]
    if "another layer" in reason or "other things in their cache" in reason:
        return [] if len(shapes) < layers else ["its cache holds keys of all layers"]
    if "differ in shape" in reason:
        return [] if len({(shape[1], shape[3]) for shape in shapes}) > 1 else [f"its cache holds {shapes}"]
    return [f"nobody knows whether it is true: {reason}"]


def held_by(model: PreTrainedModel) -> Any:
    try:
        with torch.no_grad():
            return getattr(model(input_ids=IDS, use_cache=True), "past_key_values", None)
    except ValueError:  # a cache of states alone, with which the library itself cannot go on
        return None


def assert_right_or_refused(model_type: str) -> None:
    geometry, reason, found = faults(model_type)
    assert found == []
    if geometry is None:
        assert "\n" not in reason
        assert refusal_faults(model_type, reason) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", CHOSEN)
def test_a_family_of_each_kind_is_right_or_refused(model_type: str) -> None:
    assert_right_or_refused(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [each for each in DECODERS if each not in CHOSEN])
def test_every_family_is_right_or_refused(model_type: str) -> None:
    try:
        tiny(model_type)
    except Exception as error:
        pytest.skip(f"it cannot be built small ({type(error).__name__})")
    assert_right_or_refused(model_type)


def test_what_is_not_attended_to_is_not_taken_for_right() -> None:
    model = tiny("qwen2")
    with spying() as spy:
        model(**inputs(MASKS["left"]), use_cache=False)
    prepare(model, "student", longest=TOKENS)
    for layer in recorded(model, MASKS["left"]).ordered():
        assert is_among(layer.k, spy.operands, MASKS["left"])
        assert not is_among(layer.k.roll(1, dims=1), spy.operands, MASKS["left"])
        assert not is_among(layer.k_unrotated, spy.operands, MASKS["left"])
