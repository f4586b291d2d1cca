"""Plans: which runs, with which identity, and that nothing changes them later."""

import json
import math

import pytest

from kv_align.config.compose import compose_config
from kv_align.config.identity import content_hash
from launch.cluster.schema import read_choice
from launch.planning.cost import smallest_p
from launch.planning.plan import extend_plan, make_plan
from launch.planning.sweep import load_sweep
from tests.launch.sweeps import CONF, launch

TINY = str(CONF)


def plan_of(name, *overrides, **changes):
    return make_plan(load_sweep(name, changes, TINY), overrides, config_dir=TINY)


def test_the_expected_results_matrix_is_96_runs():
    plan = plan_of("expected_results").plan
    arms = [run for run in plan.runs if not run.control]
    controls = [run for run in plan.runs if run.control]
    assert (len(arms), len(controls)) == (4 * 2 * 8, 4 * 8)
    assert {run.group for run in controls} == {""}
    assert {(run.arm, run.group, run.seed) for run in arms} == {
        (arm, loss, seed)
        for arm in ("baseline", "v4_0_1", "v4_0_2", "v4_0_3")
        for loss in ("kv", "kv+struct")
        for seed in range(8)
    }
    assert len({run.id for run in plan.runs}) == 96
    assert plan.arms["v4_0_3"]["expected_percent"] == 6.0


@pytest.mark.parametrize(
    "name", ["demo", "study_sequence", *(pytest.param(each, marks=pytest.mark.slow) for each in ("full", "weights"))]
)
def test_every_declared_sweep_can_be_planned(name):
    draft = plan_of(name)
    assert len({(run.arm, run.group, run.seed) for run in draft.plan.runs}) == len(draft.plan.runs)
    # A grid of weights has arms of its own names, which no criteria ask for.
    assert [note for note in draft.notes if not note.startswith("the primary comparison needs ")] == []


@pytest.mark.parametrize("name", ["study", "study_sequence", "study_small"])
def test_the_studies_hold_what_their_criteria_declare_and_share_its_arms(name):
    criteria = read_choice("criteria", "study", None)
    arms, study = ({**sweep.arms, **sweep.controls} for sweep in (load_sweep(each, {}) for each in (name, "study")))
    declared = {step[side] for step in criteria["sequence"] for side in ("arm", "against")}
    assert declared == {"v4_0_2", "baseline", "orthogonal", "none", "logit_kd", "shuffled_orthogonal"}
    assert declared <= arms.keys()
    assert arms.items() <= study.items()
    assert load_sweep(name, {}).seeds == list(range(8))


def test_a_run_is_what_the_same_words_compose_and_its_id_is_stable():
    plan = plan_of("tiny").plan
    run = next(run for run in plan.runs if run.id.startswith("v4_0_2-kv-seed1"))
    overrides = load_sweep("tiny", {}, TINY).overrides
    alone, _ = compose_config(["experiment=v4_0_2", "loss=kv", "seed=1", *overrides])
    assert run.content_hash == content_hash(alone)
    assert run.id == f"v4_0_2-kv-seed1-{content_hash(alone)[:8]}"
    again = plan_of("tiny").plan
    assert [each.id for each in again.runs] == [each.id for each in plan.runs]
    assert again.plan_hash == plan.plan_hash


def test_the_id_ignores_what_changes_no_number():
    plain, logged = plan_of("tiny").plan, plan_of("tiny", "trainer.num_workers=2").plan
    assert [run.id for run in plain.runs] == [run.id for run in logged.runs]
    changed = plan_of("tiny", "trainer.lr=1e-4").plan
    assert not {run.id for run in plain.runs} & {run.id for run in changed.runs}


def test_an_axis_without_effect_makes_no_second_run():
    plan = plan_of("tiny", "init=uniform,random").plan
    names = sorted({run.arm for run in plan.runs})
    assert names == ["baseline", "none", "v4_0_2-init=random", "v4_0_2-init=uniform"]
    assert len(plan.runs) == 4 * 2


def test_two_arms_that_mean_the_same_run_are_run_once(tmp_path):
    (tmp_path / "sweep").mkdir()
    text = (CONF / "sweep" / "tiny.yaml").read_text()
    twin = "  twin: {experiment: v4_0_2, overrides: [init=uniform], expected_percent: 5.0}\ncontrols:"
    (tmp_path / "sweep" / "tiny.yaml").write_text(text.replace("controls:", twin))
    draft = make_plan(load_sweep("tiny", {}, str(tmp_path)), [], config_dir=str(tmp_path))
    assert len(draft.plan.runs) == 6
    assert "twin under kv is the same run as v4_0_2 under kv: run once." in draft.notes


def test_an_extra_axis_splits_the_arms():
    draft = plan_of("tiny", "trainer.lr=1e-3,1e-2", seeds=1)
    assert draft.plan.baseline == "baseline-lr=0.001"
    assert len(draft.plan.runs) == 6
    assert any(note.startswith("the primary comparison needs baseline, v4_0_2") for note in draft.notes)
    rates = {run.arm: run.config["trainer"]["lr"] for run in draft.plan.runs}
    assert rates["v4_0_2-lr=0.01"] == 0.01


def test_extending_gives_the_runs_that_planning_more_seeds_would():
    small, large = plan_of("tiny", seeds=2).plan, plan_of("tiny", seeds=[0, 1, 5, 7]).plan
    extended, added = extend_plan(small, [1, 5, 7])
    assert {run.id for run in extended.runs} == {run.id for run in large.runs}
    assert {run.seed for run in added} == {5, 7}
    assert extended.runs[: len(small.runs)] == small.runs
    assert extended.extensions[0]["seeds"] == [5, 7]
    assert extended.criteria_hash == small.criteria_hash


def test_the_smallest_p_value_is_that_of_the_sign_flip_test():
    assert smallest_p(8) == pytest.approx(2 / 2**8)
    assert smallest_p(3) == 0.25
    assert smallest_p(1) == 1.0
    assert math.isclose(smallest_p(12), 0.00048828125)


def test_a_dry_run_prints_what_matters_and_writes_nothing(tmp_path):
    told = launch("submit", "sweep=tiny", "cluster=local", f"output_dir={tmp_path}", "--config-dir", TINY, "--dry-run")
    assert told.code == 0
    assert "6 runs, 2 seeds (0, 1)" in told.out
    assert "smallest p-value that 2 paired seeds can reach: 0.5; alpha 0.05 is out of reach" in told.out
    assert "estimated cost: unknown" in told.out
    assert list(tmp_path.iterdir()) == []


def test_the_plan_holds_all_it_needs_and_notices_a_change(done):
    sweep = done("seeds=1")
    plan = sweep.directory.plan()
    assert plan.criteria["primary"]["arm"] == "v4_0_2"
    assert plan.packages["torch"]
    assert plan.git_commit
    shown = launch("plan", str(sweep.path)).out
    assert "3 runs, 1 seeds (0)" in shown
    assert "CPU-hours (from earlier runs of the same size)" in shown
    raw = json.loads(sweep.directory.plan_file.read_text())
    raw["runs"][0]["config"]["trainer"]["lr"] = 1.0
    sweep.directory.plan_file.write_text(json.dumps(raw))
    told = launch("status", str(sweep.path))
    assert told.code == 2
    assert "was changed after it was frozen" in told.err
