"""Section of the report: the methods, in a paragraph that can be pasted into a paper."""

from __future__ import annotations

from analysis.report.render.document import Block, Heading, Paragraph
from analysis.report.sections.tables import Draw
from analysis.verdict.study import Study
from analysis.words import count, declared_percent, number, p_text, share


def section(study: Study, draw: Draw) -> list[Block]:
    """6. Methods, to be pasted into a paper."""
    criteria, grid = study.criteria, study.grid
    seeds = grid.cells["seed"].nunique()
    unit = (
        "The unit of replication is the seed, which fixes data order and student start in every arm; arms are "
        "paired by seed, after checking that both recorded hashes match. The outcome is the paired difference in "
        f"log perplexity (nats per scored token of the validation split, at {_step(study)}), reported as change "
        f"of perplexity."
    )
    primary = criteria.primary
    declared = "not declared before the runs" if study.verdict.exploratory else "declared before the runs"
    test = (
        f"The primary comparison, {declared}, is {primary.arm} against {primary.baseline} with loss {primary.loss}, "
        f"tested two-sided at {criteria.alpha:g} by an exact sign-flip test over {seeds} seeds (Monte Carlo above "
        "20), which asks for differences that are symmetric about zero where nothing differs; where a run of a pair "
        f"diverged a worst-rank sign-flip test decides.{_skewness(study)} The paper level is a fixed sequence of "
        f"{len(criteria.steps)} such tests, each at the full {criteria.alpha:g} and made only if the one before "
        "passed in the declared direction, so that its error is at most that. Intervals are t intervals of "
        f"{share(criteria.confidence)} coverage. The other arms and the controls of a loss are tested by a step-down "
        "max-T sign-flip test (Westfall and Young 1993), contrasts and factor effects under Holm. Exact match is "
        "tested only if the primary comparison passes. Non-inferiority is claimed when the interval excludes "
        f"{declared_percent(criteria.minimum.tolerated_percent, signed=True)}, equivalence by two one-sided tests "
        "within that margin."
    )
    looks = (
        f"{count(study.looks.tests, 'look')} with the primary test "
        f"{'was' if study.looks.tests == 1 else 'were'} made, {criteria.looks} declared. "
        f"Criteria {criteria.name}, SHA-256 {study.criteria_hash}"
        + (f"; plan SHA-256 {study.plan_hash}." if study.plan_hash else "; there was no frozen plan.")
    )
    return [Heading(2, "Methods"), Paragraph(f"{unit} {test} {looks}")]


def _skewness(study: Study) -> str:
    """What is seen of the symmetry that the primary test asks for."""
    primary = study.verdict.primary
    seen = None if primary is None or not study.verdict.complete else primary.symmetry
    if seen is None:
        return ""
    return (
        f" The skewness of the primary differences is {number(seen.skewness, 2, signed=True)} (standard error "
        f"{number(seen.standard_error, 2)} under normality); where it were large, an exact sign test of the median "
        f"would be the alternative ({p_text(seen.sign_test_p)})."
    )


def _step(study: Study) -> str:
    step = study.criteria.primary.step
    return "the last step" if step == "last" else f"step {step}"
