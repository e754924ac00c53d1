"""Answers with the verdict of a mathematician: (answer, gold answer, verdict)."""

C, W, U, N = "correct", "wrong", "unevaluated", "unparsable"

B = "\\boxed{%s}"


def boxed(*rows):
    return [(B % answer, gold, verdict) for answer, gold, verdict in rows]


NUMBERS = boxed(
    ("39", "39", C), ("39", "40", W), ("-7", "-7", C), ("7", "-7", W), ("007", "7", C), ("+7", "7", C), ("7.0", "7", C), ("7.", "7", C),
    ("1,000", "1000", C), ("1{,}000", "1000", C), ("1000000", "1,000,000", C), ("10,000", "1000", W), ("0", "0", C), ("-0", "0", C),
    ("3.14", "3.14", C), ("3.14", "3.15", W), (".5", "0.5", C), ("0.50", "0.5", C), ("1e3", "1000", C), ("3 \\times 10^5", "300000", C),
    ("3\\cdot10^{5}", "300000", C), ("2^{10}", "1024", C), ("2^{10}", "1000", W), ("\\sqrt{4}", "2", C), ("5!", "120", C),
    ("\\binom{5}{2}", "10", C), ("|{-3}|", "3", C), ("12345678901234567890", "12345678901234567890", C),
    ("12345678901234567891", "12345678901234567890", W), ("1.2 \\times 10^{-3}", "0.0012", C), ("1.5E-3", "0.0015", C), ("1e3", "100", W),
    ("10\\,000", "10000", C), ("10\\,000", "1000", W), ("0.\\overline{3}", "\\frac{1}{3}", C), ("0.1\\overline{6}", "\\frac{1}{6}", C),
    ("-0.\\overline{3}", "-\\frac{1}{3}", C), ("0.\\overline{3}", "0.3", W), ("2021_{3}", "2021_3", C), ("2021", "2021_3", C), ("2021_4", "2021_3", W),
    ("8.", "7", W), ("+", "+", C), ("-", "+", W), ("\\sqrt[3]{-8}", "-2", C), ("33\\frac{1}{3}\\%", "\\frac{1}{3}", C), ("5 \\pmod 7", "5", C),
)  # fmt: skip

FRACTIONS = boxed(
    ("\\frac{1}{2}", "\\frac{1}{2}", C), ("\\frac{1}{2}", "0.5", C), ("0.5", "\\frac{1}{2}", C), ("1/2", "0.5", C), ("\\dfrac{1}{2}", "1/2", C),
    ("\\tfrac12", "\\frac{1}{2}", C), ("\\frac12", "0.5", C), ("\\frac{2}{4}", "\\frac{1}{2}", C), ("\\frac{1}{3}", "\\frac{1}{2}", W),
    ("-\\frac{3}{4}", "-0.75", C), ("\\frac{-3}{4}", "-\\frac{3}{4}", C), ("\\frac{3}{-4}", "-\\frac{3}{4}", C), ("1\\frac{1}{2}", "\\frac{3}{2}", C),
    ("1 \\frac{1}{2}", "1.5", C), ("\\frac{3}{2}", "1\\frac{1}{2}", C), ("\\frac{22}{7}", "\\pi", W), ("0.333", "\\frac{1}{3}", W),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", C), ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", C), ("\\frac{1+\\sqrt{5}}{2}", "\\frac{\\sqrt{5}+1}{2}", C),
    ("\\frac{1-\\sqrt{5}}{2}", "\\frac{1+\\sqrt{5}}{2}", W), ("\\frac{a}{b}", "a/b", C), ("\\frac{b}{a}", "\\frac{a}{b}", W), ("\\frac{x+1}{x}", "1+\\frac{1}{x}", C),
)  # fmt: skip

ROOTS_AND_CONSTANTS = boxed(
    ("\\sqrt{2}", "\\sqrt{2}", C), ("\\sqrt{2}", "1.5", W), ("\\sqrt 2", "\\sqrt{2}", C), ("2^{1/2}", "\\sqrt{2}", C), ("\\sqrt{8}", "2\\sqrt{2}", C),
    ("3\\sqrt{2}", "\\sqrt{18}", C), ("\\sqrt[3]{8}", "2", C), ("\\sqrt[3]{2}", "2^{1/3}", C), ("2\\sqrt{3}", "3\\sqrt{2}", W), ("\\pi", "\\pi", C),
    ("2\\pi", "2 \\pi", C), ("\\frac{\\pi}{2}", "\\pi/2", C), ("3.14", "\\pi", W), ("e^2", "e^{2}", C), ("\\ln 2", "\\ln(2)", C),
    ("\\frac{\\pi^2}{6}", "\\frac{\\pi^{2}}{6}", C), ("2+\\sqrt{3}", "\\sqrt{3}+2", C), ("2+\\sqrt{3}", "2-\\sqrt{3}", W), ("(2+\\sqrt{3})", "2+\\sqrt{3}", C),
    ("\\sin 30^\\circ", "\\frac{1}{2}", C), ("\\infty", "\\infty", C), ("-\\infty", "\\infty", W), ("i", "i", C), ("2+3i", "3i+2", C), ("2-3i", "2+3i", W),
    ("\\sin 31^\\circ", "\\frac{1}{2}", W), ("\\sin\\left(150^{\\circ}\\right)", "0.5", C), ("\\cos^2 45^\\circ", "0.5", C),
    ("\\cos 36^\\circ", "\\frac{1+\\sqrt{5}}{4}", C), ("\\frac{1+\\sqrt{5}}{4}", "\\cos 36^\\circ", C), ("\\sin \\frac{5\\pi}{6}", "0.5", C),
    ("3√2", "\\sqrt{18}", C), ("√(x+1)", "\\sqrt{x+1}", C), ("√3", "\\sqrt{2}", W), ("45^\\circ", "\\frac{\\pi}{4}", C),
)  # fmt: skip

EXPRESSIONS = boxed(
    ("x^2+2x+1", "(x+1)^2", C), ("x^2+2x+2", "(x+1)^2", W), ("(x+1)(x-1)", "x^2-1", C), ("2x", "x+x", C), ("x(x+1)", "x^2+x", C), ("3a-b", "-b+3a", C),
    ("a-b", "b-a", W), ("x = 5", "5", C), ("5", "x = 5", C), ("x=5", "x=6", W), ("y = 2x + 3", "y=3+2x", C), ("2x + 3", "y = 2x + 3", C),
    ("n(n+1)/2", "\\frac{n(n+1)}{2}", C), ("\\frac{n^2+n}{2}", "\\frac{n(n+1)}{2}", C), ("\\sin^2 x + \\cos^2 x", "1", C), ("e^{x+y}", "e^x e^y", C),
    ("f(x) = x^2", "x^2", C), ("k", "k", C), ("k", "m", W), ("2^{n+1}", "2\\cdot 2^n", C), ("x > 3", "x > 3", C), ("3 < x", "x > 3", C), ("x < 3", "x > 3", W),
    ("x \\ge 3", "x \\geq 3", C), ("2t", "2t", C), ("t \\cdot 2", "2t", C), ("2", "2t", W), ("2t", "2", W), ("n = m", "n=m", C), ("n = s", "n = m", W),
    ("ad - bc", "ad - bc", C), ("-bc + ad", "ad - bc", C), ("ad - c", "ad - bc", W), ("f(x) = x + c", "f(x) = x+c", C), ("f(x) = x + d", "f(x) = x + c", W),
    ("f(x, y) = c", "f(x,y) = c", C), ("\\max\\{A,B\\}", "\\max\\{A, B\\}", C), ("\\max\\{A,C\\}", "\\max\\{A, B\\}", W),
    ("\\mathbb{Z}/2\\mathbb{Z}", "\\mathbb{Z}/2\\mathbb{Z}", C), ("\\mathbb{Z}/3\\mathbb{Z}", "\\mathbb{Z}/2\\mathbb{Z}", W), ("2^{\\aleph_0}", "2^{\\aleph_0}", C),
    ("2^{\\aleph_1}", "2^{\\aleph_0}", W),
)  # fmt: skip

SETS_AND_TUPLES = boxed(
    ("(1, 2)", "(1,2)", C), ("(2, 1)", "(1,2)", W), ("(1,2,3)", "(1, 2, 3)", C), ("(1,2)", "(1,2,3)", W), ("\\left(3, \\frac{\\pi}{2}\\right)", "(3, \\pi/2)", C),
    ("\\{1,2\\}", "\\{2,1\\}", C), ("\\{1,2\\}", "\\{1,3\\}", W), ("\\{1, 2, 3\\}", "1,2,3", C), ("1, 2", "2, 1", C), ("1,2,3", "3,2,1", C), ("1, 2", "1, 3", W),
    ("[0,1]", "[0, 1]", C), ("(0,1)", "[0,1]", W), ("[0,1)", "[0, 1)", C), ("(-\\infty, 3)", "(-\\infty,3)", C), ("(-\\infty,3]", "(-\\infty,3)", W),
    ("(0,1)\\cup(2,3)", "(0,1) \\cup (2,3)", C), ("(2,3)\\cup(0,1)", "(0,1)\\cup(2,3)", C), ("\\emptyset", "\\emptyset", C), ("x \\in [0,1]", "[0,1]", C),
    ("\\{0.5, 1\\}", "\\{1, \\frac{1}{2}\\}", C), ("(1, 2).", "(1,2)", C), ("(-\\infty, 0].", "(-\\infty,0]", C), ("\\left(-\\infty, 0\\right]", "(-\\infty,0]", C),
    ("\\{0\\}", "\\{\\mathbf{0}\\}", C), ("\\{1\\}", "\\{\\mathbf{0}\\}", W), ("\\pm 2", "2, -2", C), ("x = 1, y = 2", "(1,2)", C), ("x \\ge 0", "[0,\\infty)", C),
)  # fmt: skip

MATRICES = boxed(
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", C),
    ("\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", C),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", W),
    ("\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", W),
    ("\\begin{pmatrix} 0.5 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}\\frac{1}{2}\\\\2\\end{pmatrix}", C),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}", W),
)  # fmt: skip

UNITS_AND_TEXT = boxed(
    ("50\\%", "0.5", C), ("50\\%", "50\\%", C), ("50\\%", "50", C), ("5\\text{ cm}", "5", C), ("5 \\text{ cm}^2", "5", C), ("5\\,\\mathrm{m}", "5", C), ("\\$18.90", "18.90", C),
    ("90^\\circ", "90", C), ("90^{\\circ}", "90^\\circ", C), ("\\text{east}", "\\text{east}", C), ("\\text{east}", "\\text{west}", W), ("\\text{(B)}", "B", C),
    ("\\text{B}", "\\text{A}", W), ("\\textbf{5}", "5", C), ("\\mathbf{5}", "5", C), ("5 \\text{ apples}", "5", C), ("\\text{yes}", "\\text{yes}", C), ("10\\text{ minutes}", "10", C),
    ("12\\text{ and }13", "12,13", C), ("\\!5", "5", C), ("5\\;", "5", C), ("\\left(5\\right)", "5", C),
    ("Yes", "Yes", C), ("\\text{Yes}", "Yes", C), ("\\textbf{Yes}", "Yes", C), ("YES", "Yes", C), ("yes.", "Yes", C), ("\\text{Yes.}", "Yes", C), ("No", "Yes", W),
    ("NO", "\\text{No}", C), ("TRUE", "True", C), ("\\mathrm{False}", "False", C), ("False", "True", W), ("Evelyn", "\\text{Evelyn}", C), ("Ellen", "\\text{Evelyn}", W),
    ("C", "\\text{(C)}", C), ("(C)", "\\text{(C)}", C), ("\\text{C}", "\\text{(C)}", C), ("D", "\\text{(C)}", W), ("5", "5 \\text{ m}", C), ("5m", "5", C),
    ("10\\text{ a.m.}", "10\\text{ a.m.}", C), ("\\text{no solution}", "\\emptyset", C),
)  # fmt: skip

TEXT_AROUND = [
    ("so \\boxed{39}", "39", C),
    ("The answer is $\\boxed{39}$.", "39", C),
    ("First \\boxed{3}, no: \\boxed{4}", "4", C),
    ("First \\boxed{4}, no: \\boxed{3}", "4", W),
    ("So $\\boxed{3}$. Wait, I forgot one: $\\boxed{4}$.", "4", C),
    ("$x = \\boxed{3}$ or $x = \\boxed{4}$", "3,4", C),
    ("$x = \\boxed{3}$ or $x = \\boxed{4}$", "4", W),
    ("\\boxed{3}, \\boxed{4}", "\\{3, 4\\}", C),
    ("\\boxed{\\left\\{ x = 1 \\right.}", "x = 1", C),
    ("\\boxed{\\boxed{5}}", "5", C),
    ("\\fbox{5}", "5", C),
    ("\\boxed 5", "5", C),
    ("\\boxed{ 5 }", "5", C),
    ("\\boxed{5}.", "5", C),
    ("**\\boxed{5}**", "5", C),
    ("$$\\boxed{5}$$", "5", C),
    ("\\[\\boxed{\\frac{1}{2}}\\]", "\\frac{1}{2}", C),
    ("We get 3, then 4.\n\n\\boxed{12}\n", "12", C),
    ("The answer is $\\frac{2}{4}$.", "\\frac{1}{2}", C),
    ("The final answer is 42", "42", C),
    ("The final answer is 41", "42", W),
    ("答案是 \\boxed{5}", "5", C),
    ("\\boxed{−5}", "-5", C),  # a minus sign of Unicode
    ("\\boxed{５}", "5", C),  # a full-width digit
    ("\\boxed{½}", "0.5", C),
    ("\\boxed{2×3×7=42}", "42", C),
    ("\\boxed{π}", "\\pi", C),
    ("\\boxed{√2}", "\\sqrt{2}", C),
    ("x" * 5000 + " \\boxed{5}", "5", C),
    ("I do not know", "39", N),
    ("", "39", N),
    ("\\boxed{}", "39", N),
    ("\\boxed", "39", N),
]

# a single fraction, decimal, power, root … is a number in any form
NUMBERS_IN_OTHER_FORMS = boxed(
    ("\\frac{84}{2}", "42", C), ("84/2", "42", C), ("84 / 2", "42", C), ("\\dfrac{84}{2}", "42", C), ("{84}/{2}", "42", C), ("\\frac{42}{1}", "42", C), ("\\frac{8}{2}", "4", C),
    ("-\\frac{84}{2}", "-42", C), ("\\frac{-84}{2}", "-42", C), ("\\frac{84}{-2}", "-42", C), ("x = 84/2", "42", C), ("\\frac{84}{2} \\text{ cm}", "42", C), ("\\frac{84}{3}", "42", W),
    ("42.0", "42", C), ("42.00", "42", C), ("42.5", "42", W), ("0.5", "1/2", C), ("\\frac{2}{4}", "1/2", C), ("2/4", "1/2", C), ("\\frac{2}{4}", "0.5", C), ("\\frac{3}{6}", "\\frac{1}{2}", C),
    ("\\frac{8.4}{0.2}", "42", C), ("1\\frac{2}{4}", "1.5", C), ("\\frac{6}{4}", "1\\frac{1}{2}", C), ("4.2 \\times 10^1", "42", C), ("42 \\cdot 10^0", "42", C), ("2^{-1}", "\\frac{1}{2}", C),
    ("\\frac{1}{2^3}", "\\frac{1}{8}", C), ("200\\%", "2", C), ("3\\sqrt{4}", "6", C), ("\\sqrt{\\frac{8}{2}}", "2", C), ("\\cos 0", "1", C), ("\\max(1, 2)", "2", C), ("-(-42)", "42", C), ("e^0", "1", C),
    ("6 \\cdot 7 = 42", "42", C), ("84/2 = 42", "42", C), ("\\int_0^1 x dx = \\frac{1}{2}", "\\frac{1}{2}", C), ("\\sum_{n=1}^{\\infty} 2^{-n}", "\\sum_{n=1}^{\\infty} 2^{-n}", C),
)  # fmt: skip

# answers that are not worked out
LEFT_TO_DO = boxed(
    ("4 + 7", "11", U), ("5 - 9", "-4", U), ("2 \\cdot 3", "6", U), ("2 \\times 3", "6", U), ("6*7", "42", U), ("4 + 8", "11", W), ("-(4+7)", "-11", U), ("42 + 0", "42", U),
    ("42 \\times 1", "42", U), ("x = 4 + 7", "11", U), ("0.42 \\times 100", "42", U), ("6 \\cdot 7 \\cdot 10^0", "42", U),
    ("10/5+3", "5", U), ("\\frac{10+5}{3}", "5", U), ("\\frac{6 \\cdot 7}{1}", "42", U), ("\\frac{168}{2 \\cdot 2}", "42", U), ("8/2*3", "12", U), ("2 + 1/2", "2.5", U),  # a fraction, and more
    ("84 \\div 2", "42", U), ("84 ÷ 2", "42", U),  # a division sign is not a fraction bar
    ("8/2/2", "2", U), ("\\frac{\\frac{1}{2}}{3}", "\\frac{1}{6}", U), ("\\frac{1}{2}+\\frac{1}{3}", "\\frac{5}{6}", U), ("7 \\cdot \\frac{1}{2}", "3.5", U),  # fractions of fractions
    ("2^3 \\cdot 5", "40", U), ("2^3 + 2", "10", U), ("2 \\cdot 10^2 + 1", "201", U), ("2^{5+5}", "1024", U), ("(4+1)!", "120", U),  # powers are numbers, operations on them are not
    ("2 + \\sqrt{9}", "5", U), ("\\sqrt{4+5}", "3", U), ("|4-7|", "3", U), ("\\log_2 8 + 1", "4", U), ("\\log_2 8", "3", U),
    ("\\sum_{n=1}^{3} n", "6", U), ("\\int_0^1 2x dx", "1", U), ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1", U), ("\\int_0^x 2t dt", "x^2", U),
)  # fmt: skip

CASES = [
    *NUMBERS, *FRACTIONS, *ROOTS_AND_CONSTANTS, *EXPRESSIONS, *SETS_AND_TUPLES, *MATRICES, *UNITS_AND_TEXT, *TEXT_AROUND, *NUMBERS_IN_OTHER_FORMS, *LEFT_TO_DO,
]  # fmt: skip

# differences of the strict verdict from the mathematician's
DIFFERENT: dict[tuple[str, str], str] = {}

# answers for which math-verify's verdict differs from the strict one, by reason; docs/evaluation.md counts them
DIFFERENCES = {
    "an operation is left to do": tuple(answer for answer, _, verdict in LEFT_TO_DO if verdict == U),
    "a number's spelling: thin space, recurring decimal, exponent, mixed percentage, odd root, `½`, `√`, full-width digits": (
        "\\boxed{\\sqrt[3]{-8}}", "\\boxed{33\\frac{1}{3}\\%}",
        "\\boxed{1e3}", "\\boxed{10\\,000}", "\\boxed{0.\\overline{3}}", "\\boxed{0.1\\overline{6}}", "\\boxed{-0.\\overline{3}}",
        "\\boxed{3√2}", "\\boxed{√(x+1)}", "\\boxed{５}", "\\boxed{½}", "\\boxed{√2}",
    ),
    "a letter at the end of the gold answer, which is taken for a unit and dropped": (
        "\\boxed{t \\cdot 2}", "\\boxed{2}", "\\boxed{n = m}", "\\boxed{n = s}", "\\boxed{-bc + ad}", "\\boxed{ad - c}",
        "\\boxed{f(x) = x + c}", "\\boxed{f(x) = x + d}", "\\boxed{f(x, y) = c}", "\\boxed{2t}",
    ),
    "degrees: an angle in radians, and a sine or cosine, which sympy reads as of radians": (
        "\\boxed{45^\\circ}",
        "\\boxed{\\sin 30^\\circ}", "\\boxed{\\sin\\left(150^{\\circ}\\right)}", "\\boxed{\\cos^2 45^\\circ}", "\\boxed{\\cos 36^\\circ}",
        "\\boxed{\\frac{1+\\sqrt{5}}{4}}",
    ),
    "yes, no, true and false in capitals or with a full stop": ("\\boxed{YES}", "\\boxed{yes.}", "\\boxed{\\text{Yes.}}", "\\boxed{TRUE}"),
    "a full stop inside the box": ("\\boxed{7.}", "\\boxed{(1, 2).}", "\\boxed{(-\\infty, 0].}"),
    "`\\mathbf{0}`, `\\fbox`, spaces in a text": ("\\boxed{\\{0\\}}", "\\fbox{5}", "\\boxed{\\max\\{A,B\\}}"),
    "an inequality for an interval, a remainder with its modulus, no solution": (
        "\\boxed{x \\ge 0}", "\\boxed{5 \\pmod 7}", "\\boxed{\\text{no solution}}",
    ),
    "a box that the answer takes back": ("First \\boxed{3}, no: \\boxed{4}",),
    "numbers in different bases": ("\\boxed{2021_4}",),
}  # fmt: skip
