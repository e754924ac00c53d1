"""The child process that grades: JSON lines in, JSON lines out. Whatever hangs or eats memory in here is killed.

One line `{"number": ..., "answer": ..., "gold": ..., "problem": ..., "deadline": ...}` is answered by one of `number`,
`verdict`, `value`, `strict` and `reason`. `problem` names a problem whose task has a scorer (`bupo.rewards.task_scorers`), else
it is null. A line without `answer` makes the problem, which may be slow the first time. The parent keeps the deadline, so
math-verify's own alarms are off. A memory limit turns `9**9**9` into an error instead of a swapping machine.

The parent starts this file by its path, in an isolated Python with an empty environment, so that no module but the installed
ones and the files beside this one is imported. It is told where math-verify is where that is no installed package.
"""

import functools
import json
import logging
import os
import resource
import sys
import types
from pathlib import Path

MAX_MEMORY_BYTES = 2 << 30  # bytes
MAX_CPU_SECONDS = 1e6  # seconds of CPU that an answer may take, whatever the deadline


def _install_package_stubs() -> None:
    """Make `bupo.rewards` the folder of this file, and nothing else of bupo importable."""
    for name, places in (("bupo", []), ("bupo.rewards", [str(Path(__file__).resolve().parent)])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = places


def grade_answer(answer: str, gold: str) -> dict[str, str | None]:
    """Return the grade of an answer: `verdict`, `value`, `strict` and `reason`.

    `verdict` is math-verify's own, of the text as it stands: its authors' `verify(parse(gold), parse(answer))`, the gold answer
    in a box. The others come from `bupo.rewards.answers.equality.get_strict_verdict`: at most 200 characters of the final answer, the strict
    verdict, and why there is none.
    """
    from bupo.rewards.answers import equality

    verdict = get_math_verify_verdict(answer, gold)
    try:
        strict = equality.get_strict_verdict(answer, gold)
    except (Exception, RecursionError, MemoryError):
        return {"verdict": verdict, "value": None, "strict": "unparsable", "reason": "not readable"}
    value = None if strict.value is None else strict.value[:200]
    return {"verdict": verdict, "value": value, "strict": str(strict.verdict), "reason": strict.reason}


def grade_with_task_scorer(answer: str, gold: str, problem: str) -> dict[str, str | None]:
    """Return the grade of an answer to a task that has a scorer: both verdicts are the scorer's."""
    from bupo.rewards import task_scorers
    from bupo.rewards.answers import extraction

    final = extraction.extract_final_answer(answer)
    if final.text is None:
        return {"verdict": "unparsable", "value": None, "strict": "unparsable", "reason": final.reason}
    right = task_scorers.is_correct(problem, gold, final.text)
    if right is None:
        return grade_answer(answer, gold)
    verdict = "correct" if right else "wrong"
    return {"verdict": verdict, "value": final.text[:200], "strict": verdict, "reason": None}


def get_math_verify_verdict(answer: str, gold: str) -> str:
    """Return math-verify's own verdict."""
    from math_verify import parse, verify

    wanted = _parse_gold(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")
    given = parse(answer, parsing_timeout=None)
    if wanted and given and verify(wanted, given, timeout_seconds=None):
        return "correct"
    return "no_gold" if not wanted else "wrong" if given else "unparsable"


@functools.lru_cache(maxsize=64)
def _parse_gold(gold: str) -> list:
    """Expressions that math-verify finds. The answers to one problem come in a row."""
    from math_verify import parse

    return parse(gold, parsing_timeout=None)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but replies may reach the parent
    sys.path.extend(sys.argv[1:])  # behind this Python's own packages
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarms are off
    try:
        import math_verify  # noqa: F401  the slow import, before the first deadline starts

        for answer, gold in (
            ("\\frac{1}{2}", "0.5"),
            ("x + 1", "1 + x"),
        ):  # and what is made at the first answer: grammars, patterns
            grade_answer(f"\\boxed{{{answer}}}", gold)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):  # no file grows, and no process starts
        resource.setrlimit(limit, (0, 0))
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _limit_cpu(request["deadline"])
        try:
            reply = _handle_request(request)
        except (Exception, RecursionError, MemoryError):
            reply = {"verdict": "unparsable", "value": None, "strict": "unparsable", "reason": "not readable"}
        print(json.dumps({"number": request["number"], **reply}), file=replies, flush=True)


def _handle_request(request: dict) -> dict[str, str | None]:
    if "answer" not in request:
        from bupo.rewards import task_scorers

        task_scorers.warm_up_problem(request["problem"])
        return {}
    if request["problem"]:
        return grade_with_task_scorer(request["answer"], request["gold"], request["problem"])
    return grade_answer(request["answer"], request["gold"])


def _limit_cpu(deadline: float) -> None:
    """Set the CPU seconds that the next answer may take: the kernel's own deadline, for when the parent has been killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + min(deadline, MAX_CPU_SECONDS)) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _install_package_stubs()
    main()
