"""Tiny models, made on the spot."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kv_align.align.aligner import Aligner
from kv_align.data.correspondence import Correspondence
from kv_align.models.capture.prepare import prepare
from kv_align.models.capture.states import States


def make_llama(
    *,
    seed: int = 0,
    vocab_size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 12,
) -> PreTrainedModel:
    """A random Llama with grouped queries and a head width that is not hidden size over heads, ready to be recorded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    # The library's start makes all keys nearly alike; spread them, so that a wrong layer or head shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    prepare(model, "student")
    return model.eval()


def project(
    aligner: Aligner, kvq: Iterable[Tensor | None], student: Tensor, teacher: Tensor, same_time: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Project keys, values and queries between tokens of these segments."""
    target = aligner(States(*kvq), Correspondence(student, teacher, same_time))
    return target.k, target.v, target.q
