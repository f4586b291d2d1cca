"""What is noted of the code that jobs import is of that code, wherever the command that notes it was called."""

import pytest

from kv_align.runs.files import read_json
from kv_align.runs.sweep_dir import SweepDirectory
from launch.journal.journal import Journal
from launch.worker import code
from launch.worker.code import changed_code, freeze_code, take_snapshot
from tests.kv_align.test_provenance import commit_all


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of a trainer of one line, as if this process had it from there."""
    file = tmp_path / "checkout" / "kv_align" / "train.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n")
    commit_all(tmp_path / "checkout")
    monkeypatch.setattr(code, "code_root", lambda: tmp_path / "checkout")
    return tmp_path / "checkout"


def noted(journal):
    content = read_json(journal.folder / "code.json")
    return content["commit"], content["uncommitted"], list(content["files"])


def test_the_commit_is_that_of_the_folder_that_is_named(checkout, tmp_path):
    journal = Journal(SweepDirectory(tmp_path / "sweep"))
    freeze_code(journal, checkout)
    commit = (checkout / ".git" / "refs" / "heads").iterdir().__next__().read_text().strip()
    assert noted(journal) == (commit, False, ["kv_align/train.py"])
    (checkout / "kv_align" / "train.py").write_text("a = 2\n")
    freeze_code(journal, checkout)
    assert noted(journal) == (commit, True, ["kv_align/train.py"])
    copy = take_snapshot(journal)
    freeze_code(journal, copy, checkout)
    assert noted(journal) == (commit, True, ["kv_align/train.py"])
    freeze_code(journal, copy)
    assert noted(journal) == ("", False, ["kv_align/train.py"]), "nobody knows of what commit a copy is"


def test_a_copy_is_made_anew_and_has_nothing_of_the_one_before(checkout, tmp_path):
    journal = Journal(SweepDirectory(tmp_path / "sweep"))
    (checkout / "kv_align" / "old.py").write_text("")
    copy = take_snapshot(journal)
    freeze_code(journal, copy, checkout)
    (checkout / "kv_align" / "old.py").unlink()
    (checkout / "kv_align" / "train.py").write_text("a = 2\n")
    assert changed_code(journal, copy) == []
    assert take_snapshot(journal) == copy
    assert (copy / "kv_align" / "train.py").read_text() == "a = 2\n"
    assert changed_code(journal, copy) == ["kv_align/old.py", "kv_align/train.py"]
