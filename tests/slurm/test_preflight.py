"""What Slurm would refuse is refused before anything is queued, in one sentence that names the key."""

import pytest

from tests.launch.sweeps import CONF, launch
from tests.slurm.conftest import SMALL

WRONG = [
    ("cluster.partition=gpu", "cluster.partition=gpu is not allowed: set cluster.partition to one of high, low."),
    ("cluster.mem_gb=64", "cluster.mem_gb=64"),
    ("cluster.cpus_per_task=64", "cluster.cpus_per_task=64"),
    ("cluster.gpus_per_node=5", "cluster.gpus_per_node=5"),
    ("cluster.nodes=5", "cluster.nodes=5"),
    (
        "cluster.time_min=1000",
        "cluster.time_min=1000 is not allowed: set cluster.time_min to at most 600, the limit of low.",
    ),
    ("cluster.constraint=h100", "cluster.constraint=h100 is not allowed: sbatch says: Invalid feature specification"),
    (
        "cluster.python=/usr/bin/false",
        "cluster.python=/usr/bin/false is not allowed: after cluster.setup it cannot import",
    ),
    ("cluster.setup=[module load nothing]", "it cannot import launch"),
]


@pytest.mark.parametrize(("word", "sentence"), WRONG, ids=[word for word, _ in WRONG])
def test_one_sentence_and_nothing_queued(slurm, tmp_path, word, sentence):
    told = launch("submit", "sweep=tiny", f"output_dir={tmp_path}", *SMALL, word, "--config-dir", str(CONF))
    assert told.code == 2
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert slurm.out("squeue", "-h") == ""
