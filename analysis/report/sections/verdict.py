"""Section of the report: the verdict, what has to be known to read it, and the declared levels."""

from __future__ import annotations

from analysis.report.render.document import Block, Bullets, Heading, Paragraph, Table, Tone
from analysis.report.sections.tables import Draw
from analysis.report.sections.wording import headline, power_sentence, primary_notes, primary_sentence
from analysis.verdict.controls import control_notes, control_warnings
from analysis.verdict.provenance import pairs_made_differently
from analysis.verdict.study import Study


def section(study: Study, draw: Draw) -> list[Block]:
    """1. The verdict."""
    verdict, criteria = study.verdict, study.criteria
    blocks: list[Block] = [Heading(2, "Verdict")]
    if verdict.exploratory:
        blocks.append(Paragraph(" ".join(verdict.exploratory), "This report is exploratory.", "warning"))
    tone: Tone = "reached" if verdict.reached("ideal") else "lead" if verdict.reached("minimum") else "missed"
    text = ""
    if verdict.primary is not None:
        text = f"{primary_sentence(verdict.primary, criteria)} {power_sentence(verdict.primary, criteria)}"
    blocks.append(Paragraph(text, headline(verdict, criteria), tone))
    warnings = control_warnings(study.controls, study.arms)
    if verdict.primary is not None:
        warnings = control_notes(study.controls, verdict.primary) + warnings
        warnings.append(pairs_made_differently(study.collected.runs, verdict.primary, study.grid.run_of))
    blocks += [Paragraph(warning, "Warning.", "warning") for warning in warnings if warning]
    notes = primary_notes(study)
    if notes:
        blocks.append(Bullets(tuple(notes)))
    rows = [
        (level.name, check.asked, check.found, {True: "yes", False: "no", None: "not judged"}[check.passed])
        for level in verdict.levels
        for check in level.checks
    ]
    if rows:
        shown = [
            (level if place == 0 or rows[place - 1][0] != level else "", *rest)
            for place, (level, *rest) in enumerate(rows)
        ]
        blocks.append(
            Table(
                ("level", "asked", "found", "holds"),
                tuple(shown),
                "The declared levels; each asks for those above it too. What is not in this sweep cannot hold.",
            )
        )
    return blocks
