"""Launch starts without what only some of its verbs need."""

import subprocess
import sys


def test_no_verb_imports_torch_and_help_imports_next_to_nothing():
    heavy = ("torch", "hydra", "rich", "submitit")
    code = f"import sys; import launch.{{}}; print(sorted(each for each in {heavy} if each in sys.modules))"
    for module, loaded in (
        ("__main__", []),
        ("commands", ["hydra", "rich"]),
        ("worker.worker", []),
        ("executors.local.supervisor", []),
        ("status.overview", []),
        ("status.lookup", []),
    ):
        told = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == str(loaded), module


def test_help_names_every_verb():
    told = subprocess.run([sys.executable, "-m", "launch", "--help"], capture_output=True, text=True, check=True)
    for verb in ("submit", "plan", "status", "logs", "resume", "cancel", "extend"):
        assert f"    {verb} " in told.stdout
