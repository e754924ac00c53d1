"""Tokens as people read them: whole characters unchanged, bytes of others as `<E7>`, white space as a sign.

A tokenizer's `decode` gives one sign for every token that is not a whole character, and drops the space before a word.
Tokens are therefore shown by their bytes, and compared by their ids only.
"""

import codecs
import json
import re
import unicodedata
from contextlib import suppress
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

WHITESPACE_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# characters without a glyph that Python takes for printable: variation selectors, fillers, the empty braille pattern
INVISIBLE_CODE_POINTS = {
    *range(0xFE00, 0xFE10),
    *range(0xE0100, 0xE01F0),
    0x034F,
    0x115F,
    0x1160,
    0x2800,
    0x3164,
    0xFFA0,
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def format_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return how a token is shown.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        token (`int`): an id; one that the tokenizer does not know is shown as a number.
    """
    text = get_token_bytes(tokenizer, token).decode("utf-8", errors="bupo_bytes")
    return "".join(_make_visible(character) for character in text) or f"⟨{token}⟩"


def get_token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes that a token adds in the middle of a text, none if the tokenizer does not know it."""
    if added := tokenizer.added_tokens_decoder.get(token):
        return _encode(added.content)
    piece: Any = None
    with suppress(IndexError, KeyError, OverflowError):  # an id that there is not
        piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return piece if isinstance(piece, bytes) else b""
    kinds, signs = _get_decoders(tokenizer)
    if "ByteLevel" in kinds or (kinds == ("",) and "\ufffd" in tokenizer.decode([token])):
        alphabet = get_byte_alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(found[1])
    for sign in signs:
        piece = piece.replace(sign, " ")
    return _encode(piece)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _get_decoders(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the kinds of a tokenizer's decoders, `("",)` where they are not known, and the signs that it has for a space."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return ("",), ("▁",)
    state = json.loads(decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    replaced = [part["pattern"] for part in parts if part["type"] == "Replace" and part["content"] == " "]
    spaces += [pattern["String"] for pattern in replaced if "String" in pattern]
    return tuple(part["type"] for part in parts), tuple(spaces)


@cache
def get_byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE: printable bytes are themselves, the others follow from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _make_visible(character: str) -> str:
    if character in WHITESPACE_SIGNS:
        return WHITESPACE_SIGNS[character]
    if (
        character.isprintable()
        and unicodedata.category(character) != "Zs"
        and ord(character) not in INVISIBLE_CODE_POINTS
    ):
        return character
    return f"<U+{ord(character):04X}>"


def _format_undecodable_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("bupo_bytes", _format_undecodable_bytes)
