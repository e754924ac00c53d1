"""Waiting for a page whose policy forbids `eval`, by which Playwright's own `wait_for_function` asks again and again."""

import time

PATIENCE = 20.0  # seconds


def wait_until(page, expression):
    """Until the expression holds in the page."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never came true: {expression}"
        time.sleep(0.05)
