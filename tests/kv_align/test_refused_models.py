"""What cannot be recorded rightly is refused by name and reason, in one sentence, and nothing else is done to the model."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from kv_align.config.config import ModelConfig
from kv_align.config.model_card import EMBEDDED
from kv_align.models.capture.prepare import prepare, record
from kv_align.models.load import LanguageModel, load_student, load_teacher
from kv_align.runs.errors import ConfigError
from tests.families import EXPERTS, SHAPE

LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
}
SHARED = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def llama_with_other_heads_in_one_layer() -> PreTrainedModel:
    model = llama()
    other = copy.deepcopy(model.config)
    other.num_key_value_heads = 4
    model.model.layers[1].self_attn = LlamaAttention(other, layer_idx=1)
    model.model.layers[1].self_attn.config = model.config
    return model


class Shifted(nn.Module):
    """Adds to each token what stands one before it: keys that are not made of their own token alone."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        keys = self.projection(hidden)
        return keys + keys.roll(1, dims=1) * torch.arange(keys.shape[1])[:, None].clamp(max=1)


def llama_with_convolved_keys() -> PreTrainedModel:
    model = llama()
    model.model.layers[2].self_attn.k_proj = Shifted(model.model.layers[2].self_attn.k_proj)
    return model


REFUSED = {
    "linear attention": (
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **EXPERTS, **LINEAR)),
        r"only 2 of its 3 layers show keys and values \(it has layers of the kinds full_attention, linear_attention\)",
    ),
    "state space": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
        "its layers do not attend by softmax",
    ),
    "recurrent": (
        lambda: RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
        "only 0 of its 2 layers show keys and values",
    ),
    "shared keys": (
        lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**SHAPE | SHARED)),
        "its layer 2 attends to the keys and values of another layer",
    ),
    "latent": (
        lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE | LATENT)),
        r"its heads attend to 4 x 8 numbers of each token as keys, made of 1 x 8 that its cache holds \(latent attention\)",
    ),
    "two attentions in a layer": (
        lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**SHAPE)),
        "an attention layer attends 2 times in each forward pass, each time to other keys or values;",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        "it is an encoder-decoder",
    ),
    "sees the future": (lambda: BertLMHeadModel(BertConfig(**SHAPE)), "its tokens see later tokens"),
    "shapes": (llama_with_other_heads_in_one_layer, "differ in shape"),
}


# Their keys are seen, but not as they were before they were turned by their position.
TURNED = {
    "normed after rotation": (
        lambda: NanoChatForCausalLM(NanoChatConfig(**SHAPE)),
        "its rotary embedding cannot be undone: it does more than turn pairs of numbers",
    ),
    "convolved keys": (
        llama_with_convolved_keys,
        "its layers make keys of positions, in a way that cannot be undone",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_whose_states_would_be_wrong_is_refused_with_one_sentence(make, reason):
    torch.manual_seed(0)
    model = make().train()
    with pytest.raises(ConfigError, match=reason) as caught:
        prepare(model, "teacher")
    message = str(caught.value)
    assert message.startswith(f"model.teacher={type(model).__name__} is not supported: ")
    assert message.endswith("; use a decoder whose layers all attend by softmax to keys and values of their own.")
    assert "\n" not in message
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_decoder_half_of_an_encoder_decoder_is_a_decoder():
    config = BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1
    )
    torch.manual_seed(0)
    assert prepare(BartForCausalLM(config).eval(), "student").num_layers == 2


@pytest.mark.parametrize(("make", "reason"), TURNED.values(), ids=TURNED)
def test_keys_that_cannot_be_turned_back_are_given_as_they_are_and_never_otherwise(make, reason):
    torch.manual_seed(0)
    model, cache = make().eval(), DynamicCache()
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        assert prepare(model, "teacher").fixed_rotation == reason
        with record() as recorder:
            model(input_ids=ids, use_cache=False)
    for number, layer in enumerate(recorder.ordered()):
        torch.testing.assert_close(layer.k, cache.layers[number].keys)
    with pytest.raises(ValueError, match=reason):
        recorder.keys(rotated=False)
    with pytest.raises(ValueError, match=reason):
        recorder.queries(rotated=False)


def windowed_in_the_mask_alone() -> PreTrainedModel:
    kinds = ["sliding_attention"] * 3
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SHAPE | EXPERTS, use_sliding_window=True, sliding_window=16, layer_types=kinds)
    )


def gpt_neo() -> PreTrainedModel:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16}
    return GPTNeoForCausalLM(
        GPTNeoConfig(**shape, attention_types=[[["local", "global"], 1]], bos_token_id=1, eos_token_id=2)
    )


def falcon_h1() -> PreTrainedModel:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SHAPE, **mamba))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "longest", "windows"),
    [
        (windowed_in_the_mask_alone, 40, [16, 16, 16]),
        (windowed_in_the_mask_alone, 17, [16, 16, 16]),
        (windowed_in_the_mask_alone, 16, [None, None, None]),
        (gpt_neo, 40, [16, None]),
        (falcon_h1, 40, [None, None, None]),
    ],
)
def test_windows_are_those_that_the_model_is_seen_to_have_on_its_longest_text(make, longest, windows):
    torch.manual_seed(0)
    model = make().eval()
    geometry = prepare(model, "student", longest=longest)
    assert geometry.plain_attention
    assert geometry.gives_queries
    with torch.no_grad(), record() as recorder:
        model(input_ids=torch.arange(longest)[None], use_cache=False)
    assert [layer.form.window for layer in recorder.ordered()] == windows


def test_attention_in_chunks_is_seen_on_texts_beyond_one_alone():
    config = Llama4TextConfig(
        **SHAPE | {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48}
    )
    torch.manual_seed(0)
    assert prepare(Llama4ForCausalLM(config).eval(), "student", longest=16).plain_attention
    assert not prepare(Llama4ForCausalLM(config).eval(), "student", longest=17).plain_attention


# Weights


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> ModelConfig:
    """A pair whose models are a copy of the embedded student with other weights or another configuration."""
    shutil.copytree(EMBEDDED / "student", folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return ModelConfig(
        name="pair",
        teacher=str(folder),
        student=str(folder),
        student_start="pretrained",
        teacher_dtype="float32",
        gradient_checkpointing=False,
        remote_code=[],
    )


def loaders() -> dict[str, Callable[[ModelConfig], LanguageModel]]:
    cpu = torch.device("cpu")
    return {"teacher": lambda config: load_teacher(config, cpu), "student": lambda config: load_student(config, 0, cpu)}


LAST = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda weights: weights | {"model.layers.7.mlp.down_proj.weight": weights[LAST].clone()},
            "hold model.layers.7.mlp.down",
        ),
        (
            lambda weights: {name: each for name, each in weights.items() if name != LAST},
            f"lack {LAST}, and so are not",
        ),
        (
            lambda weights: weights | {LAST: weights[LAST][:, :3].clone()},
            f"have other shapes of {LAST}, and so are not",
        ),
        (
            lambda weights: {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]},
            r"lack .* and \d+ more, and",
        ),
    ],
    ids=["too many", "too few", "of another shape", "embeddings alone"],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(role, change, reason, tmp_path):
    config = changed_weights(tmp_path / "model", change)
    with pytest.raises(ConfigError, match=reason) as refused:
        loaders()[role](config)
    message = str(refused.value)
    assert message.startswith(f"model.{role}={tmp_path / 'model'} is not allowed: its weights ")
    assert message.endswith("LlamaForCausalLM in its config.json; save the model again, or correct its config.json.")
    assert "\n" not in message


def test_a_configuration_of_more_layers_than_the_weights_hold_is_refused(tmp_path):
    config = changed_weights(tmp_path / "model", lambda weights: weights)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(raw | {"num_hidden_layers": raw["num_hidden_layers"] + 1})
    )
    with pytest.raises(ConfigError, match=r"its weights lack model\.layers\.\d+\.input_layernorm\.weight, "):
        load_teacher(config, torch.device("cpu"))


def test_tied_weights_and_what_a_family_says_old_files_hold_are_fine(tmp_path):
    config = changed_weights(
        tmp_path / "model", lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    for load in loaders().values():
        assert load(config).geometry.num_layers > 2
