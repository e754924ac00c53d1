"""Precision and recall of the two verdicts on pairs of a gold answer and an answer, judged by hand.

A line of a file of pairs is `{"gold": ..., "answer": ..., "correct": true or false, "kind": ..., "note": ...}`. Files with
`heldout` in their names were not read while rules were written; their numbers are printed separately.
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
    """Numbers of right answers that are accepted and refused, and of wrong answers that are accepted and refused."""

    accepted: int
    refused: int
    wrong_accepted: int
    wrong_refused: int

    @property
    def precision(self) -> tuple[int, int]:
        """Right answers among the accepted ones, as (hits, trials)."""
        return self.accepted, self.accepted + self.wrong_accepted

    @property
    def recall(self) -> tuple[int, int]:
        """Accepted answers among the right ones, as (hits, trials)."""
        return self.accepted, self.accepted + self.refused


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


def counted(pairs: list[Pair], accepted: list[bool]) -> Counts:
    """Return the numbers of accepted and refused answers."""
    cells = [(pair.correct, is_accepted) for pair, is_accepted in zip(pairs, accepted, strict=True)]
    return Counts(*(cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))


def _share(hits: int, trials: int) -> str:
    low, high = wilson(hits, trials)
    return f"{hits}/{trials} = {hits / trials:.1%} [{low:.1%}, {high:.1%}]" if trials else "0/0"


def report(title: str, pairs: list[Pair], grades: list[Grade], show: bool = False) -> list[str]:
    """Return lines about a set of pairs: in total and by kind, and each fault if `show` is set."""
    lines = [f"{title}: {len(pairs)} pairs, {sum(pair.correct for pair in pairs)} right"]
    for name in ("record", "strict"):
        accepted = [(grade.verdict if name == "record" else grade.strict) == "correct" for grade in grades]
        total = counted(pairs, accepted)
        lines.append(f"  {name}: precision {_share(*total.precision)}, recall {_share(*total.recall)}")
        rows: dict[str, list[int]] = defaultdict(list)
        for index, pair in enumerate(pairs):
            rows[pair.kind].append(index)
        for kind, indices in sorted(rows.items()):
            counts = counted([pairs[i] for i in indices], [accepted[i] for i in indices])
            lines.append(f"    {kind:22} precision {_share(*counts.precision):34} recall {_share(*counts.recall)}")
        if show:
            for pair, grade, is_accepted in zip(pairs, grades, accepted, strict=True):
                if is_accepted != pair.correct:
                    fault = "accepted, but wrong" if is_accepted else f"refused ({grade.reason or 'wrong'}), but right"
                    lines.append(f"    {fault}: gold {pair.gold!r}, answer {pair.answer!r} ({pair.kind}: {pair.note})")
    return lines


def measure(folder: Path, show: bool = False, processes: int = 2) -> list[str]:
    """Return lines about all files of pairs in a folder, development and held-out files separately."""
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
