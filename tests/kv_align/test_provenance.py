"""What is recorded of the code gives numbers back and no secrets away."""

import logging
import subprocess
from pathlib import Path

import pytest

from kv_align.runs import provenance
from kv_align.runs.provenance import git_state, without_secrets

SECRETS = [
    "+HF_TOKEN = 'hf_abcdefghijklmnopqrstuvwxyz'",
    "-key: ghp_0123456789abcdefghijABCDEFGHIJ",
    "+client = Client('sk-0123456789abcdefghij')",
    "+aws = AKIAIOSFODNN7EXAMPLE",
    "+-----BEGIN RSA PRIVATE KEY-----",
    '+  "wandb_api_key": "0123456789abcdef0123456789abcdef01234567"',
    "+export DB_PASSWORD=correct-horse-battery-staple",
]
HARMLESS = [
    "+tokens = tokenizer(text)",
    "+    pad_token_id=tokenizer.eos_token_id",
    "+max_new_tokens: 96",
    '+    "teacher_sha256": weights_digest(model),',
    "+secret = read_secret(path)",
    "+task-0123456789abcdefghijk",
]


def commit_all(folder: Path) -> None:
    """Make a folder a checkout of all that is in it."""
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=folder, check=True)


@pytest.mark.parametrize("line", SECRETS)
def test_a_line_that_looks_like_a_secret_is_left_out_and_said(line: str, caplog: pytest.LogCaptureFixture) -> None:
    diff = f"+++ b/kv_align/train.py\n@@ -1 +1 @@\n{line}\n+more = 1\n"
    with caplog.at_level(logging.WARNING):
        shown = without_secrets(diff)
    assert shown == f"+++ b/kv_align/train.py\n@@ -1 +1 @@\n{line[0]}[a line that looks like a token]\n+more = 1\n"
    (message,) = caplog.messages
    assert "kv_align/train.py looks like a token" in message
    assert "KV_ALIGN_GIT_DIFF=off" in message


def test_other_lines_stay(caplog: pytest.LogCaptureFixture) -> None:
    diff = "\n".join(HARMLESS)
    assert without_secrets(diff) == diff
    assert caplog.messages == []


def test_a_diff_is_left_out_on_demand_and_still_tells_two_states_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kv_align" / "runs").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "kv_align" / "runs" / "provenance.py"))
    file = tmp_path / "kv_align" / "code.py"
    file.write_text("a = 1\n")
    commit_all(tmp_path)
    assert git_state()[1] == ""
    file.write_text("a = 2\n")
    commit, diff = git_state()
    assert len(commit) == 40
    assert "+a = 2" in diff
    monkeypatch.setenv("KV_ALIGN_GIT_DIFF", "off")
    first = git_state()[1]
    file.write_text("a = 3\n")
    second = git_state()[1]
    assert "a = " not in first + second
    assert first.startswith("left out by KV_ALIGN_GIT_DIFF=off; its SHA-256 is ")
    assert first != second


@pytest.mark.parametrize("left_out", [False, True])
def test_a_change_to_a_file_in_another_encoding_is_recorded_and_tells_two_states_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: bool
) -> None:
    file = tmp_path / "names.csv"
    file.write_bytes("Müller\n".encode("latin-1"))
    commit_all(tmp_path)
    if left_out:
        monkeypatch.setenv("KV_ALIGN_GIT_DIFF", "off")
    states = []
    for name in ("René", "Renè"):
        file.write_bytes(f"{name}\n".encode("latin-1"))
        states.append(git_state(tmp_path)[1])
    assert states[0] != states[1]
    assert left_out or [line for line in states[0].splitlines() if line[1:2] in "MR"] == ["-M\\xfcller", "+Ren\\xe9"]


def test_copies_without_a_commit_are_told_apart_by_their_source_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kv_align"
    (package / "runs").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "runs" / "provenance.py"))
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (package / "code.py").write_text(text)
        (package / "notes.txt").write_text(text * 2)  # is no code
        found = provenance.attempt_provenance()
        assert found["git_commit"] == ""
        digests.append(found["code_sha256"])
    assert digests[0] == digests[2] != digests[1]
    (package / "code.py").rename(package / "other.py")
    assert provenance.code_digest() not in digests
