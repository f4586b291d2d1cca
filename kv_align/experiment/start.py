"""Where a run starts: put together, compared with what its earlier attempts started from, and at its last checkpoint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kv_align.align.aligner import count_parameters
from kv_align.config.config import Config
from kv_align.config.extras import extras_versions
from kv_align.config.identity import content_hash, continued_run
from kv_align.config.inputs import changed_inputs, describe
from kv_align.data.example import Example
from kv_align.data.loader import data_order
from kv_align.data.prepared import PreparedSplit
from kv_align.data.token_cache import tokenizer_digest
from kv_align.evaluation.harness import check_tasks
from kv_align.experiment.assembly import Assembly, assemble
from kv_align.models.load import weights_digest
from kv_align.runs.digests import digest_of_json
from kv_align.runs.errors import ConfigError
from kv_align.runs.provenance import attempt_provenance
from kv_align.runs.run_dir import RunDirectory, read_json, write_json
from kv_align.runs.seeds import derive_seed
from kv_align.runs.stopwatch import Stopwatch

LOGGER = logging.getLogger(__name__)


def start(
    config: Config,
    directory: RunDirectory,
    checkpoints: Path,
    criteria_hash: str | None = None,
    stopwatch: Stopwatch | None = None,
) -> Assembly:
    """Put a run together, check that it starts from what its earlier attempts started from, and go to its last checkpoint."""
    check_tasks(config.evaluation.lm_eval or ())
    built = assemble(config, directory, checkpoints, stopwatch)
    _report_cuts(config, built)
    new = starting_point(config, built) | ({} if criteria_hash is None else {"criteria_sha256": criteria_hash})
    old = read_json(directory.provenance_file)
    if old is not None:
        _check_read(config, directory, old.get("inputs") or {}, new["inputs"] or {})
        for what in ("data_order_sha256", "texts_sha256", "initial_weights_sha256", "teacher_sha256"):
            if what in old and old[what] != new[what]:  # version 0.1.0 did not record the texts
                raise ConfigError(
                    f"{directory.path} cannot go on: its {what} is no longer what it started from, so code, data or a "
                    "model has changed since; restore that, or choose another run_name."
                )
        new["attempts"] = [*old["attempts"], *new["attempts"]]
    write_json(directory.provenance_file, new)
    built.loop.resume()
    built.evaluator.prepare()
    built.stopwatch.started()
    return built


def starting_point(config: Config, built: Assembly) -> dict[str, Any]:
    """Return what `provenance.json` says of a run: seeds, hashes, sizes, and this attempt."""
    projection, train = built.distiller.trainable_projection, built.splits.train
    return {
        "content_hash": content_hash(config),
        "seed": config.seed,
        "seeds": {purpose: derive_seed(config.seed, purpose) for purpose in ("student start", "data order", "dropout")},
        "data_order_sha256": data_order(config, len(train.examples)).digest(built.num_steps, train.ids),
        "initial_weights_sha256": built.initial_digests["student"],
        "initial_aligner_sha256": built.initial_digests["aligner"],
        "texts_sha256": {name: texts_digest(split.examples) for name, split in built.splits.by_name().items()},
        "teacher_sha256": weights_digest(built.teacher_model.model),
        "inputs": None if config.inputs is None else config.inputs | from_the_hub(config, built),
        "continues": continued_run(config),
        "layer_map": built.layers,
        "key_variance": built.distiller.key_variance.tolist(),
        "value_variance": built.distiller.value_variance.tolist(),
        "parameters": {
            "teacher": built.teacher_model.model.num_parameters(),  # also of one whose weights are packed
            "student": count_parameters(built.student_model.model),
            "student_trainable": built.student_model.model.num_parameters(only_trainable=True),
            # Or what the loss learns itself: whatever learns beside the student.
            "aligner": 0 if projection is None else count_parameters(projection),
        },
        "examples": {name: _split_facts(split) for name, split in built.splits.by_name().items()},
        "device": str(built.accelerator.device),
        "processes": built.processes.number,
        "attempts": [
            attempt_provenance() | {"torch_threads": torch.get_num_threads(), "extras": extras_versions(config)}
        ],
    }


def from_the_hub(config: Config, built: Assembly) -> dict[str, str]:
    """Return the SHA-256 of what a name on the hub gave, by the input's name: it is known only when it has been read."""
    known, found = config.inputs or {}, dict[str, str]()
    if "data" not in known and config.data.options.get("hub_name"):
        found["data"] = digest_of_json([texts_digest(split.examples) for split in built.splits.by_name().values()])
    for role, reader in (("teacher", built.teacher_model), ("student", built.student_model)):
        if f"{role} config" not in known:
            found[f"{role} config"] = hashlib.sha256(reader.model.config.to_json_string().encode()).hexdigest()
            found[f"{role} tokenizer"] = tokenizer_digest(reader.tokenizer)
    return found


def _check_read(config: Config, directory: RunDirectory, before: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to go on with what the hub gives otherwise than when the run was begun."""
    changed = [name for name in changed_inputs(before, now) if name in before and name in now]
    if changed:
        raise ConfigError(
            f"{describe(config, changed)} since {directory.path} was begun with it: name a folder that holds what it was, or "
            "choose another run_name."
        )


def texts_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) over the texts of a split, with their ids, segments and answers: what was read, from wherever it came."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(
            repr((example.id, example.question, example.steps, example.answer, example.turns)).encode() + b"\n"
        )
    return digest.hexdigest()


def _report_cuts(config: Config, built: Assembly) -> None:
    """Say what `data.max_length` takes from each split."""
    for name, split in built.splits.by_name().items():
        if split.cut or split.teacher_cut or split.dropped:
            LOGGER.info(
                "data.max_length=%d: of %d %s texts %d are cut, %d as the teacher reads them, and %d left out",
                config.data.max_length,
                len(split.examples) + split.dropped,
                name,
                split.cut,
                split.teacher_cut,
                split.dropped,
            )


def _split_facts(split: PreparedSplit) -> dict[str, int]:
    return {
        "used": len(split.examples),
        "cut": split.cut,
        "cut_for_teacher": split.teacher_cut,
        "left_out": split.dropped,
    }
