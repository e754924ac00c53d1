"""Prompts in TRL's formats: plain text, or a list of messages with all their fields."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bupo.utils.errors import UserError

# a serialized conversation has an optional quote, a bracket, and keys of messages in quotes, which may be escaped. Python
# prints objects as `role='user'`, bytes with a b before the quote, and NumPy arrays as `array([...], dtype=object)`
_INVISIBLE_CHARACTERS = "\ufeff\u200b\u2060"  # byte order mark and characters without width
# possessive quantifiers: a prompt of a million spaces is scanned once
_OPENING_BRACKET = re.compile(
    rf"""[\s{_INVISIBLE_CHARACTERS}]*+(?:array\()?b?["']?[\s{_INVISIBLE_CHARACTERS}]*+(\[|\{{)"""
)
_CLOSING_BRACKET = re.compile(
    rf"""[\]\}}](?:\s*,\s*dtype=object)?\)?[\s{_INVISIBLE_CHARACTERS}]*["']*[\s{_INVISIBLE_CHARACTERS}]*$"""
)
_MESSAGE_KEYS = tuple(
    re.compile(rf"""\\*["']{key}\\*["']\s*:|\b{key}=["']""") for key in ("role", "content", "from", "value")
)
_TEXT_PART = re.compile(r"""\\*["']type\\*["']\s*:\s*\\*["'](input_)?text\\*["']""")  # in the content of a message


def is_serialized_messages(prompt: str) -> bool:
    """Return whether a text is a list of messages, serialized as JSON or printed by Python, instead of a prompt in words."""
    if not _OPENING_BRACKET.match(prompt):
        return False
    role, content, sender, value = (key.search(prompt) is not None for key in _MESSAGE_KEYS)
    closed = _CLOSING_BRACKET.search(prompt.rstrip()[-100:]) is not None
    return closed and ((role and content) or (sender and value) or _TEXT_PART.search(prompt) is not None)


def check_not_serialized(prompt: Any, name: str, row: int) -> None:
    """Refuse a prompt that is a serialized list of messages.

    Raises:
        UserError: with the row and the remedy.
    """
    if isinstance(prompt, str) and is_serialized_messages(prompt):
        raise UserError(
            f"{name}, row {row}: the prompt is messages written as text, {prompt!r:.80}: store them as a list of messages "
            "(json.loads of the text), or the question alone as plain text"
        )


def get_message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be text, a list of parts, or nothing."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    return content or ""


def normalize_messages(
    prompt: Any, system_prompt: str | None, name: str, row: int, has_padding: bool = False
) -> list[dict]:
    """Return a prompt as messages with all their fields.

    A message without `content`, such as a tool call, gets an empty one, since TRL reads the content of every message.

    Args:
        prompt (`str` or `list[dict]`): prompt of the source.
        system_prompt (`str`, *optional*): system message for messages that do not begin with one.
        name (`str`), row (`int`): location of the prompt, for the error.
        has_padding (`bool`, *optional*, defaults to `False`): the source gives all messages the same fields, and fills missing
            ones with None. Remove these.

    Raises:
        UserError: if the prompt is invalid, empty or a serialized list of messages.
    """
    check_not_serialized(prompt, name, row)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not messages or not all(map(_is_message, messages)):
        raise _make_prompt_error(prompt, name, row)
    messages = [_drop_none(message) if has_padding else dict(message) for message in messages]
    for message in messages:
        if message.get("content") is None:
            message["content"] = ""
    last = messages[-1]
    if not (get_message_text(last).strip() or last.get("tool_calls") or _has_non_text_parts(last)):
        raise _make_prompt_error(prompt, name, row)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _make_prompt_error(prompt: Any, name: str, row: int) -> UserError:
    return UserError(f"{name}, row {row}: the prompt is no text and no list of messages, or is empty: {prompt!r:.80}")


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    has_parts = isinstance(content, list) and all(isinstance(part, Mapping | str) for part in content)
    return isinstance(content, str) or has_parts or (content is None and bool(message.get("tool_calls")))


def _has_non_text_parts(message: Mapping[str, Any]) -> bool:
    """Return whether a message holds other content than text, such as an image."""
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(part, Mapping) and "text" not in part for part in content)


def _drop_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_drop_none(inner) for inner in value]
    return value
