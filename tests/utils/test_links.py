"""Commands write, delete and read only inside their folder: links out of it are not followed, and pipes do not block."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import bupo
from bupo.cli.main import main
from bupo.cli.parsing import ALLOWED_VARIABLES
from bupo.models.loading import load_model, load_tokenizer, resolve_model_path
from bupo.reports.scoreboard import write_scoreboard
from bupo.run_files.provenance import get_git_state
from bupo.run_files.result_cache import ResultCache, get_label_folder
from bupo.training.checkpoints.integrity import find_damage
from bupo.training.checkpoints.writer import delete_old_checkpoints, recover_interrupted_save
from bupo.training.run_directory import clear_run_directory
from bupo.utils.errors import UserError
from bupo.utils.files import (
    append_text,
    atomic_write,
    make_folder,
    read_appended_rows,
    remove_path,
    repair_appended_rows,
    write_json,
)
from bupo.utils.lock import LOCK_FILE, folder_lock
from bupo.utils.safe_read import check_model_folder


@pytest.fixture
def elsewhere(tmp_path):
    """Create a folder of the user that no command may change."""
    folder = tmp_path / "elsewhere"
    (folder / "former" / "checkpoint-1").mkdir(parents=True)
    (folder / "gone").mkdir()
    for name in ("precious", "former/checkpoint-1/precious", "settings.json"):
        (folder / name).write_text("{}")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        str(path): b"" for path in folder.rglob("*") if path.is_dir()
    }


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["summary.json", "summary.json.part"])
def test_a_whole_file_replaces_the_link_in_its_place(run, elsewhere, place):
    (run / place).symlink_to(elsewhere / "precious")
    write_json(run / "summary.json", {"a": 1})
    assert json.loads((run / "summary.json").read_text()) == {"a": 1}
    assert not (run / "summary.json").is_symlink() and not os.path.lexists(run / "summary.json.part")


@pytest.mark.parametrize("place", ["summary.json", "summary.json.part"])
def test_a_complete_file_replaces_a_pipe_and_not_a_folder(run, place):
    os.mkfifo(run / place)
    write_json(run / "summary.json", {})
    (run / "other.json").mkdir()
    with pytest.raises(UserError, match=r"other.json is a folder"), atomic_write(run / "other.json") as part:
        part.write_text("x")
    assert os.listdir(run / "other.json") == []


@pytest.mark.parametrize("make", [lambda path, to: path.symlink_to(to / "precious"), lambda path, to: os.mkfifo(path)])
@pytest.mark.parametrize("name", ["metrics.jsonl", LOCK_FILE])
def test_lines_and_locks_are_refused_by_a_link_or_a_pipe(run, elsewhere, make, name):
    make(run / name, elsewhere)
    with pytest.raises(UserError, match=rf"{name} is (a link|no regular file)"):
        if name == LOCK_FILE:
            with folder_lock(run):
                pass
        else:
            append_text(run / name, "a row\n")
    with pytest.raises(UserError, match=rf"{name} is (a link|no regular file)"):
        read_appended_rows(run / name, json.loads)


@pytest.mark.parametrize("kind", ["socket", "device"])
def test_other_things_than_files_are_refused(run, kind):
    import socket

    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(run)
            one.bind("rows.jsonl")
            os.chdir(here)
    else:
        os.mknod(run / "rows.jsonl", 0o666 | 0o020000, os.makedev(1, 3)) if os.geteuid() == 0 else pytest.skip(
            "root makes devices"
        )
    with pytest.raises(UserError, match="is no regular file"):
        append_text(run / "rows.jsonl", "x")


@pytest.mark.parametrize("name", ["metrics.jsonl", LOCK_FILE])
def test_a_hard_link_is_not_written_through(run, elsewhere, name):
    os.link(elsewhere / "precious", run / name)
    with pytest.raises(UserError, match=rf"{name} is a hard link, so another file would change with it"):
        if name == LOCK_FILE:
            with folder_lock(run):
                pass
        else:
            append_text(run / name, "a row\n")
    write_json(run / name, {"a": 1})  # a complete file replaces it


def test_half_a_last_line_is_not_cut_off_another_file(run, tmp_path):
    (tmp_path / "other").write_text('{"a": 1}\n{"a"')
    os.link(tmp_path / "other", run / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl is a hard link"):
        repair_appended_rows(run / "rows.jsonl", json.loads)
    assert (tmp_path / "other").read_text() == '{"a": 1}\n{"a"'
    (tmp_path / "other").unlink()
    assert repair_appended_rows(run / "rows.jsonl", json.loads) == [{"a": 1}]
    assert (run / "rows.jsonl").read_text() == '{"a": 1}\n'


def store(folder, **more):
    return ResultCache(folder, "rows.jsonl", "rows", lambda line: (line, line), lambda key, row: row, {"x": 1}, **more)


def test_a_store_stays_in_its_folder(run, elsewhere):
    (run / "label").symlink_to(elsewhere)
    with pytest.raises(UserError, match="label is a link, which is not followed"):
        get_label_folder(run, "label")
    own = run / "own"
    store(own).begin()
    (own / "rows.jsonl").symlink_to(elsewhere / "precious")
    with pytest.raises(UserError, match=r"rows.jsonl is a link"):
        store(own)
    other = ResultCache(
        own, "rows.jsonl", "rows", lambda line: (line, line), lambda key, row: row, {"x": 2}, overwrite=True
    )
    other.begin()  # deletes the link, not its target
    other.add("a", "a")
    assert not (own / "rows.jsonl").is_symlink() and (own / "rows.jsonl").read_text() == "a\n"


def test_a_folder_of_a_run_that_is_a_link_is_refused(run, elsewhere):
    (run / "figures").symlink_to(elsewhere)
    for path in (run / "figures", run / "figures" / "deeper"):
        with pytest.raises(UserError, match="figures is a link"):
            make_folder(path, run)


def test_staged_checkpoints_of_a_link_are_left_alone(run, elsewhere):
    (run / "_saving").symlink_to(elsewhere)
    recover_interrupted_save(run)
    assert os.listdir(run) == []
    (run / "_saving").mkdir()
    (run / "_saving" / "former").symlink_to(elsewhere / "former")
    recover_interrupted_save(run)
    assert os.listdir(run) == []


def test_checkpoints_that_are_links_are_unlinked(run, elsewhere):
    for number in (1, 2, 3):
        (run / f"checkpoint-{number}").symlink_to(elsewhere)
    delete_old_checkpoints(run, 1)
    assert os.listdir(run) == ["checkpoint-3"]
    (run / "_saving").symlink_to(elsewhere)
    (run / "finished.json").symlink_to(elsewhere / "precious")
    clear_run_directory(run)
    assert os.listdir(run) == []


def test_deleting_follows_no_link(run, elsewhere):
    (run / "inner").mkdir()
    for place in (run / "link", run / "inner" / "link"):
        place.symlink_to(elsewhere)
    remove_path(run / "link")
    remove_path(run / "inner")
    remove_path(run / "nothing")
    assert os.listdir(run) == []


def test_tables_replace_links(run, elsewhere):
    for name in ("scoreboard.md", "scoreboard.csv"):
        (run / name).symlink_to(elsewhere / "precious")
    row = {
        "method": "m",
        "benchmark": "b",
        "k": 1,
        "problems": 2,
        "seeds": 1,
        "mean": 0.5,
        "sd": 0.0,
        "low": 0.1,
        "high": 0.9,
    }
    write_scoreboard(pd.DataFrame([row]), run)
    assert not any(path.is_symlink() for path in run.iterdir())


def test_the_output_folder_and_those_above_may_be_links(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "one").symlink_to(tmp_path / "disk" / "deep")
    with folder_lock(tmp_path / "runs" / "one"):
        made = get_label_folder(tmp_path / "runs" / "one", "label")
        first = store(made)
        first.begin()
        first.add("a", "a")
    assert (tmp_path / "disk" / "deep" / "label" / "rows.jsonl").read_text() == "a\n"


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model_path("embedded"), folder)
    return folder


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/hostname", "a/../../x", "..\\x", 7, None])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_folder_only(model, name, index):
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"names .* no file of its folder"):
            load(str(model))
    assert "no file of its folder" in str(damage_of_checkpoint(model, index))


def damage_of_checkpoint(model, index):
    """Return the damage of a checkpoint whose other files are intact."""
    (model / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    import torch

    torch.save({"state": {}, "param_groups": []}, model / "optimizer.pt")
    torch.save({}, model / "scheduler.pt")
    torch.save({"python": (), "numpy": (), "cpu": torch.ones(1)}, model / "rng_state.pth")
    return find_damage(model)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_damaged_is_one_line(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json cannot be read"):
        load_model(str(model))


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer_config.json", "generation_config.json"],
)
def test_the_text_of_a_file_elsewhere_is_not_read(model, tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("hunter2 {{ messages[0].content }}")
    (model / name).unlink(missing_ok=True)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    assert (
        main(["eval", "--model", "model", "--benchmarks", "arithmetic", "--size", "1", "--k", "1", "--output", "out"])
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is no regular file of its folder" in line and "hunter2" not in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_templates_elsewhere_is_not_read(model, tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "tool.jinja").write_text("x")
    (model / "additional_chat_templates").symlink_to(tmp_path / "others")
    with pytest.raises(UserError, match=r"tool.jinja is no regular file of its folder"):
        load_tokenizer(str(model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_pipe_in_a_model_does_not_block(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        load_tokenizer(str(model))


def test_an_adapters_folder_is_checked(model, tmp_path):
    (tmp_path / "secret").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"adapter_config.json is no regular file of its folder"):
        bupo.evaluate(
            str(model),
            bupo.EvalOptions(adapter=str(adapter), benchmarks=["arithmetic"], size=1, k=1, output=str(tmp_path / "o")),
        )


def test_the_hubs_cache_is_made_of_links(model, tmp_path):
    """In huggingface_hub's layout, `snapshots/REVISION/FILE` links to `blobs/SUM`, also in folders inside a snapshot."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (model / "extra.jinja").write_text("x")
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "additional_chat_templates" / "t.jinja").symlink_to("../../../blobs/0")
    check_model_folder(snapshot)
    assert load_tokenizer(str(snapshot))("1+1")["input_ids"]
    (snapshot / "more.json").symlink_to("../../../elsewhere.json")
    with pytest.raises(UserError, match=r"more.json"):
        check_model_folder(snapshot)


# -- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "GIT_SSH_COMMAND",
        "GIT_DIR",
        "GIT_EXTERNAL_DIFF",
        "HOME",
        "HF_HOME",
        "HF_ENDPOINT",
        "TRITON_PTXAS_PATH",
        "CC",
        "CUDA_HOME",
        "MPLBACKEND",
        "HF_ALLOW_CODE_EVAL",
        "NCCL_NET_PLUGIN",
        "SHELL",
        "http_proxy",
        "VLLM_PLUGINS",
        "TMPDIR",
        "XDG_CONFIG_HOME",
        "BASH_ENV",
        "HF_MODULES_CACHE",
        "WANDB_BASE_URL",
        "PATH\u200b",
    ],
)
def test_a_configuration_chooses_no_program(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(name, raising=False) if name not in ("PATH", "HOME") else None
    before = dict(os.environ)
    Path("c.yaml").write_text(f"env: {{OMP_NUM_THREADS: 1, {name}: here}}\nmodel: embedded\n", encoding="utf-8")
    assert main(["eval", "--config", "c.yaml", "--output", "out"]) == 2
    assert "which could choose programs" in capsys.readouterr().err
    assert dict(os.environ) == before or {**os.environ} == before | {"TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "")}
    assert os.listdir(tmp_path) == ["c.yaml"]


@pytest.mark.parametrize(
    "name", ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_PROJECT", "NCCL_DEBUG", "HF_HUB_OFFLINE"]
)
def test_other_settings_may_be_set(name):
    assert ALLOWED_VARIABLES.fullmatch(name)


def git(*words, folder):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Create a repository whose configuration names programs, which would all create a file."""
    folder, mark = tmp_path / "repository", tmp_path / "mark"
    folder.mkdir()
    git("init", folder=folder)
    (folder / "a.txt").write_text("one\n")
    git("add", ".", folder=folder)
    git("commit", "-m", "x", folder=folder)
    program = folder / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    for name in (
        "core.fsmonitor",
        "filter.f.clean",
        "filter.f.smudge",
        "filter.F x.process",
        "core.sshCommand",
        "core.pager",
    ):
        git("config", name, str(program), folder=folder)
    git("config", "filter.f.required", "true", folder=folder)
    (folder / ".gitattributes").write_text("*.txt filter=f\n")
    (folder / ".git" / "hooks").mkdir(exist_ok=True)
    shutil.copy(program, folder / ".git" / "hooks" / "post-index-change")
    os.utime(folder / "a.txt", (1, 1))  # forces git to read its content
    monkeypatch.chdir(folder)
    yield folder
    assert not mark.exists()


def test_git_runs_no_program_of_a_repository(repository):
    state = get_git_state()
    assert len(state["revision"]) == 40 and state["dirty"] is False
    (repository / "a.txt").write_text("two\n")
    assert get_git_state()["dirty"] is True


def test_git_is_that_of_the_path_at_the_start(repository, monkeypatch):
    shutil.copy(repository / "program", repository / "git")
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", str(repository), os.environ["PATH"]]))
    assert get_git_state()["revision"]
