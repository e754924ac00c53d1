"""Styles and scripts of the pages: they may stand inside the page, and each rule of a style has something to style."""

import re

import pytest

from bupo.reports.figures.analysis import STAGE_COLOURS
from bupo.reports.html import STATIC_DIR, escape_inline
from bupo.reports.samples_page import VERDICT_NAMES

PAGES = ["page", "samples", "runs"]
SHARED = ["base", "plots", "over"]  # scripts of several pages


def style_of(page):
    return "".join((STATIC_DIR / f"{name}.css").read_text(encoding="utf-8") for name in ("base", page))


def source_of(page):
    """The page's template and scripts."""
    template = STATIC_DIR.parent / f"{page}.html.jinja"
    shared = [name for name in SHARED if f'static("{name}.js")' in template.read_text(encoding="utf-8")]
    paths = [*(STATIC_DIR / f"{name}.js" for name in (*shared, page)), template]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('x = "</script>";', r'x = "<\/script>";'),
        ('x = "</SCRIPT >";', r'x = "<\/SCRIPT >";'),
        ('a::after { content: "</style>"; }', r'a::after { content: "<\/style>"; }'),
        ('x = "<!--<script>";', r'x = "\x3c!--<script>";'),
        ("a < b && c</d/.exec(e)", "a < b && c</d/.exec(e)"),
    ],
)
def test_what_would_end_the_element_is_spelled_otherwise(text, wanted):
    assert escape_inline(text) == wanted


@pytest.mark.parametrize("path", sorted(STATIC_DIR.iterdir()), ids=lambda path: path.name)
def test_ours_stand_in_a_page_as_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert escape_inline(text) == text and path.suffix in (".css", ".js")


@pytest.mark.parametrize("page", PAGES)
def test_every_rule_styles_something(page):
    style = style_of(page)
    assert style.count("{") == style.count("}")
    selectors = re.sub(r"\{[^{}]*\}", "{}", style)
    names = set(re.findall(r"[.#]([a-z_]\w*)", selectors)) - {*VERDICT_NAMES, *STAGE_COLOURS}
    assert len(names) > 8
    shared = (STATIC_DIR / "base.css").read_text(encoding="utf-8")  # of which a page may use a part
    sources = {name: "".join(map(source_of, PAGES)) if f".{name} " in shared else source_of(page) for name in names}
    assert {name for name, source in sources.items() if not re.search(rf"\b{name}\b", source)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_is_defined(page):
    style = style_of(page)
    used = set(re.findall(r"var\((--\w+)\)", style)) | set(re.findall(r'css\("(--\w+)"\)', source_of(page)))
    light, dark = (re.findall(rf"{root} {{([^}}]*)}}", style) for root in (":root", r'\[data-theme="dark"\]'))
    for theme in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", "".join(theme)))


def test_every_verdict_has_its_colour():
    for verdict in VERDICT_NAMES:
        assert f".{verdict} {{ --tone: var(--{verdict}); }}" in style_of("samples")
