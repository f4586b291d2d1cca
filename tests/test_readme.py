"""What README names is there."""

import re
from pathlib import Path

import pytest
from hydra.utils import get_object

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = README.split("\n## The code\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", re.findall(r"`((?:kv_align|launch|analysis)(?:\.\w+)+)`", CODE))
def test_the_way_of_a_batch_leads_through_what_exists(name: str) -> None:
    assert callable(get_object(name))


def test_the_map_names_every_folder_of_the_code() -> None:
    rows = [line.split("|")[1] for line in CODE.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"\w+", row)}
    folders = {
        folder.name
        for package in ("kv_align", "launch", "analysis")
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").is_file()
    }
    assert folders - {"compare"} <= named


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
