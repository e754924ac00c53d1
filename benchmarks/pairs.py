"""Precision and recall of the two verdicts on pairs of a gold answer and an answer that were judged by hand.

A line of a file of pairs is `{"gold": ..., "answer": ..., "correct": true or false, "kind": ..., "note": ...}`. Files with
`heldout` in their names were not looked at while rules were written; their numbers are printed apart.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bupo.rewards.grader import Grade, MathGrader

FOLDER = Path(__file__).parent / "grading_pairs"


class Pair(NamedTuple):
    gold: str
    answer: str
    correct: bool
    kind: str
    note: str


class Counts(NamedTuple):
    """Right answers that are paid and refused, and wrong ones that are paid and refused."""

    paid: int
    refused: int
    wrong_paid: int
    wrong_refused: int

    @property
    def precision(self) -> tuple[int, int]:
        """Right ones among the paid."""
        return self.paid, self.paid + self.wrong_paid

    @property
    def recall(self) -> tuple[int, int]:
        """Paid ones among the right."""
        return self.paid, self.paid + self.refused


def read_pairs(file: Path) -> list[Pair]:
    """Return the pairs of a file."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Pair(row["gold"], row["answer"], row["correct"], row["kind"], row.get("note", "")) for row in rows]


def wilson(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    if not trials:
        return 0.0, 1.0
    share, square = hits / trials, z * z / trials
    middle, half = (
        (share + square / 2) / (1 + square),
        z * (share * (1 - share) / trials + square / (4 * trials)) ** 0.5 / (1 + square),
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def counted(pairs: list[Pair], paid: list[bool]) -> Counts:
    """Return how many answers are paid and refused."""
    cells = [(pair.correct, pays) for pair, pays in zip(pairs, paid, strict=True)]
    return Counts(*(cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))


def _share(hits: int, trials: int) -> str:
    low, high = wilson(hits, trials)
    return f"{hits}/{trials} = {hits / trials:.1%} [{low:.1%}, {high:.1%}]" if trials else "0/0"


def report(title: str, pairs: list[Pair], grades: list[Grade], show: bool = False) -> list[str]:
    """Return the lines on one half of the pairs: in all and of each kind, and each fault where `show` is set."""
    lines = [f"{title}: {len(pairs)} pairs, {sum(pair.correct for pair in pairs)} right"]
    for name in ("record", "strict"):
        paid = [(grade.verdict if name == "record" else grade.strict) == "correct" for grade in grades]
        total = counted(pairs, paid)
        lines.append(f"  {name}: precision {_share(*total.precision)}, recall {_share(*total.recall)}")
        rows: dict[str, list[int]] = defaultdict(list)
        for place, pair in enumerate(pairs):
            rows[pair.kind].append(place)
        for kind, places in sorted(rows.items()):
            part = counted([pairs[place] for place in places], [paid[place] for place in places])
            lines.append(f"    {kind:22} precision {_share(*part.precision):34} recall {_share(*part.recall)}")
        if show:
            for pair, grade, pays in zip(pairs, grades, paid, strict=True):
                if pays != pair.correct:
                    fault = "paid, but wrong" if pays else f"refused ({grade.reason or 'wrong'}), but right"
                    lines.append(f"    {fault}: gold {pair.gold!r}, answer {pair.answer!r} ({pair.kind}: {pair.note})")
    return lines


def measure(folder: Path, show: bool = False, processes: int = 2) -> list[str]:
    """Return the lines on all files of pairs in a folder, development and held-out ones apart."""
    files = sorted(folder.glob("*.jsonl"))
    lines: list[str] = []
    grader = MathGrader(processes=processes)
    try:
        for title, held_out in (("development", False), ("held out", True)):
            pairs = [pair for file in files if ("heldout" in file.name) == held_out for pair in read_pairs(file)]
            if pairs:
                grades = grader.get_grades([pair.answer for pair in pairs], [pair.gold for pair in pairs])
                lines += report(title, pairs, grades, show)
    finally:
        grader.close()
    return lines or [f"no pairs in {folder}"]
