"""The success criteria as they were declared: read, checked, hashed. `analysis.verdict.verdict` says what they mean."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

import kv_align
from kv_align.runs.digests import digest_of_json
from kv_align.runs.errors import ConfigError, first_error, invalid_value, unknown_key
from kv_align.runs.values import read_values

Share = Annotated[float, Field(gt=0, lt=1)]
PositivePercent = Annotated[float, Field(gt=0, lt=100)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Primary(_Section):
    """The one test that decides: an arm minus the baseline, within a loss."""

    arm: str
    baseline: str
    loss: str
    metric: Literal["validation_loss"]
    step: Literal["last"] | Annotated[int, Field(ge=0)]


Metric = Literal["validation_loss", "training_area", "probe_r2", "exact_match"]


class SequenceStep(_Section):
    """One test of the paper level: an arm against another within a loss, and in which direction it has to differ."""

    arm: str
    against: str
    loss: str
    metric: Metric
    direction: Literal["lower", "higher"]

    @property
    def lower_is_better(self) -> bool:
        """Whether a negative difference is the declared direction."""
        return self.direction == "lower"


class Minimum(_Section):
    """Harm that is tolerated, in percent of perplexity."""

    tolerated_percent: PositivePercent


class Ideal(_Section):
    """Improvement that is asked for, in percent of perplexity, and the control to beat."""

    improvement_percent: PositivePercent
    strong_percent: PositivePercent
    better_than: str


class Contrast(_Section):
    """Two arms that differ in one thing."""

    arm: str
    against: str


class Criteria(_Section):
    """Success criteria; their words are in `conf/criteria/default.yaml`."""

    name: str
    primary: Primary
    alpha: Share
    confidence: Share
    power: Share
    seeds: Annotated[int, Field(ge=1)]
    looks: Annotated[int, Field(ge=1)]
    coverage: Annotated[float, Field(gt=0, le=1)]
    minimum: Minimum
    ideal: Ideal
    collapse_share: Share
    secondary: Literal["exact_match"] | None
    training_window: Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]], Strict(False)]
    threshold_share: Share
    contrasts: dict[str, Contrast]
    sequence: Annotated[tuple[SequenceStep, ...], Field(min_length=1), Strict(False)] | None = None

    @property
    def steps(self) -> tuple[SequenceStep, ...]:
        """The tests of the paper level in their order; criteria that declare none get what their levels name.

        Criteria were frozen without a sequence by version 0.1.0; the report says that it was not declared then.
        """
        if self.sequence is not None:
            return self.sequence
        primary = self.primary
        pair = {"arm": primary.arm, "against": primary.baseline, "loss": primary.loss}
        return (
            SequenceStep(**pair, metric="validation_loss", direction="lower"),
            SequenceStep(**pair | {"against": self.ideal.better_than}, metric="validation_loss", direction="lower"),
            SequenceStep(**pair, metric="training_area", direction="lower"),
            SequenceStep(**pair, metric="probe_r2", direction="higher"),
        )

    @property
    def tolerated_nats(self) -> float:
        """Harm that is tolerated: ln 1.01 for 1 %."""
        return math.log1p(self.minimum.tolerated_percent / 100)

    @property
    def improvement_nats(self) -> float:
        """Improvement that is asked for, above 0: -ln 0.97 for 3 %."""
        return -math.log1p(-self.ideal.improvement_percent / 100)

    @property
    def strong_nats(self) -> float:
        """Improvement that is called strong, above 0."""
        return -math.log1p(-self.ideal.strong_percent / 100)


def parse_criteria(raw: Any, source: str) -> Criteria:
    """Check criteria.

    Parameters
    ----------
    raw
        Plain containers.
    source
        Where they come from, for the error.

    Raises
    ------
    ConfigError
        For the first unknown or missing key, wrong type or value outside its range.
    """
    try:
        criteria = Criteria.model_validate(raw)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        if finding["type"] == "extra_forbidden":
            *parents, _ = finding["loc"]
            known = Criteria.model_fields
            inside = SequenceStep if parents[:1] == ["sequence"] else Contrast
            for parent in parents:
                section = known[str(parent)].annotation if str(parent) in known else inside
                known = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else known
            raise unknown_key(".".join(map(str, finding["loc"])), known, source) from None
        raise ConfigError(f"{source}: {first_error(error)}") from None
    begin, end = criteria.training_window
    if begin >= end:
        raise invalid_value(f"{source}: training_window", f"[{begin}, {end}]", "a first step and a later last one")
    if criteria.ideal.strong_percent < criteria.ideal.improvement_percent:
        allowed = f"at least ideal.improvement_percent={criteria.ideal.improvement_percent:g}"
        raise invalid_value(f"{source}: ideal.strong_percent", f"{criteria.ideal.strong_percent:g}", allowed)
    same = [name for name, each in criteria.contrasts.items() if each.arm == each.against]
    same += [f"sequence.{place}" for place, step in enumerate(criteria.steps) if step.arm == step.against]
    if same:
        raise ConfigError(f"{source}: {same[0]} compares an arm with itself; name two arms.")
    first, primary = criteria.steps[0], criteria.primary
    if (first.arm, first.against, first.loss, first.metric) != (
        primary.arm,
        primary.baseline,
        primary.loss,
        primary.metric,
    ):
        raise ConfigError(
            f"{source}: sequence.0 compares {first.arm} with {first.against} in {first.metric}, loss {first.loss}, "
            "which is not the primary comparison: begin the sequence with it."
        )
    return criteria


def load_criteria(file: Path) -> tuple[Criteria, dict[str, Any]]:
    """Read a criteria file; returns the criteria and the plain containers that the hash is taken of.

    Raises
    ------
    ConfigError
        If it cannot be read or something in it is not allowed.
    """
    try:
        raw = read_values(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--criteria={file} is not YAML: {' '.join(str(error).split())}; correct it.") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"--criteria={file} cannot be read: name a YAML file such as conf/criteria/default.yaml."
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--criteria={file} holds no criteria: name a YAML file such as conf/criteria/default.yaml.")
    return parse_criteria(raw, str(file)), raw


def default_criteria_file() -> Path:
    """Return `conf/criteria/default.yaml`: beside the packages in a checkout, inside kv_align in an installed wheel."""
    package = Path(kv_align.__file__).parent
    inside = package / "conf"
    return (inside if inside.is_dir() else package.parent / "conf") / "criteria" / "default.yaml"


def criteria_hash(raw: dict[str, Any]) -> str:
    """SHA-256 (hex) of criteria, the same as the plan's of the same ones."""
    return digest_of_json(raw)


def main() -> None:
    """Check the file that is named first; leaves with 2 and one sentence where it is wrong."""
    try:
        load_criteria(Path(sys.argv[1]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
