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
_SPELLINGS = {
    "\\fbox{": "\\boxed{",
    "½": "\\frac{1}{2}",
    "⅓": "\\frac{1}{3}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "\\mathbf{0}": "0",
}
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
_QUOTIENT = re.compile(r"-?(\\d?frac\{-?\d+\}\{-?\d+\}|\d+ */ *\d+)")


def grade(answer: str, gold: str) -> tuple[str, str | None]:
    """The verdict by name, and what the answer comes to as text, at most 200 characters.

    `unparsable` where the answer holds no expression, `no_gold` where the gold answer holds none.
    """
    from math_verify import parse, verify

    gold = _plain(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")
    answer = _last_word(_plain(answer))
    if _LAST_LETTER.search(gold):  # in `n = m` and `2t` math-verify would take the letter for a unit and drop it
        gold, answer = (_LAST_LETTER.sub(r"\1{\2}", text) for text in (gold, answer))
    wanted = parse(gold, parsing_timeout=None)
    if not wanted or not any(character.isalnum() or character == "+" for character in str(wanted[-1])):
        return "no_gold", None
    given = parse(answer, parsing_timeout=None)
    if not given:
        return "unparsable", None
    value = str(given[0])[:200]
    equal = verify(wanted, given, timeout_seconds=None) or _same_text(wanted, given)
    if not equal or _other_base(wanted, given):
        return "wrong", value
    return ("unevaluated" if left_to_do(wanted, given) else "correct"), value


def _plain(text: str) -> str:
    """Characters, commands and spellings that math-verify does not know, written as those that it does."""
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
    """Whether the gold answer is a number and the answer a sum, product or quotient that equals it.

    `4 + 7` is no answer to "what is 4 + 7?", but math-verify calls it equal to 11, and a policy soon learns to repeat the
    question. `1/2`, `3 \\times 10^5`, `50\\%`, `2^{10}`, `\\sqrt{4}` and `\\sin \\frac{5\\pi}{6}` are answers.
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

    def operation(part: sympy.Basic) -> bool:  # but for an angle such as 5 pi / 6
        return isinstance(part, sympy.Add) or (isinstance(part, sympy.Mul) and not part.has(sympy.pi))

    operations = filter(operation, sympy.preorder_traversal(expression))
    return any(sum(map(operand, part.args)) > 1 for part in operations)


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
