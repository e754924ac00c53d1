"""Output folders: deleted during a run, with the user's files, with `~`, with unusual names, and without permission."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import TrainerCallback

import bupo
from bupo.cli.main import main
from bupo.cli.parsing import parse_options_and_values
from bupo.evaluation.options import EvalOptions
from bupo.options.groups import DatasetOptions
from bupo.reports.run_records import read_runs
from bupo.run_files.provenance import record_run
from bupo.utils.errors import UserError
from bupo.utils.files import append_text, check_output_folder, expand_user_path, make_folder, write_json
from bupo.utils.lock import folder_lock
from bupo.utils.sanitize import collapse_whitespace, escape_line
from tests.helpers.made_runs import evaluate

EVAL = ["eval", "--benchmarks", "arithmetic", "--size", "1", "--k", "1", "--max_new_tokens", "2"]
STRANGE = [
    "new\nline",
    "re\rturn",
    "sep\u2028arator",
    "para\u2029graph",
    "bell\a",
    "\x1b[31mred",
    "half\udc80",
    "next\x85line",
    "a: b # c",
]


def line_of(capsys):
    """Return the only error line."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("bupo: error: ")]
    return line


# -- deleted or renamed during a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lose", [shutil.rmtree, lambda path: path.rename(path.with_name("other"))], ids=["deleted", "renamed"]
)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path / "a.json", {}),
        lambda path: append_text(path / "a.jsonl", "x"),
        lambda path: make_folder(path / "a" / "b"),
        lambda path: (path / "a").write_text("of a library"),
    ],
    ids=["json", "line", "folder", "library"],
)
def test_a_folder_that_is_gone_is_one_line_and_not_made_anew(tmp_path, lose, write):
    run = tmp_path / "runs" / "one"
    with pytest.raises(UserError, match="one was deleted or renamed while it was written"), folder_lock(run):
        lose(run)
        write(run)
    assert not run.exists()


def test_a_new_folder_of_the_same_name_is_not_the_same(tmp_path):
    run = tmp_path / "one"
    with pytest.raises(UserError, match="deleted or renamed"), folder_lock(run):
        run.rename(tmp_path / "former")
        run.mkdir()
        (run / "b.txt").write_text("another's")
        write_json(run / "a.json", {})
    assert os.listdir(run) == ["b.txt"]


@pytest.mark.parametrize(
    "lose", [shutil.rmtree, lambda path: path.rename(path.with_name("other"))], ids=["deleted", "renamed"]
)
def test_an_evaluation_whose_folder_is_gone(tmp_path, monkeypatch, capsys, lose):
    from bupo.generation.seeded_sampling import TransformersEngine

    ids = TransformersEngine.generate_token_ids
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TransformersEngine, "generate_token_ids", lambda *args: (lose(Path("out")), ids(*args))[1])
    assert main([*EVAL, "--output", "out"]) == 2
    assert "out was deleted or renamed while it was written" in line_of(capsys)
    assert not Path("out").exists()


class Losing(TrainerCallback):
    """Callback that renames or deletes the run's folder at an update."""

    def __init__(self, lose):
        self.lose = lose

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.lose(Path(args.output_dir))


@pytest.mark.slow
@pytest.mark.parametrize("save", ["no", "steps"])
@pytest.mark.parametrize(
    "lose", [shutil.rmtree, lambda path: path.rename(path.with_name("other"))], ids=["deleted", "renamed"]
)
def test_a_training_whose_folder_is_gone(tmp_path, lose, save):
    problems = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{n}+1"}] for n in range(8)], "answer": ["1"] * 8}
    )
    config = bupo.BuPOConfig(
        str(tmp_path / "run"), internal_layer=2, internal_steps=1, per_device_train_batch_size=4, num_generations=4, max_steps=3,
        max_completion_length=2, save_strategy=save, save_steps=1, logging_steps=1, report_to="none", use_cpu=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="run was deleted or renamed while it was written"):
        bupo.train("embedded", config, problems=problems, callbacks=[Losing(lose)])
    assert not (tmp_path / "run").exists()


# -- with files of the user --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--overwrite", "true"]])
@pytest.mark.parametrize(
    "command",
    [
        EVAL,
        ["analyze", "--size", "1"],
        ["demo", "--steps", "1"],
        ["train", "--model", "embedded", "--dataset", "arithmetic", "--internal_layer", "2", "--max_steps", "1"],
    ],
    ids=lambda words: words[0],
)
def test_the_working_folder_with_files_is_refused(tmp_path, monkeypatch, capsys, command, more):
    here = tmp_path / "thesis"
    (here / "figures").mkdir(parents=True)
    (here / "chapter.tex").write_text("x")
    monkeypatch.chdir(here)
    for output in (".", str(here), "../thesis", ".."):
        assert main([*command, *more, "--output", output]) == 2
        assert "is no run's folder and holds files" in line_of(capsys)
    assert sorted(os.listdir(here)) == ["chapter.tex", "figures"]


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model.safetensors", "config.yaml", "table.csv", "figures/a.png"]
)
def test_files_that_a_run_would_replace_are_refused(tmp_path, name):
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(UserError, match="is no run's folder and holds files"):
        check_output_folder("output", tmp_path / "mine")


@pytest.mark.parametrize("place", [".vscode", "app", "django"])
def test_another_programs_settings_make_no_runs_folder(tmp_path, monkeypatch, place):
    (tmp_path / "mine" / place).mkdir(parents=True)
    (tmp_path / "mine" / place / "settings.json").write_text("{}")
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(UserError, match="is no run's folder and holds files"):
        check_output_folder("output", ".")
    (tmp_path / "mine" / place / "answers.jsonl").write_text("")
    if place != ".vscode":
        check_output_folder("output", ".")


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["run.json", "config.yaml"],
        ["slurm-7.out", ".gitignore", "run.log"],
        ["notes.txt"],
        ["checkpoint-4/x", "README.md"],
    ],
)
def test_run_folders_with_other_files_are_accepted(tmp_path, names):
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    check_output_folder("output", tmp_path / "run")


def test_a_run_in_the_working_folder_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*EVAL, "--output", "."]) == 0


# -- ~ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("math500=~/f.jsonl", "math500=HOME/f.jsonl"),
        ("~/a=b", "HOME/a=b"),
        ("a/~/b", "a/~/b"),
        ("a~", "a~"),
        ("x=y", "x=y"),
    ],
)
def test_home_folders(monkeypatch, text, found):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user_path("output", text) == found.replace("HOME", "/home/me")


def test_homes_behind_an_equals_sign_and_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "output: ~/out\nbenchmarks: [math500=~/f.jsonl, ~/g.jsonl]\nsystem_prompt: ~/no path\n"
    )
    for words in (
        ["--config", "~/c.yaml"],
        ["--config=~/c.yaml"],
        ["--output=~/out", "--benchmarks=math500=~/f.jsonl,~/g.jsonl", "--system_prompt", "~/no path"],
        ["--output", "~/out", "--benchmarks", "math500=~/f.jsonl", "~/g.jsonl", "--system_prompt=~/no path"],
    ):
        (options,), given = parse_options_and_values([EvalOptions], words, "bupo eval")
        assert options.output == f"{tmp_path}/out" == given["output"]
        assert options.benchmark_names == [f"math500={tmp_path}/f.jsonl", f"{tmp_path}/g.jsonl"]
        assert options.system_prompt == "~/no path"
    (data,), _ = parse_options_and_values([DatasetOptions], ["--dataset=~/p.jsonl"], "bupo train")
    assert data.dataset == f"{tmp_path}/p.jsonl"


@pytest.mark.parametrize(
    "words",
    [
        [*EVAL, "--output", "~no-such-user/x"],
        ["eval", "--benchmarks=math500=~no-such-user/f.jsonl"],
        ["eval", "--table", "BuPO=~no-such-user"],
        ["report", "~no-such-user/runs"],
        ["sample", "--prompt", "x", "--model=~no-such-user/m"],
        ["train", "--config=~no-such-user/c.yaml"],
    ],
    ids=" ".join,
)
def test_a_user_that_there_is_not(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "there is no user 'no-such-user'" in line_of(capsys)
    assert os.listdir(tmp_path) == []


def test_a_run_that_names_such_a_user_is_reported(tmp_path):
    evaluate(tmp_path / "runs" / "e", "~no-such-user/model", math=50)
    runs, left_out = read_runs([tmp_path / "runs" / "e"])
    assert len(runs) == 1 and not left_out


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_name_breaks_no_file(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    monkeypatch.setattr("sys.orig_argv", ["bupo", "eval", "--output", name])
    record_run(folder, "eval", {"output": name, "model": "embedded"})
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"output": name, "model": "embedded"}
    assert all(line.isprintable() for line in text.split("\n"))
    note = json.loads((folder / "run.json").read_text())
    assert note["command"] == "eval" and note["command_line"].isprintable()


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_name_is_shown_in_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("x")
    assert main([*EVAL, "--output", name]) == 2
    assert line_of(capsys).isprintable()
    assert main(["report", name]) == 2
    assert line_of(capsys).isprintable()
    assert collapse_whitespace(name).isprintable() and escape_line(name).isprintable()


@pytest.mark.parametrize("name", ["new\nline", "sep\u2028arator"])
def test_an_evaluation_into_a_strange_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main([*EVAL, "--output", name]) == 0
    assert main([*EVAL, "--config", f"{name}/config.yaml"]) == 0
    assert main(["report", name, "--output", "page.html"]) == 0
    assert "\u2028" not in Path("page.html").read_text(encoding="utf-8")


def test_rollouts_may_hold_any_line_separator(tmp_path):
    from bupo.analysis.rollouts import read_rollouts

    row = {"prompt": "1\u2028+1", "completion": "2\x85"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (found,) = read_rollouts(tmp_path / "r.jsonl", bupo.load_tokenizer("embedded"))
    assert found.completion == "2\x85"


# -- without permission ---------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """Create a folder without permissions. The system calls are patched to refuse, since tests may run as root."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "p.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    stat, listdir, access, lstat, opened = os.stat, os.listdir, os.access, os.lstat, os.open

    def inside(path):
        return (
            isinstance(path, str | os.PathLike)
            and str(folder) in os.path.abspath(path)
            and os.path.abspath(path) != str(folder)
        )

    def refusing(call):
        def refused(path, *args, **kwargs):
            if inside(path):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return refused

    monkeypatch.setattr(os, "stat", refusing(stat))
    monkeypatch.setattr(os, "lstat", refusing(lstat))
    monkeypatch.setattr(os, "open", refusing(opened))
    monkeypatch.setattr(
        os, "listdir", lambda path=".": refusing(listdir)(folder / "x" if str(path) == str(folder) else path)
    )
    monkeypatch.setattr(
        os,
        "access",
        lambda path, *args, **kw: not inside(path) and str(path) != str(folder) and access(path, *args, **kw),
    )
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "eval --benchmarks CLOSED/p.jsonl --output out",
        "eval --benchmarks math500=CLOSED/p.jsonl --output out",
        "eval --output CLOSED/out",
        "eval --model CLOSED/model --output out",
        "eval --table CLOSED/run",
        "eval --compare CLOSED/run --output out",
        "analyze --dataset CLOSED/p.jsonl --output out",
        "analyze --rollouts CLOSED/p.jsonl --output out",
        "train --model embedded --internal_layer 2 --dataset CLOSED/p.jsonl --output out",
        "train --model embedded --internal_layer 2 --output out --resume_from_checkpoint CLOSED/checkpoint-1 --dataset arithmetic",
        "train --config CLOSED/c.yaml",
        "report CLOSED",
        "report CLOSED/run",
        "sample --prompt x --chat_template CLOSED/t.jinja",
    ],
)
def test_a_folder_without_permission(tmp_path, monkeypatch, capsys, closed, words):
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("CLOSED", str(closed)).split()) == 2
    assert "closed" in line_of(capsys)


@pytest.mark.parametrize("number", [28, 30, 122, 5, 116])  # ENOSPC, EROFS, EDQUOT, EIO, ESTALE
def test_a_disk_that_refuses(tmp_path, monkeypatch, capsys, number):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number), "out/settings.json")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bupo.run_files.result_cache.write_json", refused)
    assert main([*EVAL, "--output", "out"]) == 2
    assert "out/settings.json cannot be" in line_of(capsys)


@pytest.mark.parametrize("output", ["file/out", "file", "x" * 300, "/proc/out", "a/" * 3000])
def test_an_invalid_folder(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    assert main([*EVAL, "--output", output]) == 2
    line_of(capsys)
    assert os.listdir(tmp_path) == ["file"]
