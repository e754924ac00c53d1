"""The docs' page of the paper's figures and tables, from the results of `bupo reproduce`.

    python tools/paper_page.py runs/reproduce/embedded    # copies what it shows into docs/paper, writes docs/paper.md
    python tools/paper_page.py --check                    # says what is stale, exit status 1

The page is made from docs/paper and from nothing else. It is stale where it is not what this command would write, where a
figure or table is missing, or where an experiment or one of its recipes has changed since its runs.
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
    """What the page shows, of every figure and table, into docs/paper."""
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
    """A picture as a PNG of few colours that is small enough for a repository."""
    with Image.open(source) as picture:
        whole = picture.convert("RGB")
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        width = round(min(WIDEST, whole.width) * share)
        sized = whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS)
        sized.quantize(255, dither=Image.Dither.NONE).save(target, format="PNG", optimize=True)
        if target.stat().st_size <= LARGEST:
            return


def page(docs: Path) -> str:
    """docs/paper.md, from docs/paper."""
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
        f"makes all of it, this page too ([reproduce.md](reproduce.md)). By {'; '.join(versions)}.", "",
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
    """Which rows differ from the one they are compared with as they do in the paper."""
    words = ("as in the paper", "opposite to the paper", "the paper's models differ", "not told apart")
    lines = []
    for name, one in found.items():
        rows = [
            row for row in one["rows"] if any(value is not None for value in row.get("paper_difference", {}).values())
        ]
        said = {word: [row["row"] for row in rows if word in (row["direction"], row["verdict"])] for word in words}
        if rows:
            cells = [
                format_experiment_name(name),
                rows[0]["against"],
                *(", ".join(dict.fromkeys(said[word])) or "-" for word in words),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    heads = ["", "less", *words]
    return [
        "Differences whose sign the paper has too, and whether the seeds tell them apart from zero:", "",
        f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |", *lines, "",
    ]  # fmt: skip


def _heading(result: dict[str, Any]) -> str:
    return f"{format_experiment_name(result['name'])}: {result['title']}"


def _anchor(result: dict[str, Any]) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", _heading(result).lower()).replace(" ", "-")


def stale(docs: Path) -> list[str]:
    """What is wrong with the page, a line a fault."""
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
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is stale")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the docs' folder")
    given = parser.parse_args()
    if given.check == (given.results is not None):
        parser.error("give the folder of the results, or --check")
    if given.results is not None:
        try:
            copy(given.results, given.docs)
        except UserError as error:
            parser.error(str(error))
        (given.docs / "paper.md").write_text(page(given.docs))
    faults = stale(given.docs)
    print("\n".join(faults) or f"{given.docs / 'paper.md'} is what docs/paper gives")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
