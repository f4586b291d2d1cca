"""What README shows of an aligner and a loss of one's own, written to files as it says and ready to be used."""

import importlib
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"`([\w/]+\.(?:py|yaml))`[^`]*\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)


@cache
def written() -> Path:
    """A folder with `conf/`, and beside it the modules that its choices name; it is on the path of imports."""
    folder = Path(tempfile.mkdtemp(prefix="kv-align-readme-"))
    blocks = dict(_BLOCK.findall(README.read_text(encoding="utf-8").partition("## Contributing")[2]))
    assert set(blocks) == {
        "kv_align/align/mine.py",
        "conf/aligner/mine.yaml",
        "kv_align/losses/mine.py",
        "conf/loss/mine.yaml",
    }
    for name, text in blocks.items():
        # What README puts into the package stands beside it here.
        file = folder / name.replace("kv_align/", "readme_")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(re.sub(r"\bkv_align\.(align|losses)\.mine\b", r"readme_\1.mine", text))
    for package in ("readme_align", "readme_losses"):
        (folder / package / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    return folder


def module(name: str) -> ModuleType:
    """README's module, such as `align.mine`."""
    written()
    return importlib.import_module(f"readme_{name}")
