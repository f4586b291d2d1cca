"""Keeps the libraries' progress bars and routine messages out of a run's log; their warnings stay."""

from __future__ import annotations

import logging

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn down what Accelerate and transformers say of their normal work."""
    transformers_logging.disable_progress_bar()
    libraries = (
        "accelerate.accelerator",
        "accelerate.checkpointing",
        "accelerate.utils.fsdp_utils",
        "accelerate.utils.other",
    )
    for name in libraries:
        # The last warns of tied weights at every checkpoint; `tests/kv_align/test_resume.py` shows that they come back.
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of layers that are whole, as all are where nothing is spread over processes.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
    # Of a teacher that is spread or quantised, as was asked for: once, and at every layer of every forward.
    for name in ("accelerate.big_modeling", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
