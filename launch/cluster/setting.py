"""How one sweep is executed, as it was frozen when it was submitted: `launch/cluster.json` of the sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError
from kv_align.runs.files import read_json, write_json
from launch.cluster.schema import Cluster


@dataclass(frozen=True)
class Setting:
    """How a sweep is executed.

    Attributes
    ----------
    cluster
        The settings.
    resources
        What single arms have otherwise, by arm and key of the cluster.
    accounting
        Whether the scheduler keeps finished jobs (sacct); found out when the sweep was submitted.
    code
        The folder that jobs import the packages from.
    home
        Where the sweep lay when it was submitted, which is where its jobs look for it; empty for version 0.1.0.
    after
        The folder of another sweep, whose jobs end before those of this one start; empty: none.
    """

    cluster: Cluster
    resources: dict[str, dict[str, Any]]
    accounting: bool
    code: str
    home: str = ""
    after: str = ""


def read_setting(file: Path, sweep: Path) -> Setting | None:
    """Return what was frozen in a sweep's directory; None before it was submitted.

    Raises
    ------
    ConfigError
        If something of it is missing.
    """
    raw = read_json(file)
    if raw is None:
        return None
    missing = [key for key in ("cluster", "resources", "accounting", "code") if key not in raw]
    if missing:
        raise ConfigError(f"{file} is damaged, it has no {missing[0]}: restore it, or submit the sweep elsewhere.")
    kinds = {"cluster": dict, "resources": dict, "accounting": bool, "code": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(raw[key], kind)]
    if wrong:
        raise ConfigError(f"{file} is damaged, its {wrong[0]} is none: restore it, or submit the sweep elsewhere.")
    code = str(sweep / raw["code"])  # a snapshot moves with its sweep
    try:
        cluster, own = validate(Cluster, raw["cluster"]), raw["resources"]
    except ConfigError as error:
        raise ConfigError(f"{file} is damaged: in its cluster {error}") from None
    return Setting(cluster, own, raw["accounting"], code, raw.get("home", ""), raw.get("after", ""))


def write_setting(file: Path, sweep: Path, setting: Setting) -> None:
    """Freeze how a sweep is executed."""
    code = Path(setting.code)
    frozen_code = str(code.relative_to(sweep) if code.is_relative_to(sweep) else code)
    content = {
        "resources": setting.resources,
        "accounting": setting.accounting,
        "code": frozen_code,
        "home": str(sweep),
        "after": setting.after,
    }
    write_json(file, {"cluster": setting.cluster.model_dump(), **content})
