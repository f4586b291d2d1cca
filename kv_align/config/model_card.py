"""What a model's own files say about it, without loading it and without importing torch.

Only local folders (and the embedded pair) can be asked here; a name on the hub answers None until it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kv_align.runs.errors import ConfigError

_MODELS = Path(__file__).parents[1] / "models"
EMBEDDED = _MODELS / "embedded"
SHIPPED = ("embedded", "llama_17m")
"""Names of models that come with the package: the embedded pair, and an architecture for a student from scratch."""
_LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "vocab_size": 100_000_000}
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.model")


@dataclass(frozen=True)
class ModelCard:
    """Facts from a model folder.

    Attributes
    ----------
    num_layers
        Decoder layers; 0 where the files do not say it.
    vocabulary
        Tokens that it gives logits of; 0 where the files do not say it.
    tokenizer
        Its `tokenizer.json`; None where there is no such file.
    has_weights
        Whether there are safetensors weights.
    """

    num_layers: int
    vocabulary: int
    tokenizer: Path | None
    has_weights: bool

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of its tokens and how they are merged, however they are written; None where there is no such file."""
        return None if self.tokenizer is None else _digest_of_tokens(self.tokenizer.read_bytes())


def model_path(name: str, role: str) -> str:
    """Return what transformers loads: the folder of what comes with the package, an absolute folder, or the hub's name.

    Raises
    ------
    ConfigError
        If `name` is written as a folder and there is no model in it.
    """
    if name == "embedded":
        return str(EMBEDDED / role)
    if name in SHIPPED:
        return str(_MODELS / name)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.is_dir() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or not name:
        raise ConfigError(
            f"model.{role}={name} is not allowed: there is no config.json in that folder; "
            "name a folder written by save_pretrained, a model on the hub, or embedded."
        )
    return name


def tokenizer_path(teacher: str, student: str, role: str) -> str:
    """Return where the tokenizer of a role is: with the teacher, for a student whose folder has none, an architecture alone.

    Raises
    ------
    ConfigError
        As `model_path`.
    """
    own = model_path(teacher if role == "teacher" else student, role)
    folder = Path(own)
    if role == "student" and folder.is_dir() and not any(file for each in _TOKENIZER for file in folder.glob(each)):
        return model_path(teacher, "teacher")
    return own


def model_card(path: str) -> ModelCard | None:
    """Return the facts in a model folder; None for a name on the hub.

    Raises
    ------
    ValueError
        If its `config.json` holds no configuration.
    """
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"it holds {json.dumps(config)[:20]} and no object")
    sizes = {key: config.get(key) for key in ("num_hidden_layers", "n_layer", "vocab_size")}
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"its {key} is {json.dumps(value)} and no whole number above 0")
        if value is not None and value > _LARGEST[key]:
            raise ValueError(f"its {key} is {value}, more than any model has")
    tokenizer = Path(path) / "tokenizer.json"
    return ModelCard(
        num_layers=sizes["num_hidden_layers"] or sizes["n_layer"] or 0,
        vocabulary=sizes["vocab_size"] or 0,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        has_weights=any(Path(path).glob("*.safetensors")),
    )


@lru_cache(maxsize=4)
def _digest_of_tokens(content: bytes) -> str:
    """Look at nothing that saving a tokenizer again may write otherwise; what else differs is seen when it is loaded."""
    try:
        model = json.loads(content)["model"]
        # Of one kind of tokenizer a list with scores, whose last digits depend on who wrote them.
        tokens = model["vocab"] if isinstance(model["vocab"], dict) else [token for token, _ in model["vocab"]]
        # Pairs, or both in one string as older libraries wrote them.
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        content = json.dumps([tokens, merges], sort_keys=True).encode()
    except (ValueError, KeyError, TypeError):
        pass  # no tokenizer at all; what it is instead is all there is to compare
    return hashlib.sha256(content).hexdigest()
