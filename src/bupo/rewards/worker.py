"""The child process that grades: JSON lines in, JSON lines out. Whatever hangs or eats memory in here is killed.

One line `{"answer": ..., "gold": ...}` is answered by one line `{"verdict": ..., "value": ...}`. The parent keeps the
deadline, so math-verify's own alarms are off. A memory limit turns `9**9**9` into an error instead of a swapping machine.
"""

import json
import logging
import re
import resource
import sys

MEMORY = 2 << 30  # bytes
_SPELLINGS = {"\\fbox{": "\\boxed{", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"}
_QUOTIENT = re.compile(r"-?(\\d?frac\{-?\d+\}\{-?\d+\}|\d+ */ *\d+)")


def grade(answer: str, gold: str) -> tuple[str, str | None]:
    """The verdict by name, and what the answer comes to as text, at most 200 characters.

    `unparsable` where the answer holds no expression, `no_gold` where the gold answer holds none.
    """
    from math_verify import parse, verify

    answer = _plain(answer)
    wanted = parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not wanted or not any(character.isalnum() for character in str(wanted[-1])):
        return "no_gold", None
    given = parse(answer, parsing_timeout=None)
    if not given:
        return "unparsable", None
    value = str(given[0])[:200]
    if not verify(wanted, given, timeout_seconds=None):
        return "wrong", value
    return ("unevaluated" if left_to_do(wanted, given) else "correct"), value


def _plain(answer: str) -> str:
    """Characters and commands that math-verify does not know, written as those that it does."""
    for strange, known in _SPELLINGS.items():
        answer = answer.replace(strange, known)
    return answer


def left_to_do(wanted: list, given: list) -> bool:
    """Whether the gold answer is a number and the answer a sum, product or quotient that equals it.

    `4 + 7` is no answer to "what is 4 + 7?", but math-verify calls it equal to 11, and a policy soon learns to repeat the
    question. `1/2`, `3 \\times 10^5`, `50\\%`, `2^{10}` and `\\sqrt{4}` are answers.
    """
    import sympy

    number, expression = wanted[0], given[0]
    if not isinstance(number, sympy.Number):
        return False
    if isinstance(expression, sympy.Equality):
        expression = expression.rhs
    if isinstance(expression, sympy.Integer):
        return bool(_QUOTIENT.fullmatch(str(given[-1]).strip()))
    if not isinstance(expression, sympy.Basic):
        return False

    def operand(part: sympy.Basic) -> bool:
        if isinstance(part, sympy.Number):
            return part not in (-1, sympy.Rational(1, 100))
        power = isinstance(part, sympy.Pow) and part.base.is_Integer and part.exp.is_Integer and part.base != 10
        return power and isinstance(number, sympy.Integer)

    sums_and_products = (p for p in sympy.preorder_traversal(expression) if isinstance(p, sympy.Add | sympy.Mul))
    return any(sum(map(operand, part.args)) > 1 for part in sums_and_products)


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
            verdict, value = grade(request["answer"], request["gold"])
        except (Exception, RecursionError, MemoryError):
            verdict, value = "unparsable", None
        print(json.dumps({"verdict": verdict, "value": value}), file=replies, flush=True)


if __name__ == "__main__":
    main()
