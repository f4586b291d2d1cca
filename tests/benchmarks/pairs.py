"""The pairs that are measured: random-init Llamas, and batches of random tokens for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kv_align.data.batch import Batch, pad
from kv_align.data.correspondence import Correspondence
from kv_align.data.encode import Encoded
from kv_align.data.example import Segment


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, hidden width, query heads, KV heads, head width."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Pair:
    """Teacher and student of one vocabulary."""

    vocabulary_size: int
    teacher: Shape
    student: Shape


PAIRS = {
    "tiny": Pair(497, Shape(6, 160, 8, 4, 24), Shape(3, 96, 4, 2, 16)),
    "small": Pair(8192, Shape(12, 512, 8, 4, 64), Shape(6, 256, 4, 2, 64)),
}


def make_model(vocabulary_size: int, shape: Shape) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=int(2.75 * shape.hidden_size),
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config)


def make_texts(vocabulary_size: int, count: int, length: int) -> list[Encoded]:
    """Texts of equal length, all of whose tokens are scored."""
    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary_size, (count, length)).tolist()
    return [Encoded(each, [int(Segment.REASONING)] * length, False) for each in ids]


def make_batch(texts: list[Encoded], places: list[int], device: torch.device) -> Batch:
    """The texts at these places, without padding, read alike by student and teacher."""
    tokens = pad([texts[place] for place in places], 0)
    correspondence = Correspondence(tokens.segments, tokens.segments, same_time=True)
    return Batch(tokens, tokens, tokens.mask, correspondence, tuple(places)).to(device)
