"""Links of the docs' site from references in docstrings, written like transformers' (``[`~bupo.BuPOTrainer`]``)."""

import re

from griffe import Extension, Object

import bupo

PARAMETER = re.compile(r"^(\s+[\w, ]+ \()(.*?)(\):)", re.M)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?:\(\w+\.py\))?")


def linked(text: str) -> str:
    """Return a docstring with links for references to public names, and code for references to other names.

    Types of parameters lose their marks, because they are shown as code anyway.
    """

    def link(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][bupo.{name}]" if name in bupo.__all__ else f"`{name}`"

    def strip_marks(match: re.Match) -> str:
        kind = re.sub(r"\[`~?([\w.]+)`\]", r"\1", match[2])
        return match[1] + kind.replace("`", "").replace("*optional*", "optional") + match[3]

    return REFERENCE.sub(link, PARAMETER.sub(strip_marks, text))


class CrossReferences(Extension):
    """Extension of griffe that links references in docstrings."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = linked(obj.docstring.value)
