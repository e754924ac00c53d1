"""Write docs/paper.md, the paper's figures and tables, from the results of `bupo reproduce`.

    python tools/paper_page.py runs/reproduce/embedded    # copy the results into docs/paper, write docs/paper.md
    python tools/paper_page.py --check                    # list stale parts, exit status 1

The only input is docs/paper. The page is stale if this command would write another one, if a figure or table is missing, or if
an experiment or one of its recipes has changed since its runs.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from bupo.experiments.experiment import list_experiments, read_experiment
from bupo.experiments.result_page import FIGURE_FILE, RESULT_FILE, TABLE_FILE, format_experiment_name
from bupo.utils.errors import UserError

DOCS = Path(__file__).resolve().parent.parent / "docs"
LARGEST = 60_000  # bytes of a picture
WIDEST = 1000  # pixels
NAMES = list_experiments("embedded")
AGAIN = "python tools/paper_page.py runs/reproduce"


def copy(results: Path, docs: Path) -> None:
    """Copy the results of every figure and table into docs/paper."""
    missing = [name for name in NAMES if not (results / name / RESULT_FILE).is_file()]
    if missing:
        raise UserError(f"{results} has no result of {', '.join(missing)}: make them by bupo reproduce")
    target = docs / "paper"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(results / name / RESULT_FILE, target / f"{name}.json")
        shutil.copy(results / name / TABLE_FILE, target / f"{name}.md")
        if FIGURE_FILE in json.loads((target / f"{name}.json").read_text())["files"]:
            small(results / name / FIGURE_FILE, target / f"{name}.png")


def small(source: Path, target: Path) -> None:
    """Save a picture as a PNG with few colours that is small enough for a repository."""
    with Image.open(source) as picture:
        original = picture.convert("RGB")
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        width = round(min(WIDEST, original.width) * share)
        sized = original.resize((width, round(original.height * width / original.width)), Image.Resampling.LANCZOS)
        sized.quantize(255, dither=Image.Dither.NONE).save(target, format="PNG", optimize=True)
        if target.stat().st_size <= LARGEST:
            return


def page(docs: Path) -> str:
    """Return the text of docs/paper.md."""
    found = {name: json.loads((docs / "paper" / f"{name}.json").read_text()) for name in NAMES}
    scale, about = next((one["scale"], one["about"]) for one in found.values())
    shared = [note for note in found[NAMES[0]]["notes"] if all(note in one["notes"] for one in found.values())]
    versions = dict.fromkeys(", ".join(f"{name} {number}" for name, number in one["versions"].items() if number)
                             for one in found.values())  # fmt: skip
    commands = f"bupo reproduce all --scale {scale} --output runs/reproduce", f"{AGAIN}/{scale}"
    lines = [
        "# The paper's figures and tables", "",
        f"The figures and tables of the paper, at the scale `{scale}`: {about}.", *shared, "",
        "```", *commands, "```", "",
        f"makes all results and this page ([reproduce.md](reproduce.md)), with {'; '.join(versions)}.", "",
        *(f"- [{format_experiment_name(name)}](#{_anchor(one)}): {one['title']}" for name, one in found.items()), "",
        *_in_short(found),
    ]  # fmt: skip
    for name, one in found.items():
        lines += [f"## {_heading(one)}", "", f"In the paper: {one['source']}.", ""]
        if (docs / "paper" / f"{name}.png").exists():
            lines += [f"![{one['title']}](paper/{name}.png)", ""]
        lines += [(docs / "paper" / f"{name}.md").read_text()]
        lines += [*(f"- {note}" for note in one["notes"] if note not in shared), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _in_short(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of the rows whose difference has the same sign as in the paper."""
    words = ("as in the paper", "opposite to the paper", "the paper's models differ", "not significant")
    lines = []
    for name, one in found.items():
        rows = [
            row for row in one["rows"] if any(value is not None for value in row.get("paper_difference", {}).values())
        ]
        rows_by_word = {
            word: [row["row"] for row in rows if word in (row["direction"], row["verdict"])] for word in words
        }
        if rows:
            cells = [
                format_experiment_name(name),
                rows[0]["against"],
                *(", ".join(dict.fromkeys(rows_by_word[word])) or "-" for word in words),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    heads = ["", "less", *words]
    return [
        "Signs of the differences, compared with the paper's, and their significance over seeds:", "",
        f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |", *lines, "",
    ]  # fmt: skip


def _heading(result: dict[str, Any]) -> str:
    return f"{format_experiment_name(result['name'])}: {result['title']}"


def _anchor(result: dict[str, Any]) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", _heading(result).lower()).replace(" ", "-")


def stale(docs: Path) -> list[str]:
    """Return the faults of the page, one line each."""
    faults = []
    for name in NAMES:
        path = docs / "paper" / f"{name}.json"
        if not path.is_file():
            faults.append(f"{name} is missing in {path.parent}")
            continue
        result = json.loads(path.read_text())
        if result["digest"] != read_experiment(name, result["scale"]).compute_digest():
            faults.append(f"{name} is stale: its experiment or a recipe has changed; run bupo reproduce {name} again")
    if not faults and (not (docs / "paper.md").is_file() or (docs / "paper.md").read_text() != page(docs)):
        faults.append(f"{docs / 'paper.md'} is not what docs/paper gives: {AGAIN}/SCALE")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="folder of the results, such as runs/reproduce/embedded")
    parser.add_argument("--check", action="store_true", help="write nothing, and list stale parts")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the docs' folder")
    arguments = parser.parse_args()
    if arguments.check == (arguments.results is not None):
        parser.error("give the folder of the results, or --check")
    if arguments.results is not None:
        try:
            copy(arguments.results, arguments.docs)
        except UserError as error:
            parser.error(str(error))
        (arguments.docs / "paper.md").write_text(page(arguments.docs))
    faults = stale(arguments.docs)
    print("\n".join(faults) or f"{arguments.docs / 'paper.md'} is what docs/paper gives")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
