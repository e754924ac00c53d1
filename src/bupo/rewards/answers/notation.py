"""Normalisation of notation: variants of Unicode, LaTeX and plain text become one spelling."""

import re
import unicodedata
from typing import Any

_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5),
    "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
_SCRIPT_DIGITS = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-()n" * 2)
_GREEK = {
    letter: f"\\{name} "
    for letter, name in re.findall(
        r"(\w)(\w+)",
        """
        αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta ιiota κkappa λlambda μmu νnu ξxi πpi ρrho σsigma τtau υupsilon
        φphi χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi ΣSigma ΦPhi ΨPsi ΩOmega
        """,
    )
}
_CHARACTERS = str.maketrans(
    {symbol: f"\\frac{{{above}}}{{{below}}}" for symbol, (above, below) in _FRACTIONS.items()}
    | _GREEK
    | dict.fromkeys("−–—‐‑‒﹣", "-")
    | dict.fromkeys("\u2009\u202f\u00a0\u2002\u2003\u2005\u200a\u3000", " ")
    | dict.fromkeys("\u200b\u2061\u2062\u2063\u200e\u200f\ufeff", "")
    | dict.fromkeys("“”„", '"') | dict.fromkeys("‘’", "'")
    | {
        "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "∕": "/", "⁄": "/", "√": "\\sqrt ",
        "∞": "\\infty ",
        "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "≈": "\\approx ", "≡": "\\equiv ", "∈": "\\in ", "∪": "\\cup ",
        "∩": "\\cap ",
        "∅": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ", "º": "^\\circ ", "ℝ": "\\mathbb{R}",
        "ℤ": "\\mathbb{Z}",
        "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "⟨": "\\langle ", "⟩": "\\rangle ",
        "〈": "\\langle ", "〉": "\\rangle ",
        "∧": "\\land ", "∨": "\\lor ", "∖": "\\setminus ", "…": "\\ldots ", "。": ".", "、": ",", "∠": "\\angle ", "µ": "\\mu ",
        "⌊": "\\lfloor ",
        "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "′": "'", "″": "''", "ℯ": "e", "∣": "|",
    }
)  # fmt: skip

# patterns and their replacements, applied in this order
_COMMAND_REPLACEMENTS: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^\s*~\s*(?=[\d.$])", r"\\approx "),
        (r"\\left\s*\\\{(.*)\\right\s*\.", r"\1"),
        (r"\\(?:left|right|[bB]ig{1,2}[lrm]?|middle)(?![a-zA-Z])\s*", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|strut)(?![a-zA-Z])\s*", ""),
        (r"\\(?:hspace|vspace|phantom|label|tag)\*?\{[^{}]*\}", " "),
        (r"\\\\\[[^\]]*\]", r"\\\\"),  # the gap between two rows
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"(?<=\d)\s*(?:\.\.\.+|\\[lc]?dots(?![a-zA-Z]))", r"\\ldots "),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:rm|bf|it)\s", ""),
        (r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|textup|mbox|hbox|emph|underline)\s*\{", r"\\text{"),
        (r"\\(?:mathrm|mathit|mathsf|mathtt|operatorname\*?)\s*\{", r"\\text{"),
        (
            r"\\frac\s*\{\s*\\text\{([^{}]*)\}(\^\d)?\s*\}\s*\{\s*\\text\{([^{}]*)\}(\^\{?\d\}?)?\s*\}",
            r"\\text{\1\2/\3}\4",
        ),
        (r"\\(?:text)?(?:pounds|sterling)(?![a-zA-Z])", "£"),
        (r"\\(?:text)?euro(?![a-zA-Z])", "€"),
        (r"\\(?:boldsymbol|bm|mathbf)\s*\{(?![ijk]\})", r"\\text{"),
        (r"\\text\s+\{", r"\\text{"),
        (r"\\(?:hat|vec)\s*\{\s*\\(?:mathbf|text)\s*\{\s*\\?([ijk])(?:math)?\s*\}\s*\}", r"\\mathbf{\1}"),
        (r"\\text\{\s*(Rs\.?|USD|EUR|GBP|INR|JPY|US|\\?\$|US\\?\$)\s*\}", r"\1"),
        (r"\\text\{\s*(?:negative|minus)\s*\}\s*(?=\d)", "-"),
        (r"\\text\{\s*(?:negative|minus) infinity\s*\}|\b(?:negative|minus) infinity\b", r"-\\infty "),
        (r"\\text\{\s*(?:positive|plus) infinity\s*\}|\b(?:positive|plus) infinity\b", r"\\infty "),
        (r"\\nexists(?![a-zA-Z])", "does not exist"),
        (r"\{\s*([^{}]+?)\s*\\choose\s*([^{}]+?)\s*\}", r"\\binom{\1}{\2}"),
        (r"(?:\{\})?[_^]\s*\{?\s*(\w+)\s*\}?\s*C\s*_\s*\{?\s*(\w+)\s*\}?", r"\\binom{\1}{\2}"),
        (r"(?<=\d)(?:\\,|\\;|\\:|\\ |~|\\!|\{,\}|\{\\,\}|\{\\ \})(?=\d{3}(?!\d))", ","),  # 10\,000
        (r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ","),
        (
            r"(?<![\d.,'])\d{1,3}(?:(?:\.\d{3}){2,}|(?:'\d{3})+)(?![\d,']|\.\d)",
            lambda match: re.sub(r"[.']", ",", match[0]),
        ),
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])|\\(?:thinspace|space|enspace|hfill)(?![a-zA-Z])", " "),
        (r"\{\s*([,.:])\s*\}", r"\1"),
        (r"\\colon(?![a-zA-Z])\s*", ":"),
        (r"\\l[be](?![a-zA-Z])|\\leqslant(?![a-zA-Z])|<=|=<", r"\\leq "),
        (r"\\ge(?![a-zA-Z])|\\geqslant(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\neq?(?![a-zA-Z])|\\not\s*=|!=", r"\\neq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\simeq(?![a-zA-Z])|\\approxeq(?![a-zA-Z])|\\sim(?![a-zA-Z])|~=", r"\\approx "),
        (r"\\varnothing(?![a-zA-Z])|\\empty(?![a-zA-Z])", r"\\emptyset "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\l?r?vert(?![a-zA-Z])", "|"),
        (r"\\(?:textdegree|degree|deg)(?![a-zA-Z])", r"^\\circ "),
        (r"\^\s*\{?\s*\^?\\circ\s*\}?", r"^\\circ "),
        (r"\\(?:mathbb|Bbb)\s*\{?\s*([RZNQC])\s*\}?", r"\\mathbb{\1}"),
        (r"\\text\{\s*([ie])\s*\}|(?<=\d)\\text\{E\}(?=\s*[-+\d])", lambda match: match[1] or "e"),
        (r"\\(?:imath|jmath|ii)(?![a-zA-Z])", "i"),
        (r"\\(?:cdotp|bullet|ast)(?![a-zA-Z])", r"\\cdot "),
        (r"\\(?:lnot|neg)(?![a-zA-Z])", "¬"),
        (r"\\%|\\text\{\s*(?:%|percent|per cent|pct|percentage)\s*\}|(?<=[\d}])\s*(?:percent|per cent|pct)\b", "%"),
        (r"\\text\{\s*(?:if|when)\b", r"\\text{"),
        (r"\\overline\s*\{\s*(\d+)\s*\}", r"\\overline{\1}"),
    ]
]  # fmt: skip
_WRAPPERS = re.compile(r"\$+(.*)\$+|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.+)\*\*|`+([^`]+)`+", re.DOTALL)
_CLOSING = re.compile(r"(?:\s|(?<!\\)[.,;:。，；]|\\\\|(?<!\\)\\(?=\s*$))+$")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_ONLY_WORDS = re.compile(r"[^\d+*/=<>^_\\()]*")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ANSWER_PREFIX = re.compile(r"(?i)^\s*(?:\\text\{)?\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is|\s*:)\s*:?\s*(?:\})?\s*")

# canonical text of phrases with the same meaning
_SYNONYMS = {
    phrase: canonical
    for canonical, phrases in {
        "\\emptyset": ["no solution", "no solutions", "empty set", "the empty set", "\\{\\}", "{}", "no real solution",
                         "no real solutions"],
        "monday": ["mon"], "tuesday": ["tue", "tues"], "wednesday": ["wed"], "thursday": ["thu", "thur", "thurs"],
        "friday": ["fri"], "saturday": ["sat"], "sunday": ["sun"],
        "does not exist": ["the limit does not exist", "limit does not exist", "dne", "doesn't exist",
                           "undefined", "not defined"],
        "\\mathbb{R}": ["all real numbers", "all reals", "(-\\infty,\\infty)", "(-\\infty,+\\infty)",
                        "the real numbers", "\\text{R}"],
    }.items()
    for phrase in phrases
}  # fmt: skip


def normalize_notation(text: str) -> str:
    """Replace Unicode characters by LaTeX, and remove or unify commands that do not change the meaning."""
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda match: f"^{{{match[0].translate(_SCRIPT_DIGITS)}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda match: f"_{{{match[0].translate(_SCRIPT_DIGITS)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _ANSWER_PREFIX.sub(
        lambda match: "\\text{" if match[0].strip().startswith("\\text{") and "}" not in match[0] else "", text
    )
    for pattern, replacement in _COMMAND_REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return strip_markup(text)


def strip_markup(text: str) -> str:
    """Remove delimiters of formulas and emphasis around a text, and punctuation at its end."""
    while True:
        shorter = _CLOSING.sub("", text.strip())
        if (match := _WRAPPERS.fullmatch(shorter)) and not any("$" in group for group in match.groups() if group):
            shorter = next((group for group in match.groups() if group), "")
        elif (match := _TEXT.fullmatch(shorter)) or (match := re.fullmatch(r"\{([^{}]*)\}", shorter)):
            shorter = match[1]
        if shorter == text:
            return text
        text = shorter


_ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_NUMBER_WORDS = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}


def parse_number_words(text: str) -> int | None:
    """Return the number below a million that is written in English words, with its sign, or None."""
    negative = re.match(r"(?i)\s*(?:\\text\{)?\s*(?:minus|negative) ", text)
    if negative:
        text = text[negative.end() :].replace("}", "")
    words = re.sub(r"\\text\{([^{}]*)\}|-", lambda match: match[1] or " ", text).strip().lower().split()
    total, part, last = 0, 0, 1000
    for word in words:
        if word in _NUMBER_WORDS:
            value = _NUMBER_WORDS[word]
            if value >= last or (last == 20 and value > 9) or (value == 0 and len(words) > 1):
                return None
            part, last = part + value, 1 if value < 20 else 10
        elif word == "hundred" and 0 < part < 10:
            part, last = 100 * part, 100
        elif word == "thousand" and part and not total:
            total, part, last = 1000 * part, 0, 1000
        elif word != "and" or last != 100:
            return None
    number = total + part
    return (-number if negative else number) if words and words[-1] != "and" else None


def make_text_key(text: str) -> str:
    """Return a key that is equal for equal plain texts.

    Spaces count only between two words, and capitals only in single letters.
    """
    text = _TEXT.sub(r"\1", re.sub(r"[\"`$]|\\(?=[\s$])", "", text))
    text = re.sub(r"^'([^']*)'$", r"\1", text.strip())
    text = re.sub(r"\{(\w)\}", r"\1", text)
    text = _SPACES.sub("", " ".join(text.split()))
    text = _CLOSING.sub("", re.sub(r"(?<=[a-zA-Z]{4})!+$|(?<=\b[Yy]es)!+$|(?<=\b[Nn]o)!+$", "", text))
    is_product = re.fullmatch(r"[b-df-hj-np-tv-z]{2,3}|[B-DF-HJ-NP-TV-Z]{2,3}", text)  # of letters, without a vowel
    min_length = 2 if _ONLY_WORDS.fullmatch(text) and not is_product else 4  # in a formula, xy is not XY
    text = _CLOSING.sub("", _WORD.sub(lambda word: word[0].casefold() if len(word[0]) >= min_length else word[0], text))
    text = re.sub(r"^(?:a|an|the|on|in|at) (?=[a-z]{3,}$)", "", text)
    return _SYNONYMS.get(text, text)
