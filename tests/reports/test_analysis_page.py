"""The report in a headless Chromium: no error, no request, every control works, light and dark, wide and narrow."""

import csv
import json
from functools import partial

import pytest

from bupo.cli.main import main
from tests.helpers.pages import in_every_look, wait_until

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    hostile = folder / "hostile.jsonl"
    rows = [
        {"prompt": f"<b>{i}</b>+11-12 </script><script>alert(1)</script>", "completion": f"<i>&\\boxed{{{i}}}</i>"}
        for i in range(10)
    ]
    hostile.write_text("\n".join(json.dumps(row) for row in rows))
    assert (
        main(
            ["analyze", "--model", "embedded", "embedded", "--rollouts", str(hostile), "--output", str(folder / "out")]
        )
        == 0
    )
    return folder / "out"


@pytest.fixture
def opened(open_file, folder):
    """Opens the page at a size."""
    return partial(open_file, folder / "report.html", "#curve .main-svg")


def test_size(folder):
    assert (folder / "report.html").stat().st_size < 8 << 20


@in_every_look
def test_opens_without_errors(opened, shoot, name, width, dark):
    page = opened(width, dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    page.locator("#cells td").first.click()
    page.wait_for_timeout(400)
    shoot(page, name)


def test_what_the_model_wrote_is_text(opened):
    page = opened()
    assert "</script><script>alert(1)" in page.locator("#prompt").inner_text()
    assert page.locator("#cells i").count() == 0


def test_every_control(opened, tmp_path):
    page = opened()
    for key in page.locator("#measure option").evaluate_all("options => options.map(o => o.value)"):
        page.select_option("#measure", key)
        title = page.locator("#curve .ytitle").text_content()
        assert title == page.evaluate(f"data.names['{key}']")
    labels = page.evaluate("data.models.map(m => m.meta.label)")
    assert labels == ["1-embedded", "2-embedded"]
    for control in ("#flowmodel", "#simmodel", "#viewmodel"):
        page.select_option(control, labels[1])
    answers = page.locator("#answer option").count()
    assert answers == 6
    page.select_option("#answer", str(answers - 1))
    assert "<b>5</b>" in page.locator("#prompt").inner_text()
    for shade in ("entropy", "chosen", "top"):
        page.select_option("#shade", shade)
        text = page.locator('#cells td[data-layer="3"][data-token="2"]').inner_text()
        view = page.evaluate(f"data.views['2-embedded'][{answers - 1}]")
        wanted = view["top"][3][2][0][0] if shade == "top" else f"{view[shade][3][2]:.2f}"
        assert text.strip() == wanted.strip()
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "layers.csv")
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == 2 * 15 * 8 and {row["model"] for row in rows} == set(labels)


def test_cells_by_keyboard(opened):
    page = opened()
    page.locator("#shade").focus()
    page.keyboard.press("Tab")  # the prompt
    page.keyboard.press("Tab")  # the one cell that can be reached
    page.keyboard.press("Enter")
    assert "layer 8, token 1" in page.locator("#cell").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "layer 7, token 2" in page.locator("#cell").inner_text()
    assert page.locator("#cell .bar").count() == 5
    assert page.evaluate("document.activeElement.tagName") == "TD"


def test_hover_shows_value_and_interval(opened):
    page = opened()
    page.locator("#curve").scroll_into_view_if_needed()
    box = page.locator("#curve .nsewdrag").bounding_box()
    for step in range(15):  # the page listens to a moving mouse, a few times a second
        page.mouse.move(box["x"] + box["width"] / 2 + 4 * step, box["y"] + box["height"] / 2 + step)
        page.wait_for_timeout(60)
    wait_until(page, "document.querySelector('#curve .hoverlayer').textContent.includes('sd')")
    assert "[" in page.locator("#curve .hoverlayer").text_content()
