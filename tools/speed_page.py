"""The tables of docs/speed.md, from the results of the benchmarks.

    python tools/speed_page.py runs/speed    # copies the results and the figure into docs, fills the page
    python tools/speed_page.py --check       # says what is stale, exit status 1

What stands between `<!-- NAME -->` and `<!-- end -->` is made from docs/speed/NAME.json and from nothing else.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bupo.utils.sanitize import format_markdown_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = ("update", "step", "growth")
FIGURE = "growth.png"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def copy(results: Path, docs: Path) -> None:
    """The results that there are, without single measurements, and the figure."""
    (docs / "speed").mkdir(exist_ok=True)
    for name in NAMES:
        if (results / f"{name}.json").is_file():
            found = json.loads((results / f"{name}.json").read_text())
            found.pop("raw")
            (docs / "speed" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if (results / FIGURE).is_file():
        shutil.copy(results / FIGURE, docs / "images" / "speed.png")


def block(result: dict[str, Any]) -> str:
    """A result as Markdown: what was measured, its tables, its targets, and the profiles of what is missed."""
    parts = [f"`{result['command']}`: {result['setting']}.\n{result['machine']}.\n"]
    parts += [f"{table['title']}:\n\n{format_markdown_table(table['rows'])}" for table in result["tables"]]
    if result["targets"]:
        parts.append(format_markdown_table(result["targets"]))
    if any(target[""] == "missed" for target in result["targets"]):
        parts += [f"{name}:\n\n```\n{text.strip()}\n```\n" for name, text in result["profiles"].items()]
    return "\n".join(parts)


def filled(docs: Path) -> str:
    """The page with its tables."""

    def replaced(found: re.Match[str]) -> str:
        path = docs / "speed" / f"{found[2]}.json"
        text = block(json.loads(path.read_text())) if path.is_file() else f"Not measured: {path.name} is missing.\n"
        return f"{found[1]}{text}{found[3]}"

    return BLOCK.sub(replaced, (docs / "speed.md").read_text())


def stale(docs: Path) -> list[str]:
    """What is wrong with the page, a line a fault."""
    page = docs / "speed.md"
    wanted = [docs / "speed" / f"{name}.json" for name in NAMES] + [docs / "images" / "speed.png"]
    missing = [f"{path} is missing" for path in wanted if not path.is_file()]
    return missing if missing or page.read_text() == filled(docs) else [f"{page} is not what {docs / 'speed'} gives"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="folder of the results, such as runs/speed")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is stale")
    given = parser.parse_args()
    if given.check == (given.results is not None):
        parser.error("give the folder of the results, or --check")
    if given.results is not None:
        copy(given.results, DOCS)
        (DOCS / "speed.md").write_text(filled(DOCS))
    faults = stale(DOCS)
    print("\n".join(faults) or f"{DOCS / 'speed.md'} is what {DOCS / 'speed'} gives")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
