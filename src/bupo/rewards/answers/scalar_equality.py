"""Comparison of numbers and expressions with units: exactly, or to the digits of a long decimal."""

import re
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from typing import Any

from bupo.rewards.answers.classes import Scalar, UnreadableAnswer
from bupo.rewards.answers.units import Unit

MIN_SIGNIFICANT_DIGITS = 6  # of a rounded decimal that may equal an exact number
_PRECISION = 50  # digits in which irrational numbers are computed
_RELATIVE_TOLERANCE = Fraction(1, 10**40)  # of irrational numbers
_FLOAT_TOLERANCE = Fraction(2, 10**16)  # relative error of a number in floating point
_MAX_EXPONENT = 10**6  # largest exponent, and largest argument of a factorial, that is evaluated
# values of the symbols at which expressions are compared, with both signs and several sizes
_SAMPLE_VALUES = ("0.3719", "2.7314", "-1.6180", "17.1327", "-0.2917", "5.4429", "-11.391", "0.8731")


class Equality(StrEnum):
    """The result of a comparison."""

    SAME = "correct"
    DIFFERENT = "wrong"
    UNEVALUATED = "unevaluated"


def compare_scalars(gold: Scalar, answer: Scalar) -> Equality:
    """Compare two numbers or expressions with their units."""
    if not any(is_same_number(*pair) for pair in _convert_to_common_unit(gold, answer)):
        return Equality.DIFFERENT
    return Equality.UNEVALUATED if is_unevaluated(gold, answer) else Equality.SAME


def _convert_to_common_unit(gold: Scalar, answer: Scalar) -> list[tuple[Scalar, Scalar]]:
    """Return the pairs of numbers to compare. The answer is correct if one pair is equal."""
    gold_unit, answer_unit = gold.unit, answer.unit
    if gold_unit == answer_unit:
        return [(gold, answer)]
    if gold_unit is not None and answer_unit is not None:
        for meaning in (_WEIGHT, _STERLING):
            units = [_resolve_pound(unit, meaning) for unit in (gold_unit, answer_unit)]
            if units != [gold_unit, answer_unit] and units[0].bases == units[1].bases:
                return [(_multiply_by_factor(gold, units[0].factor), _multiply_by_factor(answer, units[1].factor))]
    pairs = []
    if gold_unit is None or answer_unit is None:
        unit = gold_unit or answer_unit
        if unit == _PERCENT:
            # a plain number of at most 1 is a fraction: 0.5 equals 50 %, and not 0.5 %
            pairs.append((_convert_percent(gold), _convert_percent(answer)))
            bare = gold if gold_unit is None else answer
            if isinstance(bare.value, Fraction) and abs(bare.value) > 1:
                pairs.append((gold, answer))
            return pairs
        if unit is not None and unit.bases == _DEGREES.bases and (gold_unit is None or _has_pi(answer.value)):
            pairs.append((_convert_to_radians(gold), _convert_to_radians(answer)))
            if _has_pi(gold.value) or _has_pi(answer.value):
                return pairs
        if (
            unit is not None
            and any(name.startswith("mod") for name, _ in unit.bases)
            and gold_unit is None
            and not isinstance(gold.value, Fraction)
        ):
            return []
        return [*pairs, (gold, answer)]
    if gold_unit.bases == answer_unit.bases:
        return [(_multiply_by_factor(gold, gold_unit.factor), _multiply_by_factor(answer, answer_unit.factor))]
    if {gold_unit.bases, answer_unit.bases} == {_DEGREES.bases, (("rad", 1),)}:
        return [(_convert_to_radians(gold), _convert_to_radians(answer))]
    return []


_PERCENT = Unit((("%", 1),), Fraction(1))
_STERLING = Unit((("gbp", 1),), Fraction(1))
_WEIGHT = Unit((("g", 1),), Fraction("453.59237"))
_DEGREES = Unit((("deg", 1),), Fraction(1))


def _resolve_pound(unit: Unit, meaning: Unit) -> Unit:
    """Return a unit with "pound" replaced by a weight or by an amount of money."""
    power = dict(unit.bases).get("pound", 0)
    if not power:
        return unit
    ((name, _),) = meaning.bases
    bases = {base: exponent for base, exponent in unit.bases if base != "pound"}
    bases[name] = bases.get(name, 0) + power
    nonzero = tuple(sorted((base, exponent) for base, exponent in bases.items() if exponent))
    return Unit(nonzero, unit.factor * meaning.factor**power)


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
    """Sort numbers by size.

    Raises:
        UnreadableAnswer: if an item is not a number.
    """
    try:
        return sorted(items, key=lambda item: float(item.value))
    except TypeError as error:
        raise UnreadableAnswer from error


def is_same_number(gold: Scalar, answer: Scalar) -> bool:
    """Return whether two values are equal, exactly or to the digits of a decimal with [`MIN_SIGNIFICANT_DIGITS`] digits."""
    gold_value, answer_value = _to_exact(gold.value), _to_exact(answer.value)
    if isinstance(gold_value, Fraction) and isinstance(answer_value, Fraction):
        return gold_value == answer_value or _is_equal_rounded(
            gold_value, gold.decimal_step, answer_value, answer.decimal_step
        )
    if isinstance(gold_value, Fraction) or isinstance(answer_value, Fraction):
        if isinstance(gold_value, Fraction):
            exact, decimal, step = answer_value, gold_value, gold.decimal_step
        else:
            exact, decimal, step = gold_value, answer_value, answer.decimal_step
        if not exact.free_symbols:
            if step is None or abs(decimal) < 10 ** (MIN_SIGNIFICANT_DIGITS - 1) * step:
                return _is_same_irrational(exact, _to_sympy(decimal))
            number = exact.evalf(_PRECISION)
            return bool(
                number.is_Float
                and abs(number - _to_sympy(decimal))
                <= max(_to_sympy(step) / 2, abs(number) * _to_sympy(_FLOAT_TOLERANCE))
            )
    return is_same_expression(_to_sympy(gold_value), _to_sympy(answer_value))


def _is_equal_rounded(
    gold: Fraction, gold_step: Fraction | None, answer: Fraction, answer_step: Fraction | None
) -> bool:
    """Return whether the coarser of two numbers is a decimal with enough digits that the other one rounds to."""
    if any(step is None and number.denominator == 1 for number, step in ((gold, gold_step), (answer, answer_step))):
        return False  # an integer is exact
    if gold_step is None and answer_step is None:
        return False
    is_gold_coarser = answer_step is None or (gold_step is not None and gold_step > answer_step)
    step = gold_step if is_gold_coarser else answer_step
    coarse = gold if is_gold_coarser else answer
    return (
        step is not None
        and abs(coarse) >= 10 ** (MIN_SIGNIFICANT_DIGITS - 1) * step
        and abs(gold - answer) <= max(step / 2, abs(coarse) * _FLOAT_TOLERANCE)
    )


def _to_exact(value: Any) -> Any:
    """Convert a rational number to a fraction, and the decimals of an expression to exact numbers."""
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
    """Refuse numbers with too many digits to evaluate.

    Raises:
        UnreadableAnswer: for a huge exponent or factorial.
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
    """Evaluate a tree. `doit` does not evaluate functions that were created with `evaluate=False`."""
    return value.func(*map(_evaluate_tree, value.args)) if value.args else value


def _use_real_roots(value: Any) -> Any:
    """Replace odd roots of negative numbers by real ones, as in `\\sqrt[3]{-8}`."""
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
    """Return whether two expressions are equal at the points where the gold one is real, or at all points if it never is."""
    import sympy
    from math_verify.grader import unwrap_fcs

    gold, answer = unwrap_fcs(gold), unwrap_fcs(answer)
    if gold == answer:
        return True
    symbols = gold.free_symbols | answer.free_symbols
    if not symbols:
        return _is_same_irrational(gold, answer)
    if not gold.free_symbols and answer.has(sympy.Sum, sympy.Integral, sympy.Limit, sympy.Product):
        return False
    points = _make_sample_points(symbols)
    if gold.has(*_get_step_functions()) or answer.has(*_get_step_functions()):
        points += _make_extra_points(symbols)
    complex_points, num_real = [], 0
    for point in points:
        gold_value = _evaluate_at(gold, point)
        if gold_value is not None and gold_value.is_real:
            answer_value = _evaluate_at(answer, point)
            if answer_value is None or not _is_close(gold_value, answer_value):
                return False
            num_real += 1
        elif gold_value is not None:
            complex_points.append((gold_value, point))
    if num_real >= 2:
        return True
    pairs = [(gold_value, _evaluate_at(answer, point)) for gold_value, point in complex_points]
    return num_real + len(pairs) >= 2 and all(
        answer_value is not None and _is_close(gold_value, answer_value) for gold_value, answer_value in pairs
    )


def _make_sample_points(symbols: set) -> list[dict]:
    """Return the points at which expressions are compared, each as numbers by symbol."""
    import sympy

    ordered = sorted(symbols, key=str)
    return [
        {
            symbol: sympy.Float(_SAMPLE_VALUES[(turn + 3 * index) % len(_SAMPLE_VALUES)], _PRECISION)
            * (1 + sympy.Rational(index, 7))
            for index, symbol in enumerate(ordered)
        }
        for turn in range(len(_SAMPLE_VALUES))
    ]


def _get_step_functions() -> tuple:
    """Return the functions that change only at integers or at one point, which the sample points may miss."""
    import sympy

    return sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign


def _make_extra_points(symbols: set) -> list[dict]:
    """Return integer points, and points of both signs that are larger than the numbers of most answers."""
    import sympy

    ordered = sorted(symbols, key=str)
    rows = [(6, 3, 8, 5), (7, 4, 2, 9), (9301, 7877, 6421, 5023), (-9203, -8111, -6337, -4993), (98, 47, 31, 83)]
    return [{symbol: sympy.Integer(row[index % 4]) for index, symbol in enumerate(ordered)} for row in rows]


def _evaluate_at(tree: Any, point: dict) -> Any:
    """Return the value of an expression at a point, or None if it is undefined."""
    import sympy

    value = tree.evalf(30, subs=point)
    is_defined = value.is_number and value.is_finite and not value.has(sympy.zoo, sympy.nan, sympy.oo)
    if is_defined and not value.is_Float and not value.is_Rational:
        value = value.evalf(30)
        is_defined = all(part.is_Float or part.is_Rational for part in value.as_real_imag())
    return value if is_defined else None


def _is_close(one: Any, other: Any) -> bool:
    size = max(abs(one), abs(other))
    return bool(abs(one - other) <= size * 1e-20) or bool(size == 0)


def _is_same_irrational(one: Any, other: Any) -> bool:
    if one == other:
        return True
    values = [value.evalf(_PRECISION) for value in (one, other)]
    if not all(part.is_Float or part.is_Rational for value in values for part in value.as_real_imag()):
        return False
    for x, y in zip(*(value.as_real_imag() for value in values), strict=True):
        if abs(x - y) > max(abs(x), abs(y)) * _to_sympy(_RELATIVE_TOLERANCE) and not _is_noise(x, y):
            return False
    return True


def _is_noise(one: Any, other: Any) -> bool:
    """Return whether both numbers are zero up to their computed precision."""
    return all(number == 0 or (number.is_Float and number._prec == 1) for number in (one, other))


# -- unevaluated answers

_DIVISION_SIGN = re.compile(r"÷|\\div(?![a-zA-Z])")
_UNEVALUATED_FUNCTION = re.compile(r"\\?(?<![a-zA-Z])(?:gcd|lcm|bmod)(?![a-zA-Z])")
_SLASH = re.compile(r"/|frac|\\over(?![a-zA-Z])")


def _has_pending_operation(tree: Any) -> bool:
    """Return whether evaluating an operation in an irrational number would leave fewer terms or factors.

    Such operations are sums of terms with a rational quotient, products of integers or of sums, and powers of sums.
    """
    import sympy

    for part in sympy.preorder_traversal(tree):
        if part.is_Add:
            terms = _flatten_terms(part, sympy.Add)
            quotients = (one / other for index, one in enumerate(terms) for other in terms[:index] if other != 0)
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
    """Return the terms of a nested sum, or the factors of a nested product."""
    return [inner for part in tree.args for inner in (_flatten_terms(part, kind) if isinstance(part, kind) else [part])]


def is_unevaluated(gold: Scalar, answer: Scalar) -> bool:
    """Return whether an answer that equals the gold answer is not worked out.

    If the gold answer is a number, the answer must not be a sum, product, logarithm, remainder or chain of quotients. It may
    hold a `\\sum`, integral, limit or derivative only if the gold answer does. `4 + 7` is not an answer to "what is 4 + 7?": a
    policy with a reward for it learns to repeat the question. A single fraction is a number, reduced or not (`84/2`), and so
    are decimals, `1\\frac{1}{2}`, `3 \\times 10^5`, `50\\%`, `2^{10}`, `5!` and `\\sqrt{4}`.
    """
    import sympy

    expression = answer.value
    if isinstance(expression, Fraction):
        return False
    if not isinstance(gold.value, Fraction) and gold.value.has(sympy.factorial) and expression.has(sympy.factorial):
        return False  # the gold answer is not worked out either
    if isinstance(gold.value, Fraction) and _UNEVALUATED_FUNCTION.search(answer.text):
        return True  # sympy may have evaluated it already
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
        return True  # sympy may have evaluated the quotients already
    if _is_multinomial(expression):
        return False
    return any(_is_operation(part) for part in sympy.preorder_traversal(expression)) or expression.has(
        sympy.log, sympy.Mod
    )


def _is_multinomial(tree: Any) -> bool:
    """Return whether a number is a factorial over a product of factorials, like a binomial coefficient."""
    import sympy

    factors = _flatten_terms(tree, sympy.Mul) if tree.is_Mul else []
    above = [factor for factor in factors if isinstance(factor, sympy.factorial)]
    below = [factor.base for factor in factors if factor.is_Pow and factor.exp == -1]
    if len(factors) != 2 or len(above) != 1 or len(below) != 1:
        return False
    parts = _flatten_terms(below[0], sympy.Mul) if below[0].is_Mul else below
    return all(isinstance(part.base if part.is_Pow else part, sympy.factorial) for part in parts)


def _is_operation(part: Any) -> bool:
    """Return whether a part of an expression is a sum or product of numbers, but not a fraction or an angle (5 pi / 6)."""
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

    Powers of ten do not count, since they are part of a number in scientific notation.
    """
    import sympy
    from sympy.functions.elementary.trigonometric import TrigonometricFunction

    if factor.is_Number or isinstance(factor, (sympy.factorial, sympy.binomial, TrigonometricFunction)):
        return True
    return factor.is_Pow and factor.base.is_Integer and factor.exp.is_Integer and factor.base != 10


# -- equations


def is_same_equation(left: Any, right: Any, other_left: Any, other_right: Any, positive: bool = False) -> bool:
    """Return whether two equations are equal up to their sides and a constant factor, optionally a positive one."""
    import sympy

    gold, answer = _to_sympy(left) - _to_sympy(right), _to_sympy(other_left) - _to_sympy(other_right)
    symbols = gold.free_symbols
    if not symbols or symbols != answer.free_symbols:
        return False
    factors = []
    for point in _make_sample_points(symbols):
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
