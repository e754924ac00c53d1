"""Result caches: continued, refused if the settings differ, and never deleted without `overwrite`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset

import bupo
from bupo import AnalyzeOptions, EvalOptions, UserError
from bupo.analysis.rollouts import read_rollouts
from bupo.cli.main import main
from bupo.run_files.result_cache import ResultCache, get_label_folder
from tests.cli.test_commands import fails  # noqa: F401


def listing(folder):
    """Return the content and the modification time of every file."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def lost(before, after, *rewritten):
    """Return the files that were deleted or changed, except for those that every run replaces."""
    return [
        name
        for name, content in before.items()
        if not any(Path(name).match(pattern) for pattern in rewritten) and after.get(name) != content
    ]


# -- one cache -------------------------------------------------------------------------------------------------------


def numbers(folder, settings, digests=(), **options):
    """Return a cache of numbers by name."""
    return ResultCache(
        folder,
        "rows.jsonl",
        "numbers",
        lambda line: tuple(json.loads(line)),
        lambda key, row: json.dumps([key, row]),
        settings,
        digests,
        **options,
    )


def filled(folder, settings, digests=(), **options):
    cache = numbers(folder, settings, digests, **options)
    cache.begin()
    cache.add("a", 1)
    return cache


def test_rows_survive_a_kill(tmp_path):
    filled(tmp_path / "s", {"x": 1})
    with (tmp_path / "s" / "rows.jsonl").open("a") as file:
        file.write('["b", 2')  # killed during a write
    again = numbers(tmp_path / "s", {"x": 1})
    assert (tmp_path / "s" / "rows.jsonl").read_text() == '["a", 1]\n["b", 2'  # no change before `begin`
    again.begin()
    assert again.rows == {"a": 1}
    again.add("b", 2)
    assert (tmp_path / "s" / "rows.jsonl").read_text() == '["a", 1]\n["b", 2]\n'


@pytest.mark.parametrize(
    ("settings", "digests", "message"),
    [
        ({"x": 2, "y": "q"}, ["p"], "holds numbers made with another x (1, now 2): choose another output, or --over"),
        ({"x": 1, "y": None}, ["p"], "made with another y ('q', now None)"),
        ({"x": 1, "y": "q", "z": 3}, ["p"], "without a record of their z (made by an earlier version)"),
        ({"x": 1, "y": "q"}, ["r"], "holds numbers of other problems (number 0 is p, now r)"),
    ],
)
def test_other_settings(tmp_path, settings, digests, message):
    folder = tmp_path / "s"
    filled(folder, {"x": 1, "y": "q"}, ["p"])
    before = listing(folder)
    with pytest.raises(UserError) as raised:
        numbers(folder, settings, digests)
    assert message in str(raised.value) and listing(folder) == before
    anew = numbers(folder, settings, digests, overwrite=True)
    assert listing(folder) == before  # no change before `begin`
    anew.begin()
    assert anew.rows == {} and not (folder / "rows.jsonl").exists()
    filled(folder, settings, digests)


def test_overwrite_deletes_nothing_of_the_same_settings(tmp_path):
    filled(tmp_path / "s", {"x": 1}, ["p"])
    before = listing(tmp_path / "s")
    again = numbers(tmp_path / "s", {"x": 1}, ["p"], overwrite=True)
    again.begin()
    assert again.rows == {"a": 1} and listing(tmp_path / "s") == before


def test_more_and_fewer_digests(tmp_path):
    filled(tmp_path / "s", {"x": 1}, ["p", "q"])
    for digests in (["p"], ["p", "q", "r"], ["p", "q"]):
        numbers(tmp_path / "s", {"x": 1}, digests).begin()
    with pytest.raises(UserError, match="number 2 is r, now s"):
        numbers(tmp_path / "s", {"x": 1}, ["p", "q", "s"])


def test_metadata_is_not_compared(tmp_path):
    filled(tmp_path / "s", {"x": 1}, metadata={"model": "m"})
    numbers(tmp_path / "s", {"x": 1}, metadata={"model": "n"}).begin()
    assert json.loads((tmp_path / "s" / "settings.json").read_text()) == {"model": "m", "x": 1}


def test_settings_that_are_missing_or_damaged(tmp_path):
    filled(tmp_path / "s", {"x": 1})
    path = tmp_path / "s" / "settings.json"
    for content, message in (('{"x": ', "cannot be read"), ("[]", "it is no mapping"), (None, "json is missing")):
        path.write_text(content) if content else path.unlink()
        before = listing(tmp_path / "s")
        with pytest.raises(UserError, match=message):
            numbers(tmp_path / "s", {"x": 1})
        assert listing(tmp_path / "s") == before
    numbers(tmp_path / "s", {"x": 1}, overwrite=True).begin()
    assert listing(tmp_path / "s").keys() == {"settings.json"}


def test_a_damaged_row_is_not_changed(tmp_path):
    filled(tmp_path / "s", {"x": 1})
    path = tmp_path / "s" / "rows.jsonl"
    path.write_text('["a", 1]\nnot a row\n["b", 2]\n')
    with pytest.raises(UserError, match="line 2 cannot be read"):
        numbers(tmp_path / "s", {"x": 1}).begin()
    assert path.read_text() == '["a", 1]\nnot a row\n["b", 2]\n'


def test_long_values_are_shown_where_they_differ(tmp_path):
    filled(tmp_path / "s", {"prompt": "same " * 40 + "one"})
    with pytest.raises(UserError, match=r"prompt \(….*one', now ….*two'\)"):
        numbers(tmp_path / "s", {"prompt": "same " * 40 + "two"})


def test_labels_stay_inside(tmp_path):
    assert get_label_folder(tmp_path, "math500") == tmp_path / "math500"
    for label in ("", ".", "..", "../x", "/abs", "a/b", "a\\b", "x" * 200):
        with pytest.raises(UserError, match="names no folder inside"):
            get_label_folder(tmp_path, label)


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    """Skip the figures, which take most of the time of a short analysis and have other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bupo.analysis.results.draw_analysis_figures", lambda table, summary, folder: None)
        yield


# -- bupo analyze ----------------------------------------------------------------------------------------------------

DERIVED = ("report.html", "figures/*", "summary.json", "views.json", "layers.parquet", "run.json", "config.yaml")


def analysis(folder, **changes):
    return AnalyzeOptions(**{"size": 4, "max_new_tokens": 12, "output": str(folder), **changes})


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "run"
    return bupo.analyze("embedded", analysis(folder))


def test_another_lens_keeps_the_answers_and_samples_none(analysed, monkeypatch):
    before = listing(analysed.folder)
    monkeypatch.setattr(
        "bupo.generation.seeded_sampling.TransformersEngine.generate_token_ids",
        lambda self, requests: pytest.fail("something was sampled"),
    )
    for changes in ({"lens": "final_norm"}, {"kl_pairs": True}, {"size": 3}, {"per_token": True}, {"max_tokens": 20}):
        other = bupo.analyze("embedded", analysis(analysed.folder, **changes))
        assert not lost(before, listing(analysed.folder), *DERIVED), changes
        assert other.meta["lens"] == changes.get("lens", "raw")
    again = bupo.analyze("embedded", analysis(analysed.folder))
    pd.testing.assert_frame_equal(again.table, analysed.table, rtol=1e-6)
    assert not lost(before, listing(analysed.folder), *DERIVED)
    tokens = pd.read_parquet(analysed.folder / "embedded" / "raw" / "tokens.parquet")
    assert tokens["answer"].nunique() == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.8}, "another temperature (1.0, now 0.8)"),
        ({"top_p": 0.9}, "another top_p (1.0, now 0.9)"),
        ({"max_new_tokens": 13}, "another max_new_tokens (12, now 13)"),
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"dtype": "bfloat16"}, "another dtype ('float32', now 'bfloat16')"),
        (
            {"chat_template": "octothinker"},
            'another template ("the model\'s own", now "octothinker, as in the paper\'s code")',
        ),
        ({"system_prompt": "Think."}, "another system_prompt (None, now 'Think.')"),
        ({"dataset": "reasoning_gym:chain_sum"}, "another prompt ("),
    ],
)
def test_other_sampling_is_refused_by_name(analysed, changes, message):
    before = listing(analysed.folder)
    with pytest.raises(UserError) as raised:
        bupo.analyze("embedded", analysis(analysed.folder, **changes))
    assert message in str(raised.value) and "choose another output, or --overwrite true" in str(raised.value)
    assert listing(analysed.folder) == before


def test_other_weights_are_refused_and_other_names_are_not(analysed, tmp_path):
    model, tokenizer = bupo.load_model("embedded"), bupo.load_tokenizer("embedded")
    for name in ("copy", "changed"):
        if name == "changed":
            with torch.no_grad():
                model.model.layers[3].mlp.up_proj.weight += 1e-4
        model.save_pretrained(tmp_path / name / "embedded")
        tokenizer.save_pretrained(tmp_path / name / "embedded")
    before = listing(analysed.folder)
    bupo.analyze(str(tmp_path / "copy" / "embedded"), analysis(analysed.folder))
    assert not lost(before, listing(analysed.folder), *DERIVED)
    with pytest.raises(UserError, match="another weights"):
        bupo.analyze(str(tmp_path / "changed" / "embedded"), analysis(analysed.folder))


def test_overwrite_starts_again(tmp_path):
    bupo.analyze("embedded", analysis(tmp_path))
    before = (tmp_path / "embedded" / "rollouts.jsonl").read_bytes()
    bupo.analyze("embedded", analysis(tmp_path, seed=1, overwrite=True))
    after = (tmp_path / "embedded" / "rollouts.jsonl").read_bytes()
    assert after != before and len(after.splitlines()) == 4
    fresh = bupo.analyze("embedded", analysis(tmp_path / "fresh", seed=1))
    content = (fresh.folder / "embedded" / "raw" / "answers.jsonl").read_bytes()
    assert (tmp_path / "embedded" / "raw" / "answers.jsonl").read_bytes() == content
    assert "overwrite" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_a_folder_of_an_earlier_version_is_refused_and_overwritten_completely(tmp_path):
    """The earlier version saved the measures next to the answers."""
    here = tmp_path / "embedded"
    here.mkdir()
    for name in ("rollouts.jsonl", "answers.jsonl", "tokens.parquet"):
        (here / name).write_text("{}\n")
    (here / "settings.json").write_text(json.dumps({"model": "embedded", "dtype": "float32"}))
    before = listing(tmp_path)
    with pytest.raises(
        UserError, match=r"without a record of their .* \(made by an earlier version\): .*--overwrite true"
    ):
        bupo.analyze("embedded", analysis(tmp_path))
    assert listing(tmp_path) == before
    bupo.analyze("embedded", analysis(tmp_path, overwrite=True))
    assert sorted(path.name for path in here.iterdir()) == ["raw", "rollouts.jsonl", "settings.json"]


def test_a_rollouts_file_of_the_user_is_never_changed(tmp_path):
    own = tmp_path / "embedded" / "rollouts.jsonl"
    own.parent.mkdir()
    own.write_text("".join(json.dumps({"prompt": f"{i}+1", "completion": str(i + 1)}) + "\n" for i in range(4)))
    before = listing(tmp_path)
    options = analysis(tmp_path, rollouts=str(own))
    bupo.analyze("embedded", options)
    bupo.analyze("embedded", replace(options, lens="final_norm"))
    bupo.analyze("embedded", replace(options, temperature=0.7, overwrite=True))
    assert not lost(before, listing(tmp_path))
    with pytest.raises(UserError, match="measures made with another temperature"):
        bupo.analyze("embedded", options)
    with pytest.raises(UserError, match=r"holds answers, but not their settings \(settings.json is missing\)"):
        bupo.analyze("embedded", analysis(tmp_path))
    assert not lost(before, listing(tmp_path))


def test_other_rollouts_are_refused_and_more_are_measured(tmp_path):
    def rollouts(count, start=0):
        path = tmp_path / "r.jsonl"
        rows = [{"prompt": f"{start + i}+1", "completion": str(start + i + 1)} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return analysis(tmp_path / "run", rollouts=str(path))

    bupo.analyze("embedded", rollouts(3))
    before = listing(tmp_path / "run")
    assert bupo.analyze("embedded", rollouts(5)).meta["answers"] == 5
    kept = before["embedded/raw-rollouts/answers.jsonl"][0]
    assert (tmp_path / "run" / "embedded" / "raw-rollouts" / "answers.jsonl").read_bytes().startswith(kept)
    before = listing(tmp_path / "run")
    with pytest.raises(UserError, match="holds measures of other answers"):
        bupo.analyze("embedded", rollouts(3, start=7))
    assert listing(tmp_path / "run") == before


# -- bupo eval -------------------------------------------------------------------------------------------------------


def evaluation(folder, **changes):
    return EvalOptions(**{"size": 6, "k": 2, "max_new_tokens": 12, "output": str(folder), **changes})


EVALUATED = ("summary.json", "table.*", "report.html", "*.png", "run.json", "config.yaml", "*/graded.parquet")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return bupo.evaluate("embedded", evaluation(tmp_path_factory.mktemp("eval") / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.6}, "another temperature (1.0, now 0.6)"),
        ({"top_p": 0.9}, "another top_p (1.0, now 0.9)"),
        ({"max_new_tokens": 13}, "another max_new_tokens (12, now 13)"),
        ({"layer": 6}, "another layer (None, now 6)"),
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"chat_template": "octothinker"}, "another template"),
        ({"system_prompt": "Think."}, "another system_prompt (None, now 'Think.')"),
        ({"dtype": "bfloat16"}, "another dtype ('float32', now 'bfloat16')"),
    ],
)
def test_answers_of_other_settings_are_neither_mixed_nor_lost(evaluated, changes, message):
    before = listing(evaluated.folder)
    with pytest.raises(UserError) as raised:
        bupo.evaluate(
            "embedded", evaluation(evaluated.folder, benchmarks=["reasoning_gym:chain_sum,arithmetic"], **changes)
        )
    assert message in str(raised.value) and "choose another output, or --overwrite true" in str(raised.value)
    assert listing(evaluated.folder) == before  # the other benchmark is not started


@pytest.mark.slow
def test_what_answers_do_not_depend_on(evaluated, monkeypatch):
    before = listing(evaluated.folder)
    monkeypatch.setattr(
        "bupo.generation.seeded_sampling.TransformersEngine.generate_token_ids",
        lambda self, requests: iter(()) if not requests else pytest.fail("something was sampled"),
    )
    for changes in ({"lens": "final_norm"}, {"batch_size": 3}, {"k": 1}, {"size": 2}, {"deadline": 4.0}):
        bupo.evaluate("embedded", evaluation(evaluated.folder, **changes))
        assert not lost(before, listing(evaluated.folder), *EVALUATED), changes


def test_more_answers_and_more_problems(evaluated, tmp_path):
    bupo.evaluate("embedded", evaluation(tmp_path))
    before = (tmp_path / "arithmetic" / "samples.jsonl").read_bytes()
    found = bupo.evaluate("embedded", evaluation(tmp_path, k=3, size=8))
    assert found.benchmarks["arithmetic"]["problems"] == 8 and len(found.tables["arithmetic"]) == 24
    assert (tmp_path / "arithmetic" / "samples.jsonl").read_bytes().startswith(before)


@pytest.mark.slow
def test_the_lens_of_an_internal_policy(tmp_path):
    bupo.evaluate("embedded", evaluation(tmp_path, layer=6))
    with pytest.raises(UserError, match=r"another lens \('raw', now 'final_norm'\)"):
        bupo.evaluate("embedded", evaluation(tmp_path, layer=6, lens="final_norm"))
    before = (tmp_path / "arithmetic" / "samples.jsonl").read_bytes()
    bupo.evaluate("embedded", evaluation(tmp_path, layer=6, lens="final_norm", overwrite=True))
    assert (tmp_path / "arithmetic" / "samples.jsonl").read_bytes() != before


def test_a_folder_of_an_earlier_version_continues(evaluated, tmp_path):
    """Its settings have more entries, and none for the system prompt."""
    here = tmp_path / "arithmetic"
    here.mkdir()
    now = json.loads((evaluated.folder / "arithmetic" / "settings.json").read_text())
    names = ("model", "revision", "weights", "engine", "dtype", "layer", "template", "temperature", "top_p")
    old = {name: now[name] for name in (*names, "max_new_tokens", "seed", "prompt", "problems")}
    (here / "settings.json").write_text(json.dumps(old | {"lens": "raw"}))
    (here / "samples.jsonl").write_bytes((evaluated.folder / "arithmetic" / "samples.jsonl").read_bytes())
    before = listing(tmp_path)
    found = bupo.evaluate("embedded", evaluation(tmp_path))
    assert found.benchmarks == evaluated.benchmarks
    assert not lost(before, listing(tmp_path))


# -- folders of runs -------------------------------------------------------------------------------------------------


def test_labels_that_leave_the_folder(tmp_path, fails, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": "1+2-1", "answer": "2"}) + "\n")
    for arguments in (
        ("eval", "--benchmarks", "../x=p.jsonl"),
        ("eval", "--benchmarks", f"{tmp_path}/abs=p.jsonl"),
        ("eval", "--benchmarks", "a/b=p.jsonl"),
        ("analyze", "--model", ".."),
        ("analyze", "--model", "embedded", "."),
    ):
        assert "names no folder inside" in fails(*arguments, "--output", "out")
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_run_starts_again_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "--size", "3", "--max_new_tokens", "8", "--output", "a", "--lens", "final_norm"]) == 0
    assert main(["eval", "--size", "3", "--k", "1", "--max_new_tokens", "8", "--output", "e"]) == 0
    for command, folder, derived in (("analyze", "a", DERIVED), ("eval", "e", EVALUATED)):
        before = listing(folder)
        assert {"config.yaml", "run.json"} <= before.keys()
        assert main([command, "--config", f"{folder}/config.yaml"]) == 0
        assert not lost(before, listing(folder), *derived)
        run = json.loads(Path(folder, "run.json").read_text())
        assert run["command"] == command and len(run["earlier"]) == 1


# -- pipelines in Python ---------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_same_as_its_name(analysed, evaluated, tmp_path, capsys):
    model, tokenizer = bupo.load_model("embedded", dtype=torch.float32), bupo.load_tokenizer("embedded")
    model.train()
    capsys.readouterr()
    report = bupo.analyze(model, analysis(tmp_path / "a"), tokenizer=tokenizer)
    found = bupo.evaluate(model, evaluation(tmp_path / "e"), tokenizer=tokenizer)
    assert model.training and not capsys.readouterr().out
    pd.testing.assert_series_equal(report.table["mean"], analysed.table["mean"])
    assert report.boundary_layer == analysed.boundary_layer and report.meta["weights"] == analysed.meta["weights"]
    assert found.benchmarks == evaluated.benchmarks
    pipelines: tuple = ((bupo.analyze, AnalyzeOptions(adapter="a")), (bupo.evaluate, EvalOptions(adapter="a")))
    for pipeline, adapted in pipelines:
        with pytest.raises(UserError, match="a loaded model needs its tokenizer"):
            pipeline(model)
        with pytest.raises(UserError, match="put it on the loaded model yourself"):
            pipeline(model, adapted, tokenizer=tokenizer)
    assert "model came from Python" in (tmp_path / "a" / "config.yaml").read_text()


def test_problems_and_rollouts_from_python(tmp_path):
    problems = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{i}+2-1"}] for i in range(3)], "answer": ["1", "2", "3"]}
    )
    found = bupo.evaluate("embedded", evaluation(tmp_path / "e"), benchmarks={"sums": problems})
    assert found.benchmarks["sums"]["problems"] == 3 and (tmp_path / "e" / "sums" / "graded.parquet").exists()
    report = bupo.analyze("embedded", analysis(tmp_path / "a"), problems=problems)
    assert report.meta["answers"] == 3
    path, tokenizer = report.folder / "embedded" / "rollouts.jsonl", bupo.load_tokenizer("embedded")
    again = bupo.analyze("embedded", analysis(tmp_path / "b"), rollouts=read_rollouts(path, tokenizer))
    pd.testing.assert_series_equal(again.table["mean"], report.table["mean"])
    assert report.meta["dataset"] == "problems" and again.meta["dataset"] == "rollouts"
    with pytest.raises(UserError, match="problems and rollouts are both given"):
        bupo.analyze("embedded", analysis(tmp_path / "c", rollouts=str(path)), problems=problems)
    with pytest.raises(UserError, match="rollouts is empty"):
        bupo.analyze("embedded", analysis(tmp_path / "c"), rollouts=[])


def test_invalid_problems_from_python(tmp_path):
    asked, empty = Dataset.from_dict({"question": ["1+2-1"]}), Dataset.from_dict({"prompt": [], "answer": []})
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+2-1"}]]})
    out = tmp_path / "out"
    for given, message in (
        ({"problems": asked}, "problems has no column prompt, but question: rename one, or add it"),
        ({"problems": empty}, "problems is empty"),
    ):
        with pytest.raises(UserError, match=message):
            bupo.analyze("embedded", analysis(out), **given)
    with pytest.raises(UserError, match="model is empty: give the folder of a model"):
        bupo.analyze([], analysis(out))
    for benchmarks, message in (
        ({}, "benchmarks is empty"),
        ({"mine": asked}, "mine has no column prompt, but question"),
        ({"mine": prompts}, "mine has no column answer, but prompt"),
        ({"mine": empty}, "mine is empty"),
    ):
        with pytest.raises(UserError, match=message):
            bupo.evaluate("embedded", evaluation(out), benchmarks=benchmarks)
    assert not out.exists()


def test_a_missing_second_model_leaves_nothing(tmp_path, fails):  # noqa: F811
    weights_gone = tmp_path / "encoder"
    weights_gone.mkdir()
    (weights_gone / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    bupo.load_tokenizer("embedded").save_pretrained(weights_gone)
    for name, message in (
        (str(tmp_path / "nope"), "does not exist"),
        (str(weights_gone), "is no causal language model"),
    ):
        assert message in fails("analyze", "--model", "embedded", name, "--output", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_several_models_are_one_report(tmp_path):
    model, tokenizer = bupo.load_model("embedded"), bupo.load_tokenizer("embedded")
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    report = bupo.analyze(["embedded", str(tmp_path / "other")], analysis(tmp_path / "run"))
    assert [model.label for model in report.models] == ["embedded", "other"]
    assert set(report.table["model"]) == {"embedded", "other"} and len(report.table) == 2 * 15 * 8
    assert report.models[0].boundary_layer == report.models[1].boundary_layer
    with pytest.raises(UserError, match=r"choose one of \.models"):
        report.boundary_layer  # noqa: B018


def test_columns_of_a_benchmark(tmp_path, fails):  # noqa: F811
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"q": "1+2-1", "a": {"gold": "2"}, "answer": "9"}) + "\n")
    words = ["eval", "--benchmarks", f"mine={path}", "arithmetic", "--prompt_column", "q", "--answer_column", "a.gold"]
    words += ["--size", "1", "--k", "1", "--max_new_tokens", "4"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    assert pd.read_parquet(tmp_path / "run" / "mine" / "graded.parquet")["gold"].tolist() == ["2"]
    words[words.index("q")] = "nope"
    assert "has no prompt column nope" in fails(*words, "--output", str(tmp_path / "x"))
