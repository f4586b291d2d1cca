"""What all tests share: no network, one thread, shapes checked at every public border, tiny models made on the spot."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["KV_ALIGN_DATA_CACHE"] = "off"

from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
# Whatever annotates shapes has them checked.
TENSOR_MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "kv_align").rglob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(TENSOR_MODULES, "beartype.beartype")

import pytest
import torch
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

GSM8K_FOLDER = Path(os.environ.get("KV_ALIGN_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))


# How long an example takes says nothing on a busy machine.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_ROOT_LEVEL = logging.getLogger().level
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A shell has what it starts in the background ignore Ctrl-C, and all that the tests start would do so too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_are_as_they_were() -> Iterator[None]:
    """Fail a test that leaves a signal handled otherwise: what later tests start would inherit that it is ignored."""
    before = [signal.getsignal(number) for number in _SIGNALS]
    yield
    assert [signal.getsignal(number) for number in _SIGNALS] == before


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    """A worker that is run in process sets the root's level and handlers, and a later test reads what is logged."""
    root = logging.getLogger()
    root.setLevel(_ROOT_LEVEL)  # of a fixture that outlives its test
    handlers = root.handlers[:]
    yield
    root.setLevel(_ROOT_LEVEL)
    root.handlers[:] = handlers


@pytest.fixture(scope="module", autouse=True)
def _kept_apart_from_garbage() -> None:
    """Leave what was imported so far out of garbage collection, which some libraries ask for in every call."""
    gc.collect()
    gc.freeze()


# Workers take files in this order: one that began late would keep the others waiting for it.
_LONGEST_FIRST = [
    Path(__file__).parent / name
    for name in (
        "slurm/test_faults.py",
        "slurm/test_weights.py",
        "slurm/test_waiting.py",
        "slurm/test_random_faults.py",
        "slurm/test_multirun.py",
        "slurm/test_disk.py",
        "kv_align/test_two_processes.py",
        "kv_align/test_teacher_cache.py",
        "kv_align/test_experiment.py",
        "launch/executors/local/test_queue.py",
        "kv_align/test_resume.py",
        "launch/worker/test_sharing.py",
        "kv_align/test_harness.py",
        "kv_align/test_command_line.py",
    )
]
assert all(file.exists() for file in _LONGEST_FIRST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: number for number, file in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_report_header() -> str:
    found = "found" if GSM8K_FOLDER.is_dir() else "missing: its tests are left out; set KV_ALIGN_GSM8K to its folder"
    return f"GSM8K files in {GSM8K_FOLDER}: {found}"


@pytest.fixture
def gsm8k_folder() -> Path:
    """The real GSM8K files; a test that asks for them is left out where they are missing."""
    if not GSM8K_FOLDER.is_dir():
        pytest.skip(f"the GSM8K files are not in {GSM8K_FOLDER}; set KV_ALIGN_GSM8K to their folder")
    return GSM8K_FOLDER
