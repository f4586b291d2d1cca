"""The journal survives whatever kills its writer, and its lock is gone with who held it."""

import subprocess
import sys
import threading

from kv_align.plans import SweepDirectory
from launch.journal import Journal, append, read


def test_the_ledger_knows_the_last_place_of_each_run(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    journal.submitting([["a"], ["b", "c"]], "first")
    journal.submitted("first", "12")
    journal.cancelled(["a", "b"])
    journal.submitting([["a"]], "second", after="first")
    ledger = journal.ledger()
    assert ledger.cancelled == {"b"}
    assert {name: place.job for name, place in ledger.places.items()} == {"a": None, "b": "12_1", "c": "12_1"}
    assert ledger.places["a"].submission.after == "first"
    journal.submitted("second", "13")
    assert journal.ledger().places["a"].job == "13", "a single batch is no array"


def test_a_torn_line_costs_only_itself(tmp_path):
    file = tmp_path / "rows.jsonl"
    append(file, {"event": "one"})
    with file.open("a") as stream:
        stream.write('{"event": "to')
    append(file, {"event": "three"})
    assert [row["event"] for row in read(file)] == ["one", "three"]


def test_the_lock_excludes_and_dies_with_its_holder(tmp_path):
    code = (
        "import sys, time; from kv_align.plans import SweepDirectory; from launch.journal import Journal\n"
        "with Journal(SweepDirectory(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    journal, got = Journal(SweepDirectory(tmp_path)), threading.Event()

    def wait_for_it():
        with journal.lock():
            got.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert not got.wait(0.5)
    holder.kill()
    assert got.wait(5.0)
    thread.join()
    holder.wait()
    holder.stdout.close()
