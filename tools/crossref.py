"""Docstrings' references, written as transformers writes them (``[`~bupo.BuPOTrainer`]``), as links of the docs' site."""

import re

from griffe import Extension, Object

import bupo

PARAMETER = re.compile(r"^(\s+[\w, ]+ \()(.*?)(\):)", re.M)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?:\(\w+\.py\))?")


def linked(text: str) -> str:
    """A docstring whose references to public names are links to their entries, and others names in code.

    Types of parameters are shown as code anyway, and lose their marks.
    """

    def one(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][bupo.{name}]" if name in bupo.__all__ else f"`{name}`"

    def bare(match: re.Match) -> str:
        kind = re.sub(r"\[`~?([\w.]+)`\]", r"\1", match[2])
        return match[1] + kind.replace("`", "").replace("*optional*", "optional") + match[3]

    return REFERENCE.sub(one, PARAMETER.sub(bare, text))


class CrossReferences(Extension):
    """For griffe, which reads the docstrings."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = linked(obj.docstring.value)
