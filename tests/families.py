"""Small random models of many families, as the library makes them, and what each makes of keys before any rotation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """How to make a small model, and what it is expected to be.

    Attributes
    ----------
    name, config
        Of the configuration class (without `Config`), and its arguments.
    kv_heads, width
        Its key/value heads, and their width.
    turned
        How many numbers of each head each layer rotates.
    windows
        Of each layer.
    keys
        From the outputs of the layer's own projections to its keys before rotation, [B, H, T, D]; None where nothing but
        `k_proj` and `k_norm` stands there.
    beyond
        What of `AttentionSpec` it has beyond scaled dot products and windows.
    known
        Whether that is all that its attention is.
    """

    name: str
    config: dict[str, Any] = field(default_factory=lambda: SHAPE)
    kv_heads: int = 2
    width: int = 8
    turned: tuple[int, int, int] = (8, 8, 8)
    windows: tuple[int | None, int | None, int | None] = (None, None, None)
    keys: tuple[str, Callable[[Tensor], Tensor]] | None = None
    beyond: tuple[str, ...] = ()
    known: bool = True

    def make(self, *, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A model with weights so large that every layer, head and token differs."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.name}Config")(**self.config)
        asked = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(config, **asked)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.to(dtype).eval()


def heads_first(keys: Tensor, width: int) -> Tensor:
    """[B, T, H D], [B, T, H, D] or [B, H, T, D] (with T above H) to the last."""
    if keys.dim() == 3:
        keys = keys.unflatten(-1, (-1, width))
    return keys.transpose(1, 2) if keys.shape[1] > keys.shape[2] else keys


FAMILIES = {
    "llama": Family("Llama", SHAPE | {"head_dim": 12}, width=12, turned=(12, 12, 12)),
    "llama yarn": Family("Llama", SHAPE | {"rope_parameters": YARN}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", SHAPE | {"head_dim": 12}, width=12, turned=(12, 12, 12)),
    "mistral": Family("Mistral", SHAPE | {"sliding_window": 4}, windows=(4, 4, 4)),
    "ministral": Family("Ministral", SHAPE | MIXED | {"head_dim": 8}, windows=(4, None, 4)),
    "gemma": Family("Gemma", SHAPE | {"head_dim": 12}, width=12, turned=(12, 12, 12)),
    "gemma2": Family(
        "Gemma2",
        SHAPE | MIXED | {"head_dim": 12, "query_pre_attn_scalar": 20},
        width=12,
        turned=(12, 12, 12),
        windows=(4, None, 4),
        beyond=("cap",),
    ),
    "gemma3": Family(
        "Gemma3Text",
        SHAPE | MIXED | {"head_dim": 12, "query_pre_attn_scalar": 20},
        width=12,
        turned=(12, 12, 12),
        windows=(4, None, 4),
    ),
    "phi": Family("Phi", turned=(4, 4, 4)),
    "phi3": Family(
        "Phi3",
        SHAPE | {"partial_rotary_factor": 0.5},
        turned=(4, 4, 4),
        keys=("qkv_proj", lambda fused: fused[..., 32:48]),
    ),
    "gpt2": Family("GPT2", GPT, kv_heads=4, turned=(0, 0, 0), keys=("c_attn", lambda fused: fused[..., 32:64])),
    "gpt neox": Family(
        "GPTNeoX",
        SHAPE,
        kv_heads=4,
        turned=(2, 2, 2),
        keys=("query_key_value", lambda fused: fused.unflatten(-1, (4, 24))[..., 8:16]),
    ),
    "gpt bigcode": Family(
        "GPTBigCode", GPT, kv_heads=1, turned=(0, 0, 0), keys=("c_attn", lambda fused: fused[..., None, 32:40])
    ),
    "opt": Family("OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, kv_heads=4, turned=(0, 0, 0)),
    "falcon": Family(
        "Falcon",
        SHAPE,
        kv_heads=1,
        keys=("query_key_value", lambda fused: fused[..., None, 32:40]),
    ),
    "falcon alibi": Family(
        "Falcon",
        SHAPE | {"alibi": True, "multi_query": False},
        kv_heads=4,
        turned=(0, 0, 0),
        keys=("query_key_value", lambda fused: fused.unflatten(-1, (4, 24))[..., 8:16]),
        beyond=("slopes",),
    ),
    "falcon grouped": Family(
        "Falcon",
        SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 2},
        kv_heads=4,  # it repeats its two before it keeps them
        keys=("query_key_value", lambda fused: fused.unflatten(-1, (2, 4, 8))[..., 2, :].repeat_interleave(2, dim=2)),
    ),
    "gptj": Family("GPTJ", GPT | {"rotary_dim": 4}, kv_heads=4, turned=(4, 4, 4)),
    "codegen": Family(
        "CodeGen",
        GPT | {"rotary_dim": 4},
        kv_heads=4,
        turned=(4, 4, 4),
        keys=("qkv_proj", lambda fused: fused.unflatten(-1, (4, 24))[..., 16:24]),
    ),
    "bloom": Family(
        "Bloom",
        OLD,
        kv_heads=4,
        turned=(0, 0, 0),
        keys=("query_key_value", lambda fused: fused.unflatten(-1, (4, 24))[..., 8:16]),
        beyond=("slopes",),
    ),
    "mpt": Family(
        "Mpt",
        {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
        kv_heads=4,
        turned=(0, 0, 0),
        keys=("Wqkv", lambda fused: fused[..., 32:64]),
        beyond=("slopes",),
    ),
    "xglm": Family(
        "XGLM",
        {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
        kv_heads=4,
        turned=(0, 0, 0),
    ),
    "cohere": Family("Cohere", SHAPE | {"use_qk_norm": True}),
    "cohere2": Family("Cohere2", SHAPE | MIXED, turned=(8, 0, 8), windows=(4, None, 4)),
    "glm": Family("Glm", SHAPE | {"head_dim": 8}, turned=(4, 4, 4)),
    "glm4": Family("Glm4", SHAPE | {"head_dim": 8}, turned=(4, 4, 4)),
    "ernie 4.5": Family("Ernie4_5", SHAPE | {"head_dim": 8}),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3", SHAPE | MIXED, windows=(4, None, 4)),
    "granite": Family("Granite", SHAPE | {"attention_multiplier": 0.2}),
    "smollm3": Family("SmolLM3", SHAPE | {"no_rope_layers": [1, 0, 1]}, turned=(8, 0, 8)),
    "stablelm": Family("StableLm", turned=(2, 2, 2)),
    "starcoder2": Family("Starcoder2", SHAPE | {"sliding_window": 4}, windows=(4, 4, 4)),
    "mixtral": Family("Mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen2 moe": Family("Qwen2Moe", SHAPE | EXPERTS),
    "qwen3 moe": Family("Qwen3Moe", SHAPE | EXPERTS | {"head_dim": 8}),
    "gpt oss": Family(
        "GptOss",
        SHAPE | MIXED | {"head_dim": 8, "num_local_experts": 4, "rope_parameters": YARN},
        windows=(4, None, 4),
        beyond=("sinks",),
    ),
    "doge": Family("Doge", known=False),
}
