"""Write the sums of SmolLM2's comparison into the package's problems: `python tools/make_problems.py`.

The problems are sums and differences of two numbers of one or two digits, from reasoning_gym's `chain_sum`. Held-out problems
are not among those trained on.
"""

import json
from pathlib import Path

import reasoning_gym

PROBLEMS = Path(__file__).resolve().parent.parent / "src" / "bupo" / "experiments" / "problems"
SIZES = {"sums": 192, "sums-held-out": 128}


def problems() -> dict[str, list[dict[str, str]]]:
    """Return the problems of each file. Each problem occurs once."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum", seed=0, size=1000, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    answers = {entry["question"]: entry["answer"] for entry in drawn}
    rows = iter([{"problem": question, "answer": answer} for question, answer in answers.items()])
    return {name: [next(rows) for _ in range(size)] for name, size in SIZES.items()}


def text(rows: list[dict[str, str]]) -> str:
    """Return problems as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    for name, rows in problems().items():
        (PROBLEMS / f"{name}.jsonl").write_text(text(rows), encoding="utf-8")
