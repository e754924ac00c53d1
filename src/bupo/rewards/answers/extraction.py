"""Extraction of the final answer of a completion: its last complete box outside the thinking, or text after "the answer is"."""

import re
from typing import NamedTuple


class ExtractedAnswer(NamedTuple):
    """The text of a final answer, or None and the reason."""

    text: str | None
    reason: str | None = None


EMPTY_COMPLETION, NO_ANSWER, UNCLOSED_BOX, EMPTY_BOX = "empty", "no box or final answer", "unclosed box", "empty box"
UNFINISHED_THINKING, RETRACTED, SEVERAL_ANSWERS = "unfinished thinking", "the answer is taken back", "several answers"

# tags around text that is not part of the answer
_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<reflection>", "</reflection>"),
    ("<analysis>", "</analysis>"),
    ("<draft>", "</draft>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis", "<|channel|>final"),
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BOX_SEPARATOR = re.compile(  # text between boxes that are one answer
    r"[\s$,;&]*(?:,|;|\b(?:and|or|und|oder|et|ou|y|e|o|и|или)\b|\\text\{\s*(?:and|or)\s*\}|和|或者?)?[\s$,;&]*(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?"
)
_NEGATION = (
    r"(?:\bnot|n't|n’t|\bnever|\bneither|\bnor|\bcannot|\bincorrect(?:ly)?|\bwrong(?:ly)?|\binstead of|\brather than|≠|"
    r"\\neq?\b|\bfalse that|(?<!no )(?<!without )(?<!without a )\bdoubt(?:s|ed|ful)?|"
    r"\bunlikely (?:that|to)|\bimpossible (?:that|for)|\bden(?:y|ies|ied)|"
    r"\b(?:exclud|reject)(?:es?|ed|s|ing)|\bru(?:les?|led|ling) out|"
    r"n['’]est pas|\bnicht|\bkein\w*|\bno (?:es|son|puede ser)|\bnon è|\bnão é|\bне|不是|并非|不等于)"
)
_FILLER_WORDS = (
    r"(?:be|equals?|equal to|simply|just|really|actually|the|a|an|our|my|final|correct|right|answer|result|value|option|choice|"
    r"is|was|it|to|that|think|believe|sure|certain|if|whether|say|get|possibly|"
    r"ever|even|necessarily|=)"
)
_DENIED_BEFORE = re.compile(
    rf"(?i)(?:{_NEGATION}|\bif\s+(?:it|that|this|the answer)\s+(?:were|was)|"
    rf"\b(?:assume|suppose|imagine|pretend)d?|~~)[\s:*]*(?:{_FILLER_WORDS}[\s:*]+){{0,8}}[\s$\\(\[*:=]*$"
)
_MISTAKEN_BEFORE = re.compile(
    r"(?i)\b(?:mistakes?|errors?|traps?|pitfalls?|fallacy|miscount\w*|oversight)\b[^.;:!?\n]{0,30}?"
    r"\b(?:leads? to|gives?|yields?|produces?|is|would be)[\s$(]*$|"
    r"\b(?:many|most|some|several|other)\s+(?:students|people|pupils|solvers|candidates|authors)\b[^.;:!?\n]{0,30}[\s$(]$|"
    r"\b(?:test|check|try|see|ask|verify|examine|decide|determine|wonder)\s+(?:whether|if)\b[\s$(]*$|"
    r"\b(?:nobody|no one|none of \w+)\b[^.,;:!?\n]{0,30}[\s$(]$|"
    r"\b(?:twice|thrice|half(?: of)?|minus|negative|plus|times|(?:square|square root|reciprocal|opposite) of|exceeds?)[\s$(]*$|"
    r"\ban? (?:\w+ )?(?:bound|estimate|guess|approximation)\s+(?:is|of|would be)[\s$(]*$|"
    r"\b(?:naive|tempting|wrong|mistaken|faulty|hasty)\s+\w+(?:\s+(?:is|was|gives?|would be))?[\s$(]*$"
)
# another answer or a bound in front of the box
_OPEN_BEFORE = re.compile(
    r"(?i)(?:\b(?:more|less|greater|fewer|larger|smaller|higher|lower|bigger|shorter|longer)\s+than|"
    r"\b(?:any\w*|values?|numbers?)\s+up to|"
    r"\b(?:is|are|was|were|be|just|well|costs?|strictly)\s+(?:under|over|below|above)|"
    r"\bbetween\b[^.;!?\n]{0,30}\d[^.;!?\n\w]{0,4}\s+and|"
    r"\b(?:somewhere|anywhere|rang(?:es?|ing))\s+from\b[^.;!?\n]{0,40}\bto|"
    r"\b(?:either|whether)\b[^.;!?\n]{0,60}\bor|[\d$)}\]]\s+or(?:\s+(?:maybe|perhaps|possibly|even))?|"
    r"\b(?:candidates|possibilities|options|guesses)\s+(?:are|remain)\b[^.;!?\n]{0,60}\b(?:and|or)|"
    r"\bor (?:maybe|perhaps|possibly))(?:\s+(?:an?|the|it is))?[\s$(*]*(?:[a-zA-Z]\s*=\s*)?$"
)
_OPEN_AFTER = re.compile(
    r"(?i)[\s$*)\]]*(?:\?(?![^\n]{0,60}\b(?:yes|indeed|correct|right|works|okay)\b)|"
    r"\b(?:minus|plus|times(?= *(?:[$\\\d]|two|three|the\b))|squared|cubed|divided|factorial|if(?! and only))\b|"
    r"is what (?:we|you|one|I)\b[^.\n]{0,30}\bif\b)|"
    r"[\s$*)\],;(.]*(?:give or take|plus or minus|\\?pm\b|±|or (?:so|near|nearby|thereabouts|close|more|less|fewer|a bit)\b|"
    r"(?:(?:it|this|that)\s+)?(?:could|might|may) (?:also|as well|equally|just as well)\b|"
    r"(?:but |and |though )?I(?:['’]m| am| cannot| can['’]?t| could not| couldn['’]?t| can not) "
    r"(?:not sure|unsure|tell|decide|determine|choose))"
)
# a formula with the box as a part
_SIGN_BEFORE = re.compile(r"(?:(?<!\\)\$|=|\\\(|\\\[|[\w})])\s*[-+*/]\s*(?:\{|\()*\s*$")  # in a formula
_PART_BEFORE = re.compile(
    r"(?:[\w})]\s*(?<![-=])[<>]|\^|\\(?:cdot|times|div|pm|mp|neq?|leq?|geq?|l|g|"
    r"leqslant|geqslant|not|sqrt|frac|[dt]frac|ln|log|sin|cos|tan|lfloor|lceil)(?![a-zA-Z])|[≠<>≤≥×·])\s*(?:\{|\()*\s*$"
)
_PART_AFTER = re.compile(
    r"[ \t]*(?:\^(?!\s*\{?\s*(?:\\circ|°|\\degree))|[+/]\s*[\w\\(]|-\s*[\d\\(]|!\s*(?:\$|\\[)\]])|"
    r"\\(?:cdot|times|div|pm|mp)(?![a-zA-Z]))"
)
# a number behind the box that replaces it
_REPLACEMENT_AFTER = re.compile(
    r"(?i)(?:\b(?:final|corrected|correct|actual|true|revised|updated|right|real|proper)\s+"
    r"(?:result|total|value|count|number|figure|sum|answer)\s+(?:is|was|should be|must be)|"
    r"\bthe (?:result|answer) (?:is|was|should be|must be)|"
    r"\b(?:the|its|their) (?:total|sum|count|value|result|number|answer) (?:should|must) be|"
    r"\b(?:now|actually|instead|here|really)\b\s+(?:\w+\s+){0,2}?(?:is|are|count|get|find|found|obtain|have|counted|gives?)|"
    r"\b(?:found|got|obtained|counted)(?=[^.\n]{0,15}(?:in the end|instead|finally|at last|eventually)))\s*[$\\(]*"
    r"(-?\d+(?:\.\d+)?)(?![\d.]*\s*[-+*/^<>=\\])"
)
_DENIED_AFTER = re.compile(
    r"(?i)[\s$.,;:*)\]\\]*(?:but\s+)?(?:(?:which|that|this|it)\s+)?(?:"
    r"(?:is|was|were|would be|can|could|does|must|should|cannot|can't|isn't|wasn't)(?:\s*(?:n't|n’t|not|never))?\s*(?:be\s*)?"
    r"(?:not\b|n't|n’t|"
    r"(?:my|the|our|an?|his|her|their) (?:first|initial|original|naive|tempting|common|earlier)|"
    r"the wrong|an? (?:wrong|incorrect)|wrong|incorrect|false|a mistake|impossible|ruled out)"
    r"|(?:isn't|isn’t|wasn't|can't be|cannot be|is not|was not|must not|could not be)\b)"
    r"|[\s$.,;*)\]]*(?:is|was|would be|seems|turns out)\s+(?:far\s+|much\s+|slightly\s+)?"
    r"(?:too (?:large|small|big|high|low|many|few)|"
    r"(?:only|just|merely|at best) an? (?:\w+ )?(?:bound|estimate|guess|approximation)|"
    r"an? (?:over|under)(?:count|estimate)|off by|"
    r"(?:the|an?) \w+ (?:for the (?:larger|smaller|other|original|wrong)|if)|(?:right|correct|true) (?:only|if))"
    r"|[\s$*)\]]*,?\s*(?:which|that|but this|but that)\s+"
    r"(?:overlooks|ignores|misses|forgets|neglects|omits|overcounts|undercounts|"
    r"double[- ]counts)"
    r"|[\s$*)\]]*,\s*(?:and|but|from which)\s+(?:then\s+)?(?:we|I|you)\s+[^.!?\n]{0,40}\bto (?:get|obtain|give)\b"
    r"|[\s$*)\]]*(?:fails?|failed|contradicts?|violates?|breaks)\b"
    r"|[\s$*)\]]*(?:turned out|turns out|proved|proves)(?: to be)? (?:wrong|incorrect|false|mistaken|too)"
    r"|[\s$*)\]]*[,;—-]*\s*(?:and |but )?(?:that|this|which|it|both|all|they)\s+(?:must be|has to be|is|are|was|were|seems?)\s+"
    r"(?:an? (?:misprint|typo|error|mistake|miscount|slip)|flawed|mistaken|invalid|wrong|incorrect|impossible)"
    r"|[\s$*)\]\\]*\?\s*(?:no|wrong|not)\b"
    r"|[\s$*)\]\\.]*(?:[✗✘❌]|\(\s*(?:wrong|incorrect|false)\b)"
    r"|[\s$*)\]\\\"'”]*,?\s*(?:but|yet|though|although|however,?)\s+(?:they|this|that|it|he|she|I)\b[^.!?\n]{0,40}"
    r"\b(?:mistaken|wrong(?:ly)?|incorrect(?:ly)?|false|untrue|not (?:true|right|correct)|an? (?:error|mistake))"
)
# words between boxes of one sentence that leave the answer open
_UNDECIDED = re.compile(
    r"(?i)\b(?:or|otherwise|maybe|perhaps|possibly|probably|alternatively|else|depending|if|unless)\b"
)
_AGREEMENT = re.compile(
    r"(?i)\b(?:equivalent(?:ly)?|equals?|that is|i\.e|in other words|same|wait|no|not|actually|correct(?:ion)?|rather|but)\b|="
)
_ALTERNATIVE_AFTER = re.compile(
    r"(?i)[\s$*)\]]*,?\s*(?:or\b|and/or\b|perhaps\b|maybe\b|possibly\b|oder\b|ou\b|o\b|или\b|或者?)\s*(?:maybe\s+|perhaps\s+|possibly\s+)?[$*(]*[-\d]|[\s$*)\]]*,?\s*(?:or|unless|depending)\b[^.\n\d]{0,20}\bif\b"
)
# another possible answer in the same sentence
_SECOND_POSSIBILITY = re.compile(
    r"(?i)[^.!?\n]{0,60}?\b(?:though|although|but|while|and)\s+(?:maybe\s+|perhaps\s+|possibly\s+)?[$\\(]*-?\d[^.!?\n]{0,30}?"
    r"\b(?:possible|plausible|likely|might|may|could|also|too|as well|works|valid)\b"
)
_RETRACTION = re.compile(
    r"(?i)\b(?:no|wait|actually|sorry|correction|scratch that|hold on|oops)\b[,:.;!—-]?.{0,200}?"
    r"\b(?:answer|result|it|value|that|box)\b.{0,30}?\b(?:is|be|was|equals|should|wrong|incorrect)\b",
    re.DOTALL,
)
_DISREGARD_PHRASE = re.compile(
    r"(?is).{0,200}?\b(?:on second thought|(?:disregard|ignore|scratch|forget) (?:that|this|the)\b|"
    r"I made an? (?:mistake|error)|"
    r"(?:that|this)(?:['’]s| is| was) (?:wrong|incorrect|not (?:right|correct))\b|"
    r"no, wait|\b(?:hmm+|wait|oops|hold on)\b.{0,80}?(?:\b(?:not|no|fails?|wrong|also|mistake|error)\b|n['’]t\b|contradict))"
)
_SUPPOSITION = re.compile(
    r"(?i)\b(?:suppose|assume|imagine|pretend|if|whether)\b|"
    r"\b(?:naive|tempting|obvious|common|popular|incomplete|hasty|student['’]s|students['’]?|his|her|their)\s+(?:final\s+)?answer"
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"^\s*####\s*(.+?)\s*$", re.MULTILINE)
_ANSWER_PHRASE = re.compile(
    r"(?i)\b(?:final\s+|correct\s+)?answer(?:\s+(?:to|of|for)\b[^.:\n]{0,80}?)?"
    r"(?:\s+is|\s*:|\s*=|\s+would be|\s+should be|\s+must be)\s*:?|答案(?:是|为|：|:)|"
    r"\b(?:respuesta|resposta|réponse|risposta)(?:\s+(?:final\w*|correct\w*))?\s+(?:es|est|é|è)\b|"
    r"\b(?:antwort|lösung)\s+(?:ist|lautet)\b:?"
)
_SENTENCE_END = re.compile(r"\n|[.!?。](?=\s|$)|(?<=\$)[.,](?=\s|$)")
_LAST_FORMULA = re.compile(
    r"(?i)\b(?:is|are|=|equals|get|gives|conclude that|so|thus|therefore|hence|be)[:,]?\s*(?:\*\*)?"
    r"(?:\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])(?:\*\*)?\s*[.!]?\s*$"
)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$([^$]+)\$(?!\s*(?:and|or|,|%))|\\\((.+?)\\\)(?!\s*(?:and|or|,|%))", re.DOTALL
)
_REASON_CLAUSE = re.compile(r"(?i),?\s+(?:because|since|which|where)\b|,\s+as\b|(?<=\$)\s+(?=[a-z]{3})(?!and\b)")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_EMPHASIS = re.compile(r"^[\s*_`]+|[\s*_`]+$")
_DENIAL_WINDOW = 400  # characters behind a box in which it may be denied
_MAX_UNBOXED_LENGTH = 2000  # characters of a final answer without a box


def extract_final_answer(completion: str) -> ExtractedAnswer:
    """Return the final answer of a completion.

    The last complete box outside the thinking counts. Boxes joined by a comma, "and" or "or" are one answer. A box that the
    sentence denies ("the answer is not") does not count, and a box that is cut off makes the completion unparsable. Without a
    box, the answer is the text after `####`, in `<answer>` or after "the answer is", the formula of a last line that ends in
    "is $...$", or a completion of one short line.
    """
    if not completion.strip():
        return ExtractedAnswer(None, EMPTY_COMPLETION)
    text = _strip_thinking(completion)
    if not text.strip():
        return ExtractedAnswer(None, UNFINISHED_THINKING)
    tags = _ANSWER_TAG.findall(text) if "</answer>" in text.lower() else []
    if tags and (_BOX.search(tags[-1]) or not _BOX.search(text)):
        text = tags[-1]
        if not _BOX.search(text):
            return _clean_answer(text)
    return _extract_boxed(text) if _BOX.search(text) else _extract_unboxed(text)


def find_later_answer(completion: str) -> str | None:
    """Return the number, formula or letter after "the answer is" behind the last box, or None."""
    text = _strip_thinking(completion)
    boxes = list(_BOX.finditer(text))
    end = _find_box_end(text, boxes[-1].end()) if boxes else None
    if end is None or len(text) - end > _MAX_UNBOXED_LENGTH:
        return None
    for phrase in reversed(list(_ANSWER_PHRASE.finditer(text, end))):
        clause = _extract_clause(text, phrase.end())
        sentence = re.split(r"[.;!?\n]\s*", text[end : phrase.end()])[-1]
        is_doubtful = re.search(rf"(?i)\bif\b|\bwould\b|\b(?:to|of|for)\b|\byour?\b|{_NEGATION}", sentence)
        if is_doubtful or not re.match(
            r"[\s*$(\\\[]*(?:[-+−]?[\d.√]|[-+]?\\(?:frac|sqrt|pi)|[A-Z]\b(?!\s+[a-z]))", clause
        ):
            continue
        return _clean_answer(clause).text
    return None


def _strip_thinking(text: str) -> str:
    for opening, closing in _THINKING_TAGS:
        lower = text.lower() if len(text.lower()) == len(text) else text
        if (end := lower.rfind(closing.lower())) >= 0:  # the opening tag may be part of the prompt
            before, text = lower[:end], text[end + len(closing) :]
            start = lower.find(opening.lower(), end)
            if opening.lower() not in before and start >= 0:
                text = text[: start - end - len(closing)]
        elif (start := lower.find(opening.lower())) >= 0:
            return text[:start] if opening != "<|channel|>analysis" else ""
    return text


def _extract_boxed(text: str) -> ExtractedAnswer:
    boxes, position = [], 0
    while match := _BOX.search(text, position):
        start, end = match.end(), _find_box_end(text, match.end())
        if end is None:
            return ExtractedAnswer(None, UNCLOSED_BOX)
        inner = text[start + 1 : end - 1] if text[start] in "{" else text[start:end]
        boxes.append((match.start(), end, inner.strip()))
        position = end
    accepted: list[tuple[int, int, str]] = []
    denied = set()
    for start, end, inner in boxes:
        before = text[max(0, start - 120) : start]
        if (
            _DENIED_BEFORE.search(before)
            or _MISTAKEN_BEFORE.search(before)
            or _DENIED_AFTER.match(text, end, end + _DENIAL_WINDOW)
        ):
            denied.add(inner)
        else:
            accepted.append((start, end, inner))
    if (
        not accepted
        or accepted[-1][2] in denied
        or _DISREGARD_PHRASE.match(text, accepted[-1][1], accepted[-1][1] + _DENIAL_WINDOW)
        or _RETRACTION.search(text, accepted[-1][1])
    ):
        return ExtractedAnswer(None, RETRACTED)
    start, _, inner = accepted.pop()
    answers = [_unwrap_nested_boxes(inner)]
    while accepted and _BOX_SEPARATOR.fullmatch(text, accepted[-1][1], start):
        start, _, inner = accepted.pop()
        answers.insert(0, _unwrap_nested_boxes(inner))
    answers = list(dict.fromkeys(answers))
    if len(answers) == 1 and re.fullmatch(r"-?\d+(?:\.\d+)?", answers[0]):
        replacements = _REPLACEMENT_AFTER.findall(text, boxes[-1][1], boxes[-1][1] + _DENIAL_WINDOW)
        if replacements and replacements[-1] != answers[0]:
            return ExtractedAnswer(None, RETRACTED)
    if _is_undecided(text, start, accepted, boxes[-1][1], answers):
        return ExtractedAnswer(None, SEVERAL_ANSWERS)
    return ExtractedAnswer(", ".join(answers)) if any(answers) else ExtractedAnswer(None, EMPTY_BOX)


def _is_undecided(text: str, start: int, earlier: list[tuple[int, int, str]], end: int, answers: list[str]) -> bool:
    """Return whether the sentence of the final box offers another answer."""
    before = text[max(0, start - 120) : start]
    if _OPEN_BEFORE.search(before) or _OPEN_AFTER.match(text, end, end + _DENIAL_WINDOW):
        return True
    before = re.sub(r"</?[\w|]*>", "", before)
    if _PART_BEFORE.search(before) or _PART_AFTER.match(text, end):
        return True
    if _SIGN_BEFORE.search(before) and _is_in_formula(text, start):
        return True
    if _ALTERNATIVE_AFTER.match(text, end, end + _DENIAL_WINDOW) or _SECOND_POSSIBILITY.match(
        text, end, end + _DENIAL_WINDOW
    ):
        return True
    if not earlier or _unwrap_nested_boxes(earlier[-1][2]) in answers:
        return False
    between = text[earlier[-1][1] : start]
    sentence_ends = re.search(r"\n\s*\n|[.!?;]\W*\s", between)
    return (
        not sentence_ends
        and bool(_UNDECIDED.search(between + text[end : end + 40].partition(".")[0]))
        and not _AGREEMENT.search(between)
    )


def _is_in_formula(text: str, position: int) -> bool:
    """Return whether a position of a text is inside a LaTeX formula."""
    is_open = len(re.findall(r"(?<!\\)\$", text[:position].replace("$$", "$"))) % 2 == 1
    return is_open or any(
        text.rfind(opening, 0, position) > text.rfind(closing, 0, position)
        for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"))
    )


def _find_box_end(text: str, start: int) -> int | None:
    """Return the end of a box's argument, or None if the argument is cut off."""
    if start >= len(text):
        return None
    if text[start] != "{":  # \boxed 5
        token = re.compile(r"-?\d+(?:\.\d+)?|\\?[a-zA-Z]+|\S").match(text, start)
        return token.end() if token else None
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _unwrap_nested_boxes(inner: str) -> str:
    for _ in range(3):
        match = _BOX.search(inner)
        if match is None or (end := _find_box_end(inner, match.end())) is None:
            break
        content = inner[match.end() + 1 : end - 1] if inner[match.end()] == "{" else inner[match.end() : end]
        inner = f"{inner[: match.start()]}{content}{inner[end:]}".strip()
    return inner


def _extract_unboxed(text: str) -> ExtractedAnswer:
    if hashes := _HASHES.findall(text):
        return _clean_answer(hashes[-1])
    if phrases := list(_ANSWER_PHRASE.finditer(text)):
        last = phrases[-1]
        clause = _extract_clause(text, last.end())
        sentence = text[max(0, last.start() - 60) : last.end()].rpartition("\n")[2]
        if re.search(rf"(?i){_NEGATION}", re.split(r"[.;!?]\s", sentence)[-1]) or re.match(
            rf"(?i)\s*{_NEGATION}", clause
        ):
            return ExtractedAnswer(None, RETRACTED)
        end = text.find(clause, last.end()) + len(clause)
        if (
            _DENIED_AFTER.match(text, end, end + _DENIAL_WINDOW)
            or re.match(r"[\s$*)]*\?", text[end : end + _DENIAL_WINDOW])
            or _SUPPOSITION.search(re.split(r"[.;!?]\s", sentence)[-1])
            or ("would" in last[0] and re.match(r"[\s$.]*(?:But|However|Yet)\b", text[end : end + _DENIAL_WINDOW]))
            or _DISREGARD_PHRASE.match(text, end, end + _DENIAL_WINDOW)
            or _RETRACTION.search(text, last.end())
        ):
            return ExtractedAnswer(None, RETRACTED)
        return _clean_answer(clause)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if len(lines) == 1 and len(text) <= _MAX_UNBOXED_LENGTH:
        formula = _LAST_FORMULA.search(text)
        if formula is None and len(_WORDS.findall(text)) <= 8 and not re.search(rf"(?i){_NEGATION}", text):
            return _clean_answer(text)
    formula = _LAST_FORMULA.search(lines[-1][-_MAX_UNBOXED_LENGTH:])
    if formula and not re.search(rf"(?i){_NEGATION}", lines[-1][: formula.start()]):
        return _clean_answer(next(filter(None, formula.groups())))
    return ExtractedAnswer(None, NO_ANSWER)


def _extract_clause(text: str, start: int) -> str:
    """Return the formula or the words at a position behind "the answer is"."""
    rest = text[start:].lstrip(" \n*_:")
    end = _SENTENCE_END.search(rest)
    formula = _FORMULA.match(rest)
    clause = next(filter(None, formula.groups())) if formula else rest[: end.start()] if end else rest
    return _REASON_CLAUSE.split(clause)[0]


def _clean_answer(text: str) -> ExtractedAnswer:
    text = _EMPHASIS.sub("", text if len(text) <= _MAX_UNBOXED_LENGTH else "").removesuffix("=").rstrip()
    return ExtractedAnswer(text) if text else ExtractedAnswer(None, NO_ANSWER)
