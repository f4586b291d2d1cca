"""Numbers in conf/cluster and on the command line are decimal: what YAML reads to base sixty or eight is refused."""

import pytest
import yaml

from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError
from kv_align.runs.values import read_values
from launch.executors.registry import executor_class, kinds, load_cluster
from tests.launch.sweeps import CONF, launch

NOT_DECIMAL = {"4:00:00": 14400, "1:30": 90, "0240": 160, "0x10": 16, "0b11": 3, "1:30.5": 90.5, "010.5": 10.5}


def numbers(kind):
    """The keys of a kind of cluster that are numbers, nested ones with a dot."""

    def of(fields, before):
        for name, field in fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            if inner is not None:
                yield from of(inner, f"{before}{name}.")
            elif any(word in str(field.annotation) for word in ("int", "float")):
                yield before + name

    return sorted(of(executor_class(kind).schema.model_fields, ""))


ALL = [(kind, key) for kind in kinds() for key in numbers(kind)]


def test_all_numbers_are_looked_at():
    assert len(ALL) > 35
    assert {("slurm", "time_min"), ("slurm", "mem_gb"), ("local", "slots"), ("debug", "retry.pause_s")} <= set(ALL)


@pytest.mark.parametrize("written", NOT_DECIMAL)
def test_yaml_would_read_another_number(written):
    assert yaml.safe_load(written) == NOT_DECIMAL[written]
    assert read_values(written) == written
    assert read_values(f"{{a: [{written}]}}") == {"a": [written]}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("240", 240),
        ("0", 0),
        ("-1", -1),
        ("1_000", 1000),
        (".5", 0.5),
        ("32.0", 32.0),
        ("1.5e+3", 1500.0),
        ("null", None),
    ],
)
def test_decimal_numbers_are_read_as_ever(written, value):
    assert read_values(written) == value == yaml.safe_load(written)
    assert type(read_values(written)) is type(value)


@pytest.mark.parametrize(("kind", "key"), ALL)
def test_no_number_of_a_cluster_is_read_to_another_base(kind, key, tmp_path):
    written = "4:00:00"
    with pytest.raises(ConfigError) as refused:
        load_cluster(kind, {key: read_values(written)})
    raw = yaml.safe_load((config_directory() / "cluster" / f"{kind}.yaml").read_text())
    *parents, last = key.split(".")
    if last in (raw["retry"] if parents else raw):  # one that is not in the file has its default, and cannot be changed
        assert str(refused.value).startswith(f"cluster.{key}={written} is not allowed: set cluster.{key} to a")
    (raw["retry"] if parents else raw)[last] = "HERE"
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(yaml.safe_dump(raw).replace("HERE", "0240"))
    with pytest.raises(ConfigError, match=rf"cluster\.{key}=0240 is not allowed"):
        load_cluster("mine", {}, str(tmp_path))


def test_text_reaches_the_scheduler_as_it_was_written():
    cluster = load_cluster(
        "slurm", read_values("{additional_parameters: {time: 4:00:00, begin: 16:00}, account: '0123'}")
    )
    assert cluster.additional_parameters == {"time": "4:00:00", "begin": "16:00"}
    assert cluster.account == "0123"
    assert load_cluster("slurm", {"account": read_values("0123")}).account == "0123"


@pytest.mark.parametrize("written", ["4:00:00", "0240", "soon", "0"])
def test_what_an_arm_asks_for_is_checked_as_what_all_ask_for(tmp_path, written):
    (tmp_path / "sweep").mkdir()
    own = f"  none: {{experiment: none, resources: {{time_min: {written}}}}}"
    text = (CONF / "sweep" / "tiny.yaml").read_text().replace("  none: {experiment: none}", own)
    (tmp_path / "sweep" / "tiny.yaml").write_text(text)
    told = launch("submit", "sweep=tiny", "cluster=slurm", "--dry-run", "--config-dir", str(tmp_path))
    assert told.code == 2
    key = "arms.none.resources.time_min"
    assert told.err.startswith(f"launch: {key}={written} is not allowed: set {key} to a ")
    assert told.err.count("\n") == 1
