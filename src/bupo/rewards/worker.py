"""The child process that grades: JSON lines in, JSON lines out. Whatever hangs or eats memory in here is killed.

One line `{"answer": ..., "gold": ...}` is answered by one line `{"verdict": ...}`. The parent keeps the deadline, so
math-verify's own alarms are off. A memory limit turns `9**9**9` into an error instead of a swapping machine.
"""

import json
import logging
import resource
import sys

MEMORY = 2 << 30  # bytes


def grade(answer: str, gold: str) -> str:
    """`correct`, `wrong`, or `unparsable` where the answer holds no expression; `bad_gold` where the gold does not."""
    from math_verify import parse, verify

    wanted = parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not wanted:
        return "bad_gold"
    given = parse(answer, parsing_timeout=None)
    if not given:
        return "unparsable"
    return "correct" if verify(wanted, given, timeout_seconds=None) else "wrong"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarms are off
    sys.set_int_max_str_digits(10_000)
    import math_verify  # noqa: F401  the slow import, before the first deadline starts

    replies = sys.stdout
    sys.stdout = sys.stderr  # nothing but replies may reach the parent
    print(json.dumps({"verdict": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = grade(request["answer"], request["gold"])
        except (Exception, RecursionError, MemoryError):
            verdict = "unparsable"
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main()
