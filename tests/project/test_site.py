"""Check the documentation site: it builds without a warning, is complete, and works in Chromium."""

import dataclasses
import html
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import bupo
from bupo.cli.help import COMMANDS, get_option_classes
from bupo.training.model_card import CITATION
from tests.helpers.trl_table import ARGUMENTS, OPTIONS

pytestmark = pytest.mark.external
ROOT = Path(__file__).resolve().parents[2]
KINDS = [
    "index.html", "start.html", "concepts.html", "howto/layer.html", "analysis.html", "notebooks/layers.html",
    "notebooks/training.html", "notebooks/one-file.html", "reference/python.html", "reference/train.html",
    "reference/trl_options.html", "results.html", "results_when.html", "results_appendix.html", "paper.html", "faults.html",
    "claims.html", "changelog.html",
]  # fmt: skip
LOOKS = {"light": (1280, False), "dark": (1280, True), "narrow": (390, False)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with the site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0 and not built.stderr.strip(), built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Serve the site on this machine and yield its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Links(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.links += [attrs[name] for name in ("href", "src") if attrs.get(name) and tag in ("a", "img", "script")]


def test_every_link_leads_somewhere(site):
    """Check files and anchors in the built pages."""
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 35
    for page, found in pages.items():
        for link in found.links:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:", target):
                continue
            path = Path(os.path.normpath(page.parent / target)) if target else page
            path = path / "index.html" if path.is_dir() else path
            assert path.exists(), f"{page.name}: {link}"
            assert not anchor or anchor.startswith("__") or anchor in pages[path].anchors, f"{page.name}: {link}"


def test_every_public_name_has_an_entry_with_its_text(site):
    page = (site / "reference" / "python.html").read_text()
    for name in set(bupo.__all__) - {"__version__"}:
        start = page.find(f'id="bupo.{name}"')
        assert start > 0, name
        text = html.unescape(re.sub(r"<[^>]+>|\s", "", page[start : start + 20_000]))
        first = (getattr(bupo, name).__doc__ or "").strip().split("\n")[0].split("[`")[0][:40]
        assert first and re.sub(r"[`\s]", "", first) in text, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_row(site, command):
    page = (site / "reference" / f"{command}.html").read_text()
    for each in get_option_classes(command):
        for field in dataclasses.fields(each):
            if field.init:
                assert page.count(f"<code>--{field.name}</code>") >= 1, field.name


def test_every_trl_option_has_a_row(site):
    page = (site / "reference" / "trl_options.html").read_text()
    for name in (*OPTIONS, *ARGUMENTS):
        assert f"<code>{name}</code>" in page, name


def test_the_citation_is_that_of_a_models_card():
    assert CITATION in (ROOT / "docs" / "cite.md").read_text()


@pytest.mark.parametrize("look", LOOKS)
def test_pages_have_no_errors(browser, address, shoot, look):
    """Check for errors, requests to other hosts, and content wider than the window."""
    width, dark = LOOKS[look]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    for kind in KINDS:
        page.goto(f"{address}/{kind}")
        page.wait_for_load_state("networkidle")
        assert wrong == [], kind
        assert page.evaluate("document.documentElement.scrollWidth") <= width, kind
        scheme = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
        assert scheme == ("slate" if dark else "default"), kind
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert broken == [], kind
        shoot(page, f"site-{look}-{kind.replace('/', '-').removesuffix('.html')}")
    page.close()


def test_search_finds_an_option_and_a_concept(browser, address):
    page = browser.new_page()
    for word, target in {"internal_fade_batches": "reference/train.html", "boundary layer": "analysis.html"}.items():
        page.goto(f"{address}/index.html")
        page.fill("input.md-search__input", word)
        page.wait_for_selector(".md-search-result__link", timeout=120_000)  # the index is large, a busy machine slow
        page.wait_for_timeout(500)
        found = [
            urljoin(page.url, link.get_attribute("href")) for link in page.query_selector_all(".md-search-result__link")
        ]
        assert any(target in link for link in found), (word, found)
    page.close()
