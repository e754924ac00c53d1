"""The sample browser: what it holds and how large it is; and in a headless Chromium, that every control does its work."""

import json
import random
import re
from functools import partial

import pandas as pd
import pytest

from bupo.evaluation.answers import summarize
from bupo.reports.evaluation_scores import VERDICT_COLUMNS, build_score_rows
from bupo.reports.html import dump_script_json
from bupo.reports.samples_page import MAX_PAGE_BYTES, MIN_TEXT_LENGTH, VERDICT_NAMES, shorten_text, write_samples_page
from tests.helpers.pages import in_every_look, wait_until

HOSTILE = (
    "<b>bold</b> </script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> \u2028\u2029 {{ 1 }} $& \x00"
)
META = {
    "model": "org/model <i>7B</i>",
    "layer": None,
    "lens": "raw",
    "template": "its own",
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 64,
    "seed": 3,
    "engine": "transformers",
    "versions": {"bupo": "0.1.0"},
}


def answers(problems, k, text=lambda problem, sample: f"We find \\boxed{{{problem}}}", seed=0):
    """A graded table. Of every three problems one is never solved, one always, one by half of its samples."""
    random.seed(seed)
    rows = []
    for problem in range(problems):
        for sample in range(k):
            correct = problem % 3 == 1 or (problem % 3 == 2 and sample % 2 == 0)
            verdict = "correct" if correct else random.choice(["wrong", "unparsable", "no_gold", "timeout"])
            rows.append(
                {
                    "problem": problem,
                    "sample": sample,
                    "question": f"What is {problem}?",
                    "gold": str(problem),
                    "text": text(problem, sample),
                    "verdict": verdict,
                    "value": None if verdict in ("unparsable", "timeout") else str(problem if correct else sample + 99),
                    "tokens": 10 + sample,
                    "truncated": sample % 4 == 3,
                    "strict": "unevaluated" if correct and sample % 3 == 1 else verdict,
                    "reason": "unclosed box" if verdict == "unparsable" else None,
                    "answer_class": 0 if correct else sample + 1,
                }
            )
    return pd.DataFrame(rows)


def write(path, tables, prompts=None):
    summary = {"meta": META, "benchmarks": {label: summarize(table) for label, table in tables.items()}}
    write_samples_page(tables, summary, prompts or dict.fromkeys(tables, "user: What is 0?"), path)
    return path


def data_of(path):
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(found[1])


# -- what the page holds


def test_the_table_comes_back(tmp_path):
    table = answers(9, 4, text=lambda problem, sample: f"{problem} {sample} {HOSTILE} é 数")
    table.loc[0, "value"] = float("nan")  # as pandas writes None now and then
    data = data_of(write(tmp_path / "report.html", {"one": table, "two": table}, {"one": HOSTILE, "two": "b"}))
    assert data["prompts"] == {"one": HOSTILE, "two": "b"}
    for label in ("one", "two"):
        rows = [
            [p["problem"], p["question"], p["gold"], *answer]
            for p in data["problems"]
            if p["benchmark"] == label
            for answer in p["answers"]
        ]
        columns = ["problem", "question", "gold", "sample", "verdict", "value", "tokens", "truncated", "text", "strict"]
        columns += ["reason", "answer_class"]
        found = pd.DataFrame(rows, columns=columns)[list(table.columns)]
        assert found["value"].isna().tolist() == table["value"].isna().tolist()
        assert found.fillna("").equals(table.fillna(""))


def test_the_page_is_written_in_one_piece(tmp_path):
    path = write(tmp_path / "report.html", {"one": answers(3, 2)})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "a", "abcde" * 7, HOSTILE])
@pytest.mark.parametrize("limit", [1, 2, 7, 34, 1000])
def test_shortened_keeps_as_much_as_it_may(text, limit):
    kept = shorten_text(text, limit)
    if isinstance(kept, str):
        assert kept == text and len(text) <= limit
    else:
        assert len(kept["head"]) + len(kept["tail"]) == limit
        assert text.startswith(kept["head"]) and text.endswith(kept["tail"])
        assert kept["left_out"] == len(text) - limit > 0


@pytest.mark.slow
@pytest.mark.parametrize("letter", ["a", "数", "<", "\n"])  # of 1, 3, 6 and 2 bytes in the page
def test_many_long_answers_fit(tmp_path, letter):
    lengths = {}

    def text(problem, sample):
        lengths[problem, sample] = 30_000 if sample else 50
        return letter * lengths[problem, sample]

    path = write(tmp_path / "report.html", {"one": answers(120, 16, text)})
    assert 0.8 * MAX_PAGE_BYTES < path.stat().st_size < MAX_PAGE_BYTES + (1 << 17)
    data = data_of(path)
    for problem in data["problems"]:
        for sample, *_, kept, _, _, _ in problem["answers"]:
            length = lengths[problem["problem"], sample]
            if sample:
                assert len(kept["head"]) + kept["left_out"] + len(kept["tail"]) == length
                assert kept["head"] and kept["tail"]
            else:
                assert kept == letter * length  # short ones are whole
    limit = len(kept["head"]) + len(kept["tail"])
    assert f"1,800 of 1,920 answers are longer than {limit:,} characters" in " ".join(path.read_text().split())


def test_more_answers_than_the_budget_holds_keep_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr("bupo.reports.samples_page.MAX_PAGE_BYTES", 1000)
    data = data_of(write(tmp_path / "report.html", {"one": answers(3, 4, lambda problem, sample: "x" * 500)}))
    kept = data["problems"][0]["answers"][0][-4]
    assert len(kept["head"]) + len(kept["tail"]) == MIN_TEXT_LENGTH and kept["left_out"] == 500 - MIN_TEXT_LENGTH


def test_what_a_script_element_may_not_hold_is_escaped():
    text = dump_script_json({"text": HOSTILE, "none": float("nan")})
    assert "<" not in text and "\u2028" not in text and "\u2029" not in text
    assert json.loads(text) == {"text": HOSTILE, "none": None}


def test_numbers_and_meta_are_in_the_page(tmp_path):
    table = answers(9, 4)
    numbers = summarize(table) | {"difference": 0.031, "difference_interval": (0.004, 0.058)}
    summary = {"meta": META | {"layer": 6}, "benchmarks": {"one": numbers}, "compared_with": "runs/before"}
    write_samples_page({"one": table}, summary, {"one": "a"}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "org/model &lt;i&gt;7B&lt;/i&gt;, layer 6" in page and "of layer 6, raw lens" in page
    (row,) = build_score_rows(summary)
    assert row["difference [95 %]"] == "3.1 [0.4, 5.8]" and ">runs/before<" in page
    for name in set(row) - set(VERDICT_COLUMNS):
        assert f">{name}<" in page and f">{row[name]}<" in page


# -- in the browser


@pytest.fixture(scope="module")
def tables():
    def text(problem, sample):
        if (problem, sample) == (1, 2):
            return HOSTILE
        if (problem, sample) == (2, 0):
            return "head " * 1000 + "the rare needle" + " tail" * 1000
        return f"{problem} and {sample} make \\boxed{{{problem + sample}}}" + " truly" * (problem % 4)

    long = answers(60, 8, text, seed=1)
    long.loc[long["problem"] == 4, "question"] = f"What of {HOSTILE}?"
    return {"short": answers(12, 8), "a <b>label</b>": long}


@pytest.fixture(scope="module")
def path(tables, tmp_path_factory):
    prompts = {"short": "<|im_start|>user\nWhat is 0?<|im_end|>", "a <b>label</b>": HOSTILE}
    return write(tmp_path_factory.mktemp("samples") / "report.html", tables, prompts)


@pytest.fixture
def opened(open_file, path):
    """Opens the page at a size."""
    return partial(open_file, path, ".answer")


def everything(tables):
    return pd.concat([table.assign(benchmark=label) for label, table in tables.items()], ignore_index=True)


def counted(page):
    """Problems and answers that pass the filters, by what the page says."""
    found = re.fullmatch(r"([\d,]+) of [\d,]+ problems, ([\d,]+) answers", page.locator("#count").inner_text())
    return tuple(int(number.replace(",", "")) for number in found.groups()) if found else (0, 0)


def walked(page):
    """Problems and answers that pass the filters, by opening every problem."""
    page.locator("#list").focus()
    page.keyboard.press("Home")
    answers, problems = 0, 0
    while True:
        problems, answers = problems + 1, answers + page.locator(".answer").count()
        before = page.locator("#title").inner_text()
        page.keyboard.press("ArrowDown")
        if page.locator("#title").inner_text() == before:
            return problems, answers


def expected(rows):
    return (rows.groupby(["benchmark", "problem"]).ngroups, len(rows))


@pytest.mark.external
@in_every_look
def test_opens_without_errors(opened, shoot, name, width, dark):
    page = opened(width, dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    page.click("summary")
    page.locator(".row").nth(2).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    shoot(page, f"samples-{name}")
    page.select_option("#benchmark", "a <b>label</b>")
    for _ in range(5):  # the long answer and the hostile question among them
        page.get_by_role("button", name="next").click()
        for fold in page.locator("#problem button[aria-expanded]").all():
            fold.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.external
def test_theme(opened):
    page = opened()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"


@pytest.mark.external
def test_filters(opened, tables):
    page, rows = opened(), everything(tables)
    solved = rows.assign(correct=rows["verdict"] == "correct").groupby(["benchmark", "problem"])["correct"]
    share = solved.transform("mean")
    assert counted(page) == expected(rows) == walked(page)
    filters = [
        ("#benchmark", "short", rows["benchmark"] == "short"),
        ("#verdict", "correct", rows["verdict"] == "correct"),
        ("#verdict", "unparsable", rows["verdict"] == "unparsable"),
        ("#cut", "yes", rows["truncated"]),
        ("#cut", "no", ~rows["truncated"]),
        ("#solved", "always", share == 1),
        ("#solved", "sometimes", (share > 0) & (share < 1)),
        ("#solved", "never", share == 0),
    ]
    for control, value, passes in filters:
        page.select_option(control, value)
        assert counted(page) == expected(rows[passes]), (control, value)
        assert counted(page) == walked(page)
        page.click("#reset")
        assert counted(page) == expected(rows)
    page.select_option("#benchmark", "a <b>label</b>")
    page.select_option("#verdict", "wrong")
    page.select_option("#cut", "no")
    page.select_option("#solved", "sometimes")
    together = (rows["benchmark"] != "short") & (rows["verdict"] == "wrong") & ~rows["truncated"]
    assert counted(page) == expected(rows[together & (share > 0) & (share < 1)]) == walked(page)


@pytest.mark.external
def test_filtered_problem_can_show_its_other_answers(opened):
    page = opened()
    page.select_option("#solved", "sometimes")
    page.select_option("#verdict", "correct")
    assert page.locator(".answer").count() == 4 and page.locator('.row[aria-selected="true"] .mark.other').count() == 4
    page.get_by_role("button", name="show the other 4 answers").click()
    assert page.locator(".answer").count() == 8
    page.get_by_role("button", name="show only what passes").click()
    assert page.locator(".answer").count() == 4


@pytest.mark.external
def test_search(opened, tables):
    page, rows = opened(), everything(tables)

    def search(text):
        page.fill("#search", text)
        page.wait_for_timeout(300)
        return counted(page)

    for text in ("TRULY truly", "\\boxed{7", "3 and 1 make", "What is 11?", "$&"):
        found = (rows["question"] + "\0" + rows["text"]).str.contains(text, case=False, regex=False)
        assert search(text) == expected(rows[found]), text
        assert {mark.lower() for mark in page.locator("mark").all_inner_texts()} == {text.lower()}
    assert search("no such text") == (0, 0)
    assert page.locator(".answer, .row").count() == 0
    assert page.locator("#count").inner_text() == "No answer passes these filters."
    assert search("the rare needle") == (1, 1)
    assert page.locator("mark").inner_text() == "the rare needle"  # what is found is not folded


@pytest.mark.external
def test_long_answers_are_folded(opened, tables):
    page = opened()
    page.select_option("#benchmark", "a <b>label</b>")
    page.locator(".row").nth(2).click()
    answer = page.locator(".answer").first
    whole = tables["a <b>label</b>"].query("problem == 2 and sample == 0")["text"].item()
    seen = answer.locator("pre").inner_text()
    assert seen.startswith("head head") and seen.endswith("tail tail") and len(seen) < 1300
    hidden = int(re.search(r"([\d,]+) characters folded", seen)[1].replace(",", ""))
    assert hidden + 700 + 500 == len(whole)
    answer.get_by_role("button", name="show all").click()
    assert answer.locator("pre").inner_text() == whole
    answer.get_by_role("button", name="show less").click()
    assert answer.locator("pre").inner_text() == seen


@pytest.mark.external
def test_what_is_left_out_is_said(open_file, tmp_path, monkeypatch):
    monkeypatch.setattr("bupo.reports.samples_page.MAX_PAGE_BYTES", 20_000)
    path = write(tmp_path / "report.html", {"one": answers(3, 2, lambda problem, sample: "x" * 9_000)})
    kept = data_of(path)["problems"][0]["answers"][0][-4]
    page = open_file(path, ".answer")
    answer = page.locator(".answer").first
    total = len(kept["head"]) + len(kept["tail"])
    assert f"{9_000 - 700 - 500:,} characters folded" in answer.inner_text()
    answer.get_by_role("button", name="show more").click()
    assert f"{9_000 - total:,} characters left out here" in answer.inner_text()


@pytest.mark.external
def test_what_the_model_wrote_is_text(opened):
    page = opened()
    page.click("summary")
    assert HOSTILE[:60] in page.locator("#prompts").inner_text()
    page.select_option("#benchmark", "a <b>label</b>")
    page.locator(".row").nth(1).click()
    assert page.locator(".answer").nth(2).locator("pre").text_content() == HOSTILE
    page.locator(".row").nth(4).click()
    assert page.locator(".question").inner_text().startswith("What of <b>bold</b> </script><script>")
    assert page.locator("main b b, main h2 b, #prompts b, .text b, img").count() == 0
    assert page.locator("script").count() == 2


@pytest.mark.external
def test_keyboard(opened):
    page = opened()
    title = page.locator("#title")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "list":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, wanted in [
        ("ArrowDown", "short #1:"),
        ("ArrowDown", "short #2:"),
        ("ArrowUp", "short #1:"),
        ("PageDown", "short #11:"),
        ("End", "a <b>label</b> #59:"),
        ("ArrowDown", "a <b>label</b> #59:"),
        ("Home", "short #0:"),
    ]:
        page.keyboard.press(key)
        assert title.inner_text().startswith(wanted), key
        chosen = page.locator("#" + page.locator("#list").get_attribute("aria-activedescendant"))
        assert chosen.get_attribute("aria-selected") == "true"
        assert chosen.get_attribute("aria-label").startswith(wanted[:-1])
        inside = "e => { const a = e.getBoundingClientRect(), b = e.closest('#list').getBoundingClientRect(); return a.top >= b.top - 1 && a.bottom <= b.bottom + 1 }"
        assert chosen.evaluate(inside)
    page.get_by_role("button", name="next").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert title.inner_text().startswith("short #2:")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    assert title.inner_text().startswith("short #1:")
    page.locator("#search").focus()
    page.keyboard.press("ArrowRight")  # moves the cursor in a field
    assert title.inner_text().startswith("short #1:")


@pytest.mark.external
def test_controls_have_names(opened):
    page = opened()
    page.locator(".row").nth(2).click()
    for control in page.locator("button, select, input, [tabindex]").all():
        named = control.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()"
        )
        assert named, control.evaluate("e => e.outerHTML")


@pytest.mark.external
def test_numbers_of_the_open_problem(opened, tables):
    page = opened()
    table = tables["short"].query("problem == 2")
    page.locator(".row").nth(2).click()
    assert page.locator("#title").inner_text() == "short #2: 4 of 8 correct"
    assert page.locator(".row").nth(2).locator(".mark").count() == 8
    assert page.locator(".row").nth(2).locator("i").inner_text() == "4/8"
    for row, article in zip(table.itertuples(), page.locator(".answer").all(), strict=True):
        head = article.locator(".head").inner_text()
        assert VERDICT_NAMES[row.verdict] in head and f"sample {row.sample}" in head and f"{row.tokens} tokens" in head
        assert ("cut at the limit" in head) == row.truncated
        assert ("strict: not worked out" in head) == (row.strict != row.verdict)
        assert (f"= {row.value}" in head) == pd.notna(row.value)
    assert "4 × 2" in page.locator(".chips").inner_text()


@pytest.mark.external
def test_thousands_of_problems_do_not_freeze_it(open_file, tmp_path):
    path = write(tmp_path / "report.html", {"one": answers(5000, 8)})
    page = open_file(path, ".answer")
    assert counted(page) == (5000, 40_000)
    assert page.locator(".row").count() < 60
    spent = page.evaluate("""() => {
        const list = document.getElementById("list"), start = performance.now();
        list.focus();
        for (const key of ["End", "Home", "End"]) list.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        document.getElementById("verdict").value = "wrong";
        document.getElementById("verdict").dispatchEvent(new Event("change"));
        return performance.now() - start;
    }""")
    assert spent < 1500
    page.locator("#list").evaluate("list => { list.scrollTop = 1000 * 58; }")
    wait_until(page, "document.querySelectorAll('.row')[8].dataset.index > 990")
