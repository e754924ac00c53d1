"""Compare numbers and expressions, with their units: exactly, or to the digits of a long decimal."""

import re
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from typing import Any

from bupo.rewards.answers.classes import Scalar, UnreadableAnswer
from bupo.rewards.answers.units import Unit

MIN_SIGNIFICANT_DIGITS = 6  # significant digits that a rounded decimal needs
_PRECISION = 50  # digits to which irrational numbers are compared
_RELATIVE_TOLERANCE = Fraction(1, 10**40)  # relative
_FLOAT_TOLERANCE = Fraction(2, 10**16)  # the relative error that a number in floating point may have
_MAX_EXPONENT = 10**6  # of an exponent, and of a number whose factorial is taken, that are worked out
# at these values of their letters, expressions are compared: of both signs and several sizes
_SAMPLE_VALUES = ("0.3719", "2.7314", "-1.6180", "17.1327", "-0.2917", "5.4429", "-11.391", "0.8731")


class Equality(StrEnum):
    SAME = "correct"
    DIFFERENT = "wrong"
    UNEVALUATED = "unevaluated"


def compare_scalars(gold: Scalar, answer: Scalar) -> Equality:
    """Return whether two numbers or expressions, with their units, are the same answer."""
    if not any(is_same_number(*pair) for pair in _convert_to_common_unit(gold, answer)):
        return Equality.DIFFERENT
    return Equality.UNEVALUATED if is_unevaluated(gold, answer) else Equality.SAME


def _convert_to_common_unit(gold: Scalar, answer: Scalar) -> list[tuple[Scalar, Scalar]]:
    """Return the pairs of numbers to compare: the answer is right if one pair is equal."""
    ours, theirs = gold.unit, answer.unit
    if ours == theirs:
        return [(gold, answer)]
    if ours is not None and theirs is not None:
        for meaning in (_WEIGHT, _STERLING):
            read = [_resolve_pound(unit, meaning) for unit in (ours, theirs)]
            if read != [ours, theirs] and read[0].bases == read[1].bases:
                return [(_multiply_by_factor(gold, read[0].factor), _multiply_by_factor(answer, read[1].factor))]
    pairs = []
    if ours is None or theirs is None:
        unit = ours or theirs
        if unit == _PERCENT:
            # a plain number of at most 1 is a share of one: 0.5 and 50 %, never 0.5 and 0.5 %
            pairs.append((_convert_percent(gold), _convert_percent(answer)))
            bare = gold if ours is None else answer
            if isinstance(bare.value, Fraction) and abs(bare.value) > 1:
                pairs.append((gold, answer))
            return pairs
        if unit is not None and unit.bases == _DEGREES.bases and (ours is None or _has_pi(answer.value)):
            pairs.append((_convert_to_radians(gold), _convert_to_radians(answer)))
            if _has_pi(gold.value) or _has_pi(answer.value):
                return pairs
        if (
            unit is not None
            and any(name.startswith("mod") for name, _ in unit.bases)
            and ours is None
            and not isinstance(gold.value, Fraction)
        ):
            return []
        return [*pairs, (gold, answer)]
    if ours.bases == theirs.bases:
        return [(_multiply_by_factor(gold, ours.factor), _multiply_by_factor(answer, theirs.factor))]
    if {ours.bases, theirs.bases} == {_DEGREES.bases, (("rad", 1),)}:
        return [(_convert_to_radians(gold), _convert_to_radians(answer))]
    return []


_PERCENT = Unit((("%", 1),), Fraction(1))
_STERLING = Unit((("gbp", 1),), Fraction(1))
_WEIGHT = Unit((("g", 1),), Fraction("453.59237"))
_DEGREES = Unit((("deg", 1),), Fraction(1))


def _resolve_pound(unit: Unit, meaning: Unit) -> Unit:
    """Return a unit with "pound" in it read as a weight or as an amount of money."""
    power = dict(unit.bases).get("pound", 0)
    if not power:
        return unit
    ((name, _),) = meaning.bases
    bases = {base: exponent for base, exponent in unit.bases if base != "pound"}
    bases[name] = bases.get(name, 0) + power
    kept = tuple(sorted((base, exponent) for base, exponent in bases.items() if exponent))
    return Unit(kept, unit.factor * meaning.factor**power)


def _has_pi(value: Any) -> bool:
    import sympy

    return not isinstance(value, Fraction) and bool(value.has(sympy.pi))


def _convert_percent(scalar: Scalar) -> Scalar:
    return _multiply_by_factor(scalar, Fraction(1, 100)) if scalar.unit == _PERCENT else scalar


def _convert_to_radians(scalar: Scalar) -> Scalar:
    import sympy

    if scalar.unit is None or scalar.unit.bases != _DEGREES.bases:
        return scalar
    return Scalar(_to_sympy(scalar.value) * sympy.pi / 180, None, None, scalar.text)


def _multiply_by_factor(scalar: Scalar, factor: Fraction) -> Scalar:
    if factor == 1:
        return scalar
    step = None if scalar.decimal_step is None else scalar.decimal_step * factor
    value = scalar.value * factor if isinstance(scalar.value, Fraction) else scalar.value * _to_sympy(factor)
    return Scalar(value, step, scalar.unit, scalar.text)


def multiply(one: Scalar, other: Scalar) -> Scalar:
    """Return the product of two scalars."""
    if isinstance(one.value, Fraction):
        return _multiply_by_factor(other, one.value)
    return Scalar(one.value * _to_sympy(other.value), text=other.text)


def divide(above: Scalar, below: Scalar) -> Scalar:
    """Return the quotient of two scalars."""
    if isinstance(above.value, Fraction) and isinstance(below.value, Fraction):
        return Scalar(above.value / below.value)
    return Scalar(_to_sympy(above.value) / _to_sympy(below.value))


def is_zero(scalar: Scalar) -> bool:
    """Return whether a number is zero."""
    return scalar.value == 0


def sort_by_value(items: Sequence[Scalar]) -> list[Scalar]:
    """Return numbers by size.

    Raises:
        Unreadable: if one of them is none.
    """
    try:
        return sorted(items, key=lambda item: float(item.value))
    except TypeError as error:
        raise UnreadableAnswer from error


def is_same_number(gold: Scalar, answer: Scalar) -> bool:
    """Return whether two values are equal: exactly, or to the digits of a decimal that has at least [`MIN_SIGNIFICANT_DIGITS`]."""
    ours, theirs = _to_exact(gold.value), _to_exact(answer.value)
    if isinstance(ours, Fraction) and isinstance(theirs, Fraction):
        return ours == theirs or _is_equal_rounded(ours, gold.decimal_step, theirs, answer.decimal_step)
    if isinstance(ours, Fraction) or isinstance(theirs, Fraction):
        exact, decimal, step = (
            (theirs, ours, gold.decimal_step) if isinstance(ours, Fraction) else (ours, theirs, answer.decimal_step)
        )
        if not exact.free_symbols:
            if step is None or abs(decimal) < 10 ** (MIN_SIGNIFICANT_DIGITS - 1) * step:
                return _is_same_irrational(exact, _to_sympy(decimal))
            number = exact.evalf(_PRECISION)
            return bool(
                number.is_Float
                and abs(number - _to_sympy(decimal))
                <= max(_to_sympy(step) / 2, abs(number) * _to_sympy(_FLOAT_TOLERANCE))
            )
    return is_same_expression(_to_sympy(ours), _to_sympy(theirs))


def _is_equal_rounded(ours: Fraction, our_step: Fraction | None, theirs: Fraction, their_step: Fraction | None) -> bool:
    """Return whether the coarser of two numbers is a decimal of enough digits, to which the other one rounds."""
    if any(step is None and number.denominator == 1 for number, step in ((ours, our_step), (theirs, their_step))):
        return False  # an integer is exact
    if our_step is None and their_step is None:
        return False
    ours_is_coarser = their_step is None or (our_step is not None and our_step > their_step)
    step = our_step if ours_is_coarser else their_step
    coarse = ours if ours_is_coarser else theirs
    return (
        step is not None
        and abs(coarse) >= 10 ** (MIN_SIGNIFICANT_DIGITS - 1) * step
        and abs(ours - theirs) <= max(step / 2, abs(coarse) * _FLOAT_TOLERANCE)
    )


def _to_exact(value: Any) -> Any:
    """A number as a fraction where it is rational; decimals in an expression are what is written."""
    if isinstance(value, Fraction):
        return value
    import sympy

    floats = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    value = value.xreplace(floats) if floats else value
    if value.free_symbols:
        return value
    _check_size(value)
    value = _evaluate_tree(_use_real_roots(value).doit())
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else value


def _check_size(value: Any) -> None:
    """Refuse numbers of too many digits to be worked out.

    Raises:
        Unreadable: for an exponent or factorial beyond any answer.
    """
    import sympy

    for part in sympy.postorder_traversal(value):
        sizes = (
            [part.exp]
            if part.is_Pow
            else list(part.args)
            if isinstance(part, (sympy.factorial, sympy.binomial))
            else []
        )
        if any(size.is_number and not abs(size.evalf(5)) < _MAX_EXPONENT for size in sizes):
            raise UnreadableAnswer


def _evaluate_tree(value: Any) -> Any:
    """A tree, evaluated: `doit` leaves functions that were made without evaluation."""
    return value.func(*map(_evaluate_tree, value.args)) if value.args else value


def _use_real_roots(value: Any) -> Any:
    """A tree in which odd roots of negative numbers are real, as in `\\sqrt[3]{-8}`."""
    import sympy

    def is_root(part: Any) -> bool:
        return (
            part.is_Pow
            and part.exp.is_Rational
            and part.exp.p == 1
            and part.exp.q % 2 == 1
            and part.base.is_Integer
            and part.base < 0
        )

    return value.replace(is_root, lambda part: -sympy.Pow(-part.base, part.exp)) if value.has(sympy.Pow) else value


def _to_sympy(value: Any) -> Any:
    import sympy

    return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def is_same_expression(gold: Any, answer: Any) -> bool:
    """Return whether two expressions have the same values wherever the gold one is real, or everywhere where it is nowhere."""
    import sympy
    from math_verify.grader import unwrap_fcs

    gold, answer = unwrap_fcs(gold), unwrap_fcs(answer)
    if gold == answer:
        return True
    letters = gold.free_symbols | answer.free_symbols
    if not letters:
        return _is_same_irrational(gold, answer)
    if not gold.free_symbols and answer.has(sympy.Sum, sympy.Integral, sympy.Limit, sympy.Product):
        return False
    others, real = [], 0
    for point in _make_sample_points(letters) + (
        _make_extra_points(letters) if gold.has(*_get_step_functions()) or answer.has(*_get_step_functions()) else []
    ):
        wanted = _evaluate_at(gold, point)
        if wanted is not None and wanted.is_real:
            given = _evaluate_at(answer, point)
            if given is None or not _is_close(wanted, given):
                return False
            real += 1
        elif wanted is not None:
            others.append((wanted, point))
    if real >= 2:
        return True
    pairs = [(wanted, _evaluate_at(answer, point)) for wanted, point in others]
    return real + len(pairs) >= 2 and all(given is not None and _is_close(wanted, given) for wanted, given in pairs)


def _make_sample_points(letters: set) -> list[dict]:
    """The points at which expressions are compared: a number for each letter."""
    import sympy

    ordered = sorted(letters, key=str)
    return [
        {
            letter: sympy.Float(_SAMPLE_VALUES[(turn + 3 * place) % len(_SAMPLE_VALUES)], _PRECISION)
            * (1 + sympy.Rational(place, 7))
            for place, letter in enumerate(ordered)
        }
        for turn in range(len(_SAMPLE_VALUES))
    ]


def _get_step_functions() -> tuple:
    """Return the functions that change at integers or at one place only, which may be far from the other points."""
    import sympy

    return sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign


def _make_extra_points(letters: set) -> list[dict]:
    """Return integer points, and points of either sign that are larger than the numbers in most answers."""
    import sympy

    ordered = sorted(letters, key=str)
    rows = [(6, 3, 8, 5), (7, 4, 2, 9), (9301, 7877, 6421, 5023), (-9203, -8111, -6337, -4993), (98, 47, 31, 83)]
    return [{letter: sympy.Integer(row[place % 4]) for place, letter in enumerate(ordered)} for row in rows]


def _evaluate_at(tree: Any, point: dict) -> Any:
    """The value of an expression at a point; None where it has none."""
    import sympy

    value = tree.evalf(30, subs=point)
    known = value.is_number and value.is_finite and not value.has(sympy.zoo, sympy.nan, sympy.oo)
    if known and not value.is_Float and not value.is_Rational:
        value = value.evalf(30)
        known = all(part.is_Float or part.is_Rational for part in value.as_real_imag())
    return value if known else None


def _is_close(one: Any, other: Any) -> bool:
    size = max(abs(one), abs(other))
    return bool(abs(one - other) <= size * 1e-20) or bool(size == 0)


def _is_same_irrational(one: Any, other: Any) -> bool:
    if one == other:
        return True
    values = [value.evalf(_PRECISION) for value in (one, other)]
    if not all(part.is_Float or part.is_Rational for value in values for part in value.as_real_imag()):
        return False
    for mine, yours in zip(*(value.as_real_imag() for value in values), strict=True):
        if abs(mine - yours) > max(abs(mine), abs(yours)) * _to_sympy(_RELATIVE_TOLERANCE) and not _is_noise(
            mine, yours
        ):
            return False
    return True


def _is_noise(one: Any, other: Any) -> bool:
    """Return whether both numbers are zero to the last digit that was computed."""
    return all(number == 0 or (number.is_Float and number._prec == 1) for number in (one, other))


# -- answers that are the question again

_DIVISION_SIGN = re.compile(r"÷|\\div(?![a-zA-Z])")
_UNEVALUATED_FUNCTION = re.compile(r"\\?(?<![a-zA-Z])(?:gcd|lcm|bmod)(?![a-zA-Z])")
_SLASH = re.compile(r"/|frac|\\over(?![a-zA-Z])")


def _has_pending_operation(tree: Any) -> bool:
    """Return whether an irrational number holds an operation on numbers that leaves fewer terms or factors when it is done.

    These are a sum of terms whose quotient is rational, a product of integers or of sums, and a power of a sum.
    """
    import sympy

    for part in sympy.preorder_traversal(tree):
        if part.is_Add:
            terms = _flatten_terms(part, sympy.Add)
            quotients = (one / other for place, one in enumerate(terms) for other in terms[:place] if other != 0)
            if any(quotient.doit().is_Rational for quotient in quotients):
                return True
        elif part.is_Mul:
            factors = [factor for factor in _flatten_terms(part, sympy.Mul) if factor not in (1, -1)]
            integers = [factor for factor in factors if factor.is_Integer]
            if len(integers) > 1 or sum(factor.is_Add for factor in factors) > 1:
                return True
        elif part.is_Pow and part.base.is_Add and part.exp.is_Integer and part.exp > 1:
            return True
    return False


def _flatten_terms(tree: Any, kind: type) -> list:
    """Return the terms of a sum or the factors of a product, with those of its parts of the same kind."""
    return [inner for part in tree.args for inner in (_flatten_terms(part, kind) if isinstance(part, kind) else [part])]


def is_unevaluated(gold: Scalar, answer: Scalar) -> bool:
    """Return whether the answer equals the gold one, but is the question again: an operation that nobody has carried out.

    That is a sum, product, logarithm, remainder or chain of quotients where the gold answer is a number, and a `\\sum`,
    integral, limit or derivative where it holds none. `4 + 7` is no answer to "what is 4 + 7?", and a policy that is paid for
    it learns to repeat the question. A single fraction is a number, reduced or not (`84/2`), and so are decimals,
    `1\\frac{1}{2}`, `3 \\times 10^5`, `50\\%`, `2^{10}`, `5!` and `\\sqrt{4}`.
    """
    import sympy

    expression = answer.value
    if isinstance(expression, Fraction):
        return False
    if not isinstance(gold.value, Fraction) and gold.value.has(sympy.factorial) and expression.has(sympy.factorial):
        return False  # the gold answer is not worked out, either
    if isinstance(gold.value, Fraction) and _UNEVALUATED_FUNCTION.search(answer.text):
        return True  # sympy may have carried it out already
    calculus = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    if expression.has(*calculus):
        return isinstance(gold.value, Fraction) or not gold.value.has(*calculus)
    if not isinstance(_to_exact(gold.value), Fraction):
        if gold.value.free_symbols or expression.free_symbols:
            return False
        if _UNEVALUATED_FUNCTION.search(answer.text) and not _UNEVALUATED_FUNCTION.search(gold.text):
            return True
        return _has_pending_operation(expression) and not _has_pending_operation(gold.value)
    if all(atom.is_Number for atom in expression.atoms()) and (
        _DIVISION_SIGN.search(answer.text) or len(_SLASH.findall(answer.text)) > 1
    ):
        return True  # which sympy may have carried out already
    if _is_multinomial(expression):
        return False
    return any(_is_operation(part) for part in sympy.preorder_traversal(expression)) or expression.has(
        sympy.log, sympy.Mod
    )


def _is_multinomial(tree: Any) -> bool:
    """Return whether a number is a factorial over a product of factorials, as a binomial is written out."""
    import sympy

    factors = _flatten_terms(tree, sympy.Mul) if tree.is_Mul else []
    above = [factor for factor in factors if isinstance(factor, sympy.factorial)]
    below = [factor.base for factor in factors if factor.is_Pow and factor.exp == -1]
    if len(factors) != 2 or len(above) != 1 or len(below) != 1:
        return False
    parts = _flatten_terms(below[0], sympy.Mul) if below[0].is_Mul else below
    return all(isinstance(part.base if part.is_Pow else part, sympy.factorial) for part in parts)


def _is_operation(part: Any) -> bool:
    """Return whether a part of an expression is a sum or product of numbers: no fraction, and no angle (5 pi / 6)."""
    import sympy

    if part.is_Add:
        return sum(term.is_number and not term.has(sympy.pi) for term in part.args) > 1
    angles = sympy.functions.elementary.trigonometric.TrigonometricFunction
    if not part.is_Mul or any(factor.has(sympy.pi) and not isinstance(factor, angles) for factor in part.args):
        return False
    factors = [factor for factor in part.args if factor != -1]  # a sign
    below = [factor for factor in factors if factor.is_Pow and factor.exp == -1 and factor.base.is_Number]
    if len(factors) == 2 and len(below) == 1 and any(factor.is_Number for factor in factors):
        return False
    roots = [factor for factor in factors if factor.is_Pow and factor.base.is_Integer and not factor.exp.is_Integer]
    return sum(map(_is_operand, factors)) > 1 or len(roots) > 1


def _is_operand(factor: Any) -> bool:
    """Return whether a factor is a number, or a power, factorial, binomial or trigonometric function of one.

    Powers of ten are a way to write a number.
    """
    import sympy
    from sympy.functions.elementary.trigonometric import TrigonometricFunction

    if factor.is_Number or isinstance(factor, (sympy.factorial, sympy.binomial, TrigonometricFunction)):
        return True
    return factor.is_Pow and factor.base.is_Integer and factor.exp.is_Integer and factor.base != 10


# -- equations


def is_same_equation(left: Any, right: Any, other_left: Any, other_right: Any, positive: bool = False) -> bool:
    """Return whether two equations are the same up to sides and a constant factor, positive for an inequality."""
    import sympy

    gold, answer = _to_sympy(left) - _to_sympy(right), _to_sympy(other_left) - _to_sympy(other_right)
    letters = gold.free_symbols
    if not letters or letters != answer.free_symbols:
        return False
    factors = []
    for point in _make_sample_points(letters):
        values = [_evaluate_at(tree, point) for tree in (gold, answer)]
        if None in values:
            continue
        if abs(values[1]) < 1e-30 or abs(values[0]) < 1e-30:
            return False
        factors.append(sympy.N(values[0] / values[1], 30))
        if abs(factors[-1] - factors[0]) > abs(factors[0]) * sympy.Float("1e-20"):
            return False
    if len(factors) < 3:
        return False
    return not positive or bool(factors[0].is_real and factors[0] > 0)
