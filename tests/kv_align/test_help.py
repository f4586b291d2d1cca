"""What `kv-align`, its `--help` and its completion say: all there is, with what it means, without anything heavy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kv_align as kv_align_package
from kv_align.config.help import completion
from kv_align.config.help.commands import VERBS
from kv_align.config.help.completion import complete
from kv_align.config.help.describe import (
    choices,
    default_choices,
    described,
    groups_of,
    keys_of,
    keys_of_entry,
    read_file,
)
from kv_align.config.targets import config_directory

CONF = config_directory()
DEFAULTS = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
TRAIN_GROUPS = [next(iter(each)) for each in DEFAULTS if each != "_self_"]


def kv_align(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call the command where importing torch, transformers or pandas ends in an error."""
    for name in ("torch", "transformers", "pandas"):
        (folder / f"{name}.py").write_text("raise ImportError('heavy')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(CONF.parent), *sys.path[1:]])}
    command = [sys.executable, "-m", "kv_align", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


# Meanings


@pytest.mark.parametrize("entry", ["train", "pretrain", "submit"])
def test_every_key_has_a_meaning(entry: str) -> None:
    assert [key.path for key in keys_of_entry(entry) if not key.meaning] == []


@pytest.mark.parametrize("group", [*TRAIN_GROUPS, "sweep", "cluster", "criteria"])
def test_every_choice_has_a_meaning(group: str) -> None:
    files = choices(group)
    assert files
    assert [name for name, file in files.items() if not file.meaning] == []


def test_the_groups_that_are_shown_are_those_of_the_entry_point() -> None:
    assert sorted(groups_of("train")) == sorted(TRAIN_GROUPS)
    assert default_choices("train") == {
        "model": "embedded",
        "adapter": "none",
        "data": "arithmetic",
        "aligner": "structured",
        "init": "uniform",
        "layer_map": "proportional",
        "time_warp": "segment",
        "keys": "unrotated",
        "loss": "kv",
        "trainer": "quick",
    }


def test_every_key_of_the_yaml_files_is_shown_with_the_value_of_the_default_choice() -> None:
    text = described("train")
    for group, choice in default_choices("train").items():
        for name, value in yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()).items():
            if name in ("name", "_target_", "defaults") or isinstance(value, dict):
                continue
            shown = re.search(rf"^   {group}\.{name}=(\S*)", text, re.MULTILINE)
            assert shown is not None, (group, name)
            assert yaml.safe_load(shown[1]) == value


def test_a_comment_above_and_one_beside_are_read_and_structure_is_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# @package _global_\n# What it is.\n# And more.\n"
        "defaults:\n  - base\n  - other@part\n  - _self_\n\nname: mine\n"
        "one: 1 # beside\n# above,\n# in two lines\ntwo: [a, b]\n"
        "outer: # both\n  inner: x # within\n# of nothing\n\nthree: 3\n"
    )
    read = read_file(file)
    assert (read.meaning, read.named, read.bases) == ("What it is. And more.", True, ("base",))
    assert [(key.path, key.value, key.meaning) for key in read.keys] == [
        ("one", "1", "beside"),
        ("two", "[a, b]", "above, in two lines"),
        ("outer", "", "both"),
        ("outer.inner", "x", "within"),
        ("three", "3", ""),
    ]


def test_a_choice_has_the_keys_of_the_files_that_it_starts_from() -> None:
    owners = {key.path: of for key, of in keys_of("data")}
    assert owners["max_length"] == owners["rationale"] == ("arithmetic", "arithmetic_large", "gsm8k", "text")
    assert owners["min_steps"] == ("arithmetic", "arithmetic_large")
    assert owners["scored_turns"] == ("text",)


def test_choices_of_a_user_are_shown_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "aligner").mkdir()
    (tmp_path / "aligner" / "mine.yaml").write_text("# My own map.\nname: mine\n_target_: a.b\nwidth: 3 # of it\n")
    text = described("train", str(tmp_path))
    assert re.search(r"^   mine +My own map$", text, re.MULTILINE)
    assert re.search(r"^   aligner\.width=3 +of it \(mine\)$", text, re.MULTILINE)


# Help


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--help"], "kv-align COMMAND"),
        (["train", "--help"], "usage: kv-align train"),
        (["profile", "--help"], "loss.lambda_kv="),
        (["pretrain", "--help"], "teacher.hidden_size=160"),
        (["summary", "--help"], "usage: kv-align summary"),
        (["launch", "--help"], "usage: kv-align launch"),
        (["launch", "submit", "--help"], "cluster.partition=null"),
        (["report", "--help"], "usage: kv-align report"),
        (["compare", "--help"], "usage: kv-align compare"),
        (["collect", "--help"], "usage: kv-align collect"),
        (["launch", "resume", "--help"], "usage: kv-align launch resume"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, list) else "",
)
def test_help_is_shown_without_anything_heavy(words: list[str], told: str, tmp_path: Path) -> None:
    done = kv_align(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert told in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_without_a_command_and_with_a_wrong_one_it_says_what_there_is(tmp_path: Path) -> None:
    nothing, wrong = kv_align(folder=tmp_path), kv_align("trian", folder=tmp_path)
    assert (nothing.returncode, wrong.returncode) == (2, 2)
    for verb in VERBS:
        assert f"  {verb} " in nothing.stderr
    assert wrong.stderr == f"kv-align: trian is no command; use one of {', '.join(VERBS)}.\n"


def test_bad_input_keeps_its_exit_code(tmp_path: Path) -> None:
    done = kv_align("train", "aligner=flatt", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("kv-align: aligner=flatt is not allowed")


# Completion


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kv-align pr", ["pretrain ", "profile "]),
        ("kv-align train align.", ["align.fit=", "align.fit_steps=", "align.period="]),
        ("kv-align train experim", ["experiment="]),
        ("kv-align train aligner=st", ["aligner=structured "]),
        ("kv-align train seed=3 loss=kv loss.met", ["loss.metric="]),
        ("kv-align train loss.metric=", ["loss.metric=cosine ", "loss.metric=mse "]),
        ("kv-align train aligner.elastic=", ["aligner.elastic=false ", "aligner.elastic=true "]),
        ("kv-align train --mul", ["--multirun "]),
        ("kv-align launch s", ["status ", "submit "]),
        ("kv-align launch submit cluster=s", ["cluster=slurm "]),
        ("kv-align launch submit sweep=dem", ["sweep=demo "]),
        ("kv-align launch submit cluster.part", ["cluster.partition="]),
        ("kv-align launch status out", []),
        ("kv-align report --req", ["--require "]),
    ],
)
def test_a_word_becomes(line: str, found: list[str]) -> None:
    assert complete(line) == found


@pytest.mark.parametrize("option", ["--config-dir={}", "--config-dir {}"])
@pytest.mark.parametrize("command", ["train", "profile", "launch submit"])
def test_groups_of_the_users_own_are_completed(option: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "aligner").mkdir()
    (tmp_path / "aligner" / "mine.yaml").write_text("# My map.\nname: mine\n_target_: a.b\nspan: 3 # one | two\n")
    line = f"kv-align {command} {option.format(tmp_path)} "
    assert complete(f"{line}aligner=m") == ["aligner=mine "]
    assert complete(f"{line}aligner.sp") == ["aligner.span="]
    assert complete(f"{line}aligner.span=") == ["aligner.span=one ", "aligner.span=two "]
    assert complete(f"kv-align {command} aligner.sp") == []
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "own.yaml").write_text("# My sweep.\nbaseline: flat\n")  # a sweep needs no name
    assert complete(f"{line}sweep=o") == (["sweep=own "] if command == "launch submit" else [])


def test_the_choices_of_ones_own_are_in_the_help_of_submit(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "own.yaml").write_text("# My sweep.\nbaseline: flat\n")
    done = kv_align("launch", "submit", "--config-dir", str(tmp_path), "--help", folder=tmp_path)
    assert re.search(r"^   own +My sweep$", done.stdout, re.MULTILINE)


def test_the_version_says_where_the_groups_are(tmp_path: Path) -> None:
    told = kv_align("--version", folder=tmp_path).stdout
    assert told == f"kv-align {kv_align_package.__version__}, whose groups are in {CONF}\n"


def test_bash_completes_what_follows_the_equals_sign(tmp_path: Path) -> None:
    command = tmp_path / "kv-align"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={CONF.parent} exec {sys.executable} -m kv_align "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(kv-align completion)"; COMP_LINE="kv-align train aligner=s"; COMP_POINT=${#COMP_LINE}; _kv_align; '
        'printf "%s|" "${COMPREPLY[@]}"; complete -p kv-align'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("structured |complete -o default -o nospace -F _kv_align kv-align\n", "")


@pytest.mark.parametrize("module", ["kv_align.train", "kv_align.pretrain"])
def test_an_interruption_while_a_command_still_imports_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CONF.parent), *sys.path[1:]])}
    command = [sys.executable, "-m", module, "seed=1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "kv-align: interrupted; run the same command again to go on\n")


def test_completion_says_how_it_is_turned_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kv-align completion", "--help"])
    completion.main()
    assert capsys.readouterr().out.startswith('usage: eval "$(kv-align completion)"\n')


def test_the_completion_of_nothing_is_every_command_and_other_shells_are_refused(monkeypatch, capsys):
    assert set(complete("")) == {f"{verb} " for verb in VERBS}
    monkeypatch.setattr(sys, "argv", ["kv-align completion", "zsh"])
    with pytest.raises(SystemExit) as left:
        completion.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "kv-align: completion takes no words: it writes for bash; put its output into eval.\n"
    )
