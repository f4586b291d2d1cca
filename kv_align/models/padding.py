"""Whether a decoder can be given texts of several lengths at once, padded on their left, as it generates."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from kv_align.models.evaluating import evaluating

_LEFT, _TOKENS = 3, 5


@torch.no_grad()
def pads_left(model: PreTrainedModel) -> bool:
    """Whether a text padded on its left gets the predictions that it gets alone.

    Decoders that count positions from the padding on, and take none by `position_ids`, predict something else.
    """
    device = model.device
    text = torch.arange(1, _TOKENS + 1, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    mask = torch.ones(1, _LEFT + _TOKENS, dtype=torch.long, device=device)
    mask[:, :_LEFT] = 0
    padded = torch.cat((text[:, :1].expand(1, _LEFT), text), dim=1)
    # As `generate` gives them: to a model that names them.
    positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    named = "position_ids" in inspect.signature(model.forward).parameters
    with evaluating(model):
        alone = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits.float()
        behind = model(
            input_ids=padded, attention_mask=mask, use_cache=False, **positions if named else {}
        ).logits.float()
    return bool((behind[:, _LEFT:] - alone).abs().max() <= 1e-3 * alone.abs().max())
