"""Write docs/speed_tables.md from the results of the benchmarks.

    python tools/speed_page.py runs/speed    # copy the results and the figure into docs, fill the page
    python tools/speed_page.py --check       # list stale parts, exit status 1

The text between `<!-- NAME -->` and `<!-- end -->` comes from docs/speed/NAME.json only.
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
    """Copy the existing results, without single measurements, and the figure."""
    (docs / "speed").mkdir(exist_ok=True)
    for name in NAMES:
        if (results / f"{name}.json").is_file():
            found = json.loads((results / f"{name}.json").read_text())
            found.pop("raw")
            (docs / "speed" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if (results / FIGURE).is_file():
        shutil.copy(results / FIGURE, docs / "images" / "speed.png")


def block(result: dict[str, Any]) -> str:
    """Return a result as Markdown: its setting, tables, targets, and the profiles of missed targets."""
    parts = [f"`{result['command']}`: {result['setting']}.\n{result['machine']}.\n"]
    parts += [f"{table['title']}:\n\n{format_markdown_table(table['rows'])}" for table in result["tables"]]
    if result["targets"]:
        parts.append(format_markdown_table(result["targets"]))
    if any(target[""] == "missed" for target in result["targets"]):
        parts += [f"{name}:\n\n```\n{text.strip()}\n```\n" for name, text in result["profiles"].items()]
    return "\n".join(parts)


def filled(docs: Path) -> str:
    """Return the page with its tables."""

    def replaced(found: re.Match[str]) -> str:
        path = docs / "speed" / f"{found[2]}.json"
        text = block(json.loads(path.read_text())) if path.is_file() else f"Not measured: {path.name} is missing.\n"
        return f"{found[1]}{text}{found[3]}"

    return BLOCK.sub(replaced, (docs / "speed_tables.md").read_text())


def stale(docs: Path) -> list[str]:
    """Return the faults of the page, one line each."""
    page = docs / "speed_tables.md"
    wanted = [docs / "speed" / f"{name}.json" for name in NAMES] + [docs / "images" / "speed.png"]
    missing = [f"{path} is missing" for path in wanted if not path.is_file()]
    return missing if missing or page.read_text() == filled(docs) else [f"{page} is not what {docs / 'speed'} gives"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="folder of the results, such as runs/speed")
    parser.add_argument("--check", action="store_true", help="write nothing, and list stale parts")
    given = parser.parse_args()
    if given.check == (given.results is not None):
        parser.error("give the folder of the results, or --check")
    if given.results is not None:
        copy(given.results, DOCS)
        (DOCS / "speed_tables.md").write_text(filled(DOCS))
    faults = stale(DOCS)
    print("\n".join(faults) or f"{DOCS / 'speed_tables.md'} is what {DOCS / 'speed'} gives")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
