"""Numbers of two benchmarks side by side: `make bench-compare A=one.json B=other.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def compared(first: dict[str, float], second: dict[str, float]) -> list[tuple[str, float | None, float | None]]:
    """Return each number that one of the two has, in their order, as the first and as the second has it."""
    return [(name, first.get(name), second.get(name)) for name in dict.fromkeys((*first, *second))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().files]
    table = Table(title="second over first")
    for place, column in enumerate(("", *(content["commit"] for content in contents), "ratio")):
        table.add_column(column, justify="right" if place else "left")
    for name, one, other in compared(*(content["numbers"] for content in contents)):
        shown = ("-" if each is None else f"{each:,.3f}" for each in (one, other))
        table.add_row(name, *shown, f"{other / one:.3f}" if one and other is not None else "-")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
