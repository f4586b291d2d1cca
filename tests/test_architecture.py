"""Imports go in one direction, and what must start at once imports nothing heavy."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kv_align", "launch", "analysis")
LINES, ENTRIES = 300, 14

# The contracts between the packages, and what is as light as they are.
CONTRACTS = ("kv_align", "kv_align.runs")
FOR_LAUNCH = (*CONTRACTS, "kv_align.config", "kv_align.config.help")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages by name, parsed."""
    return {
        module_name(file): ast.parse(file.read_text(encoding="utf-8"))
        for package in PACKAGES
        for file in files(package)
    }


def imported(name: str, *, at_once: bool = False) -> Iterator[str]:
    """Modules that a module imports, anywhere in it or only `at_once`; those of these packages by their full names."""
    for node in modules()[name].body if at_once else ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            yield from inner or {node.module}


def of_package(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def in_folders(name: str, folders: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages, or stands in one of them itself."""
    return name in folders or name.rpartition(".")[0] in folders[1:]


def loaded_after_importing(names: list[str], heavy: set[str]) -> dict[str, list[str]]:
    """Import modules one after another in a new process; by module, which heavy packages are loaded after it."""
    script = (
        "import importlib, json, sys\n"
        "found = {}\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    found[name] = sorted({heavy!r} & set(sys.modules))\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def nothing(names: list[str]) -> dict[str, list[str]]:
    return {name: [] for name in names}


# Direction


def test_kv_align_knows_neither_launch_nor_analysis() -> None:
    upward = {
        (name, each)
        for name in modules()
        if of_package(name, "kv_align")
        for each in imported(name)
        if of_package(each, "launch") or of_package(each, "analysis")
    }
    assert upward == set()


def test_analysis_knows_of_the_others_only_the_contracts() -> None:
    beside = {
        (name, each)
        for name in modules()
        if of_package(name, "analysis")
        for each in imported(name)
        if of_package(each, "launch") or (of_package(each, "kv_align") and not in_folders(each, CONTRACTS))
    }
    assert beside == set()


def test_launch_knows_of_the_trainer_nothing_but_in_its_worker() -> None:
    beside = {
        (name, each)
        for name in modules()
        if of_package(name, "launch")
        for each in imported(name)
        if of_package(each, "analysis") or (of_package(each, "kv_align") and not in_folders(each, FOR_LAUNCH))
    }
    assert beside == {("launch.worker.worker", "kv_align.experiment.experiment")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    graph = {
        name: {each for each in imported(name, at_once=True) if each in modules() and each not in (name, package)}
        for name in modules()
        if of_package(name, package)
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


@pytest.mark.parametrize(("package", "floors"), [("kv_align", 9), ("launch", 7), ("analysis", 7)])
def test_folders_are_floors(package: str, floors: int) -> None:
    """A folder's imports, also those inside functions, go to folders below it."""
    below: dict[str, set[str]] = {}
    for name in modules():
        if not of_package(name, package) or name == package:
            continue
        folder = below.setdefault(room_of(name), set())
        inside = (
            each for each in imported(name) if of_package(each, package) and each in modules() and each != package
        )
        folder |= {room_of(each) for each in inside} - {room_of(name)}
    heights: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(below).static_order():
        heights[room] = 1 + max((heights[each] for each in below[room]), default=0)
    assert max(heights.values()) <= floors, heights


def room_of(name: str) -> str:
    """The folder, or the file beside the folders, of a package that a module is in."""
    return name.split(".")[1]


def test_no_folder_holds_more_than_one_looks_at() -> None:
    folders = {folder for package in PACKAGES for folder in (ROOT / package).rglob("*") if any(folder.glob("*.py"))}
    folders |= {ROOT / package for package in PACKAGES}

    def is_code(each: Path) -> bool:
        """Whether it is a module or a folder of modules, and not the face of the folder that holds it."""
        return not each.name.startswith("__") and (each.is_dir() or each.suffix == ".py")

    full = {
        folder.relative_to(ROOT).as_posix(): count
        for folder in folders
        if (count := sum(is_code(each) for each in folder.iterdir())) > ENTRIES
    }
    assert full == {}


# Lightness


def test_the_command_line_imports_no_torch_transformers_or_pandas() -> None:
    names = [
        f"kv_align.{name}"
        for name in ("runs.run_dir", "runs.sweep_dir", "config.config", "config.compose", "config.cli", "train")
    ]
    assert loaded_after_importing(names, {"torch", "transformers", "pandas", "datasets", "accelerate"}) == nothing(
        names
    )


def test_modules_that_say_that_they_import_no_torch_import_none() -> None:
    saying = [
        name for name, module in modules().items() if re.search(r"(?i)\bno torch\b", ast.get_docstring(module) or "")
    ]
    assert {"kv_align", "kv_align.config.config", "kv_align.runs.run_dir", "kv_align.align.layer_map.fixed"} <= set(
        saying
    )
    assert loaded_after_importing(saying, {"torch", "transformers"}) == nothing(saying)


@pytest.mark.parametrize("package", ["launch", "analysis"])
def test_launch_and_analysis_import_no_torch(package: str) -> None:
    names = [name for name in modules() if of_package(name, package) and not name.endswith("__main__")]
    assert loaded_after_importing(names, {"torch", "transformers"}) == nothing(names)


def test_a_heavy_import_would_be_seen() -> None:
    assert loaded_after_importing(["kv_align.runs.errors", "kv_align.losses.functional"], {"torch"}) == {
        "kv_align.runs.errors": [],
        "kv_align.losses.functional": ["torch"],
    }


# Form


def test_every_public_module_says_what_it_is() -> None:
    silent = [name for name, module in modules().items() if not (ast.get_docstring(module) or "").strip()]
    assert silent == []


def test_every_file_of_kv_align_can_be_read_at_a_sitting() -> None:
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files("kv_align")
    }
    assert len(lengths) > 30
    assert {name: length for name, length in lengths.items() if length >= LINES} == {}
