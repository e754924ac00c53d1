"""No test asks the network. A headless Chromium for the pages, and what must hold of every page: no error, no request."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("bupo", deadline=None)  # an example's time is the machine's
settings.load_profile("bupo")
os.environ["HF_HUB_OFFLINE"] = "1"  # before the first test file imports huggingface_hub, which reads it once
SCREENSHOTS = os.environ.get("BUPO_SCREENSHOTS")  # a folder that keeps them, to be looked at


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
    """Opens a file at a size and waits for a selector; afterwards there must have been no error and no request."""
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
    """Keeps a picture of a page, where they are wanted."""

    def keep(page, name):
        if SCREENSHOTS:
            page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), full_page=True)

    return keep
