"""Capture against the library's own cache and its own projections: what is recorded is what attention was handed."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kv_align.models.capture.prepare import Geometry, Rotation, prepare, record

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, head_dim=12)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, head_dim=12, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0)),
    "yarn": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=YARN)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**COMMON)),
}
FAMILIES = ("llama", "qwen2", "mistral", "gpt2")
ROTARY = ("llama", "qwen2", "mistral", "yarn", "phi")
IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 33, 12, 7], [1, 2, 44, 18, 7, 7, 29, 50, 11, 6, 21]])
RIGHT = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])


def fresh(name: str) -> PreTrainedModel:
    """A random model as the library makes it, with weights so large that every layer, head and token differs."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif parameter.abs().sum() == 0:
                parameter.normal_(std=0.3)
    assert model.config._attn_implementation == "sdpa"
    return model.eval()


def prepared(name: str) -> PreTrainedModel:
    model = fresh(name)
    prepare(model, "student")
    return model


def projections(model: PreTrainedModel, **inputs: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What the model's own linear layers make of q, k and v, before any rotation, [B, H, T, D] by layer."""
    found: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    config, hooks = model.config, []
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def note(kinds: str, output: torch.Tensor) -> None:
        for kind, part in zip(kinds, output.chunk(len(kinds), dim=-1), strict=True):
            found[kind].append(part.detach().unflatten(-1, (-1, width)).transpose(1, 2))

    for path, module in model.named_modules():
        kinds = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_attn": "qkv"}.get(path.rpartition(".")[2])
        if kinds is not None:
            hooks.append(module.register_forward_hook(lambda _, __, out, kinds=kinds: note(kinds, out)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("padding", [None, RIGHT], ids=["full", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rotated_keys_and_values_are_those_of_a_plain_cache(name, padding):
    cache = DynamicCache()  # without the config, so that sliding layers keep all tokens
    with torch.no_grad():
        expected = fresh(name)(input_ids=IDS, attention_mask=padding, past_key_values=cache).logits
        with record() as recorder:
            logits = prepared(name)(input_ids=IDS, attention_mask=padding, use_cache=False).logits
    for number in range(3):
        assert torch.equal(recorder.keys(rotated=True)[:, number], cache.layers[number].keys)
        assert torch.equal(recorder.values()[:, number], cache.layers[number].values)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_unrotated_states_are_the_outputs_of_the_models_own_projections(name):
    expected = projections(fresh(name), input_ids=IDS)
    model = prepared(name)
    with torch.no_grad(), record() as recorder:
        model(input_ids=IDS, use_cache=False)
    torch.testing.assert_close(recorder.keys(rotated=False), torch.stack(expected["k"], dim=1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(recorder.queries(rotated=False), torch.stack(expected["q"], dim=1), atol=2e-6, rtol=1e-5)
    assert torch.equal(recorder.values(), torch.stack(expected["v"], dim=1))


@pytest.mark.parametrize("name", MODELS)
def test_rotating_the_unrotated_gives_the_rotated(name):
    model = prepared(name)
    with torch.no_grad(), record() as recorder:
        model(input_ids=IDS, use_cache=False)
    for layer in recorder.ordered():
        if name == "gpt2":
            assert layer.rotation is None
            assert layer.k_unrotated is layer.k
            assert layer.q_unrotated is layer.q
        else:
            torch.testing.assert_close(layer.rotation.rotate(layer.k_unrotated), layer.k, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(layer.rotation.rotate(layer.q_unrotated), layer.q, atol=2e-6, rtol=1e-5)
            # Position 0 is not rotated (but scaled, under YaRN), all others are.
            assert not torch.allclose(layer.k_unrotated[:, :, 1:], layer.k[:, :, 1:], atol=1e-2)


@pytest.mark.parametrize("name", ROTARY)
def test_unrotated_keys_of_layer_0_do_not_depend_on_the_position(name):
    model, found = prepared(name), []
    for offset in (0, 37):
        with torch.no_grad(), record([0]) as recorder:
            model(input_ids=IDS, position_ids=torch.arange(11)[None] + offset, use_cache=False)
        found.append(recorder.layers[0])
    near, far = found
    torch.testing.assert_close(near.k_unrotated, far.k_unrotated, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(near.q_unrotated, far.q_unrotated, atol=2e-6, rtol=1e-5)
    assert torch.equal(near.v, far.v)
    assert (near.k - far.k).abs().max() > 0.1


def test_yarn_scales_what_it_rotates_and_the_scale_is_undone():
    model = prepared("yarn")
    with torch.no_grad(), record() as recorder:
        model(input_ids=IDS, use_cache=False)
    layer = recorder.layers[1]
    square = layer.rotation.cos.square() + layer.rotation.sin.square()
    # The attention factor of YaRN, 0.1 ln(factor) + 1 (Peng et al., 2023), for a factor of 4.
    torch.testing.assert_close(square, torch.full_like(square, 1.1386294361**2))
    torch.testing.assert_close(layer.k.norm(dim=-1), 1.1386294361 * layer.k_unrotated.norm(dim=-1))


def test_a_rotation_by_hand():
    # A quarter turn of two pairs (numbers 0 and 2, 1 and 3); the fifth number is not rotated.
    quarter = Rotation(torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    states = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(1, 1, 1, 5)
    assert quarter.rotate(states).flatten().tolist() == [-3, -4, 1, 2, 5]
    assert quarter.unrotate(states).flatten().tolist() == [3, 4, -1, -2, 5]


def test_bfloat16_is_turned_in_float32_and_rounded_once():
    angles = torch.linspace(0.1, 3.0, 4).repeat(1, 5, 2)
    rotation = Rotation(angles.cos().bfloat16(), angles.sin().bfloat16())
    exact = Rotation(rotation.cos.float(), rotation.sin.float())
    # Large numbers beside small ones, which are all that is left of a large one turned away.
    states = (
        torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 6)
    ).bfloat16()
    for ours, theirs in ((rotation.rotate, exact.rotate), (rotation.unrotate, exact.unrotate)):
        assert torch.equal(ours(states), theirs(states.float()).bfloat16())
    assert torch.equal(rotation.rotate(states)[..., 8:], states[..., 8:])


def test_sines_that_are_handed_over_before_cosines_are_told_apart(monkeypatch):
    """GPT-J's are in transformers 5.24; taken for cosines, keys came out turned by a right angle."""
    expected = projections(fresh("llama"), input_ids=IDS)
    model = fresh("llama")
    angles = model.model.rotary_emb.forward
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda *given, **named: angles(*given, **named)[::-1])
    for layer in model.model.layers:
        own = layer.self_attn.forward

        def attend(*given, position_embeddings, own=own, **named):
            return own(*given, position_embeddings=position_embeddings[::-1], **named)

        monkeypatch.setattr(layer.self_attn, "forward", attend)
    prepare(model, "student")
    with torch.no_grad(), record() as recorder:
        logits = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(recorder.keys(rotated=False), torch.stack(expected["k"], dim=1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(recorder.queries(rotated=False), torch.stack(expected["q"], dim=1), atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(logits, fresh("llama")(input_ids=IDS, use_cache=False).logits)


def test_partial_rotation_leaves_the_rest_of_a_head_alone():
    model = prepared("phi")  # rotates half of each head
    with torch.no_grad(), record([1]) as recorder:
        model(input_ids=IDS, use_cache=False)
    layer = recorder.layers[1]
    assert layer.rotation.cos.shape[-1] == 4
    assert torch.equal(layer.k_unrotated[..., 4:], layer.k[..., 4:])


@pytest.mark.parametrize("padding", [None, RIGHT, LEFT], ids=["full", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_bit_for_bit_those_of_plain_sdpa(name, padding):
    positions = None if padding is None else (padding.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": IDS, "attention_mask": padding, "position_ids": positions, "use_cache": False}
    model = prepared(name)
    with torch.no_grad():
        expected = fresh(name)(**inputs).logits
        silent = model(**inputs).logits
        with record():
            recorded = model(**inputs).logits
    assert expected.std() > 0.5
    assert torch.equal(silent, expected)
    assert torch.equal(recorded, expected)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_with_position_ids_gives_the_states_of_no_padding(name):
    model = prepared(name)
    with torch.no_grad():
        with record() as alone:
            logits = model(input_ids=IDS[1:, :7], use_cache=False).logits
        padded = torch.cat((IDS[1:, 7:], IDS[1:, :7]), dim=1)
        with record() as left:
            left_logits = model(
                input_ids=padded,
                attention_mask=LEFT[1:],
                position_ids=(LEFT[1:].cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
    for rotated in (True, False):
        for ours, theirs in ((left.keys, alone.keys), (left.queries, alone.queries)):
            torch.testing.assert_close(ours(rotated=rotated)[..., 4:, :], theirs(rotated=rotated), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left.values()[..., 4:, :], alone.values(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left_logits[:, 4:], logits, atol=1e-3, rtol=1e-3)


def gradients(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor | None], int]:
    """Of a loss on recorded states of all layers alone, by parameter; and how often the first layer's MLP ran."""
    runs = []
    mlp = next(module for path, module in model.named_modules() if path.endswith("0.mlp"))
    hook = mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.zero_grad()
    with record() as recorder:
        model(input_ids=IDS, attention_mask=RIGHT, use_cache=False)
    loss = recorder.keys(rotated=False).square().mean() + recorder.values().pow(3).mean()
    (loss + recorder.queries(rotated=True).abs().mean()).backward()
    hook.remove()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, len(runs)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_model_and_checkpointing_does_not_change_them(name):
    model = prepared(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, runs = gradients(model)
    assert runs == 1
    plain = {parameter: None if gradient is None else gradient.clone() for parameter, gradient in plain.items()}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    checkpointed, runs = gradients(model)
    assert runs == 2
    # What stands above the last layer's projections is not part of the loss; everything else is.
    last = ("layers.2.self_attn.o_proj", "layers.2.mlp", "layers.2.post", "h.2.attn.c_proj", "h.2.mlp", "h.2.ln_2")
    above = (*last, "model.norm", "ln_f", "lm_head")
    for parameter, gradient in plain.items():
        if any(part in parameter for part in above):
            assert gradient is None
        else:
            assert gradient.abs().max() > 0, parameter
            torch.testing.assert_close(checkpointed[parameter], gradient, atol=0, rtol=0, msg=parameter)


def test_record_selects_layers_and_keeps_their_order():
    model = prepared("llama")
    with torch.no_grad():
        with record() as everything:
            model(input_ids=IDS, use_cache=False)
        with record([2, 0]) as some:
            model(input_ids=IDS, use_cache=False)
    assert sorted(some.layers) == [0, 2]
    assert torch.equal(some.keys(rotated=True), everything.keys(rotated=True)[:, [0, 2]])
    assert torch.equal(some.values(), everything.values()[:, [0, 2]])
    assert everything.keys(rotated=False).shape == (2, 3, 2, 11, 12)
    assert everything.queries(rotated=False).shape == (2, 3, 4, 11, 12)


@pytest.mark.parametrize("name", FAMILIES)
def test_stopping_after_the_last_layer_runs_nothing_above_and_changes_nothing(name):
    model, calls = prepared(name), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, ___, path=path: calls.append(path))
    with torch.no_grad():
        with record([0, 1]) as whole:
            expected = model(input_ids=IDS, attention_mask=RIGHT, use_cache=False).logits
        finished_whole = list(calls)
        calls.clear()
        reached = False
        with record([0, 1], stop_after_last=True) as stopped:
            model(input_ids=IDS, attention_mask=RIGHT, use_cache=False)
            reached = True
        finished_stopped = list(calls)
        again = model(input_ids=IDS, attention_mask=RIGHT, use_cache=False).logits
    for ours, theirs in zip(stopped.ordered(), whole.ordered(), strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert torch.equal(ours.v, theirs.v)
        assert torch.equal(ours.q_unrotated, theirs.q_unrotated)
    assert not reached
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    assert any(path.startswith(f"{layers}.0.") for path in finished_stopped)
    assert {f"{layers}.1", f"{layers}.2", "lm_head"} <= set(finished_whole)
    assert not [path for path in finished_stopped if path.startswith((f"{layers}.1.mlp", f"{layers}.2", "lm_head"))]
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name):
    model = fresh(name).to(torch.bfloat16)
    expected = projections(model, input_ids=IDS)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        prepare(model, "teacher")
        with record() as recorder:
            model(input_ids=IDS, use_cache=False)
    keys = recorder.keys(rotated=False)
    assert keys.dtype == recorder.values().dtype == torch.bfloat16
    for number in range(3):
        assert torch.equal(recorder.keys(rotated=True)[:, number], cache.layers[number].keys)
        # What the model rounded when it rotated, and once more.
        difference = (keys[:, number] - expected["k"][number]).float().norm() / expected["k"][number].float().norm()
        assert difference < (1e-6 if name == "gpt2" else 0.003)


def test_how_each_layer_attends_is_recorded():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = Qwen2ForCausalLM(Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, layer_types=kinds)).eval()
    prepare(mixed, "student")
    windows = {}
    for name, model in {"mixed": mixed, **{name: prepared(name) for name in FAMILIES}}.items():
        with torch.no_grad(), record() as recorder:
            model(input_ids=IDS, use_cache=False)
        windows[name] = [layer.form.window for layer in recorder.ordered()]
        width = recorder.layers[0].k.shape[-1]
        assert [layer.form.scaling for layer in recorder.ordered()] == pytest.approx([width**-0.5] * 3)
    assert windows == {
        "mixed": [5, None, 5],
        "llama": [None] * 3,
        "qwen2": [None] * 3,
        "mistral": [4] * 3,
        "gpt2": [None] * 3,
    }


def test_an_inner_block_takes_over_and_gives_back():
    model, other = prepared("llama"), prepared("qwen2")
    with torch.no_grad(), record() as outer:
        model(input_ids=IDS, use_cache=False)
        before = outer.keys(rotated=True).clone()
        with record([1]) as inner:
            other(input_ids=IDS, use_cache=False)
        assert sorted(inner.layers) == [1]
        assert inner.keys(rotated=True).shape == (2, 1, 2, 11, 8)
        assert torch.equal(outer.keys(rotated=True), before)
        model(input_ids=IDS[:, :5], use_cache=False)
        assert outer.keys(rotated=True).shape == (2, 3, 2, 5, 12)
    other(input_ids=IDS, use_cache=False)
    assert outer.keys(rotated=True).shape == (2, 3, 2, 5, 12)
    assert sorted(inner.layers) == [1]


def test_an_inner_block_that_stops_early_does_not_end_the_outer_one():
    model, other = prepared("llama"), prepared("qwen2")
    reached = False
    with torch.no_grad(), record() as outer:
        with record([0], stop_after_last=True) as inner:
            other(input_ids=IDS, use_cache=False)
        model(input_ids=IDS, use_cache=False)
        reached = True
    assert reached
    assert sorted(inner.layers) == [0]
    assert sorted(outer.layers) == [0, 1, 2]


def test_blocks_in_two_threads_do_not_mix():
    models = {"llama": prepared("llama"), "qwen2": prepared("qwen2")}
    expected, found, together = {}, {}, threading.Barrier(2, timeout=30)
    for name, model in models.items():
        with torch.no_grad(), record() as recorder:
            model(input_ids=IDS, use_cache=False)
        expected[name] = recorder.keys(rotated=True)

    def run(name: str) -> None:
        with torch.no_grad(), record() as recorder:
            together.wait()
            models[name](input_ids=IDS, use_cache=False)
            together.wait()
        found[name] = recorder.keys(rotated=True)

    threads = [threading.Thread(target=run, args=(name,)) for name in models]
    with record() as main:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert main.layers == {}
    for name in models:
        assert torch.equal(found[name], expected[name])


def test_a_block_left_by_an_exception_records_no_longer():
    model = prepared("llama")
    with pytest.raises(ZeroDivisionError), record() as recorder:
        raise ZeroDivisionError
    model(input_ids=IDS, use_cache=False)
    assert recorder.layers == {}


def test_recomputation_in_backward_does_not_write_to_a_later_block():
    model = prepared("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with record() as first:
        model(input_ids=IDS, use_cache=False)
    loss = first.keys(rotated=False).square().sum()
    recorded = [id(layer) for layer in first.ordered()]
    with record([0]) as later:
        model(input_ids=IDS[:, :3], use_cache=False)
    loss.backward()
    assert [id(layer) for layer in first.ordered()] == recorded
    assert later.keys(rotated=True).shape[3] == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", Geometry(3, 4, 2, 12, 12)),
        ("qwen2", Geometry(3, 4, 2, 8, 8)),
        ("mistral", Geometry(3, 4, 2, 12, 12)),
        ("gpt2", Geometry(3, 4, 4, 8, 8)),
    ],
)
def test_geometry_is_what_the_model_really_has(name, expected):
    assert prepare(fresh(name), "student") == expected


def test_preparing_leaves_weights_mode_and_random_state_alone():
    model = fresh("gpt2").train()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prepare(model, "student")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
