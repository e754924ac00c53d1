"""The child process that grades: JSON lines in, JSON lines out. Whatever hangs or eats memory in here is killed.

One line `{"number": ..., "answer": ..., "gold": ..., "deadline": ...}` is answered by one of `number`, `verdict`, `value` and
`strict`. The parent keeps the deadline, so math-verify's own alarms are off. A memory limit turns `9**9**9` into an error
instead of a swapping machine.

The parent starts this file by its path, in an isolated Python with an empty environment, so that no module but the installed
ones is imported. Hence it imports nothing of bupo, and is told where math-verify is where that is no installed package.
"""

import json
import logging
import os
import re
import resource
import sys
from typing import Any

MEMORY = 2 << 30  # bytes
LONGEST = 1e6  # seconds of CPU that an answer may take, whatever the deadline
_SPELLINGS = {
    "\\fbox{": "\\boxed{",
    "½": "\\frac{1}{2}",
    "⅓": "\\frac{1}{3}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "\\mathbf{0}": "0",
}
_FULL_WIDTH = {0xFF10 + digit: str(digit) for digit in range(10)}  # ０ to ９
_PATTERNS = {
    r"(?<!\.)(?<!\\right)\.(?=\s*\})": "",  # the full stop of \boxed{7.}
    r"√\s*(?:(\d+|[a-zA-Z])|\(([^()]*)\))": r"\\sqrt{\1\2}",
    r"\\boxed\{\s*(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})\s*\}": r"\\boxed{\1 \\times 10^{\2}}",
    r"(?i)\\boxed\{\s*(yes|no|true|false)\s*\}": r"\\boxed{\\text{\1}}",  # not y * e * s
    r"(?<=\d)\\,(?=\d{3}(?!\d))": "",  # 10\,000
    # sympy's sine takes radians
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?\s*(?:\\left)?[({]?\s*)(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\\circ\})": (
        r"\1(\\frac{\2 \\pi}{180})"
    ),
}
_RECURRING = re.compile(r"(\d{1,50})\.(\d{0,50})\\overline\{(\d{1,50})\}")
_TAKEN_BACK = re.compile(r"(?i)\b(?:no|wait|actually|sorry|correction)[,:.;!](?=[^\\]{0,70}\\boxed)")
_LAST_LETTER = re.compile(r"([=+*/-] *|\d(?=[a-z] *\W))([a-z]{1,2})(?= *(?:[}$]|\\[)\]]))")
_IN_BASE = re.compile(r"\w+_\{?(\d+)\}?")
_SLASH, _DIVIDED = re.compile(r"/|frac|\\over"), re.compile(r"÷|\\div")


def grade(answer: str, gold: str) -> dict[str, str | None]:
    """What becomes of an answer: `verdict`, `value` and `strict`.

    `verdict` is math-verify's own, of the text as it stands: its authors' `verify(parse(gold), parse(answer))`, the gold
    answer in a box. `value` is what it takes the answer for, at most 200 characters. `strict` is ours: see `_strict`.
    """
    gold = gold if "\\boxed" in gold else f"\\boxed{{{gold}}}"
    wanted, given = _parsed(gold), _parsed(answer)
    verdict = _verdict(wanted, given, _equal(wanted, given))
    value = _shown(given[0]) if given else None
    try:
        equal = verdict == "correct"
        plain_gold, plain_answer = _respelled(gold, answer)
        if (plain_gold, plain_answer) != (gold, answer):  # most are the same, and nothing is parsed or compared twice
            wanted, given = _parsed(plain_gold), _parsed(plain_answer)
            equal = _equal(wanted, given)
        strict = _strict(wanted, given, equal)
    except (Exception, RecursionError, MemoryError):
        strict = "unparsable"
    return {"verdict": verdict, "value": value, "strict": strict}


def _parsed(text: str) -> list:
    """Expressions that math-verify finds, and the text of the first as the last element; empty where there is none."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def _equal(wanted: list, given: list) -> bool:
    from math_verify import verify

    return bool(wanted and given) and verify(wanted, given, timeout_seconds=None)


def _verdict(wanted: list, given: list, equal: bool) -> str:
    if equal:
        return "correct"
    return "no_gold" if not wanted else "wrong" if given else "unparsable"


def _strict(wanted: list, given: list, equal: bool) -> str:
    """Our verdict: what is left to do is `unevaluated`, and what math-verify equates by mistake is `wrong`."""
    if not wanted or not any(character.isalnum() or character == "+" for character in str(wanted[-1])):
        return "no_gold"
    verdict = _verdict(wanted, given, equal or (bool(given) and _same_text(wanted, given)))
    if verdict != "correct":
        return verdict
    return "wrong" if _other_base(wanted, given) else "unevaluated" if left_to_do(wanted, given) else verdict


def _shown(expression: object) -> str | None:
    try:
        return str(expression)[:200]
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return None


def _respelled(gold: str, answer: str) -> tuple[str, str]:
    """Both as math-verify reads them rightly; unchanged where it does."""
    gold, answer = _plain(gold), _last_word(_plain(answer))
    if _LAST_LETTER.search(gold):  # in `n = m` and `2t` math-verify would take the letter for a unit and drop it
        gold, answer = (_LAST_LETTER.sub(r"\1{\2}", text) for text in (gold, answer))
    return gold, answer


def _plain(text: str) -> str:
    """Characters, commands and spellings that math-verify does not know, written as those that it does."""
    text = text.translate(_FULL_WIDTH)
    for strange, known in _SPELLINGS.items():
        text = text.replace(strange, known)
    for pattern, known in _PATTERNS.items():
        text = re.sub(pattern, known, text)
    return _RECURRING.sub(_fraction, text)


def _fraction(recurring: re.Match) -> str:
    """`0.1\\overline{6}` as the fraction (16 - 1) / 90."""
    whole, fixed, repeated = recurring.groups()
    above = int(whole + fixed + repeated) - int(whole + fixed)
    return f"\\frac{{{above}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"


def _last_word(answer: str) -> str:
    """The answer from where it takes back its earlier boxes: math-verify would join boxes that stand close together."""
    ends = [match.end() for match in _TAKEN_BACK.finditer(answer)]
    return answer[ends[-1] :] if ends else answer


def _same_text(wanted: list, given: list) -> bool:
    """Whether both are beyond math-verify, which leaves them as text, and differ in spaces only."""
    both = isinstance(wanted[0], str) and isinstance(given[0], str)
    return both and "".join(wanted[0].split()) == "".join(given[0].split())


def _other_base(wanted: list, given: list) -> bool:
    """Whether both are numbers written in a base, as `2021_3`, and the bases differ: math-verify does not look at them."""
    bases = {match[1] for text in (wanted[-1], given[-1]) if (match := _IN_BASE.fullmatch(str(text)))}
    return len(bases) > 1


def left_to_do(wanted: list, given: list) -> bool:
    """Whether the answer equals the gold one, but is the question again: an operation that nobody has carried out.

    That is a sum, product or chain of quotients where the gold answer is a number, and a `\\sum`, integral, limit or
    derivative where it holds none. `4 + 7` is no answer to "what is 4 + 7?", but math-verify calls it equal to 11, and a
    policy soon learns to repeat the question. A single fraction is a number, reduced or not (`84/2`), and so are decimals,
    `1\\frac{1}{2}`, `3 \\times 10^5`, `50\\%`, `2^{10}`, `\\sqrt{4}` and `\\sin \\frac{5\\pi}{6}`.
    """
    import sympy

    number, expression = wanted[0], given[0]
    if isinstance(expression, sympy.Equality):
        expression = expression.rhs
    if not isinstance(number, sympy.Basic) or not isinstance(expression, sympy.Basic):
        return False
    calculus = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    if expression.has(*calculus):
        return not number.has(*calculus)
    if not isinstance(number, sympy.Number):
        return False
    text = str(given[-1]).rpartition("=")[2]
    if all(atom.is_Number for atom in expression.atoms()) and (_DIVIDED.search(text) or len(_SLASH.findall(text)) > 1):
        return True  # which sympy may have carried out already
    return any(_operation(part, sympy) for part in sympy.preorder_traversal(expression))


def _operation(part: Any, sympy: Any) -> bool:
    """Whether a part of an expression is a sum or product of numbers, but for a fraction, and an angle such as 5 pi / 6."""
    if part.is_Add:
        return sum(term.is_number and not term.has(sympy.pi) for term in part.args) > 1
    if not part.is_Mul or part.has(sympy.pi):
        return False
    factors = [factor for factor in part.args if factor != -1]  # a sign
    below = [factor for factor in factors if factor.is_Pow and factor.exp == -1 and factor.base.is_Number]
    if len(factors) == 2 and len(below) == 1 and any(factor.is_Number for factor in factors):
        return False
    return sum(map(_operand, factors)) > 1


def _operand(factor: Any) -> bool:
    """Whether a factor is a number or a power of one. Powers of ten and the 1/100 of a percentage are ways to write it."""
    if factor.is_Number:
        return factor * 100 != 1
    return factor.is_Pow and factor.base.is_Integer and factor.exp.is_Integer and factor.base != 10


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but replies may reach the parent
    sys.path.extend(sys.argv[1:])  # behind this Python's own packages
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarms are off
    try:
        import math_verify  # noqa: F401  the slow import, before the first deadline starts

        grade("\\boxed{\\frac{1}{2}}", "0.5")  # and what is made at the first answer: grammars, patterns
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
            reply = grade(request["answer"], request["gold"])
        except (Exception, RecursionError, MemoryError):
            reply = {"verdict": "unparsable", "value": None, "strict": "unparsable"}
        print(json.dumps({"number": request["number"], **reply}), file=replies, flush=True)


def _limit_cpu(deadline: float) -> None:
    """The CPU seconds that the next answer may take: the kernel's own deadline, for when the parent has been killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + min(deadline, LONGEST)) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
