"""The truth about runs, from synthetic folders: what the scheduler, the status file and the artefacts say together."""

import contextlib
import io
import json
import shutil
import time
from dataclasses import replace

import pytest

from kv_align.runs.run_dir import RunDirectory, Status
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.base import JobState
from launch.executors.registry import load_cluster
from launch.journal.journal import Journal
from launch.journal.ledger import JobRef, Ledger, Submission
from launch.planning.plan import make_plan
from launch.planning.sweep import load_sweep
from launch.status.judgement import STATES, HelperState, Overview, RunState, judge, needs
from launch.status.overview import overview
from launch.status.table import show, show_live
from tests.launch.sweeps import CONF, finish, launch

NOW = time.time()
RUNNING = Status("running", "", "a", "kv", 0, "h", 3, 6, 1, NOW, NOW, "host", 1, "")
STALE_S = 60.0


def ledger(job="7", cancelled=()):
    submission = Submission("u", NOW, (("x",),), None, job)
    return Ledger({"u": submission}, {"x": JobRef(submission, 0)}, set(cancelled))


def status(state, reason="", age_s=0.0):
    return replace(RUNNING, state=state, reason=reason, updated=time.time() - age_s)


TRUTH = [
    # scheduler, status file, journal -> state, in the reason
    (None, None, Ledger(), "missing", "not submitted"),
    (None, None, ledger(job=None), "missing", "did not reach"),
    (JobState("pending"), None, ledger(), "pending", ""),
    (JobState("pending", "QOSMaxJobs"), None, ledger(), "pending", "QOSMaxJobs"),
    (JobState("pending"), status("interrupted", "by USR2"), ledger(), "preempted", "by USR2"),
    (JobState("pending"), status("running", age_s=25), ledger(), "preempted", ""),
    (JobState("pending"), status("running", age_s=5), ledger(), "running", ""),
    (JobState("pending"), status("failed", "RuntimeError: old"), ledger(), "pending", ""),
    (JobState("held", "held: an error"), None, ledger(), "held", "held: an error"),
    (JobState("blocked", "can never start"), None, ledger(), "blocked", "can never start"),
    (JobState("blocked", "can never start"), status("interrupted", "by USR2"), ledger(), "blocked", "can never start"),
    (JobState("running"), None, ledger(), "running", ""),
    (JobState("running"), status("running"), ledger(), "running", ""),
    (JobState("running"), status("running", age_s=500), ledger(), "running", "no sign of life for 8 min"),
    (JobState("running"), status("failed", "old"), ledger(), "running", ""),
    (JobState("ended"), status("failed", "RuntimeError: x"), ledger(), "failed", "RuntimeError: x"),
    (JobState("ended", "out of memory"), status("running"), ledger(), "failed", "out of memory"),
    (JobState("ended"), status("diverged", "not finite"), ledger(), "diverged", "not finite"),
    (JobState("ended"), status("finished"), ledger(), "failed", "its artefacts are not there"),
    (
        JobState("ended", "its node failed"),
        status("interrupted", "by TERM"),
        ledger(),
        "failed",
        "its node failed and by TERM",
    ),
    (None, status("running"), ledger(), "running", "its job is unknown"),
    (None, status("running", age_s=500), ledger(), "lost", "last sign of life 8 min ago"),
    (JobState("gone", "gone"), None, ledger(), "lost", "gone; it never started"),
    (JobState("gone", "gone"), status("running"), ledger(), "lost", "gone; last sign of life 0 s ago"),
    (None, None, ledger(cancelled=["x"]), "cancelled", ""),
    (JobState("ended"), status("interrupted"), ledger(cancelled=["x"]), "cancelled", ""),
    (JobState("running"), status("running"), ledger(cancelled=["x"]), "running", ""),
]


@pytest.mark.parametrize(("job", "file", "journal", "state", "reason"), TRUTH)
def test_judgement(job, file, journal, state, reason):
    if file is not None:  # the table was made when the tests were collected
        file = replace(file, updated=time.time() - max(0.0, NOW - file.updated))
    found, said = judge("x", file, job, journal, STALE_S)
    assert found == state
    assert reason in said
    assert bool(reason) == bool(said)


@pytest.mark.parametrize(
    ("retry", "wanted"),
    [
        (None, {"missing", "failed", "lost", "cancelled", "held", "blocked"}),
        ("failed", {"failed"}),
        ("diverged", {"diverged"}),
        ("all", {"missing", "failed", "lost", "cancelled", "held", "blocked", "diverged"}),
    ],
)
def test_what_resume_takes(retry, wanted):
    runs = [RunState("x", "a", "kv", 0, state, "", 0, 0, None, 0, "", "") for state in STATES]
    assert {run.state for run in runs if needs(run, retry)} == wanted


def planned(path, seeds=2) -> tuple[SweepDirectory, Plan]:
    plan = make_plan(load_sweep("tiny", {"seeds": seeds}, str(CONF)), [], config_dir=str(CONF)).plan
    sweep = SweepDirectory(path)
    sweep.write_plan(plan)
    return sweep, plan


def test_done_needs_sound_artefacts(tmp_path):
    sweep, plan = planned(tmp_path)
    for run in plan.runs:
        finish(sweep.run(run), run.config)
    assert overview(sweep).counts() == {"done": 6}
    sweep.run(plan.runs[0]).summary_file.write_text("{")
    (sweep.run(plan.runs[1]).student / "model.safetensors").unlink()
    sweep.run(plan.runs[2]).status_file.write_text("garbage")
    assert overview(sweep).counts() == {"done": 3, "failed": 2, "missing": 1}


def test_a_hydra_multirun_is_read_without_a_plan(tmp_path):
    (tmp_path / "0").mkdir()
    finish(RunDirectory(tmp_path / "0"), {"loss": {"name": "kv"}, "seed": 4})
    directory = RunDirectory(tmp_path / "1")
    with directory.lock():
        begun = directory.begin({"loss": {"name": "kv"}, "seed": 5}, arm="b", content_hash="g", total_steps=8)
    directory.metrics_file.write_text('{"step": 2, "elapsed_s": 4.0}\n')
    directory.update(begun, step=2)
    (tmp_path / "1" / "train.log").write_text("so far so good\n")
    told = launch("status", str(tmp_path), "--json")
    shown = json.loads(told.out)
    assert (shown["planned"], shown["counts"]) == (False, {"done": 1, "running": 1})
    assert (shown["runs"][1]["eta_s"], shown["runs"][1]["seed"]) == (12.0, 5)
    assert launch("logs", str(tmp_path), "1").code == 0
    assert "a plain Hydra multirun: no frozen plan" in launch("status", str(tmp_path)).out
    told = launch("resume", str(tmp_path))
    assert told.code == 2
    assert "has no frozen plan, as a plain Hydra multirun has none" in told.err
    assert told.err.count("\n") == 1


def test_the_table_of_many_runs_shows_what_matters(tmp_path):
    from rich.console import Console

    sweep, plan = planned(tmp_path, seeds=30)
    for run in plan.runs[:80]:
        finish(sweep.run(run), run.config)
    journal = Journal(sweep)
    last = sweep.run(plan.runs[-1])
    with last.lock():
        begun = last.begin(plan.runs[-1].config, arm="b", content_hash="g", total_steps=8)
    last.update(begun, state="failed", reason="RuntimeError: made to fail")
    console = Console(width=80, record=True, file=io.StringIO())
    with contextlib.chdir(tmp_path.parent):
        console.print(show(overview(sweep), 5, 5))
    shown = console.export_text().splitlines()
    assert shown[1].split()[1:5] == ["failed", "0/8", "RuntimeError:", "made"], "what must be looked at comes first"
    assert shown[1].split()[0] == "none-ce-seed29", "the hash says nothing to a reader"
    assert shown[6] == "tiny: 80 done, 1 failed, 9 missing"
    words = f"to queue 10 of them again: python -m launch resume {tmp_path.name}".split()
    assert " ".join(shown[7:-1]).split() == words
    assert shown[-1] == "and 5 more that are neither done nor pending"
    assert all(len(line) <= 80 for line in shown)
    assert journal.ledger().jobs == {}


def test_a_terminal_of_80_by_24_shows_the_counts_and_what_runs_before_the_rest():
    from rich.console import Console

    def run(number, state, reason=""):
        name = f"a_long_name_of_an_arm-kv+struct-seed{number}-0123abcd"
        return RunState(name, "a", "kv", number, state, reason, 3, 900, 75.0, 1, "7", "host")

    runs = [run(number, "held", "held in Slurm by an administrator: " + "ask for it " * 20) for number in range(40)]
    runs += [run(number, "pending") for number in range(40, 60)] + [run(number, "running") for number in range(60, 65)]
    helpers = (HelperState("prepare", "failed", "exit code 7", "8"), HelperState("report", "done", "", "9"))
    now = Overview("/somewhere", "tiny", True, tuple(runs), helpers, ("paused: " + "the disk is full " * 20,))
    console = Console(width=80, height=24, record=True, file=io.StringIO())
    console.print(show_live(now, 80, 24))
    lines = console.export_text().splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "tiny: 5 running, 20 pending, 40 held"
    assert lines[1:3] == ["prepare job failed: exit code 7", lines[2]]
    assert lines[2].startswith("paused: ")
    assert lines[3] == "to queue 40 of them again: python -m launch resume /somewhere"
    assert [line.split()[1] for line in lines[5:10]] == ["running"] * 5
    assert lines[-1].endswith("more")


def test_a_folder_of_several_sweeps_has_a_line_for_each(tmp_path):
    for name in ("one", "two"):
        planned(tmp_path / "sweeps" / name)
    told = launch("status", str(tmp_path))
    assert [line.split() for line in told.out.splitlines()[1:]] == [
        ["one", "6", "6", "missing"],
        ["two", "6", "6", "missing"],
    ]
    assert [sweep["counts"] for sweep in json.loads(launch("status", str(tmp_path), "--json").out)] == [
        {"missing": 6}
    ] * 2


def test_a_sweep_that_cannot_be_seen_is_named_and_the_others_are_shown(tmp_path, fake_slurm):
    for name in ("damaged", "silent", "sound"):
        planned(tmp_path / "sweeps" / name)
    damaged, silent, _ = sorted((tmp_path / "sweeps").iterdir())
    (damaged / "plan.json").write_text("{")
    journal = Journal(SweepDirectory(silent))
    journal.write_setting(Setting(load_cluster("slurm", {}), {}, accounting=False, code=str(tmp_path)))
    journal.submitting([[next(run.id for run in journal.sweep.frozen_plan().runs)]], "u")
    journal.submitted("u", "77")
    fake_slurm.says("squeue", err="Socket timed out\n", code=1)
    told = launch("status", str(tmp_path))
    assert (told.code, [line.split() for line in told.out.splitlines()[1:]]) == (2, [["sound", "6", "6", "missing"]])
    sentences = [
        f"launch: {damaged}/plan.json cannot be read as a plan: restore it, or submit a new sweep.",
        f"launch: {silent}: Slurm does not answer: squeue says: Socket timed out; try again when it does.",
    ]
    assert told.err.splitlines() == sentences
    told = launch("status", str(tmp_path), "--json")
    assert (told.code, told.err.splitlines()) == (2, sentences)
    assert [sweep["name"] for sweep in json.loads(told.out)] == ["tiny"]


def test_a_thousand_runs_are_shown_within_a_second_of_the_processor(tmp_path):
    sweep, plan = planned(tmp_path, seeds=340)
    finish(sweep.run(plan.runs[0]), plan.runs[0].config)
    for run in plan.runs[1:1000]:
        shutil.copytree(sweep.run(plan.runs[0]).path, sweep.run(run).path)
    began = time.process_time()
    assert overview(sweep).counts() == {"done": 1000, "missing": 20}
    assert time.process_time() - began < 1.0
