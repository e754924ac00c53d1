"""Comparison of an answer with a gold answer within the gold answer's class: text exactly, mathematics by value.

The table in docs/evaluation.md lists the rules of each class.
"""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from bupo.rewards.answers.classes import (
    Assignment,
    AssignmentGroup,
    IntegerFamily,
    Interval,
    IntervalUnion,
    Matrix,
    Relation,
    Scalar,
    UnreadableAnswer,
    ValueCollection,
    get_symbols,
)  # fmt: skip
from bupo.rewards.answers.extraction import RETRACTED, extract_final_answer, find_later_answer
from bupo.rewards.answers.notation import make_text_key, normalize_notation, parse_number_words
from bupo.rewards.answers.parsing import (
    is_nonmath_text,
    parse_choice,
    parse_formatted_text,
    parse_letter_unit,
    parse_number,
    parse_value,
)
from bupo.rewards.answers.scalar_equality import (
    Equality,
    compare_scalars,
    divide,
    is_same_equation,
    is_same_number,
    is_zero,
)

_INTEGRATION_CONSTANT = re.compile(r"\+\s*C\s*$")
_GROUPED_DIGITS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+")
_RECURRING_DECIMAL = re.compile(r"\.\d*\\(?:overline|bar|overbar|dot)|\d\s*\\ldots|\.\d*\(\d+\)")
_ONLY_PUNCTUATION = re.compile(r"[\s?.,;:!'_…]*")


class StrictVerdict(NamedTuple):
    """The strict verdict on an answer, the text of its final answer, and the reason for `unparsable`."""

    verdict: str
    value: str | None
    reason: str | None


def is_empty_gold(gold: str) -> bool:
    """Return whether a gold answer is empty or holds only punctuation."""
    return _ONLY_PUNCTUATION.fullmatch(make_text_key(_normalize_gold(gold))) is not None


def get_strict_verdict(answer: str, gold: str) -> StrictVerdict:
    """Return the strict verdict on a completion."""
    text, reason = extract_final_answer(answer)
    if is_empty_gold(gold):
        return StrictVerdict("no_gold", text, None)
    normalized_gold = _normalize_gold(gold)
    if text is None:
        return StrictVerdict("unparsable", None, reason)
    if (later := find_later_answer(answer)) is not None:
        with contextlib.suppress(UnreadableAnswer):
            if compare_texts(normalize_notation(text), normalize_notation(later)) == Equality.DIFFERENT:
                return StrictVerdict("unparsable", text, RETRACTED)
    try:
        equality = compare_texts(normalized_gold, normalize_notation(text))
    except UnreadableAnswer:
        return StrictVerdict("unparsable", text, "not readable")
    return StrictVerdict(equality, text, None)


def _normalize_gold(gold: str) -> str:
    text = extract_final_answer(gold).text if "\\boxed" in gold else gold
    return normalize_notation(text or "")


def compare_texts(gold: str, answer: str) -> Equality:
    """Compare two normalised texts.

    Raises:
        UnreadableAnswer: if the gold answer is mathematics and the answer is not.
    """
    is_list = _GROUPED_DIGITS.fullmatch(gold) and re.search(r"\d,\s", answer)  # 1, 234 is not 1,234
    if make_text_key(gold) == make_text_key(answer) and not is_list:
        return Equality.SAME
    if gold == "\\phi" or "\\emptyset" in make_text_key(gold):
        answer = re.sub(r"\\phi\s*$", r"\\emptyset ", answer) if gold != "\\phi" else answer
        if make_text_key(gold) == make_text_key(answer):
            return Equality.SAME
    for compare in (_compare_choices, _compare_letters, _compare_words, _compare_booleans, _compare_formatted_texts):
        verdict = compare(gold, answer)
        if verdict is not None:
            return verdict
    try:
        gold_values = parse_readings(gold)
    except UnreadableAnswer:
        return Equality.DIFFERENT  # two different texts
    if _INTEGRATION_CONSTANT.search(gold) and len(re.findall(r"(?<![\\a-zA-Z])[cC](?![a-zA-Z])", answer)) == 1:
        answer = re.sub(r"\+\s*c\s*$", "+ C", answer)  # the constant of an integral
    best, is_recurring = Equality.DIFFERENT, _RECURRING_DECIMAL.search(gold)
    for value in parse_readings(answer, gold):
        if is_recurring and isinstance(value, Scalar):  # a rounded decimal does not equal a recurring one
            value = dataclasses.replace(value, decimal_step=None)
        for gold_value in gold_values:
            verdict = compare_values(gold_value, value)
            if verdict == Equality.SAME:
                return verdict
            best = verdict if verdict == Equality.UNEVALUATED else best
    return best


def parse_readings(text: str, gold: str | None = None) -> list:
    """Return the possible values of a text. For example, letters behind a number may be factors or a unit.

    Args:
        text (`str`): a normalised text.
        gold (`str`, *optional*): the gold answer, if the text is an answer. It allows more readings.

    Raises:
        UnreadableAnswer: if the text has no value.
    """
    values = []
    with contextlib.suppress(UnreadableAnswer, RecursionError):
        values.append(parse_value(text))
    if (gold is not None or re.search(r"\d\s", text)) and (number := parse_letter_unit(text)) is not None:
        values.append(number)
    if (
        gold is not None
        and (match := re.fullmatch(r"([-+]?\d+),(\d+)([^\d,;]*)", text))
        and re.search(r"\d?\.\d|frac|/", gold)
        and (len(match[2]) != 3 or match[1].lstrip("-+") == "0")
    ):
        with contextlib.suppress(UnreadableAnswer):
            values.append(parse_value(f"{match[1]}.{match[2]}{match[3]}"))  # a decimal comma
    if gold is not None and gold.startswith("(") and (point := re.fullmatch(r"[A-Z]\s*(\(.*,.*\))", text)):
        with contextlib.suppress(UnreadableAnswer):
            values.append(parse_value(point[1]))
    if gold is not None and not gold.startswith("(") and (match := re.fullmatch(r"C\s*\((\w+),\s*(\w+)\)", text)):
        with contextlib.suppress(UnreadableAnswer):
            values.append(parse_value(f"\\binom{{{match[1]}}}{{{match[2]}}}"))
    if gold is not None and (integer := parse_number_words(text)) is not None and parse_number(gold):
        values.append(Scalar(Fraction(integer), text=text))
    if not values:
        raise UnreadableAnswer
    return values


# -- texts


def _compare_choices(gold: str, answer: str) -> Equality | None:
    """Compare choices by their letter; None if the gold answer is not a choice."""
    gold_choice = parse_choice(gold)
    flat = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", gold).strip()
    is_marked = re.match(r"\([A-Ja-j]\)|[A-J][.):]", flat)
    if gold_choice is None or not (is_marked or flat == gold_choice[0]):
        return None
    answer_choice = parse_choice(answer)
    if answer_choice is None or answer_choice[0] != gold_choice[0]:
        return Equality.DIFFERENT
    rest = answer_choice[1]
    if not rest:
        return Equality.SAME
    if gold_choice[1]:
        keys = [make_text_key(normalize_notation(text)) for text in (rest, gold_choice[1])]
        return _to_equality(keys[0] == keys[1])
    hedges = re.search(
        r"(?i)(?<![a-z])(?:or|and|not|no|nor|either|both|maybe|is|isn.?t|are|was|would|cannot|can.?t|wrong|incorrect\w*|false\w*|except|but|"
        r"unless|if|perhaps|possibl[ey]|probabl[ey]|anything|something|whatever|guess\w*|(?:un)?likely|eliminat\w*|reject\w*|ruled|"
        r"exclud\w*|confiden\w*|fails?|failed|impossible|unsure|sure|doubt\w*|contradict\w*|discard\w*|crossed|too|"
        r"invalid|mistake\w*|almost|seems?)(?![a-z])|(?<![A-Za-z\\])\(?[A-J]\)?(?![A-Za-z])|[,;/&]\s*[A-Ja-j]\b",
        rest,
    )
    is_marked = re.match(
        r"(?i)(?:(?:option|choice|answer)\s*:?\s*)?(?:\([A-J]\)|[A-J]\s*[.):])",
        re.sub(r"\\text\{([^{}]*)\}", r"\1 ", answer).strip(),
    )
    return _to_equality(not hedges and is_marked is not None)


def _compare_letters(gold: str, answer: str) -> Equality | None:
    """Compare letters in order, with any separators; None if the gold answer is not a sequence of single letters."""
    if not re.fullmatch(r"[A-Z](?:[\s,]+[A-Z])+", gold):
        return None
    if not re.fullmatch(r"[A-Z](?:(?:\s|,|->|\\to(?![a-zA-Z])|\\rightarrow(?![a-zA-Z]))*[A-Z])+", answer):
        return None
    return _to_equality(re.findall(r"[A-Z]", answer) == re.findall(r"[A-Z]", gold))


def _compare_words(gold: str, answer: str) -> Equality | None:
    """Return SAME for equal words in order, with any separators, else None."""
    rows = []
    for text in (gold, answer):
        flat = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace("\\to ", ",").replace("->", ",")
        if not re.fullmatch(r"\[?(?:[\s,;'\"]*[^\W\d_]{3,})(?:[\s,;'\"]+[^\W\d_]{2,})+[\s,;'\"]*\]?", flat):
            return None
        rows.append(re.findall(r"\w+", flat.lower()))
    return Equality.SAME if rows[0] == [word for word in rows[1] if word != "then" or word in rows[0]] else None


_BOOLEANS = re.compile(r"(yes|no|true|false)(?:\s*[,;.:]\s*(.*))?", re.DOTALL)
_HEDGE = re.compile(
    r"\b(?:yes|no|not|true|false|but|or|maybe|unless|if|only|wrong|incorrect|never|except|however|n't|when\w*|for|provided|"
    r"assum\w+|given|suppos\w+|in (?:most|some|many|general|part)|most(?:ly)?|part(?:ly|ially)|usually|sometimes|often|"
    r"probabl[ey]|perhaps|possibl[ey]|likely|almost|nearly|guess\w*|unsure|uncertain|depend\w*|as long as|under|seems?|think|"
    r"although|though|otherwise|doubt\w*|typically|generally|until|while)\b|n't"
)


def _compare_booleans(gold: str, answer: str) -> Equality | None:
    """Compare yes, no, true or false, with a reason behind a comma; None if the gold answer is another text."""
    gold_match, answer_match = (
        _BOOLEANS.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().lower()) for text in (gold, answer)
    )
    if gold_match is None or gold_match[2] or answer_match is None:
        return None
    return _to_equality(answer_match[1] == gold_match[1] and not _HEDGE.search(answer_match[2] or ""))


_WEEKDAY = re.compile(r"\s*(mon|tue|wed|thu|fri|sat|sun)[a-z]*\b")


def _compare_formatted_texts(gold: str, answer: str) -> Equality | None:
    """Compare dates, times, ratios, numbers in a base and codes; None if the gold answer is another text."""
    gold_parts, answer_parts = parse_formatted_text(gold), parse_formatted_text(answer)
    if gold_parts is None:
        if is_nonmath_text(gold):
            return _compare_numbers_in_base(("base", make_text_key(gold).upper(), 2), answer_parts)
        if answer_parts is not None and answer_parts[0] == "base" and answer_parts[2] == 10 and gold == answer_parts[1]:
            return Equality.SAME
        return Equality.DIFFERENT if answer_parts is not None and not _is_binary(gold, answer_parts) else None
    kind = gold_parts[0]
    if kind == "base":
        return _compare_numbers_in_base(gold_parts, answer_parts, answer)
    if kind == "ratio" and answer_parts is None and "=" in answer:
        *steps, last = [side.strip() for side in answer.split("=")]
        if not all(re.fullmatch(r"[a-zA-Z]+(?:\s*:\s*[a-zA-Z]+)+", side) for side in steps) and (
            any(_compare_formatted_texts(gold, side) != Equality.SAME for side in steps)
        ):
            return Equality.DIFFERENT
        return _compare_formatted_texts(gold, last)
    if kind == "ratio" and len(gold_parts) == 3 and answer_parts is None and not re.fullmatch(r"\d?\d:[0-5]\d", gold):
        try:
            ratio = parse_value(answer)
        except UnreadableAnswer:
            return Equality.DIFFERENT
        if isinstance(ratio, Scalar) and not ratio.unit and not is_zero(gold_parts[2]):
            is_fraction = re.search(r"/|frac", answer) is not None
            return _to_equality(is_fraction and is_same_number(ratio, divide(gold_parts[1], gold_parts[2])))
        return Equality.DIFFERENT
    if answer_parts is None:
        return Equality.DIFFERENT
    if {kind, answer_parts[0]} == {"time", "ratio"}:  # 15:45 and 3:45 PM
        ratio, time = (gold_parts, answer_parts) if kind == "ratio" else (answer_parts, gold_parts)
        clock = [int(part.value) if isinstance(part.value, Fraction) else -1 for part in ratio[1:]]
        return _to_equality(len(clock) > 1 and (clock[0] >= 12 or clock[0] == 0) and [*clock, 0][:3] == list(time[1:]))
    if kind != answer_parts[0] or len(gold_parts) != len(answer_parts):
        return Equality.DIFFERENT
    if kind == "date":
        days = [_WEEKDAY.match(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).lower()) for text in (gold, answer)]
        if None not in days and days[0][1] != days[1][1]:  # type: ignore[index]
            return Equality.DIFFERENT
    if kind == "ratio":
        if any((part.unit is None) != (other.unit is None) for part, other in itertools.pairwise(answer_parts[1:])):
            return Equality.DIFFERENT
        return _to_equality(
            all(map(is_same_number, gold_parts[1:], answer_parts[1:]))
            or _is_reduced_ratio(gold, gold_parts[1:], answer_parts[1:])
        )
    return _to_equality(gold_parts == answer_parts)


def _is_reduced_ratio(gold: str, gold_parts: Sequence[Scalar], answer_parts: Sequence[Scalar]) -> bool:
    """Return whether an answer is a gold ratio of integers in lowest terms. A clock time is not a ratio."""
    values = [part.value for part in (*gold_parts, *answer_parts)]
    if re.fullmatch(r"\d?\d(?::[0-5]\d)+", gold):
        return False
    if len(gold_parts) != len(answer_parts) or not all(isinstance(value, Fraction) and value > 0 for value in values):
        return False
    if any(value.denominator != 1 for value in values):
        return False
    gold_values, answer_values = values[: len(gold_parts)], values[len(gold_parts) :]
    divisor = math.gcd(*(value.numerator for value in gold_values))
    return divisor > 1 and all(
        value == divisor * other for value, other in zip(gold_values, answer_values, strict=True)
    )


def _is_binary(gold: str, parts: tuple) -> bool:
    return parts[0] == "base" and parts[2] == 2 and re.fullmatch(r"[01]{3,}", gold) is not None and gold == parts[1]


def _compare_numbers_in_base(gold_parts: tuple, answer_parts: tuple | None, answer: str = "") -> Equality:
    if answer_parts is not None:
        return _to_equality(answer_parts == gold_parts)
    if len(sides := answer.split("=")) == 2:  # with its value in another base
        bases = [parse_formatted_text(side.strip()) or ("base", side.strip(), 10) for side in sides]
        if all(base[0] == "base" and re.fullmatch(r"\w+", base[1]) for base in bases) and gold_parts in bases:
            with contextlib.suppress(ValueError):
                return _to_equality(int(bases[0][1], bases[0][2]) == int(bases[1][1], bases[1][2]))
        return Equality.DIFFERENT
    return _to_equality(re.sub(r"[\s{}]", "", answer).upper() == gold_parts[1])


def _to_equality(same: bool) -> Equality:
    return Equality.SAME if same else Equality.DIFFERENT


# -- values


def compare_values(gold: Any, answer: Any) -> Equality:
    """Compare two values."""
    if (
        isinstance(gold, Assignment)
        and isinstance(answer, Relation)
        and gold.left is not None
        and isinstance(gold.value, Scalar)
    ):
        same = (
            is_same_equation(gold.left, gold.value.value, answer.left.value, answer.right.value)
            if answer.sign == "="
            else False
        )
        return _to_equality(same) if not same or get_symbols(gold.value.value) else Equality.UNEVALUATED
    if (
        isinstance(answer, Assignment)
        and isinstance(gold, Relation)
        and answer.left is not None
        and isinstance(answer.value, Scalar)
    ):
        same = gold.sign == "=" and is_same_equation(gold.left.value, gold.right.value, answer.left, answer.value.value)
        return _to_equality(same)
    if isinstance(gold, Assignment) and isinstance(answer, Assignment):
        if _is_same_name(gold.name, answer.name):
            return compare_values(gold.value, answer.value)
        if renamed := _rename_argument(gold.name, answer):
            return compare_values(gold.value, renamed)
        if all(
            re.fullmatch(r"y|[a-zA-Z]\([a-xz]\)", name.replace(" ", "")) for name in (gold.name, answer.name)
        ) and "y" in (gold.name, answer.name):
            return compare_values(gold.value, answer.value)  # y and f(x)
        lefts = (
            None not in (gold.left, answer.left) and isinstance(gold.value, Scalar) and isinstance(answer.value, Scalar)
        )
        if lefts and get_symbols(gold.value.value) and get_symbols(answer.value.value):
            return _to_equality(is_same_equation(gold.left, gold.value.value, answer.left, answer.value.value))
        return Equality.DIFFERENT
    if isinstance(gold, Assignment):
        if isinstance(gold.value, Scalar) and gold.left is not None and getattr(gold.value.value, "is_Symbol", False):
            return Equality.DIFFERENT  # n for n = m
        return compare_values(gold.value, answer)
    if isinstance(answer, Assignment):
        if isinstance(answer.value, Scalar) and answer.left in get_symbols(answer.value.value):
            return Equality.DIFFERENT  # x = 2x + 3 is an equation
        return compare_values(gold, answer.value)
    if isinstance(gold, AssignmentGroup) or isinstance(answer, AssignmentGroup):
        return _compare_assignment_groups(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return compare_scalars(gold, answer)
    if isinstance(gold, IntegerFamily) and isinstance(answer, IntegerFamily):
        verdict = compare_values(gold.value, answer.value) if gold.domain == answer.domain else Equality.DIFFERENT
        return verdict if verdict == Equality.SAME else _to_equality(_is_same_progression(gold, answer))
    if isinstance(gold, IntegerFamily) != isinstance(answer, IntegerFamily):
        one, other = (_to_integer_family(value) for value in (gold, answer))
        return _to_equality(one is not None and other is not None and _is_same_progression(one, other))
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        shapes = [(len(matrix.rows), len(matrix.rows[0])) for matrix in (gold, answer)]
        return (
            _compare_in_order(zip(sum(gold.rows, ()), sum(answer.rows, ()), strict=True))
            if shapes[0] == shapes[1]
            else Equality.DIFFERENT
        )
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _compare_relations(gold, answer)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        return _compare_intervals(gold, answer)
    if isinstance(gold, IntervalUnion) or isinstance(answer, IntervalUnion):
        parts = [value.parts if isinstance(value, IntervalUnion) else (value,) for value in (gold, answer)]
        return _compare_unordered(*parts)
    gold, answer = _unwrap_singleton_set(gold, answer), _unwrap_singleton_set(answer, gold)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return compare_scalars(gold, answer)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        return _compare_intervals(gold, answer)
    if (
        isinstance(gold, Scalar)
        and isinstance(answer, ValueCollection)
        and answer.kind == "list"
        and _has_distinct_texts(answer.items)
    ):
        return _compare_in_order((gold, item) for item in answer.items)  # one value in several forms
    ordered = [_get_ordered_items(value) for value in (gold, answer)]
    for index, value in enumerate((gold, answer)):
        entries = ordered[index]
        if getattr(value, "kind", "") == "components" and entries and len(ordered[1 - index] or ()) == 2:
            ordered[index] = entries[:2] if is_zero(entries[2]) else entries  # a vector in the plane
    if isinstance(gold, ValueCollection) and isinstance(answer, ValueCollection):
        if {gold.kind, answer.kind} <= {"list", "set"}:
            return _compare_unordered(_get_distinct_items(gold), _get_distinct_items(answer))
        if {gold.kind, answer.kind} == {"letters", "set"}:
            return _compare_unordered(gold.items, answer.items)
    if ordered[0] is not None and ordered[1] is not None:
        if (isinstance(gold, ValueCollection) and gold.kind == "set") or (
            isinstance(answer, ValueCollection) and answer.kind == "set"
        ):
            return Equality.DIFFERENT
        if isinstance(gold, Interval) and isinstance(answer, ValueCollection) and answer.kind == "list":
            return Equality.DIFFERENT  # (0, 1) may be an interval
        return (
            _compare_in_order(zip(ordered[0], ordered[1], strict=True))
            if len(ordered[0]) == len(ordered[1])
            else Equality.DIFFERENT
        )
    return Equality.DIFFERENT


def _has_distinct_texts(items: Sequence) -> bool:
    """Return whether all items have different texts."""
    texts = [item.text for item in items if isinstance(item, Scalar)]
    return len(set(texts)) == len(items) > 1


def _unwrap_singleton_set(value: Any, other: Any) -> Any:
    """Return the only element of a set if the other value is a number or a pair, else the value itself."""
    if (
        isinstance(value, ValueCollection)
        and value.kind == "set"
        and (isinstance(other, Scalar) or getattr(other, "may_be_pair", False))
    ):
        items = _get_distinct_items(value)
        return items[0] if len(items) == 1 else value
    return value


def _get_ordered_items(value: Any) -> tuple | None:
    if isinstance(value, ValueCollection):
        return value.items
    if isinstance(value, Interval) and value.may_be_pair:
        return (value.low, value.high)
    if isinstance(value, Matrix) and 1 in (len(value.rows), len(value.rows[0])):
        return sum(value.rows, ())
    return None


def _rename_argument(name: str, answer: Assignment) -> Any:
    """Return the value of a function with its argument renamed to the gold answer's (`f(t)` to `f(x)`), or None."""
    import sympy

    heads = [re.fullmatch(r"([a-zA-Z])\(([a-z])\)", each.replace(" ", "")) for each in (name, answer.name)]
    if None in heads or heads[0][1] != heads[1][1] or not isinstance(answer.value, Scalar):  # type: ignore[index]
        return None
    gold_symbol, symbol = (sympy.Symbol(head[2]) for head in heads)  # type: ignore[index]
    tree = answer.value.value
    if isinstance(tree, Fraction) or gold_symbol in tree.free_symbols:
        return None
    return Scalar(tree.xreplace({symbol: gold_symbol}), text=answer.value.text)


def _is_same_name(gold: str, answer: str) -> bool:
    keys = [make_text_key(name).replace("{", "").replace("}", "") for name in (gold, answer)]
    return keys[0] == keys[1]


def _to_integer_family(value: Any) -> IntegerFamily | None:
    """Return a value as a family over the integers, also for a remainder (`2 \\pmod 3`), or None."""
    import sympy

    if isinstance(value, IntegerFamily) or not isinstance(value, Scalar) or value.unit is None:
        return value if isinstance(value, IntegerFamily) else None
    modulus = re.fullmatch(r"mod(\d+)", value.unit.bases[0][0])
    if modulus is None or len(value.unit.bases) != 1 or not isinstance(value.value, Fraction):
        return None
    tree = int(modulus[1]) * sympy.Symbol("n_0") + sympy.Rational(value.value.numerator, value.value.denominator)
    return IntegerFamily(Scalar(tree), "\\mathbb{Z}")


def _is_same_progression(gold: IntegerFamily, answer: IntegerFamily) -> bool:
    """Return whether two families over the integers are the same arithmetic progression (`3k + 2`, `3k - 1`)."""
    import sympy

    trees = [
        sympy.expand(family.value.value)
        for family in (gold, answer)
        if family.domain == "\\mathbb{Z}" and isinstance(family.value, Scalar) and get_symbols(family.value.value)
    ]
    if len(trees) != 2 or any(family.value.unit for family in (gold, answer)):
        return False
    (index,) = [symbol for symbol in trees[0].free_symbols if str(symbol) == "n_0"] or [None]
    if index is None or any(tree.free_symbols != {index} for tree in trees):
        return False
    steps, starts = [tree.coeff(index, 1) for tree in trees], [tree.subs(index, 0) for tree in trees]
    if any(
        sympy.expand(tree - step * index - start) != 0 for tree, step, start in zip(trees, steps, starts, strict=True)
    ):
        return False
    shift = sympy.nsimplify((starts[0] - starts[1]) / steps[0]) if steps[0] else None
    return bool(shift is not None and abs(steps[0]) == abs(steps[1]) and shift.is_Integer)


def _compare_assignment_groups(gold: Any, answer: Any) -> Equality:
    if isinstance(gold, AssignmentGroup) and isinstance(answer, AssignmentGroup):
        keys = [{make_text_key(name): value for name, value in names.values.items()} for names in (gold, answer)]
        if set(keys[0]) != set(keys[1]):
            return Equality.DIFFERENT
        return _compare_in_order((value, keys[1][name]) for name, value in keys[0].items())
    names, other = (gold, answer) if isinstance(gold, AssignmentGroup) else (answer, gold)
    values = [value for _, value in sorted(names.values.items())]
    items = _get_ordered_items(other)
    stems = {name.partition("_")[0].strip() for name in names.values}
    if isinstance(other, ValueCollection) and other.kind in ("list", "set") and len(stems) == 1:  # x_1 = 2, x_2 = 3
        return _compare_unordered(other.items, values) if names is answer else _compare_unordered(values, other.items)
    if items is None or len(items) != len(values) or (isinstance(other, ValueCollection) and other.kind != "tuple"):
        return Equality.DIFFERENT
    return _compare_in_order(zip(items, values, strict=True) if names is answer else zip(values, items, strict=True))


def _compare_in_order(pairs: Any) -> Equality:
    verdicts = [compare_values(gold, answer) for gold, answer in pairs]
    if Equality.DIFFERENT in verdicts:
        return Equality.DIFFERENT
    return Equality.UNEVALUATED if Equality.UNEVALUATED in verdicts else Equality.SAME


def _compare_unordered(gold: Sequence, answer: Sequence) -> Equality:
    """Compare values in any order: each needs an equal one in the answer."""
    rest, worst = list(answer), Equality.SAME
    if len(gold) != len(rest) or len(rest) > 200:
        return Equality.DIFFERENT
    for value in gold:
        for index, other in enumerate(rest):
            if _is_set(value) != _is_set(other) and (isinstance(value, Scalar) or isinstance(other, Scalar)):
                continue  # a number is not a set of one number
            verdict = compare_values(value, other)
            if verdict != Equality.DIFFERENT:
                worst = worst if verdict == Equality.SAME else verdict
                rest.pop(index)
                break
        else:
            return Equality.DIFFERENT
    return worst


def _is_set(value: Any) -> bool:
    return isinstance(value, ValueCollection) and value.kind == "set"


def _get_distinct_items(collection: ValueCollection) -> tuple:
    items: list = []
    for item in collection.items[:201]:
        if collection.kind != "set" or not any(compare_values(other, item) == Equality.SAME for other in items):
            items.append(item)
    return tuple(items)


def _compare_intervals(gold: Interval, answer: Interval) -> Equality:
    if (gold.low_open, gold.high_open) != (answer.low_open, answer.high_open):
        return Equality.DIFFERENT
    ends = [(gold.low, answer.low), (gold.high, answer.high)]
    if any((one is None) != (other is None) for one, other in ends):
        return Equality.DIFFERENT
    return _compare_in_order(pair for pair in ends if pair[0] is not None)


def _compare_relations(gold: Relation, answer: Relation) -> Equality:
    if gold.sign != answer.sign:
        return Equality.DIFFERENT
    sides = (gold.left.value, gold.right.value, answer.left.value, answer.right.value)
    return _to_equality(is_same_equation(*sides, positive=gold.sign != "="))
