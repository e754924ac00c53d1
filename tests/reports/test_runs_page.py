"""The page over runs: what it holds, how large it is, what it may replace; in Chromium, that every control does its work."""

import csv
import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest

import bupo
from bupo import UserError
from bupo.cli.main import main
from bupo.cli.report import _add_folders_flag
from bupo.reports.html import dump_script_json
from bupo.reports.run_records import SERIES_METRICS, TrainingRecord
from bupo.reports.run_settings import RunSettings
from bupo.reports.runs_page import (
    SERIES_NAMES,
    RunsReport,
    _get_block_width,
    _thin_points,
    build_runs_data,
    report_runs,
)
from bupo.reports.seed_comparison import SeedGroup
from bupo.utils.statistics import compute_seed_statistics
from tests.helpers.made_runs import BUPO, GRPO, analyze, evaluate, probed, train
from tests.helpers.pages import in_every_look, wait_until
from tests.reports.test_samples_page import HOSTILE, data_of

SETTINGS = {"b": BUPO, "l3": BUPO | {"internal_layer": 3}, "long": BUPO | {"internal_steps": 5}, "g": GRPO}
SETTINGS |= {"norm": BUPO | {"internal_lens": "final_norm"}, "frozen": GRPO | {"frozen_up_to_layer": 5}}


def make_runs(runs, seeds=(1, 2, 3)):
    """Every setting over the seeds, with evaluations; analyses before, at a checkpoint and after; one folder of none."""
    folders = [evaluate(runs / "vanilla", "embedded", math=30, aime=10), analyze(runs / "layers-0", "embedded")]
    for place, (name, options) in enumerate(SETTINGS.items()):
        for seed in seeds:
            own = f"{name}-{seed}"
            folders.append(
                train(
                    runs / own,
                    seed,
                    options,
                    reward=lambda batch, s=seed, p=place: 0.1 * batch + 0.03 * s * s + 0.02 * p,
                )
            )
            folders.append(
                evaluate(runs / f"eval-{own}", f"runs/{own}", math=60 + 5 * place + seed * seed, aime=20 + place * seed)
            )
    for seed in seeds[:2]:
        probed(runs / f"b-{seed}")
        folders.append(
            analyze(runs / f"layers-{seed}", f"runs/b-{seed}/checkpoint-8", f"runs/b-{seed}", height=seed / 10)
        )
    (runs / "notes").mkdir()
    return [*folders, runs / "notes"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    runs = tmp_path_factory.mktemp("report") / "runs"
    return report_runs(make_runs(runs), runs / "report.html")


# -- what the page holds


def test_what_is_there_is_said(report):
    assert str(report) == "18 training runs, 19 evaluations, 3 analyses"
    assert [Path(folder).name for folder, _ in report.skipped] == ["notes"]
    assert [table.number for table in report.tables] == [1, 2, 3, 5, 10, 11]
    page = report.path.read_text(encoding="utf-8")
    assert "Skipped: " in page and "notes (no run)" in page and report.path.stat().st_size < 6 << 20
    assert bupo.report_runs is report_runs


def test_every_run_and_number_is_in_the_page(report):
    data = data_of(report.path)
    assert len(data["runs"]) == 18 and data["groups"][0]["name"] == "vanilla"
    (run,) = [run for run in data["runs"] if run["folder"].endswith("/b-2")]
    assert run["y"]["reward"] == {"y": [0.22, 0.32, 0.42, 0.52, 0.62, 0.72], "from": 1}
    assert run["y"]["internal/entropy"]["y"] == [0.5, 0.5, 0.5] and (run["seed"], run["first"]) == (2, 3)
    (one,) = [table for table in data["tables"] if table["number"] == 1]
    cell = one["rows"][1]["cells"][one["heads"].index("math avg@10")]
    assert dict(cell["values"]) == {1: pytest.approx(76), 2: pytest.approx(79), 3: pytest.approx(84)}
    over = compute_seed_statistics([0.0, 1.0, 5.0])
    assert data["student"][3] * over.sd / 3**0.5 == pytest.approx(over.high - over.mean)
    (line,) = [each for each in data["dynamics"][0]["lines"] if (each["measure"], each["later"]) == ("kl", 7)]
    assert line["x"] == [0, 2, 4] and line["y"] == [7.0, 7.2, 7.4]


def test_every_series_has_a_name():
    assert set(SERIES_METRICS) == SERIES_NAMES.keys()


def test_many_long_runs_fit(tmp_path):
    """Runs of 300 rollout batches with every series; a point is the mean of several batches where there are more."""
    points = {float(batch): batch + 0.123456 for batch in range(1, 301)}
    run = TrainingRecord(tmp_path, RunSettings("m", "GRPO"), 1, dict.fromkeys(SERIES_METRICS, points), 0, "", 300, True)
    group = SeedGroup(run.setting, "GRPO", "GRPO", [run] * 20)
    data = build_runs_data(RunsReport([group], [], [], [run] * 20, tmp_path / "page.html"))
    assert data["width"] == 1 and data["runs"][19]["y"]["reward"]["y"][:2] == [1.1235, 2.1235]
    assert len(dump_script_json(data)) < 50_000 * 20  # 100 of them make 5 MB
    assert _thin_points(points, 3)["x"] == list(range(2, 300, 3))
    assert _thin_points(points, 3)["y"] == [pytest.approx(2.1235 + 3 * n, abs=1e-2) for n in range(100)]
    assert _get_block_width([dataclasses.replace(run, batches=1200)]) == 3  # 400 points
    assert _get_block_width([run] * 1000) == 7  # 47 points of each of 22,000 curves
    assert _get_block_width([]) == 1


# -- the command


def test_the_command_writes_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_runs(tmp_path / "runs", (1,))
    shown = sorted(str(path) for path in Path("runs").iterdir())
    assert main(["report", *shown]) == 0
    assert (
        main(["report", *sorted(str(path) for path in Path("runs").iterdir())]) == 0
    )  # with the page itself among them
    out = " ".join(capsys.readouterr().out.split())
    assert (
        out.count("left out: runs/notes (no run)") == 2
        and "report.html" not in out.split("left out:")[1].split("page:")[0]
    )
    assert "page: runs/report.html (6 training runs, 7 evaluations, 2 analyses; tables 1, 2, 3, 5, 11;" in out


def test_folders_stand_wherever_they_like():
    wanted = ["--output", "x.html", "--folders", "a", "b", "c"]
    assert _add_folders_flag(["a", "--output", "x.html", "b", "c"]) == wanted
    assert _add_folders_flag(["--folders", "a", "b", "--output", "x.html", "c"]) == wanted
    assert _add_folders_flag(["--output=x.html", "a"]) == ["--output=x.html", "--folders", "a"]
    assert _add_folders_flag(["--help"]) == ["--help"] and _add_folders_flag([]) == []


def test_only_a_page_of_its_own_is_replaced(tmp_path):
    folder = train(tmp_path / "runs" / "a", 1)
    for output, says in [
        (tmp_path / "notes.html", "is not a page of bupo report"),
        (tmp_path / "runs", "is a folder: name the file of the page"),
        (tmp_path / "notes.html" / "x.html", "notes.html is a file"),
    ]:
        (tmp_path / "notes.html").write_text("mine")
        with pytest.raises(UserError, match=says):
            report_runs([folder], output)
    assert (tmp_path / "notes.html").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(UserError, match="is not a regular file"):
        report_runs([folder], tmp_path / "pipe.html")
    with pytest.raises(UserError, match=r"no folder holds a run: .*runs \(holds run folders: give runs/\*\)"):
        report_runs([tmp_path / "runs"], tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()
    first = report_runs([folder], tmp_path / "new" / "page.html").path.read_text()
    assert report_runs([folder], tmp_path / "new" / "page.html").path.read_text() == first
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    folder = train(tmp_path / "runs" / "a", 1)
    (tmp_path / "pages").mkdir()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"page.html cannot be written: No space left"):
        report_runs([folder], tmp_path / "pages" / "page.html")
    assert list((tmp_path / "pages").iterdir()) == []


# -- in the browser


@pytest.fixture
def opened(open_file, report):
    """Opens the page at a size."""
    return partial(open_file, report.path, "#curves .main-svg >> nth=5")


def cells_of(page, number):
    """A table as the page shows it: by the row's name, the cells' texts."""
    rows = page.locator(f"table[data-table='{number}'] tbody tr")
    texts = rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))")
    return {row[0]: row[1:] for row in texts}


@pytest.mark.external
@in_every_look
def test_opens_without_errors(opened, shoot, name, width, dark):
    page = opened(width, dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    page.wait_for_timeout(400)
    shoot(page, f"runs-{name}")


@pytest.mark.external
def test_tables_are_those_of_python(opened, report):
    page = opened()
    for table in report.tables:
        wanted = {str(cells[0]): [str(cell or "") for cell in cells[1:]] for _, cells in table.rows}
        assert cells_of(page, table.number) == wanted


@pytest.mark.external
def test_bands_are_over_seeds(opened):
    """Seeds of reward 0.1 batch + 0.03 seed^2: the drawn line and band of GRPO, at every rollout batch."""
    page = opened()
    number = page.evaluate("groups.findIndex(group => group.name === 'GRPO')")
    traces = page.evaluate("panels[0].plot.data.map(t => ({ name: t.name, x: t.x, y: t.y, fill: t.fill }))")
    bands, lines = ([trace for trace in traces if bool(trace.get("fill")) == filled] for filled in (True, False))
    assert traces == [*bands, *lines]  # no line is under a band
    (place,) = [n for n, trace in enumerate(lines) if trace["name"] == "GRPO"]
    line, band = lines[place], bands[place]
    for n, batch in enumerate(range(1, 7)):
        over = compute_seed_statistics([round(0.1 * batch + 0.03 * seed * seed + 0.02 * 3, 6) for seed in (1, 2, 3)])
        assert line["x"][n] == batch and line["y"][n] == pytest.approx(over.mean, abs=1e-4)
        assert (band["y"][n], band["y"][-1 - n]) == pytest.approx((over.high, over.low), abs=1e-3)
    assert number > 0 and band["fill"] == "toself"
    shapes = page.evaluate("panels[0].plot.layout.shapes.map(s => [s.type, s.x0, s.x1])")
    assert ["rect", 0.5, 5.5] in shapes and ["line", 3.5, 3.5] in shapes and ["line", 5.5, 5.5] in shapes
    low, high = page.evaluate("panels[0].plot.layout.yaxis.range")
    reached = [y for trace in traces if trace.get("fill") for y in trace["y"]]  # of three seeds each
    assert low < min(reached) and high > max(reached)
    page.locator("input[name=seed][value='1']").check()
    page.locator("input[name=seed][value='2']").check()
    low, high = page.evaluate("panels[0].plot.layout.yaxis.range")  # the interval of two is wider than what it is of
    assert 0 < low < 0.13 and 0.82 < high < 0.95
    page.click("#reset")
    page.check("#single")
    thin = page.evaluate("panels[0].plot.data.filter(t => t.line.width < 1 && t.opacity < 1).length")
    assert thin == 18


@pytest.mark.external
def test_filters(opened, report):
    page = opened()

    def names():
        return page.evaluate("panels[0].plot.data.filter(t => t.fill !== 'toself').map(t => t.name)")

    assert len(names()) == 6 and "18 of 18 training runs, 7 of 7 settings" in page.locator("#count").inner_text()
    page.get_by_role("checkbox", name="GRPO", exact=True).check()
    assert names() == ["GRPO"] and list(cells_of(page, 1)) == ["GRPO"]
    assert "3 of 18 training runs, 1 of 7 settings" in page.locator("#count").inner_text()
    assert page.evaluate("location.hash") == "#method=GRPO"
    page.get_by_role("checkbox", name="BuPO", exact=True).check()
    page.get_by_role("checkbox", name="3", exact=True).first.check()  # the layer
    assert names() == ["BuPO, layer 3 for 3 batches"]
    page.click("#reset")
    assert len(names()) == 6 and page.evaluate("location.hash") == "" and page.locator("input:checked").count() == 0
    for seed in ("1", "2"):
        page.locator(f"input[name=seed][value='{seed}']").check()
    assert "12 of 18" in page.locator("#count").inner_text()
    over = compute_seed_statistics([76.0, 79.0])
    assert cells_of(page, 1)["GRPO"][0] == f"{over.mean:.1f} [{over.low:.1f}, {over.high:.1f}] n=2"
    assert cells_of(page, 1)["vanilla"][0].startswith("30.0 [")  # of no training, and no seed
    assert page.locator("#runs tbody tr").count() == 12
    page.locator("input[name=method][value='vanilla']").check()
    assert names() == [] and list(cells_of(page, 1)) == ["vanilla"]
    page.locator("input[name=layer][value='5']").check()
    assert page.locator("#count").inner_text() == "Nothing passes these filters."
    assert page.locator("#tables table").count() == 0


@pytest.mark.external
def test_the_address_keeps_what_is_chosen(opened, open_file, report):
    page = opened()
    page.locator("input[name=method][value='BuPO, final norm']").check()
    page.check("#single")
    page.goto(report.path.as_uri() + page.evaluate("location.hash"))
    page.reload()
    page.wait_for_selector("#curves .main-svg >> nth=5")
    assert page.locator("input[name=method]:checked").evaluate_all("all => all.map(each => each.value)") == [
        "BuPO, final norm"
    ]
    assert page.is_checked("#single") and list(cells_of(page, 1)) == ["BuPO, final norm, layer 5 for 3 batches"]
    page.evaluate("location.hash = '#seed=2&method=nothing&x=%3Cb%3E'")
    wait_until(page, "document.querySelectorAll('input:checked').length === 1")
    assert "6 of 18" in page.locator("#count").inner_text()


@pytest.mark.external
def test_keyboard(opened):
    page = opened()
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for _ in range(3):  # the two exports, then the first filter
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "method"
    page.keyboard.press("Space")
    assert "1 of 7 settings" in page.locator("#count").inner_text()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.get_by_label("measure of panel 1").focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("panels[0].measure") == page.locator("#curves select").first.input_value() != "reward"
    for control in page.locator("button, select, input, [tabindex='0']").all():
        named = control.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()"
        )
        assert named, control.evaluate("e => e.outerHTML")


@pytest.mark.external
def test_passes_layers_and_dynamics(opened):
    page = opened()
    page.select_option("#benchmark", "aime, 10 problems, 10 answers each")
    names = page.evaluate("document.getElementById('passes').data.filter(t => t.name).map(t => t.name)")
    assert len(names) == 7 and page.evaluate("document.getElementById('passes').data.at(-1).x") == [1, 10]
    assert page.locator("#layer-group option").all_inner_texts() == ["BuPO, layer 5 for 3 batches"]
    lines = page.evaluate("document.getElementById('layers').data.filter(t => t.name).map(t => [t.name, t.y[0]])")
    assert [name for name, _ in lines] == ["before", "update 8", "after"]
    assert [y for _, y in lines] == pytest.approx(
        [1.0, 1.15, 2.15]
    )  # over the two seeds: their heights are 0.1 and 0.2
    band = page.evaluate("document.getElementById('layers').data.find(t => t.fill).y")
    assert band[0] == pytest.approx(1.1) and band[-1] == pytest.approx(0.9)  # one analysis: its own interval
    page.select_option("#layer-measure", "d_entropy_attn")
    assert page.locator("#layers .ytitle").text_content().startswith("entropy change of ATTN")
    assert page.evaluate("document.getElementById('dynamics-kl').data.map(t => t.name)") == ["5 → 6", "5 → 7", "5 → 8"]
    page.locator("input[name=method][value='vanilla']").check()
    assert page.locator("#layer-group option").all_inner_texts() == ["vanilla"]


@pytest.mark.external
def test_exports(opened, report, tmp_path):
    page = opened()
    for button, name in (("#csv", "tables.csv"), ("#markdown", "tables.md")):
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / name)
    rows = list(csv.DictReader((tmp_path / "tables.csv").open(newline="")))
    wanted = [row for table in report.tables for row in table.to_dataframe().to_dict("records")]
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert (int(row["table"]), row["method"], row["column"], row["kind"]) == tuple(
            other[n] for n in ("table", "method", "column", "kind")
        )
        for name in ("mean", "sd", "low", "high"):
            assert (float(row[name]) if row[name] else None) == (
                pytest.approx(other[name]) if other[name] == other[name] else None
            )
    text = (tmp_path / "tables.md").read_text()
    assert all(table.to_markdown() in text for table in report.tables)


@pytest.mark.external
def test_hostile_runs_are_drawn_as_text(open_file, tmp_path):
    """Names with HTML, Plotly's own markup and templates, in every place where one stands. Nothing is asked for, nothing runs."""
    label = "<a href='https://evil.invalid'>x</a> %{x} <b>b</b> </script><script>alert(1)</script>"
    runs = tmp_path / f"runs {HOSTILE[:20]}".replace("/", "")
    folders = [train(runs / f"a{n}", n, BUPO, model=label, optim=label + str(n % 2)) for n in range(4)]
    folders += [evaluate(runs / "e", f"{runs.name}/a1", **{label: 50}), evaluate(runs / "v", label, **{label: 20})]
    folders += [analyze(runs / "l", label, f"{runs.name}/a1")]
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"eval/rollout_batches": 1, f"eval/{label.replace('/', '')}/avg@4": 0.5}) + "\n")
    page = open_file(report_runs(folders, tmp_path / "page.html").path, "#curves .main-svg >> nth=0")
    page.wait_for_timeout(500)
    page.locator("#curves .nsewdrag").first.hover()
    page.wait_for_timeout(500)
    assert page.locator("a[href], main b b, main li b, main option b").count() == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert "<a href='https://evil.invalid'>" in page.locator("#key").inner_text()
    text = (tmp_path / "page.html").read_text()
    assert "alert(1)</script>" not in re.sub(r"<script>.*?</script>", "", text[-200_000:], flags=re.S)


@pytest.mark.external
def test_runs_that_training_has_left(open_file, tmp_path, monkeypatch):
    """Real folders of the commands: a run with probes and an evaluation while it goes, its evaluation and its layers."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "arithmetic", "--size", "64", "--max_steps", "2", "--per_device_train_batch_size", "8"]
    flags += ["--num_generations", "4", "--max_new_tokens", "16", "--steps_per_generation", "1", "--report_to", "none"]
    flags += [
        "--eval_benchmarks",
        "arithmetic",
        "--eval_every",
        "1",
        "--eval_k",
        "2",
        "--eval_problems",
        "4",
        "--probe_every",
        "1",
    ]
    for seed in ("1", "2"):
        phase = ["--internal_layer", "5", "--internal_steps", "1", "--seed", seed, "--output", f"runs/b{seed}"]
        assert main(["train", "--model", "embedded", *flags, *phase]) == 0
    few = ["--size", "4", "--max_new_tokens", "8"]
    for model, output in (("embedded", "runs/vanilla"), ("runs/b1", "runs/e1"), ("runs/b2", "runs/e2")):
        assert main(["eval", "--model", model, "--benchmarks", "arithmetic", *few, "--k", "2", "--output", output]) == 0
    assert main(["analyze", "--model", "embedded", "runs/b1", *few, "--output", "runs/layers"]) == 0
    found = report_runs(sorted(Path("runs").iterdir()))
    assert str(found) == "2 training runs, 3 evaluations, 1 analysis" and not found.skipped
    assert [group.name for group in found.groups] == ["vanilla", "BuPO, layer 5 for 1 batches"]
    scores = json.loads(Path("runs/e1/summary.json").read_text())["benchmarks"]["arithmetic"]["avg@k"]
    assert found.groups[1].scores[next(iter(found.groups[1].scores))][1].value == scores
    page = open_file(tmp_path / "runs" / "report.html", "#dynamics-kl .main-svg")
    assert page.locator("#layers .main-svg").count() > 0 and len(cells_of(page, 1)) == 2
    assert "avg@2 on arithmetic while training (%)" in page.locator("#curves option").all_inner_texts()
