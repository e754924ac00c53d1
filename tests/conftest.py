"""Shared fixtures: no network, and a headless Chromium that fails on any error or request of a page."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("bupo", deadline=None)  # an example's duration depends on the machine
settings.load_profile("bupo")
os.environ["HF_HUB_OFFLINE"] = "1"  # before the first test file imports huggingface_hub, which reads it once
SCREENSHOTS = os.environ.get("BUPO_SCREENSHOTS")  # folder for screenshots


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_file(browser):
    """Return a function that opens a file and waits for a selector; fail on an error or a request of the page."""
    errors, requests = [], []

    def open_page(path, ready, width=1280, height=900, dark=False):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector(ready)
        return page

    yield open_page
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []


@pytest.fixture
def shoot():
    """Return a function that saves a screenshot of a page if `BUPO_SCREENSHOTS` is set."""

    def save(page, name):
        if SCREENSHOTS:
            page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), full_page=True)

    return save


# -- tests that were not selected

TIERS = {
    "slow": "make test-slow",
    "faults": "make test-faults",
    "external": "make test-models, test-browser, test-docs, test-vllm, test-deepspeed",
}
_deselected: Counter[str] = Counter()


def pytest_deselected(items):
    for item in items:
        _deselected.update(next(([tier] for tier in TIERS if item.get_closest_marker(tier)), ["other"]))


def pytest_sessionfinish(session):
    if hasattr(
        session.config, "workeroutput"
    ):  # a process of pytest-xdist, whose deselected tests the main one does not see
        session.config.workeroutput["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _deselected.clear()  # each process has deselected the same tests
    _deselected.update(getattr(node, "workeroutput", {}).get("deselected", {}))


def pytest_terminal_summary(terminalreporter):
    for tier, command in TIERS.items():
        if _deselected[tier]:
            terminalreporter.write_line(f"not selected: {_deselected[tier]} {tier} tests ({command})")
