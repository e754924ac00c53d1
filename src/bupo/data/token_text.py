"""Readable texts of tokens: complete characters unchanged, other bytes as `<E7>`, white space as a visible symbol.

A tokenizer's `decode` returns the same replacement character for every token that is not a complete character, and drops the
space before a word. Tokens are therefore shown by their bytes, and compared by their ids.
"""

import codecs
import json
import re
import unicodedata
from contextlib import suppress
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

WHITESPACE_SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# characters without a glyph that `str.isprintable` accepts: variation selectors, fillers, the empty braille pattern
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
    """Return the readable text of a token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        token (`int`): token id. An unknown id is shown as a number.
    """
    text = get_token_bytes(tokenizer, token).decode("utf-8", errors="bupo_bytes")
    return "".join(_make_visible(character) for character in text) or f"⟨{token}⟩"


def get_token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes of a token inside a text; empty if the tokenizer does not know the id."""
    if added := tokenizer.added_tokens_decoder.get(token):
        return _encode(added.content)
    piece: Any = None
    with suppress(IndexError, KeyError, OverflowError):  # an unknown id
        piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return piece if isinstance(piece, bytes) else b""
    decoder_types, space_symbols = _get_decoders(tokenizer)
    if "ByteLevel" in decoder_types or (decoder_types == ("",) and "\ufffd" in tokenizer.decode([token])):
        alphabet = get_byte_alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(match[1])
    for symbol in space_symbols:
        piece = piece.replace(symbol, " ")
    return _encode(piece)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _get_decoders(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the types of a tokenizer's decoders, `("",)` if they are unknown, and its symbols for a space."""
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
    """Return the byte of each character of byte-level BPE: printable bytes map to themselves, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _make_visible(character: str) -> str:
    if character in WHITESPACE_SYMBOLS:
        return WHITESPACE_SYMBOLS[character]
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
