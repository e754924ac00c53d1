"""Units of numbers: their names and conversion, and the words that may follow a number."""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A product of base units with integer exponents, sorted by name, and the factor that converts to it."""

    bases: tuple[tuple[str, int], ...]
    factor: Fraction


# base unit and factor by name of a unit; `_register_unit` adds the prefixes
_UNITS: dict[str, tuple[str, Fraction]] = {}


_PREFIXES = {
    "k": (3, "kilo"), "c": (-2, "centi"), "m": (-3, "milli"), "d": (-1, "deci"), "μ": (-6, "micro"), "n": (-9, "nano"),
    "M": (6, "mega"), "G": (9, "giga"), "h": (2, "hecto"),
}  # fmt: skip


def _register_unit(base: str, factor: object, *names: str, prefixes: str = "") -> None:
    for name in names:
        _UNITS[name] = (base, Fraction(str(factor)))
    for prefix in prefixes:
        power, long_prefix = _PREFIXES[prefix]
        for name in names:
            if name.isascii():
                full_name = (prefix if len(name) <= 3 else long_prefix) + name
                _UNITS[full_name] = (base, Fraction(str(factor)) * Fraction(10) ** power)


_register_unit("m", 1, "m", "meter", "metre", "米", prefixes="kcmdμn")
_register_unit("m", 1000, "公里", "千米")
_register_unit("m", Fraction(1, 100), "厘米")
_register_unit("m", "0.3048", "ft", "foot", "feet")
_register_unit("m", "0.0254", "in", "inch", "inches")
_register_unit("m", "1609.344", "mi", "mile", "英里")
_register_unit("m", "0.9144", "yd", "yard")
_register_unit("s", 1, "s", "sec", "secs", "second", "秒", prefixes="mnμ")
_register_unit("s", 60, "min", "mins", "minute", "分钟")
_register_unit("s", 3600, "h", "hr", "hrs", "hour", "小时", "Stunden", "Stunde")
_register_unit("s", 86400, "d", "day", "天", "日")
_register_unit("s", 604800, "week", "wk", "周")
_register_unit("month", 1, "month", "个月")
_register_unit("month", 12, "year", "yr", "yrs", "年")
_register_unit("g", 1, "g", "gram", "gramme", "克", prefixes="kcmdμn")
_register_unit("g", 1000, "公斤", "千克")
_register_unit("g", 1000000, "tonne")
_register_unit("g", "453.59237", "lb", "lbs")
_register_unit("pound", 1, "pound")  # a weight or an amount of money
_register_unit("g", "28.349523125", "oz", "ounce")
_register_unit("L", 1, "L", "l", "liter", "litre", "升", prefixes="mcd")
_register_unit("K", 1, "K", "kelvin")
_register_unit("J", 1, "J", "joule", prefixes="kM")
_register_unit("W", 1, "W", "watt", prefixes="kMm")
_register_unit("N", 1, "N", "newton", prefixes="kM")
_register_unit("Pa", 1, "Pa", "pascal", prefixes="kMh")
_register_unit("V", 1, "V", "volt", prefixes="km")
_register_unit("A", 1, "A", "amp", "ampere", prefixes="m")
_register_unit("Hz", 1, "Hz", "hertz", prefixes="kMG")
_register_unit("C", 1, "C", "coulomb")
_register_unit("T", 1, "T", "tesla")
_register_unit("Ohm", 1, "Ω", "ohm", "Ohm", prefixes="k")
_register_unit("mol", 1, "mol", "mole", prefixes="m")
_register_unit("eV", 1, "eV", prefixes="kMG")
_register_unit("cal", 1, "cal", "calorie", prefixes="k")
_register_unit("deg", 1, "°", "degree", "deg", "Grad", "度", "grad")
_register_unit("rad", 1, "rad", "radian", "弧度")
_register_unit("celsius", 1, "°C", "℃", "celsius")
_register_unit("fahrenheit", 1, "°F", "℉", "fahrenheit")
_register_unit("usd", 1, "dollar", "usd", "USD", "$", "bucks", "美元")
_register_unit("usd", Fraction(1, 100), "cent", "¢")
_register_unit("gbp", Fraction(1, 100), "pence", "penny")
_register_unit("eur", 1, "€", "euro", "eur", "EUR", "欧元")
_register_unit("gbp", 1, "£", "GBP", "gbp")
_register_unit("cny", 1, "元", "yuan", "CNY", "RMB", "rmb", "人民币", "块")
_register_unit("yen", 1, "¥", "yen", "JPY", "円", "日元")
_register_unit("rupee", 1, "₹", "rupee", "Rs", "INR", "rs")
_register_unit("%", 1, "%", "percent")
_UNITS |= {
    "mph": ("mph", Fraction(1)),
    "kph": ("kph", Fraction(1)),
    "kmh": ("kph", Fraction(1)),
    "kmph": ("kph", Fraction(1)),
}
_COMPOUND_UNITS: dict[str, tuple[str, str | None, Fraction]] = {
    "mph": ("m", "s", Fraction("1609.344") / 3600),
    "kph": ("m", "s", Fraction(1000) / 3600),
}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3, "平方": 2, "立方": 3}
_MULTIPLIERS = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
# words behind a number that are no unit: they change the number, or doubt it
_NON_UNIT_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        or and not no nor to from minus plus times divided over mod modulo less more than least most about
        approximately around wrong incorrect false is isn are was be but if else maybe either neither half
        halves third thirds quarter quarters fifth tenth tenths hundredths thousandths squared cubed factorial
        twice double triple pairs pair point negative positive the answer base between up down unless except
        without instead rather greater smaller fewer otherwise when where for all any some each every different
        one two three four five six seven eight nine ten eleven twelve zero few perhaps always sometimes besides
        zeros zeroes ones twos tens dozens scores percents percentage additional further remaining missing
        excluding including inclusive exclusive maximum minimum max average total rounded exactly nearly almost
        too also only just under above below upper lower wrongly true right correct possible answers guesses
        options choices possibly probably doubtful log ln sin cos tan root roots reciprocal inverse opposite
        complement remainder factorials exponents powers hundreds thousands millions billions fails works equals
        holds makes gives seems looks appears satisfies contradicts exceeds becomes has have had does did would
        could should will may might must can cannot many much gross couple couples twins trios duos triplets
        lakh lakhs crore crores quadrillion quadrillions quintillion quintillions sextillions zillions myriads
        debt error excess doubt deficit arrears vain lower higher owed owing short shy percentile percentiles
        rejected excluded eliminated lost
        """,
    )
)
# nouns of counted things that do not end in s
_COUNTED_NOUNS = frozenset(
    re.findall(
        r"\w+",
        """
        st nd rd th paths lengths widths depths youths births deaths moths people persons person children child
        men man women woman mice geese sheep fish teeth feet dice cattle deer unit way solution point apple
        student triple integer number digit element case term factor step edge side vertex vertices matrices
        indices tile coin marble ball card box book page game team player ticket piece cup spoon glass bag
        bottle pencil tree flower car house room day night time turn trip move member subset function graph path
        triangle rectangle square circle line segment region zero arrangement permutation combination
        """,
    )
) - {"zero", "number", "square", "time", "triple"}
# after "metres" or "years"
_DIMENSION_WORDS = frozenset({"old", "high", "long", "wide", "tall", "deep", "away", "apart"})
_ADJECTIVES = frozenset({"different", "possible", "positive", "negative", "remaining", "total"})  # "different ways"
_NON_UNIT_CJK = re.compile(r"[不非无無或约約多少余餘半对對双雙打十百千万萬亿億]")


def _is_counted_noun(word: str) -> bool:
    """Return whether a word behind a number looks like the noun of counted things, such as "apples" or "people"."""
    word = word.lower()
    if not word.isascii():
        return len(word) <= 6 and not _NON_UNIT_CJK.search(word)
    plural = re.fullmatch(r"[a-z]{3,}s", word) and not re.search(r"(?:ss|us|is|ous|wards?|ways|ths)$", word)
    return word in _COUNTED_NOUNS or word == "ways" or bool(plural)


_TOKEN = re.compile(
    r"\^\s*\{?\s*(-?\d)\s*\}?|(%|[°℃℉€£¥₹$¢Ω])(?:\s*([CF])(?![a-zA-Z]))?|(?!per\b)([^\W\d_]+)|(/|per\b)|(\S)"
)


def is_unit_name(word: str) -> bool:
    """Return whether a word is the name of a unit."""
    return _find_unit(word) is not None


def _find_unit(word: str) -> tuple[str, Fraction] | None:
    for form in (word, word.lower() if len(word) > 3 else word, word.removesuffix("s") if len(word) > 3 else word):
        if form in _UNITS:
            return _UNITS[form]
    return _UNITS.get(word.lower().removesuffix("s")) if len(word) > 4 else None


def parse_unit(text: str) -> tuple[Unit, int] | None:
    """Parse the text behind a number as a unit.

    Up to four words that are in no table also count as a unit if the last looks like a noun of counted things, such as "apples"
    or "red marbles", and none of them changes the number.

    Returns:
        `tuple[Unit, int]`, *optional*: the unit, and the factor of words such as "million"; or None.
    """
    text = (
        text.replace("\\text", " ")
        .replace("{", " { ")
        .replace("^\\circ", "°")
        .replace("\\cdot", " ")
        .replace("\\mu", "μ")
    )
    text = (
        re.sub(r"\{\s*(-?\d)\s*\}", r"\1", text).replace("{", " ").replace("}", " ").replace("*", " ").replace("⋅", " ")
    )
    text = text.replace("(s)", "")
    text = re.sub(r"\b([ap])\.\s*m\b", "or", text)  # a time of day is not a unit
    bases: dict[str, int] = {}
    factor, multiplier, sign, power, words = Fraction(1), 1, 1, 1, 0
    last: tuple[str, Fraction] | None = None
    after_noun = False  # after a preposition, as in "pieces of the cake"
    is_open = False  # an adjective needs its noun
    if re.match(r"\s*(?:per\b|/)", text):
        return None

    def multiply_by(name: str, scale: Fraction, exponent: int) -> None:
        nonlocal factor
        above, below, rate = _COMPOUND_UNITS.get(name, (name, None, Fraction(1)))
        bases[above] = bases.get(above, 0) + exponent
        if below is not None:
            bases[below] = bases.get(below, 0) - exponent
        factor *= (scale * rate) ** exponent

    for raised, sign_of, scale_of, word, slash, other in _TOKEN.findall(text):
        if raised:
            if last is None:
                return None
            multiply_by(*last, sign * (int(raised) - 1))
            last = None
        elif slash:
            sign = -1
        elif other == ".":
            continue
        elif other:
            return None
        else:
            name = sign_of + scale_of or word
            if name.lower() in _POWERS or name in _POWERS:
                exponent = _POWERS.get(name, _POWERS.get(name.lower(), 1))
                if last is not None and name.lower() in ("squared", "cubed"):
                    multiply_by(*last, sign * (exponent - 1))
                power = 1 if last is not None and name.lower() in ("squared", "cubed") else exponent
                continue
            if name in _MULTIPLIERS or name.lower() in _MULTIPLIERS or name.lower().removesuffix("s") in _MULTIPLIERS:
                multiplier *= (
                    _MULTIPLIERS.get(name)
                    or _MULTIPLIERS.get(name.lower())
                    or _MULTIPLIERS[name.lower().removesuffix("s")]
                )
                continue
            if after_noun and name.lower() in ("the", "a", "an", "its", "their"):
                continue
            adjective = name.lower() in _ADJECTIVES or (is_open and name.lower() in ("pairs", "roots", "triples"))
            if (name.lower() in _NON_UNIT_WORDS and not adjective) or words >= 4:
                return None
            if _find_unit(name) is None and len(name) == 1 and name.isascii():
                return None  # a factor, as in 2x
            if words and not is_open and name.lower() in _DIMENSION_WORDS:
                continue
            known = _find_unit(name)
            if known is None and not name.isascii() and not _is_counted_noun(name):
                return None
            if name.lower() in ("of", "in", "on"):
                if not words or is_open:
                    return None
                after_noun = True
            is_open = not after_noun and known is None and (not _is_counted_noun(name) or name.lower() in _ADJECTIVES)
            last = known or (name.lower().removesuffix("s"), Fraction(1))
            words += 1
            multiply_by(*last, sign * power)
            power = 1
    if is_open or (words > 1 and "%" in bases):
        return None
    nonzero = tuple(sorted((base, exponent) for base, exponent in bases.items() if exponent))
    return (Unit(nonzero, factor), multiplier) if nonzero or multiplier != 1 else None
