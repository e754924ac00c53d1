"""What the tests of pages share."""

import time

import pytest

in_every_look = pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1280, False), ("dark", 1280, True), ("phone", 390, False)]
)
PATIENCE = 20.0  # seconds


def wait_until(page, expression):
    """Until the expression holds in the page, whose policy forbids `eval`, by which Playwright's `wait_for_function` asks again."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never came true: {expression}"
        time.sleep(0.05)
