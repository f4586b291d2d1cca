"""Losses of predictions as functions of whole logits [B, T, V], for tests that look at their values."""

import torch
from torch import Tensor

from kv_align.config.signals import TopLogits
from kv_align.data.batch import Tokens
from kv_align.data.example import Segment
from kv_align.losses.functional import Masked
from kv_align.losses.predictions.linear_head import Predictions, RowLoss, row_losses
from kv_align.losses.predictions.next_token import CrossEntropy, Divergence
from kv_align.losses.predictions.top_k import TopDivergence, TopPredictions
from kv_align.losses.predictions.top_k import top_predictions as of_rows


def scored_tokens(scored: Tensor, ids: Tensor | None = None) -> Tokens:
    """Tokens of which just these are scored; a text's first never is."""
    segments = torch.where(scored, int(Segment.ANSWER), int(Segment.QUESTION))
    places = torch.arange(scored.shape[1]).expand(scored.shape)
    return Tokens(segments if ids is None else ids, torch.ones_like(scored), places, segments)


def summed(logits: Tensor, scored: Tensor, loss: RowLoss) -> Masked:
    rows = Predictions(logits.flatten(0, 1)).at(scored_tokens(scored).predicting)
    return Masked(row_losses(rows, [loss]).sum(), scored[:, 1:].sum())


def causal_cross_entropy(logits: Tensor, ids: Tensor, scored: Tensor) -> Masked:
    return summed(logits, scored, CrossEntropy(scored_tokens(scored, ids).predicted))


def logit_divergence(student: Tensor, teacher: Tensor, scored: Tensor, temperature: float) -> Masked:
    theirs = Predictions(teacher.flatten(0, 1)).at(scored_tokens(scored).predicting)
    return summed(student, scored, Divergence(theirs, temperature))


def top_divergence(student: Tensor, teacher: TopPredictions, scored: Tensor, wanted: TopLogits) -> Masked:
    return summed(student, scored, TopDivergence(teacher.at(scored_tokens(scored).predicting), wanted))


def top_predictions(logits: Tensor, wanted: TopLogits) -> TopPredictions:
    found = of_rows(Predictions(logits.flatten(0, 1)), wanted)
    return TopPredictions(*(each.view(*logits.shape[:2], -1) for each in found))
