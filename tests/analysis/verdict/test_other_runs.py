"""Runs beside the planned ones, in their folders or in their place, and commands beside each other, change no number."""

import shutil
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from analysis.design.history import History, Looks, one_at_a_time
from analysis.verdict.study import study_sweep
from tests.analysis.synthetic import Recipe, make_plan, write_run, write_sweep

EIGHT = Recipe(seeds=8, steps=50, examples=4, losses=("kv",), controls=("none",))


def test_a_run_that_is_not_planned_stands_for_no_planned_one_though_it_lies_in_its_folder(tmp_path):
    sweep = write_sweep(tmp_path / "s", EIGHT)
    for run in make_plan(EIGHT).runs:
        if run.arm == "v4_0_2":
            shutil.rmtree(sweep.run(run).path)
            other = replace(run, content_hash=f"{run.seed:064d}", config=run.config | {"trainer": {"lr": 9}})
            write_run(sweep.run(run), other, replace(EIGHT, effects={"v4_0_2": -0.2}))
    found = study_sweep(sweep.path)
    assert found.verdict.primary.pairs.seeds == ()
    assert not found.verdict.complete
    cells = found.grid.cells
    assert set(cells.loc[cells["arm"] == "v4_0_2", "state"]) == {"missing"}
    foreign = found.collected.problems.query("kind == 'foreign'")
    assert set(foreign["detail"]) == {"this run is not in the plan and is not used"}
    assert len(foreign) == 8


@pytest.mark.parametrize("kind", ["foreign", "duplicate", "damaged"])
def test_a_short_run_that_is_not_used_shortens_the_window_of_no_other(tmp_path, kind):
    sweep = write_sweep(tmp_path / "s", EIGHT)
    before = study_sweep(sweep.path)
    planned = next(run for run in make_plan(EIGHT).runs if (run.arm, run.seed) == ("none", 1))
    short = replace(EIGHT, steps=20)
    if kind == "damaged":
        shutil.rmtree(sweep.run(planned).path)
        directory = sweep.run(planned)
        write_run(directory, planned, short)
        directory.summary_file.unlink()
    else:
        directory = sweep.run(replace(planned, id="try"))
        write_run(directory, replace(planned, content_hash="f" * 64) if kind == "foreign" else planned, short)
    after = study_sweep(sweep.path)
    assert after.grid.window == before.grid.window == (1.0, 50.0)
    areas = [
        found.grid.cells.set_index(["arm", "seed"])["training_area"].drop(("none", 1)).to_dict()
        for found in (before, after)
    ]
    assert areas[0] == areas[1]


def test_two_reports_at_once_follow_each_other(tmp_path):
    sweep, begun = write_sweep(tmp_path / "s", replace(EIGHT, seeds=2)), threading.Barrier(2)

    def report() -> None:
        begun.wait()
        with one_at_a_time(sweep):
            history = History(sweep)
            time.sleep(0.2)
            history.append(
                now=datetime.now(UTC),
                look=Looks(1, True, 1),
                results="r",
                tested=True,
                plan=None,
                criteria="c",
                conclusion="Better.",
            )

    both = [threading.Thread(target=report) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(sweep.history_file.read_text(encoding="utf-8").splitlines()[-2:]) == 2
    assert History(sweep).problems(None) == []
