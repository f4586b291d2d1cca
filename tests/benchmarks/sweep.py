"""A sweep with and without the teacher cache: real runs, from the configuration to the summary."""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from kv_align.config.compose import compose_config
from kv_align.experiment.experiment import run
from kv_align.experiment.quiet import quiet_libraries
from tests.benchmarks.measure import now_s
from tests.benchmarks.pairs import Pair, make_model

RUNS = 32
"""Of the sweep that is spoken of."""
TEXTS, HELD_OUT, BATCH_SIZE, EPOCHS = 48, 8, 4, 3


@dataclass(frozen=True)
class Sweep:
    """Cost in seconds of single runs: without the cache, the one that fills it, and those that find it filled."""

    without_s: list[float]
    filling_s: float
    warm_s: list[float]

    def ratios(self) -> list[float]:
        """A whole sweep's cost with the cache over that without, by each pair of neighbouring runs.

        The sweep is one run that fills the cache and `RUNS - 1` that find it filled.
        """
        pairs = zip(self.without_s, self.warm_s, strict=True)
        return [(self.filling_s + (RUNS - 1) * warm) / (RUNS * without) for without, warm in pairs]


def measure_sweep(pair: Pair, length: int, runs: int, folder: Path) -> Sweep:
    """Do `runs` runs without, one that fills and `runs` with a filled cache, in turn, each with a seed of its own."""
    quiet_libraries()
    overrides = _settings(pair, length, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def cost_s(seed: int, cache: str, *others: str) -> float:
        config = compose_config([*overrides, f"seed={seed}", f"teacher_cache={cache}", *others])[0]
        began = now_s(device)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            state = run(config, folder / f"run-{seed}")
        assert state == "finished", state
        return now_s(device) - began

    cache = str(folder / "cache")
    # The first in a process imports what the others find imported.
    cost_s(1000, "off", "trainer.max_steps=1", "trainer.warmup_steps=0")
    filling_s = cost_s(2000, cache)
    without_s, warm_s = [], []
    for seed in range(runs):
        without_s.append(cost_s(seed, "off"))
        warm_s.append(cost_s(100 + seed, cache))
    return Sweep(without_s, filling_s, warm_s)


def _settings(pair: Pair, length: int, folder: Path) -> list[str]:
    """Save the pair and some texts, and name them."""
    words = {f"w{number}": number for number in range(pair.vocabulary_size - 1)}
    tokenizer = Tokenizer(WordLevel({**words, "</s>": len(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    for role, shape in (("teacher", pair.teacher), ("student", pair.student)):
        make_model(pair.vocabulary_size, shape).save_pretrained(folder / role)
        fast.save_pretrained(folder / role)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(list(words), k=length)) for _ in range(TEXTS + 2 * HELD_OUT)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    return [
        "model=pair",
        f"model.teacher={folder / 'teacher'}",
        f"model.student={folder / 'student'}",
        "model.student_start=scratch",
        "data=text",
        f"data.path={folder / 'texts.txt'}",
        f"data.max_length={length}",
        f"data.validation_examples={HELD_OUT}",
        f"data.test_examples={HELD_OUT}",
        "aligner=structured",
        "loss=kv",
        f"trainer.batch_size={BATCH_SIZE}",
        f"trainer.max_steps={EPOCHS * TEXTS // BATCH_SIZE}",
        "trainer.checkpoint_interval=1000",
        "evaluation.interval=1000",
        "evaluation.exact_match_examples=0",
        f"evaluation.calibration_examples={HELD_OUT}",
    ]
