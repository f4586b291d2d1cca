"""Layers that call no attention function: their queries, found where keys are multiplied, and rotations that they make."""

import gc
import inspect
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.cache_tap import CacheTap, cache_argument
from kv_align.models.capture.prepare import prepare, record
from kv_align.models.capture.recorder import LayerFacts, write_facts
from kv_align.models.capture.rotary import rotary_table
from tests.families import FAMILIES

IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 33, 12, 7], [4, 62, 44, 18, 7, 7, 29, 50, 11, 6, 21]])
PRODUCTS = {
    "matmul": lambda q, k, v: torch.matmul(q, k.transpose(-1, -2)),
    "operator": lambda q, k, v: q @ k.mT,
    "bmm": lambda q, k, v: torch.bmm(q.flatten(0, 1), k.reshape(-1, 5, 4).transpose(1, 2)),
    "baddbmm": lambda q, k, v: torch.zeros(6, 1, 5).baddbmm(
        batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=0.5, alpha=0.1
    ),
    "einsum": lambda q, k, v: torch.einsum("bhtd,bhrd->bhtr", q, k),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "cast": lambda q, k, v: torch.matmul(q.double(), k.double().transpose(-1, -2)),
}


def numbered() -> torch.nn.Module:
    """Stands for an attention layer."""
    module = torch.nn.Module()
    write_facts(module, LayerFacts(0))
    return module


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("multiply", PRODUCTS.values(), ids=PRODUCTS)
def test_what_keys_are_multiplied_with_are_the_queries(multiply):
    q, k, v = (draw(2, 3, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    expected = multiply(q, k, v)
    with record() as recorder:
        seen_k, seen_v = CacheTap(recorder, numbered(), AttentionSpec(0.5)).update(k * 1, v)
        assert recorder.layers == {}
        found = multiply(q, seen_k, seen_v)
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    layer = recorder.layers[0]
    assert [type(each) for each in (layer.q, layer.k, layer.v)] == [Tensor] * 3
    assert torch.equal(layer.q, q)
    assert torch.equal(layer.k, k)
    assert layer.v is v
    assert layer.form == AttentionSpec(0.5)
    gradients = (torch.autograd.grad(each.sum(), (q, k), retain_graph=True) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert (torch.autograd.grad(2 * layer.k.sum(), k)[0] == 2).all()


def test_a_forward_pass_without_a_backward_one_is_forgotten():
    model = FAMILIES["falcon"].make()
    prepare(model, "student")
    with record() as recorder:
        model(input_ids=IDS, use_cache=False)
    kept = weakref.ref(recorder.layers[2].q)
    del recorder
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("name", ["falcon", "gptj", "bloom"])
def test_mixed_precision_changes_no_more_than_without_recording(name):
    model, plain = FAMILIES[name].make(), FAMILIES[name].make()
    prepare(model, "student")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = plain(input_ids=IDS, use_cache=False).logits
        with record() as recorder:
            found = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, expected)
    for layer in recorder.ordered():
        assert layer.q.dtype == layer.k.dtype
        assert layer.q.std() > 0.1


@pytest.mark.parametrize("name", ["falcon", "gptj", "bloom", "mpt", "xglm", "codegen"])
def test_queries_are_what_the_models_own_projections_make(name):
    model, found = FAMILIES[name].make(), {}
    projections = {
        "falcon": ("query_key_value", lambda fused: fused[..., :32]),
        "gptj": ("q_proj", lambda q: q),
        "bloom": ("query_key_value", lambda fused: fused.unflatten(-1, (4, 24))[..., :8].flatten(2)),
        "mpt": ("Wqkv", lambda fused: fused[..., :32]),
        "xglm": ("q_proj", lambda q: q * 8**-0.5),
        "codegen": ("qkv_proj", lambda fused: fused.unflatten(-1, (4, 24))[..., :8].flatten(2)),
    }
    end, of_output = projections[name]
    prepare(model, "teacher")
    for path, module in model.named_modules():
        if path.endswith(end):
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            module.register_forward_hook(lambda _, __, out, layer=layer: found.__setitem__(layer, of_output(out)))
    with torch.no_grad(), record() as recorder:
        model(input_ids=IDS, use_cache=False)
    for number, layer in enumerate(recorder.ordered()):
        expected = found[number].unflatten(-1, (4, 8)).transpose(1, 2)
        torch.testing.assert_close(layer.q_unrotated, expected, atol=1e-4, rtol=1e-5)


def turned(keys: Tensor, pairs: list[tuple[int, int]], speeds: list[float], positions: int) -> Tensor:
    """[N, H, D] to [N, H, P, D], pair by pair."""
    result = keys[:, :, None].repeat(1, 1, positions, 1)
    for (first, second), speed in zip(pairs, speeds, strict=True):
        angles = torch.arange(positions) * speed
        x, y = keys[..., None, first], keys[..., None, second]
        result[..., first], result[..., second] = (
            x * angles.cos() - y * angles.sin(),
            y * angles.cos() + x * angles.sin(),
        )
    return result


@pytest.mark.parametrize("pairs", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(4, 1), (0, 3)]])
def test_a_table_gives_back_any_rotation(pairs):
    keys = draw(2, 3, 6, seed=0)
    at_places = turned(keys, pairs, [1.0, 0.01], 50)
    rotation = rotary_table(at_places).at(torch.arange(50)[None])
    still = keys[:, :, None].expand_as(at_places)
    torch.testing.assert_close(rotation.rotate(still), at_places, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rotation.unrotate(at_places), still, atol=1e-6, rtol=1e-5)
    other = draw(1, 1, 6, seed=1)
    places = torch.tensor([[7, 7, 0, 31]])
    expected = turned(other, pairs, [1.0, 0.01], 50)[:, :, places[0]]
    found = rotary_table(at_places).at(places).rotate(other[:, :, None].expand(-1, -1, 4, -1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_no_rotation_has_no_table():
    keys = draw(2, 3, 6, seed=0)[:, :, None].repeat(1, 1, 50, 1)
    with pytest.raises(ValueError, match="more than turn pairs"):
        rotary_table(keys + torch.arange(50)[:, None] * torch.tensor([1.0, 2.0, 3.0, 0, 0, 0]))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past", "past_key_value"])
def test_a_cache_is_taken_by_whatever_name_the_library_gives_it(name):
    """Since transformers 5.24 that is `cache`; under a name that is not known a family was refused."""
    taking = nn.Identity()
    taking.forward = lambda *given, **named: None
    taking.forward.__signature__ = inspect.Signature(
        [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in ("hidden_states", "mask", name)]
    )
    assert cache_argument(taking) == name
    assert cache_argument(nn.Linear(2, 2)) is None
