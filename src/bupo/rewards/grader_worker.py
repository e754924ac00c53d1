"""The worker process for grading. It reads and writes JSON lines, and the parent kills it if it hangs.

A request `{"number": ..., "answer": ..., "gold": ..., "problem": ..., "deadline": ...}` gets a reply with `number`, `verdict`,
`value`, `strict` and `reason`. `problem` is a reference of a problem whose task has a scorer (`bupo.rewards.task_scorers`), or
null. A request without `answer` creates the problem, which may be slow the first time. The parent enforces the deadline, so
math-verify's own alarms are off. A memory limit turns `9**9**9` into an error.

The parent runs this file by its path, in an isolated Python with an almost empty environment. Only installed packages and the
modules of this package can be imported. The arguments are folders of libraries that are not installed as packages.
"""

import functools
import json
import logging
import os
import resource
import sys
import types
from pathlib import Path

MAX_MEMORY_BYTES = 2 << 30
MAX_CPU_SECONDS = 1e6  # of an answer, for every deadline


def _install_package_stubs() -> None:
    """Make the modules of `bupo.rewards` importable from this file's folder, and no other module of bupo."""
    for name, paths in (("bupo", []), ("bupo.rewards", [str(Path(__file__).resolve().parent)])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = paths


def grade_answer(answer: str, gold: str) -> dict[str, str | None]:
    """Return the grade of an answer: `verdict`, `value`, `strict` and `reason`.

    `verdict` is math-verify's own, `verify(parse(gold), parse(answer))` with the gold answer in a box. `value` (the final
    answer, cut at 200 characters), `strict` and `reason` are those of `bupo.rewards.answers.equality.get_strict_verdict`.
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
    """Return the grade of an answer by its task's scorer, which decides both verdicts."""
    from bupo.rewards import task_scorers
    from bupo.rewards.answers import extraction

    final = extraction.extract_final_answer(answer)
    if final.text is None:
        return {"verdict": "unparsable", "value": None, "strict": "unparsable", "reason": final.reason}
    is_correct = task_scorers.is_correct(problem, gold, final.text)
    if is_correct is None:
        return grade_answer(answer, gold)
    verdict = "correct" if is_correct else "wrong"
    return {"verdict": verdict, "value": final.text[:200], "strict": verdict, "reason": None}


def get_math_verify_verdict(answer: str, gold: str) -> str:
    """Return math-verify's own verdict."""
    from math_verify import parse, verify

    gold_parse = _parse_gold(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")
    answer_parse = parse(answer, parsing_timeout=None)
    if gold_parse and answer_parse and verify(gold_parse, answer_parse, timeout_seconds=None):
        return "correct"
    if not gold_parse:
        return "no_gold"
    return "wrong" if answer_parse else "unparsable"


@functools.lru_cache(maxsize=64)
def _parse_gold(gold: str) -> list:
    """Parse a gold answer with math-verify. The cache helps since the answers to one problem follow each other."""
    from math_verify import parse

    return parse(gold, parsing_timeout=None)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only replies may reach the parent
    sys.path.extend(sys.argv[1:])  # after this Python's own packages
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarms are off
    try:
        import math_verify  # noqa: F401  this import is slow, so it precedes the first deadline

        # the first answers also build grammars and patterns
        for answer, gold in (("\\frac{1}{2}", "0.5"), ("x + 1", "1 + x")):
            grade_answer(f"\\boxed{{{answer}}}", gold)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):  # forbid writing files and starting processes
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
    """Limit the CPU time of the next answer, so that the worker ends even if the parent has been killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + min(deadline, MAX_CPU_SECONDS)) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _install_package_stubs()
    main()
