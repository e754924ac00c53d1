"""Parser of answers: numbers, expressions, lists, sets, intervals, matrices, equations and formatted texts.

A text is parsed completely or refused: no number is extracted from a text that cannot be parsed. Nothing is evaluated as
Python. `latex2sympy2_extended` parses expressions, after all their commands and words were found in a list.
"""

import functools
import itertools
import re
from fractions import Fraction
from typing import Any

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
)
from bupo.rewards.answers.scalar_equality import is_same_number, multiply, sort_by_value
from bupo.rewards.answers.units import Unit, is_unit_name, parse_unit

# -- formatted texts

_MONTHS = re.findall(r"\w+", "jan feb mar apr may jun jul aug sep oct nov dec")
_MONTH = (  # not "marbles" or "decimals"
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})([-/.])(?P<number>\d{1,2})\2(?P<day>\d{1,2})",
        rf"(?:{_WEEKDAY},?\s+)?{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(?P<year>\d{{4}}))?",
        rf"(?:{_WEEKDAY},?\s+)?(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s+of)?\s+{_MONTH}(?:,?\s+(?P<year>\d{{4}}))?",
        r"(?P<year>\d{4})年(?P<number>\d{1,2})月(?P<day>\d{1,2})日",
    )
]
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:\\?text)?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_RATIO = re.compile(r"[^:{}]+(?::[^:]+)+")
_BASE_NAMES = {
    name: number for number, name in enumerate(re.findall(r"\w+", "two three four five six seven eight nine ten"), 2)
}
_NUMBER_IN_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*\(?(\d{1,2}|[a-z]+)\)?\s*\}?")
_PREFIXED_NUMBER = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s*:?\s*)?(?:\(([A-Ja-j])\)|([A-J])(?=$|[.):\s]))\s*[.):]?\s*(.*)", re.DOTALL
)
# digits that are no number: spans, codes, telephone numbers, numbers with a leading zero
_CODE = re.compile(
    r"\d+(?:-\d+)+|0\d{3,}|(?=.*\d)(?=.*[A-Za-z])[A-Z0-9]*(?:[A-Z]\d|\d[A-Z]\d|\d[A-Z]{2})[A-Z0-9]*|"
    r"\d{1,2}/\d{1,2}/\d{2,4}|\d(?: \d)+"
)

# sequences of words or letters that are not products (`ad - bc` is one)
_WORDS_ONLY = re.compile(
    r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[\s,;'\".&]+[^\W\d_]+)*[\s,;'\".]*|[a-zA-Z](?:\s+[a-zA-Z])+|(?=.*[^\W\d_]{3})[^\W\d_]+(?:-[^\W\d_]+)+"
    r"|(?=.*[A-Za-z]\d+[A-Za-z])[A-Za-z0-9]+"
)


def _to_am_pm(match: re.Match) -> str:
    return f"{match[1]} {'pm' if match[2] or match[3] else 'am'}"


def parse_formatted_text(text: str) -> tuple | None:
    """Parse a date, time, ratio or number in a base as a tuple that begins with the kind; None for another text."""
    flat = " ".join(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).split())
    flat = re.sub(r"(\d) to (?=\d)", r"\1:", flat)
    flat = re.sub(r"^(\d?\d(?::[0-5]\d)+) ?(?:h|hrs?|hours|Uhr|o'clock)$", r"\1", flat)
    flat = re.sub(r"(\d) (?:in the (?:morning|(after)noon|(eve)ning))$", _to_am_pm, flat)
    flat = re.sub(r"(\d)\s*(?:,|\()?\s*(?:in )?base[ -](\w+)\)?$", r"\1_\2", flat)
    for pattern in _DATES:
        if match := pattern.fullmatch(flat):
            parts = match.groupdict()
            number = parts.get("number") or 1 + _MONTHS.index(parts["month"][:3].lower())
            return ("date", int(parts["year"] or 0), int(number), int(parts["day"]))
    if match := _TIME.fullmatch(flat):
        hour, minute, second, half = match.groups()
        if 1 <= int(hour) <= 12:
            return ("time", int(hour) % 12 + 12 * (half.lower() == "p"), int(minute or 0), int(second or 0))
    if match := _NUMBER_IN_BASE.fullmatch(flat):
        base = int(match[2]) if match[2].isdigit() else _BASE_NAMES.get(match[2])
        if base and all(int(digit, 36) < base for digit in match[1]):
            return ("base", match[1].upper(), base)
    if match := _PREFIXED_NUMBER.fullmatch(flat):
        return ("base", match[2].upper(), {"x": 16, "b": 2, "o": 8}[match[1].lower()])
    if _RATIO.fullmatch(flat) and not re.search(r"\\in|\\mid|[<>=({\[]\s*[a-z]\s*:", flat):
        try:
            return ("ratio", *(parse_number(part) or _parse_scalar(part) for part in flat.split(":")))
        except UnreadableAnswer:
            return None
    return None


def _parse_scalar(text: str) -> Scalar:
    value = parse_value(text)
    if not isinstance(value, Scalar):
        raise UnreadableAnswer
    return value


def parse_choice(text: str) -> tuple[str, str] | None:
    """Return the letter of a choice and the text behind it, or None."""
    flat = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text).strip()
    match = _CHOICE.fullmatch(flat)
    return ((match[1] or match[2]).upper(), match[3].strip()) if match else None


def is_nonmath_text(text: str) -> bool:
    """Return whether a text is a word, span or code, although its letters could be factors."""
    flat = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    return flat not in ("pi", "infinity") and bool(_CODE.fullmatch(flat) or _WORDS_ONLY.fullmatch(flat))


# -- numbers

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d ])|\d+)"
_DECIMAL = rf"(?:{_DIGITS}?\.\d+|{_DIGITS}\.?)"
_SIGN = r"([-+]?)\s*"
_NUMBER = re.compile(rf"{_SIGN}({_DECIMAL})")
_SCIENTIFIC = re.compile(
    rf"{_SIGN}(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*([-+]?\d{{1,5}})\s*\}}|([-+]?\d{{1,5}}))"
)
_EXPONENT = re.compile(rf"{_SIGN}({_DECIMAL})[eE]\{{?([-+]?\d{{1,4}})\}}?")
_QUOTIENT = re.compile(
    rf"{_SIGN}(?:\\frac\s*\{{\s*{_SIGN}({_DECIMAL})\s*\}}\s*\{{\s*{_SIGN}({_DECIMAL})\s*\}}|\{{?({_DECIMAL})\}}?\s*/\s*\{{?({_DECIMAL})\}}?)"
)
_MIXED_NUMBER = re.compile(
    rf"{_SIGN}(\d+)\s*(?:(?:\\text\{{\s*)?\band\b\s*\}}?)?\s*(?:\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|(?<=[\s}}d])(\d+)\s*/\s*(\d+))"
)
# 0.1\overline{6}, 0.(3), 0.\dot{1}2\dot{3}; and 0.333..., 0.4545...
_RECURRING_DECIMAL = re.compile(
    rf"{_SIGN}(\d*)\.(\d*)(\\(?:overline|bar|overbar|dot)\s*(?:\{{\s*\d+\s*\}}|\d)|\(\d+\)|\\dot\s*\{{?\d\}}?\d*\s*\\dot\s*\{{?\d\}}?)"
)
_ELLIPSIS_DECIMAL = re.compile(rf"{_SIGN}(\d*)\.(\d*?)(?:(\d)\4{{2,}}|(\d{{2,}}?)\5+)\s*\\ldots")


def _strip_digit_separators(text: str) -> str:
    return text.replace(",", "").replace(" ", "")


def _get_decimal_step(digits: str) -> Fraction | None:
    places = len(digits.partition(".")[2])
    return Fraction(1, 10**places) if places else None


def parse_number(text: str) -> Scalar | None:
    """Parse an integer, decimal, fraction, mixed number, recurring decimal or power of ten; None for another text."""
    text = _add_missing_braces(text.strip())
    if match := _NUMBER.fullmatch(text):
        digits = _strip_digit_separators(match[2])
        return Scalar(_apply_sign(match[1], Fraction(digits.removesuffix("."))), _get_decimal_step(digits), text=text)
    if (match := _SCIENTIFIC.fullmatch(text)) or (match := _EXPONENT.fullmatch(text)):
        digits = _strip_digit_separators(match[2] or "1")
        power = Fraction(10) ** int(match[3] or match[4])
        places = len(digits.partition(".")[2])
        step = power / 10**places if places else None
        return Scalar(_apply_sign(match[1], Fraction(digits.removesuffix(".")) * power), step, text=text)
    if match := _QUOTIENT.fullmatch(text):
        numerator, denominator = (
            _strip_digit_separators(part) for part in (match[3] or match[6], match[5] or match[7])
        )
        if not Fraction(denominator):
            return None
        sign = "-" if (match[1] + (match[2] or "") + (match[4] or "")).count("-") % 2 else ""
        quotient = Fraction(numerator.removesuffix(".")) / Fraction(denominator.removesuffix("."))
        return Scalar(_apply_sign(sign, quotient), text=text)
    if match := _MIXED_NUMBER.fullmatch(text):
        ones, over, under = int(match[2]), int(match[3] or match[5]), int(match[4] or match[6])
        if over < under:
            return Scalar(_apply_sign(match[1], ones + Fraction(over, under)), text=text)
        return None
    if match := _RECURRING_DECIMAL.fullmatch(text):
        sign, integer, fixed, repeated = match.group(1, 2, 3, 4)
        return _parse_recurring_decimal(sign, integer or "0", fixed, re.sub(r"\D", "", repeated))
    if match := _ELLIPSIS_DECIMAL.fullmatch(text):
        return _parse_recurring_decimal(match[1], match[2] or "0", match[3], match[4] or match[5])
    return None


def _parse_recurring_decimal(sign: str, integer: str, fixed: str, repeated: str) -> Scalar | None:
    if len(fixed) > 50 or len(repeated) > 50:
        return None
    numerator = int(integer + fixed + repeated) - int(integer + fixed)
    return Scalar(_apply_sign(sign, Fraction(numerator, (10 ** len(repeated) - 1) * 10 ** len(fixed))))


def _apply_sign(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _add_missing_braces(text: str) -> str:
    """Add braces around the arguments of fractions and roots, where LaTeX allows to omit them: `\\frac12`, `\\sqrt3`."""
    text = _brace_fraction_arguments(text)
    text = re.sub(r"(\\sqrt)\s*(?:(\d+|[a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z{(])))", r"\1{\2}", text)
    return re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)


_ARGUMENT = re.compile(r"\s*(\d|\\[a-zA-Z]+|[a-zA-Z])")


def _brace_fraction_arguments(text: str) -> str:
    """Add braces around both arguments of each fraction and binomial, starting with the innermost."""
    starts = [match.end() for match in re.finditer(r"\\(?:frac|binom)(?![a-zA-Z])", text)]
    for start in reversed(starts[:200]):
        position = start
        for _ in range(2):
            if token := _ARGUMENT.match(text, position):
                text = f"{text[:position]}{{{token[1]}}}{text[token.end() :]}"
                position += len(token[1]) + 2
                continue
            opening = re.compile(r"\s*(?=\{)").match(text, position)
            end = _find_brace_end(text, opening.end()) if opening else None
            if end is None:
                break
            position = end
    return text


def _find_brace_end(text: str, start: int) -> int | None:
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return None


# -- expressions

_FUNCTIONS = re.findall(
    r"\w+",
    "sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc sin cos tan cot sec csc ln log exp max min gcd lcm det",
)
_KNOWN_COMMANDS = frozenset(_FUNCTIONS) | frozenset(
    re.findall(
        r"\w+",
        """
        frac sqrt cdot times div pi infty binom lfloor rfloor lceil rceil Gamma bar hat vec overline dot ddot tilde circ sum
        prod int lim to limits alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho
        sigma tau upsilon phi varphi chi psi omega Delta Theta Lambda Xi Sigma Phi Psi Omega Pi ell hbar partial aleph
        """,
    )
)
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\s*\}?")
_UNSUPPORTED_SYNTAX = re.compile(
    r"--|['\"&#@;:?~`]|!!|\d\s+\d|\d\s*_|[+*/^]\s*$|^\s*[*/^]|\^\s*\*|\*\*\*|\\\\|\.\s|\.$|\d\.\d+\.\d"
)


def parse_expression(text: str) -> Any:
    """Parse an expression to an unevaluated sympy tree.

    Raises:
        UnreadableAnswer: for a sign, command or word that is in no list, and for errors of the parser.
    """
    text = re.sub(r"\\text\{\s*(-?[\d.,]+|[a-zA-Z])\s*\}", r"{\1}", text)
    text = _add_missing_braces(
        re.sub(r"(?<!\\)\b(pi|infinity|inf)\b", lambda match: "\\pi " if match[1] == "pi" else "\\infty ", text)
    )
    text = re.sub(rf"(?<![\\a-zA-Z])(sqrt|{'|'.join(_FUNCTIONS)})(?=\s*[({{\d])", r"\\\1", text)
    text = _add_missing_braces(text.replace("**", "^"))
    text = re.sub(r"(?<![\\a-zA-Z{])([a-zA-Z]{1,3})(\d+)", r"\1_{\2}", text)  # x1 is x_1, not a product or power
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)
    text = re.sub(r"\\log(?![a-zA-Z])(?!\s*_)", r"\\ln", text)
    text = re.sub(r"(\\log)\s*_\s*(\w)\s*", r"\1_{\2} ", text)
    text = re.sub(r"\\(sinh|cosh|tanh|coth|arcsin|arccos|arctan)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"\\(bar|hat|vec|tilde|dot)\s+([a-zA-Z])", r"\\\1{\2}", text)
    text = re.sub(r"(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", _to_improper_fraction, text)
    text = _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"([\d)}])\s*(?=[(]|\\frac|\\ln|\\sqrt)(?<!\\)(?<=[\d)])", r"\1 \\cdot ", text)  # 2(3) is a product
    text = re.sub(r"\)\s*(?=[\da-zA-Z])", r") \\cdot ", text)
    if _UNSUPPORTED_SYNTAX.search(text) or not text.strip() or len(text) > 20_000:
        raise UnreadableAnswer
    if any(command not in _KNOWN_COMMANDS for command in re.findall(r"\\([a-zA-Z]+|.)", text)):
        raise UnreadableAnswer
    if any(len(word) > 3 for word in _WORDS.findall(text)):
        raise UnreadableAnswer
    if "," in text and not re.search(r"\\(?:max|min|gcd|lcm)|[a-zA-Z]\([^()]*,", text):
        raise UnreadableAnswer
    return _parse_tree(text.strip())


def _to_improper_fraction(match: re.Match) -> str:
    integer, numerator, denominator = map(int, match.groups())
    if not 0 < numerator < denominator:
        raise UnreadableAnswer
    return f"(\\frac{{{integer * denominator + numerator}}}{{{denominator}}})"


@functools.cache
def _get_parser_class() -> type:
    """Return a parser that multiplies an integer with a fraction behind it. Mixed numbers were replaced before."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    class Parser(_Latex2Sympy):
        def convert_postfix(self, postfix):
            cache = self.__dict__.setdefault("_postfix_cache", {})
            if postfix not in cache:
                cache[postfix] = super().convert_postfix(postfix)
            return cache[postfix]

        def convert_postfix_list(self, arr, i=0):
            if i + 1 < len(arr) and getattr(first := self.convert_postfix(arr[i]), "is_Integer", False):
                rest = self.convert_postfix_list(arr, i + 1)
                if isinstance(rest, sympy.Expr) and rest.is_Rational:
                    return self.mul_flat(first, rest)
            return super().convert_postfix_list(arr, i)

    return Parser


def _parse_tree(text: str) -> Any:
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    try:
        tree = _get_parser_class()(config=ConversionConfig(lowercase_symbols=False)).parse(text)
    except Exception as error:
        raise UnreadableAnswer from error
    if not isinstance(tree, sympy.Expr) or isinstance(tree, sympy.MatrixBase) or tree.has(sympy.nan, sympy.zoo):
        raise UnreadableAnswer
    ends = (sympy.oo, -sympy.oo, sympy.Mul(-1, sympy.oo, evaluate=False))
    if tree.has(sympy.oo) and tree not in ends and not tree.has(sympy.Sum, sympy.Integral, sympy.Limit, sympy.Product):
        raise UnreadableAnswer  # arithmetic with infinity
    capital = sympy.Symbol("I")
    with sympy.evaluate(False):  # keep sums of numbers
        return tree.xreplace({sympy.I: capital}).xreplace({sympy.Symbol("i"): sympy.I})


# -- names on the left of an answer

_LETTER = (
    r"(?:[a-zA-Z]|\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|theta|kappa|lambda|sigma|rho|phi)|[ei]ta|mu|nu|xi|tau|upsilon|"
    r"chi|psi|omega|ell|hbar|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)(?![a-zA-Z]))"
)
_NAME = re.compile(
    rf"""(?x)
    {_LETTER}\s*(?:_\s*(?:\{{[^{{}}]*\}}|\w))?\s*'*(?:\^\s*\{{?(?:\*|'+|\\prime|\\ast)\}}?)?   # x, x_1, y', z^*
    | [A-Zfghpquvy]\s*(?:_\s*(?:\{{[^{{}}]*\}}|\w))?'*\s*(?:\^\{{?-1\}}?)?\s*\([^()]*\)         # f(x), P(A), f^{{-1}}(x), f(3)
    | [xyzrst]\s*\(\s*[a-z]\s*\)                                                  # x(t)
    | \\(?:angle|triangle|measuredangle|sphericalangle|overline|overrightarrow|vec|hat|bar|widehat|mathbf|mathcal|mathbb)
      \s*(?:\{{\s*\\?[A-Za-z]+\s*\}}|\\?[A-Za-z]+)
    | \(\s*[a-z]\s*(?:,\s*[a-z]\s*)+\)                                            # (x, y)
    | m\s*\\angle\s*[A-Z]+ | \|?\s*[A-Z]{{2,4}}'?\s*\|? | \[\s*[A-Z]{{3,6}}\s*\] | S_\{{?\\?[a-z]*\s*[A-Z]+\}}?
    | (?:\\text\{{[^{{}}\d]*\}}|[A-Za-z]{{4,}}(?:\s[A-Za-z]+){{0,3}})(?:_\{{?\w+\}}?)?(?:\s*\([^()]*\))?
    | \\frac\s*\{{\s*(?:d|\\partial)\s*[a-zA-Z]?\s*\}}\s*\{{\s*(?:d|\\partial)\s*[a-zA-Z]\s*\}}
    | \\(?:det|dim|deg|gcd|max|min|arg|ker)(?![a-zA-Z])[^=<>]*
    | \\(?:lim|int|iint|oint|sum|prod)(?![a-zA-Z]).*
    """
)
_NOT_A_NAME = re.compile(
    r"(?i)\b(?:not|no|never|isn|wrong|incorrect|false|less|more|least|most|except|or|and|if|than)\b"
)
_CONSTANTS = {"e", "i", "\\pi"}


def is_variable_name(text: str) -> bool:
    """Return whether a text is a name such as `x`, `f(x)`, `\\angle ABC` or `\\text{area}`, not an expression such as `2x`."""
    text = text.strip()
    return text not in _CONSTANTS and _NAME.fullmatch(text) is not None and not _NOT_A_NAME.search(text)


# -- values

_RELATION = re.compile(r"\\equiv(?=.*\\pmod)|\\leq|\\geq|\\neq|\\approx|\\in(?![a-zA-Z])|<|>|=")
_OPENING, _CLOSING = "([{", ")]}"
_INEQUALITY_SIGNS = {"<", ">", "\\leq", "\\geq"}
_OR = re.compile(r"\\text\{\s*,?\s*(?:or)\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-zA-Z])|或")
_AND = re.compile(
    r"\\text\{\s*,?\s*(?:and)\s*,?\s*\}|(?<![a-zA-Z\\])and(?![a-zA-Z])|\\land(?![a-zA-Z])|和|"
    r"(?<=\s)\\text\{,\}|&(?![a-zA-Z ]*\\)"
)
_MATRIX = re.compile(r"(.*?)\\begin\{([pbBvV]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\2\}", re.DOTALL)
_VECTOR = re.compile(r"\\(?:mathbf|hat|vec)\s*\{?\s*\\?(?:text\s*\{\s*)?([ijk])(?:math)?\s*\}?\}?(?![a-zA-Z])")


def split_top_level(text: str, pattern: re.Pattern) -> tuple[list[str], list[str]]:
    """Split a text at the matches of a pattern outside all brackets. Return the parts and the matches."""
    parts, signs, start, depth, position = [], [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (match := pattern.match(text, position)) and match.end() > position:
            parts.append(text[start:position])
            signs.append(match[0])
            start = position = match.end()
            continue
        pair = text[position : position + 2]
        if pair in ("\\{", "\\}"):
            depth += 1 if pair == "\\{" else -1
            position += 2
            continue
        if text.startswith(("\\langle", "\\rangle", "\\begin", "\\end"), position):
            depth += 1 if text.startswith(("\\langle", "\\begin"), position) else -1
            position += 4
            continue
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        position += 1
    return [*parts, text[start:]], signs


_COMMA = re.compile(r"[,;]")
_PLUS_MINUS = re.compile(r"\\[pm]{2}(?![a-zA-Z])")


@functools.lru_cache(maxsize=256)
def parse_value(text: str) -> Any:
    """Parse a normalised text completely.

    Raises:
        UnreadableAnswer: if the text has no value.
    """
    text = re.sub(r"\\text\{\s*((?:or|and)\s)", r"\\text{ \1", text.strip())
    text = re.sub(r"^\\text\{\s*([^{}]*\d[^{}]*)\}$", r"\1", text)
    if not text or len(text) > 20_000:
        raise UnreadableAnswer
    if (number := parse_number(text)) is not None:
        return number
    text = _THOUSANDS.sub(
        lambda match: match[0] if _get_bracket_depths(text[: match.start()])[-1] else match[0].replace(",", ""), text
    )
    if family := _parse_integer_family(text):
        return family
    if matrix := _parse_matrix(text):
        return matrix
    text = re.sub(r"^(\([^()]*,[^()]*\))\s*\^\s*\{?\s*(?:T|\\top|\\text\{T\}|\\intercal)\s*\}?$", r"\1", text)
    if _VECTOR.search(text):
        return _parse_vector_components(text)
    ors, _ = split_top_level(text, _OR)
    if len(ors) > 1:
        return _combine_alternatives([parse_value(part.strip(" ,;")) for part in ors])
    if (interval := _parse_inequality_pair(text)) is not None:
        return interval
    items, _ = split_top_level(re.sub(r",\s*,", ",", _AND.sub(",", text)), _COMMA)
    if len(items) > 1:
        return _parse_list(items)  # refuses empty items
    sides, signs = split_top_level(text, _RELATION)
    if signs:
        return _parse_relation([side.strip() for side in sides], signs)
    parts, _ = split_top_level(text, re.compile(r"\\cup(?![a-zA-Z])"))
    if len(parts) > 1:
        return _combine_alternatives([parse_value(part.strip()) for part in parts])
    if (group := _parse_bracketed(text)) is not None:
        return group
    if signs := _PLUS_MINUS.findall(text):
        if len(signs) != 1:
            raise UnreadableAnswer
        variants = (_PLUS_MINUS.sub(sign, text).strip().removeprefix("+").strip() for sign in "+-")
        return ValueCollection("list", tuple(parse_value(variant) for variant in variants))
    return parse_quantity(text)


def _parse_inequality_pair(text: str) -> Any:
    """Parse `x > 1 and x < 2` as an interval, or `x < 1, x > 2` as a union; None for another text."""
    parts, _ = split_top_level(text, _AND)
    is_conjunction = len(parts) == 2
    parts = parts if is_conjunction else split_top_level(text, _COMMA)[0]
    if len(parts) != 2 or not all(re.search(r"[<>]|\\[lg]eq", part) for part in parts):
        return None
    values = [parse_value(part.strip(" ,;")) for part in parts]
    if not all(isinstance(value, Assignment) and isinstance(value.value, Interval) for value in values):
        return None
    ends = [value.value for value in values]
    if values[0].name != values[1].name or [end.low is None for end in ends].count(True) != 1:
        return None
    above, below = ends if ends[1].low is None else ends[::-1]
    if below.high is None or above.high is not None:
        return None
    if not is_conjunction:  # a comma is "and" if the intervals overlap, else "or"
        low, high = above.low.value, below.high.value
        if not isinstance(low, Fraction) or not isinstance(high, Fraction) or low == high:
            return None
        if low > high:
            return Assignment(values[0].name, IntervalUnion((below, above)))
    return Assignment(values[0].name, Interval(above.low, below.high, above.low_open, below.high_open))


_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_INTEGER_FAMILY = re.compile(
    r"(.*?)[,;\s(]*(?:\\text\{\s*(?:for|where|with|and)(?:\s+(?:all|any|every|each|some|an?|integers?))*\s*\}|\b(?:for|where|with)\b|\\forall|:)?\s*([a-z])\s*\\in\s*(\\mathbb\{[ZN]\}(?:\^?\+)?)\)?"
)


_BRACKET = re.compile(r"\\langle|\\rangle|[()\[\]{}]")


def _get_bracket_depths(text: str) -> list[int]:
    """Return the number of open brackets at the start of a text and behind each bracket."""
    steps = (1 if bracket in ("\\langle", "(", "[", "{") else -1 for bracket in _BRACKET.findall(text))
    return list(itertools.accumulate(steps, initial=0))


def _is_balanced(text: str) -> bool:
    depths = _get_bracket_depths(text)
    return min(depths) >= 0 and depths[-1] == 0


def _parse_integer_family(text: str) -> Any:
    """Parse a family over the integers, such as `k\\pi, k \\in \\mathbb{Z}`; None for another text."""
    match = _INTEGER_FAMILY.fullmatch(text)
    if match is None or not re.search(rf"(?<![\\a-zA-Z]){match[2]}(?![a-zA-Z])", match[1]):
        return None
    head = re.sub(rf"(?<![\\a-zA-Z]){match[2]}(?![a-zA-Z])", " n_{0} ", match[1])
    value = parse_value(head.strip(" ,;"))
    name = value.name if isinstance(value, Assignment) else None
    family = IntegerFamily(value.value if isinstance(value, Assignment) else value, match[3])
    return Assignment(name, family) if name else family


def _parse_list(items: list[str]) -> Any:
    values = [parse_value(item.strip()) for item in items]
    if all(isinstance(value, Assignment) for value in values):
        names = [value.name for value in values]
        if len(set(names)) == len(names) > 1:
            if any(isinstance(value.value, (Interval, IntervalUnion)) for value in values):
                raise UnreadableAnswer
            return AssignmentGroup({value.name: value.value for value in values})
    name = values[0].name if isinstance(values[0], Assignment) else None
    if name is not None:  # x = 2, 3
        if any(isinstance(value, Assignment) and value.name != name for value in values):
            raise UnreadableAnswer
        values = [value.value if isinstance(value, Assignment) else value for value in values]
    if any(isinstance(value, (Assignment, Relation, IntervalUnion)) for value in values):
        raise UnreadableAnswer
    if name is not None and any(isinstance(value, Interval) for value in values):
        raise UnreadableAnswer  # a value and an interval
    are_letters = all(re.fullmatch(r"\s*[a-zA-Z]\s*", item) for item in items)
    collection = ValueCollection("letters" if are_letters else "list", _flatten_lists(values))
    return Assignment(name, collection) if name is not None else collection


def _flatten_lists(values: list) -> tuple:
    """Replace lists among the values by their items, as for `0, \\pm 1`."""
    return tuple(
        inner
        for value in values
        for inner in (value.items if isinstance(value, ValueCollection) and value.kind == "list" else (value,))
    )


def _combine_alternatives(values: list) -> Any:
    names = {value.name for value in values if isinstance(value, Assignment)}
    if len(names) > 1 or (names and not isinstance(values[0], Assignment)):
        raise UnreadableAnswer
    values = [value.value if isinstance(value, Assignment) else value for value in values]
    if any(isinstance(value, (Interval, IntervalUnion)) for value in values):
        parts: list = []
        for value in values:
            parts += value.parts if isinstance(value, IntervalUnion) else [value]
        if any(
            not isinstance(part, (Interval, ValueCollection))
            or (isinstance(part, ValueCollection) and part.kind != "set")
            for part in parts
        ):
            raise UnreadableAnswer
        union: Any = IntervalUnion(tuple(parts))
    elif all(isinstance(value, ValueCollection) and value.kind == "set" for value in values):
        union = ValueCollection("set", tuple(item for value in values for item in value.items))
    elif any(isinstance(value, (AssignmentGroup, Relation)) for value in values):
        raise UnreadableAnswer
    else:
        union = ValueCollection("list", _flatten_lists(values))
    return Assignment(names.pop(), union) if names else union


def _try_parse_expression(text: str) -> Any:
    """Return the tree of a name that is also an expression, or None."""
    try:
        return parse_expression(text)
    except UnreadableAnswer:
        return None


def _parse_relation(sides: list[str], signs: list[str]) -> Any:
    if not all(sides):
        raise UnreadableAnswer
    if set(signs) <= {"=", "\\approx"} or signs == ["\\equiv"]:
        return _parse_equation(sides, signs)
    if signs == ["\\in"] and is_variable_name(sides[0]):
        value = parse_value(sides[1])
        if isinstance(value, (Scalar, Assignment, AssignmentGroup, Relation)):
            raise UnreadableAnswer
        return Assignment(sides[0], value)
    if signs == ["\\neq"]:
        name, value = (sides[0], sides[1]) if is_variable_name(sides[0]) else (sides[1], sides[0])
        if is_variable_name(name):
            return Assignment(name, exclude_points(_parse_scalar(value)))
    if set(signs) <= _INEQUALITY_SIGNS:
        return _parse_inequality(sides, signs)
    raise UnreadableAnswer


def exclude_points(*holes: Scalar) -> IntervalUnion:
    """Return the real line without some points, which must be sorted."""
    ends = [None, *holes, None]
    return IntervalUnion(tuple(Interval(low, high, True, True) for low, high in itertools.pairwise(ends)))


def _parse_equation(sides: list[str], signs: list[str]) -> Any:
    if len(sides) == 2 and signs == ["="] and is_variable_name(sides[1]) and not is_variable_name(sides[0]):
        sides = sides[::-1]
    names = [side for side in sides if is_variable_name(side)]
    if len(names) == len(sides):
        if len(sides) != 2:
            raise UnreadableAnswer
        left, right = _try_parse_expression(sides[0]), _try_parse_expression(sides[1])
        if None in (left, right):
            raise UnreadableAnswer
        return Assignment(sides[0], Scalar(right, text=sides[1]), left)
    rounded = signs.index("\\approx") if "\\approx" in signs else len(sides) - 1
    if not any(not is_variable_name(side) for side in sides[: rounded + 1]):
        rounded = len(sides) - 1
    value = parse_value(sides[rounded])
    if isinstance(value, (Assignment, AssignmentGroup, Relation, IntegerFamily)):
        raise UnreadableAnswer
    _check_approximations(value, sides[rounded + 1 :])
    if is_variable_name(sides[0]):
        for side in sides[1:rounded]:
            if not is_variable_name(side) and not re.search(r"\\[cl]?dots", side):
                other = parse_value(side)
                numbers = isinstance(other, Scalar) and isinstance(value, Scalar) and not get_symbols(other.value)
                if numbers and not get_symbols(value.value) and not is_same_number(other, value):
                    raise UnreadableAnswer
        return Assignment(sides[0], value, _try_parse_expression(sides[0]) if len(sides) == 2 else None)
    first = parse_value(sides[0])
    others = [first] + [parse_value(side) for side in sides[1:rounded] if not is_variable_name(side)]
    if not all(isinstance(other, Scalar) for other in [*others, value]):
        raise UnreadableAnswer
    if all(is_same_number(other, value) for other in others if other is not value):  # a calculation, or an identity
        return next((other for other in [value, *others] if isinstance(other.value, Fraction)), value)
    if len(sides) == 2 and get_symbols(first.value) | get_symbols(value.value):
        return Relation("=", first, value)
    raise UnreadableAnswer


def _check_approximations(value: Any, sides: list[str]) -> None:
    """Refuse approximations of an exact value that are not numbers near it."""
    for side in sides:
        number = parse_number(side)
        exact = value.value if isinstance(value, Scalar) else None
        if number is None or exact is None or get_symbols(exact):
            raise UnreadableAnswer
        if isinstance(exact, Fraction) and exact.denominator == 1 and number.value != exact:
            raise UnreadableAnswer  # an integer is not rounded
        step, error = float(number.decimal_step or 1), float(exact) - float(number.value)
        is_truncated = 0 <= error * (1 if float(exact) > 0 else -1) < step
        if not abs(error) <= step * 0.5001 and not is_truncated:
            raise UnreadableAnswer  # neither rounded nor truncated
        if number.decimal_step is None and not abs(float(number.value) - float(exact)) <= 0.02 * abs(float(exact)):
            raise UnreadableAnswer


def _parse_inequality(sides: list[str], signs: list[str]) -> Any:
    if all(sign in (">", "\\geq") for sign in signs):
        sides, signs = sides[::-1], [{">": "<", "\\geq": "\\leq"}[sign] for sign in signs[::-1]]
    elif not all(sign in ("<", "\\leq") for sign in signs):
        raise UnreadableAnswer
    names = [index for index, side in enumerate(sides) if is_variable_name(side)]
    if len(sides) == 3 and names == [1]:
        low, high = (
            None if re.fullmatch(r"[-+]?\s*\\infty", side) else _parse_scalar(side) for side in (sides[0], sides[2])
        )
        return Assignment(
            sides[1], Interval(low, high, low is None or signs[0] == "<", high is None or signs[1] == "<")
        )
    if len(sides) != 2:
        raise UnreadableAnswer
    if (absolute := re.fullmatch(r"\|([^|]*[a-z][^|]*)\|", sides[0])) and (
        interval := _parse_absolute_value(absolute[1], sides[1])
    ):
        name, low, high = interval
        return Assignment(name, Interval(low, high, signs[0] == "<", signs[0] == "<"))
    if len(names) == 1 and not get_symbols(_parse_scalar(sides[1 - names[0]]).value):
        end = _parse_scalar(sides[1 - names[0]])
        below = names[0] == 0
        return Assignment(
            sides[names[0]],
            Interval(
                None if below else end, end if below else None, below or signs[0] == "<", not below or signs[0] == "<"
            ),
        )
    left, right = _parse_scalar(sides[0]), _parse_scalar(sides[1])
    return Relation(signs[0], left, right)


def _parse_absolute_value(inside: str, radius: str) -> tuple[str, Scalar, Scalar] | None:
    """Return the letter and the two ends of `|x - 2| < 3`, or None if the inside is not linear in one letter."""
    import sympy

    end, tree = parse_number(radius), parse_expression(inside)
    tree = sympy.expand(tree.xreplace({number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)}))
    if end is None or end.value <= 0 or len(tree.free_symbols) != 1:
        return None
    (letter,) = tree.free_symbols
    slope, offset = tree.coeff(letter, 1), tree.coeff(letter, 0)
    if not (slope.is_Rational and offset.is_Rational and slope) or sympy.expand(tree - slope * letter - offset) != 0:
        return None
    ends = [
        (sign * end.value - Fraction(int(offset.p), int(offset.q))) / Fraction(int(slope.p), int(slope.q))
        for sign in (-1, 1)
    ]
    return str(letter), Scalar(min(ends)), Scalar(max(ends))


def _parse_bracketed(text: str) -> Any:
    """Parse a set, tuple, interval or value in brackets; None if the text is not one pair of brackets."""
    if re.fullmatch(r"\\mathbb\{R\}", text):
        return Interval(None, None, True, True)
    if match := re.fullmatch(
        r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-|\\)\s*(\\\{.*\\\}|[(\[][^()\[\]]*[)\]])", text
    ):
        holes = parse_value(match[1])
        if isinstance(holes, ValueCollection) and all(isinstance(hole, Scalar) for hole in holes.items):
            return exclude_points(*sort_by_value(holes.items))
        if isinstance(holes, Interval):
            return _get_complement(holes)
        raise UnreadableAnswer
    if re.fullmatch(r"\\emptyset|\\\{\s*\\\}", text):
        return ValueCollection("set", ())
    if match := re.fullmatch(r"\]\s*([^\[\]]+)\[|\]\s*([^\[\]]+)\]|\[\s*([^\[\]]+)\[", text):  # ]0, 1[
        inner = next(filter(None, match.groups()))
        low, high = _parse_pair(inner)
        return _make_interval(low, high, text[0] == "]", text[-1] == "[")
    for opening, closing in (
        ("\\{", "\\}"),
        ("\\langle", "\\rangle"),
        ("(", ")"),
        ("[", "]"),
        ("(", "]"),
        ("[", ")"),
        ("{", "}"),
        ("<", ">"),
    ):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : len(text) - len(closing)]
            if not _is_balanced(inner):
                continue
            return _make_bracketed_value(opening, closing, inner.strip())
    return None


def _get_complement(interval: Interval) -> Any:
    below = Interval(None, interval.low, True, not interval.low_open)
    above = Interval(interval.high, None, not interval.high_open, True)
    parts = [part for part, end in ((below, interval.low), (above, interval.high)) if end is not None]
    if not parts:
        raise UnreadableAnswer
    return parts[0] if len(parts) == 1 else IntervalUnion(tuple(parts))


def _make_bracketed_value(opening: str, closing: str, inner: str) -> Any:
    items = [item.strip() for item in split_top_level(inner, _COMMA)[0]]
    if opening == "\\{" or (opening == "{" and len(items) > 1):
        if match := re.fullmatch(r"\(?\s*([a-z])\s*(?:\\in\s*\\mathbb\{R\})?\s*\)?\s*(?:\\mid|\||:)\s*(.+)", inner):
            value = parse_value(match[2])
            if (
                isinstance(value, Assignment)
                and value.name == match[1]
                and not isinstance(value.value, (Scalar, Assignment))
            ):
                return value.value
            raise UnreadableAnswer
        values = parse_value(inner) if len(items) == 1 else None
        if isinstance(values, ValueCollection) and values.kind == "list":  # \{\pm 2\}
            return ValueCollection("set", values.items)
        if (
            len(items) == 1
            and isinstance(values, (Interval, IntervalUnion, Assignment, Relation))
            and not getattr(values, "may_be_pair", False)
        ):
            if isinstance(values, Assignment) and not isinstance(values.value, (Interval, IntervalUnion)):
                return ValueCollection("set", (values.value,))
            raise UnreadableAnswer
        return ValueCollection("set", _flatten_lists([parse_value(item) for item in items]))
    if opening in ("\\langle", "<"):
        if len(items) < 2:
            raise UnreadableAnswer
        return ValueCollection("tuple", tuple(parse_value(item) for item in items))
    if len(items) == 1:
        value = parse_value(inner)
        if opening == "(" and closing == ")":
            if isinstance(value, Scalar):
                return Scalar(value.value, value.decimal_step, value.unit, inner)
            if isinstance(value, (Interval, ValueCollection)):
                return None
            return value
        if opening == "{":
            return value
        if (opening, closing) != ("[", "]"):
            raise UnreadableAnswer
        return ValueCollection("tuple", (value,))
    if len(items) == 2 and opening in "([" and closing in ")]":
        return _make_interval(*_parse_pair(inner), opening == "(", closing == ")")
    if opening + closing in ("()", "[]"):
        return ValueCollection("tuple", tuple(parse_value(item) for item in items))
    raise UnreadableAnswer


def _parse_pair(inner: str) -> tuple[Any, Any]:
    items = split_top_level(inner, _COMMA)[0]
    if len(items) != 2:
        raise UnreadableAnswer
    return parse_value(items[0].strip()), parse_value(items[1].strip())


def _make_interval(low: Any, high: Any, low_open: bool, high_open: bool) -> Any:
    if not isinstance(low, Scalar) or not isinstance(high, Scalar):
        if low_open == high_open:
            return ValueCollection("tuple", (low, high))
        raise UnreadableAnswer
    ends = [
        None if "\\infty" in end.text and re.fullmatch(r"[-+]?\s*\\infty", end.text.strip()) else end
        for end in (low, high)
    ]
    if ends[0] is None and not low.text.strip().startswith("-"):
        return ValueCollection("tuple", (low, high))
    if ends[1] is None and high.text.strip().startswith("-"):
        return ValueCollection("tuple", (low, high))
    return Interval(ends[0], ends[1], low_open, high_open, may_be_pair=low_open and high_open and None not in ends)


def _parse_matrix(text: str) -> Any:
    if match := re.fullmatch(r"(.*\\end\{.*)\^\s*\{?(?:T|\\top|\\text\{T\}|\\intercal)\}?", text, re.DOTALL):
        matrix = _parse_matrix(match[1])
        return matrix and Matrix(tuple(zip(*matrix.rows, strict=True)))
    if re.fullmatch(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])+\s*\]", text):
        rows = re.findall(r"\[([^\[\]]*)\]", text)
        text = "\\begin{matrix}" + " \\\\ ".join(row.replace(",", " & ") for row in rows) + "\\end{matrix}"
    match = _MATRIX.fullmatch(text)
    if match is None:
        match = re.fullmatch(
            r"(.*?)([\[(])\s*\\begin\{(?:matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{(?:matrix|array)\}\s*[\])]",
            text,
            re.DOTALL,
        )
        if match is None:
            return None
    elif match[2] in ("vmatrix", "Vmatrix"):
        raise UnreadableAnswer  # a determinant
    rows = [row for row in re.split(r"\\\\", match[3]) if row.strip() and row.strip() != "\\hline"]
    cells = tuple(tuple(_parse_scalar(cell.strip()) for cell in row.replace("\\hline", "").split("&")) for row in rows)
    if not cells or len({len(row) for row in cells}) != 1:
        raise UnreadableAnswer
    factor = re.sub(r"\\cdot|\\times|\*", "", match[1]).strip()
    named = re.fullmatch(r"(.*?)=\s*", factor)
    if named and (is_variable_name(named[1]) or re.fullmatch(r"[A-Z]\s*\^\s*\{?(?:-?\d+|[nkTt])\}?\s*", named[1])):
        factor = ""
    if factor:
        scale = Scalar(Fraction(-1)) if factor == "-" else _parse_scalar(factor)
        cells = tuple(tuple(multiply(scale, cell) for cell in row) for row in cells)
    return Matrix(cells)


def _parse_vector_components(text: str) -> ValueCollection:
    """Parse the components of a vector such as `3\\mathbf{i} - 2\\mathbf{j}`."""
    import sympy

    tree = parse_expression(_VECTOR.sub(lambda match: f" v_{{{'ijk'.index(match[1])}}} ", text))
    units = [sympy.Symbol(f"v_{index}") for index in range(3)]
    if not set(units) & tree.free_symbols:
        raise UnreadableAnswer
    tree = sympy.expand(tree.doit())
    parts = [tree.coeff(unit) for unit in units]
    if sympy.expand(tree - sum(part * unit for part, unit in zip(parts, units, strict=True))) != 0:
        raise UnreadableAnswer
    return ValueCollection("components", tuple(Scalar(part, text=str(part)) for part in parts))


# -- numbers with units

# behind an amount of money
_MAGNITUDE_SUFFIXES = {
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "mn": 10**6,
    "m": 10**6,
    "B": 10**9,
    "bn": 10**9,
}
_CURRENCY = re.compile(r"([-+]?)\s*(?:US|A|C)?(?:\\\$|\$|€|£|¥|₹|USD|EUR|Rs\.?)\s*")
_NUMBER_AND_TEXT = re.compile(
    r"(.*?[\d})\]!a-z]|\\pi|.*?\\(?:infty|pi))\s*((?:\\text\{.*|\^\\circ.*|%.*|[€£¥₹¢].*|\\\$.*|[°℃℉].*))", re.DOTALL
)
_NUMBER_AND_WORD = re.compile(
    r"(.*?(?:[\d})%]|\\pi))(\s*)([^\W\d_][^\d\\=]*(?:\^\s*\{?-?\d\}?[^\W\d_/\s]*)*)", re.DOTALL
)
_PRIME = r"(?:'|\^\s*\{?\s*\\prime\s*\}?)"
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*(?:,|and)?\s*")
_DEGREES_AND_MINUTES = re.compile(rf"(-)?\s*(\d+)\s*\^\\circ\s*(\d+)\s*{_PRIME}(?:\s*(\d+)\s*{_PRIME}\s*{_PRIME})?")
_MODULUS = re.compile(r"(.*?)\s*\(?\\pmod\s*\{?\s*(\d+)\s*\}?\)?|(.*?)\s*\(\s*\\bmod\s*(\d+)\s*\)|(.*?)\\bmod\s*(\d+)")


def parse_quantity(text: str) -> Scalar:
    """Parse an expression with an optional unit."""
    if match := _DEGREES_AND_MINUTES.fullmatch(text):
        degrees, minutes, seconds = (Fraction(part or "0") for part in match.group(2, 3, 4))
        if minutes >= 60 or seconds >= 60:
            raise UnreadableAnswer
        size = degrees + minutes / 60 + seconds / 3600
        return Scalar(-size if match[1] else size, None, Unit((("deg", 1),), Fraction(1)), text)
    if match := _MODULUS.fullmatch(text):
        head, modulus = [group for group in match.groups() if group is not None]
        return _attach_unit(head, Unit((("mod" + modulus, 1),), Fraction(1)))
    if (match := _CURRENCY.match(text)) and match.end() < len(text):
        unit = parse_unit(re.sub(r"^(?:US|A|C)(?=\$)", "", match[0].replace("\\", "").strip("+- ")))
        if unit and (foreign := re.match(r"[-+\s]*([AC])\\?\$", text)):  # Australian and Canadian dollars
            unit = Unit((("usd" + foreign[1], 1),), Fraction(1)), unit[1]
        rest = match[1] + text[match.end() :]
        number = parse_number(rest) if unit else None
        if number is None and unit and (amount := re.fullmatch(r"(.*?\d)\s*(?:\\text\{)?\s*(\w+)\s*\}?", rest)):
            suffix = parse_unit(amount[2])
            if magnitude := _MAGNITUDE_SUFFIXES.get(amount[2]):
                suffix = Unit((), Fraction(1)), magnitude
            number = _scale_scalar(amount[1], suffix[1]) if suffix and not suffix[0].bases else None
            if number is None and suffix and suffix[0] == unit[0]:  # $5 dollars
                number = parse_number(amount[1])
        if number is not None and unit is not None:
            return Scalar(number.value, number.decimal_step, unit[0], rest)
        raise UnreadableAnswer
    if match := _NUMBER_AND_TEXT.fullmatch(text):
        if (total := _parse_quantity_sum(text)) is not None:
            return total
        # the degrees of a sine belong to its argument
        is_angle = match[2].startswith("^") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1])
        unit = None if is_angle else parse_unit(match[2])
        if unit is not None:
            return _attach_unit(match[1], *unit)
    try:
        return Scalar(parse_expression(text), text=text)
    except UnreadableAnswer:
        match = _NUMBER_AND_WORD.fullmatch(text)
        if match is None:
            raise
    if (total := _parse_quantity_sum(text)) is not None:
        return total
    first = re.match(r"[^\W\d_]+", match[3])
    if first is None or not (is_unit_name(first[0]) or match[2] or not first[0].isascii()):
        raise UnreadableAnswer
    unit = parse_unit(match[3])
    if unit is None:
        raise UnreadableAnswer
    return _attach_unit(match[1], *unit)


def parse_letter_unit(text: str) -> Scalar | None:
    """Parse a number and letters as a number with a unit (`5m`), not as a product; None for another text."""
    match = re.fullmatch(r"(.*\d\}?)\s*([A-Za-z]{1,4}(?:\s*/\s*[a-z]{1,3})?(?:\s*\^\s*\{?[23]\}?)?)", text)
    if match is None or not is_unit_name(re.split(r"[\s/^]", match[2])[0]) or re.search(r"\dK$", text):
        return None  # 15K may be 15,000
    number, unit = parse_number(match[1]), parse_unit(match[2])
    return Scalar(number.value, number.decimal_step, unit[0], match[1]) if number and unit else None


def _attach_unit(head: str, unit: Unit, multiplier: int = 1) -> Scalar:
    head = head.strip()
    if (inner := re.fullmatch(r"\((.*)\)", head)) and _is_balanced(inner[1]):
        head = inner[1]
    number = _scale_scalar(head, multiplier)
    if number is None:
        tree = parse_expression(head)
        if multiplier != 1:
            raise UnreadableAnswer
        return Scalar(tree, None, unit if unit.bases else None, head)
    return Scalar(number.value, number.decimal_step, unit if unit.bases else None, head)


def _scale_scalar(head: str, multiplier: int) -> Scalar | None:
    number = parse_number(head)
    if number is None or multiplier == 1:
        return number
    step = None if number.decimal_step is None else number.decimal_step * multiplier
    return Scalar(number.value * multiplier, step, text=head)


def _parse_quantity_sum(text: str) -> Scalar | None:
    """Parse a sum of quantities such as `2 hours 30 minutes`; None for another text."""
    flat = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    flat = re.sub(r"(\d\s*h(?:rs?|ours?)?\s*,?\s*\d+\s*)m\b", r"\1min", flat)
    parts = _QUANTITY.findall(flat)
    if len(parts) < 2 or _QUANTITY.sub("", flat).strip():
        return None
    total, bases = Fraction(0), set()
    for digits, word in parts:
        unit = parse_unit(word) if is_unit_name(word) else None
        if unit is None or unit[1] != 1:
            return None
        total += Fraction(digits) * unit[0].factor
        bases.add(unit[0].bases)
    return Scalar(total, None, Unit(bases.pop(), Fraction(1)), text) if len(bases) == 1 else None
