"""Launch starts without torch, and knows of kv_align only what the contract allows."""

import ast
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
ALLOWED = {"config", "effective", "compose", "errors", "runs", "plans", "provenance", "progress", "options"}


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_launch_knows_the_contract_and_only_the_worker_the_trainer():
    for file in LAUNCH.rglob("*.py"):
        parts = {name.split(".")[1] for name in imports_of(file) if name.startswith("kv_align.")}
        allowed = ALLOWED | ({"experiment"} if file.name == "worker.py" else set())
        assert parts <= allowed, file
        others = {"analysis", "transformers"} | (set() if file.name == "worker.py" else {"torch"})
        assert not any(name.split(".")[0] in others for name in imports_of(file)), file


def test_no_verb_imports_torch_and_help_imports_next_to_nothing():
    heavy = ("torch", "hydra", "rich", "submitit")
    code = f"import sys; import launch.{{}}; print(sorted(each for each in {heavy} if each in sys.modules))"
    for module, loaded in (
        ("__main__", []),
        ("commands", ["hydra", "rich"]),
        ("worker", []),
        ("supervisor", []),
        ("status", []),
        ("lookup", []),
    ):
        told = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == str(loaded), module


def test_help_names_every_verb():
    told = subprocess.run([sys.executable, "-m", "launch", "--help"], capture_output=True, text=True, check=True)
    for verb in ("submit", "plan", "status", "logs", "resume", "cancel", "extend"):
        assert f"    {verb} " in told.stdout
