"""How what is written in YAML or on a command line becomes typed, frozen data, or one sentence. Imports no torch.

A *section* knows its keys. A *choice* (aligner, loss, init, ...) names its target by `_target_`, and its other keys are
that target's options, bound to the target's signature by `kv_align.config.options`. Knows nothing of which sections there
are.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from kv_align.config.options import Parts, options_of
from kv_align.config.targets import FORMER_PATHS, check_target
from kv_align.runs.errors import ConfigError, first_error, unknown_key


class Section(BaseModel):
    """A frozen part of the configuration that knows exactly which keys it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


SectionType = TypeVar("SectionType", bound=Section)


class Choice(Section):
    """One choice of a group: a label, a target, and the target's options as extra keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)

    name: str
    target: str = Field(alias="_target_", default="")

    @field_validator("target")
    @classmethod
    def _where_it_is_now(cls, target: str) -> str:
        return FORMER_PATHS.get(target, target)

    @property
    def options(self) -> dict[str, Any]:
        """The target's keyword arguments."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def parts(self) -> dict[str, Choice]:
        """The choices of its group that it is composed of, by name, once its options are checked; none for most."""
        parts = self.options.get("parts")
        return (
            {name: each for name, each in parts.items() if isinstance(each, Choice)} if isinstance(parts, dict) else {}
        )


ChoiceType = TypeVar("ChoiceType", bound=Choice)


def validate(kind: type[SectionType], raw: dict[str, Any]) -> SectionType:
    """Check a composed configuration against the schema.

    Raises
    ------
    ConfigError
        For the first unknown key, wrong type or value outside its range, as one sentence.
    """
    try:
        section = kind.model_validate(raw)
    except ValidationError as error:
        finding = error.errors()[0]
        if finding["type"] == "extra_forbidden":
            raise _unknown(kind, finding["loc"]) from None
        raise first_error(error) from None
    checked = {key: check_options(key, value) for key, value in section if isinstance(value, Choice)}
    return section.model_copy(update=checked)


def _unknown(kind: type[BaseModel], location: tuple[str | int, ...]) -> ConfigError:
    *parents, _ = location
    for parent in parents:
        if str(parent) not in kind.model_fields:
            continue  # a name that the user gave, in a mapping of sections
        kind = _section_in(kind.model_fields[str(parent)].annotation)
    where = ".".join(map(str, parents)) or "the configuration"
    return unknown_key(".".join(map(str, location)), kind.model_fields, where)


def _section_in(annotation: Any) -> type[BaseModel]:
    """Return the section that an annotation is, or holds: `Section`, `Section | None`, `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = getattr(annotation, "__args__", ())
    return next(_section_in(member) for member in members if _holds_section(member))


def _holds_section(annotation: Any) -> bool:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return is_section or any(map(_holds_section, getattr(annotation, "__args__", ())))


def check_options(group: str, choice: ChoiceType, key: str | None = None) -> ChoiceType:
    """Bind a choice's options to its target's keyword-only parameters, without importing the target's module.

    Parameters
    ----------
    group, choice
        What is chosen.
    key
        Where it stands in the configuration, if that is not the group itself.

    Returns
    -------
    The choice with its options as the types say (1 as 1.0 where a float is wanted), so that they hash alike.

    Raises
    ------
    ConfigError
        For an option that the target does not have, or one of another type or range.
    """
    key = key or group
    if not choice.target:
        known = {}
    else:
        try:
            known = options_of(choice.target)
        except ValueError as error:
            raise ConfigError(f"{group}={choice.name}: {error}; correct it in that choice's YAML file.") from None
        check_target(group, choice.name, choice.target)
    options = choice.options
    for option, value in options.items():
        if option not in known:
            raise unknown_key(f"{key}.{option}", known, f"{group}={choice.name}")
        try:
            options[option] = TypeAdapter(known[option].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise first_error(error, f"{key}.{option}") from None
        if known[option].annotation == Parts:
            options[option] = {
                name: _part(group, part, f"{key}.{option}.{name}") for name, part in options[option].items()
            }
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise ConfigError(f"{key}.{missing[0]} is missing: {group}={choice.name} needs it; add it to the command line.")
    return choice.model_copy(update=options)


def _part(group: str, part: Any, key: str) -> Choice:
    try:
        choice = part if isinstance(part, Choice) else Choice.model_validate(part)
    except ValidationError as error:
        raise first_error(error, key) from None
    return check_options(group, choice, key)
