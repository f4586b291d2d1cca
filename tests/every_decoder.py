"""Every causal decoder that the installed transformers can build small: configurations shrunk field by field."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DECODERS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 16
RULES: list[tuple[str, int]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|sep_token_id|cls_token_id", 2),
    (r".*vocab_size(_per_layer_input)?|.*ngram_vocab_size_base", 64),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|dff|ffn_embed_dim)", 48),
    (r".*experts_per_tok|moe_top_?k|top_k_experts|.*moe_topk|num_selected_experts", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|num_nextn_predict_layers|first_k_dense_replace", 1),
    (r".*experts", 4),
    (r".*(num_key_value_heads|num_kv_heads)", 2),
    (r"(encoder|decoder)_layers|num_hidden_layers|n_layers?|num_layers|num_decoder_layers|num_encoder_layers", 4),
    (r".*attention_heads|n_heads?|num_heads", 4),
    (r".*(head_dim|d_kv)|attention_head_size|v_head_dim|.*_head_size", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r".*lora_rank", 8),
    (
        r".*(sliding_window|window_size|attention_window|attention_chunk_size|chunk_size|attn_window|chunk_len.*)",
        WINDOW,
    ),
    (
        r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions|max_source_positions|seq_length",
        256,
    ),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|model_dim|word_embed_proj_dim|lru_width|embd_dim)", 32),
]
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DOUBLE = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [0, 1, 2, 3]},
    "granitemoehybrid": MAMBA | {"layer_types": ["full_attention", "linear_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": ["mamba", "hybrid"] * 2} | DOUBLE,
    "zamba2": DOUBLE | {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "intermediate_size": 48},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "ernie4_5_moe": {"moe_k": 2},
    "kimi_linear": {"num_experts_per_tok": 2} | LATENT,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
    "qwen2": {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "cpmant": {"prompt_length": 4, "segment_types": 4, "dim_head": 8},
    "xlm": {"emb_dim": 32, "n_langs": 1, "max_vocab": -1, "causal": True},
    "xlnet": {"d_inner": 48, "d_head": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "longcat_flash": {"head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "zero_expert_num": 2},
    "bailing_hybrid": LATENT | {"head_dim": 8},
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        LATENT,
    ),
}


def shrunk(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration like this one, but small."""
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = shrunk(value, own) | {"model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, small in RULES:
                if re.fullmatch(pattern, name):
                    if value > small or "token_id" in name:
                        changed[name] = small
                    break
    return changed | {name: value for name, value in own.items() if hasattr(config, name)}


def tiny(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A small random model of a family, with weights so large that every layer, head and token differs."""
    kind = CONFIG_MAPPING[model_type]
    config = kind(**shrunk(kind(), OWN.get(model_type, {})))
    config.is_decoder = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()
