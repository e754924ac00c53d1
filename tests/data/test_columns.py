"""Every column of a data set reaches the reward functions unchanged, and prompts keep all fields of their messages."""

import json
import logging
import time
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from bupo import BuPOConfig, TrainOptions, UserError, load_problems
from bupo.data.chat_templates import join_messages, tokenize_prompt
from bupo.data.columns import make_dataset, replace_columns
from bupo.data.problems import check_problems, compute_problems_sha256
from bupo.data.prompts import check_not_serialized, get_message_text, is_serialized_messages
from bupo.training.run import train
from tests.training.test_trainer import TOKENIZER, model_of

ROWS: list[dict[str, Any]] = [
    {
        "problem": f"{n}+1",
        "solution": f"\\boxed{{{n + 1}}}",
        "answer": n + 1,
        "difficulty": None if n % 3 == 0 else n / 4,
        "tags": ["sum"] * (n % 3),
        "meta": {"source": {"book": "b", "page": n}} if n % 2 else {"year": 2000 + n, "notes": [None, "x"]},
        "mixed": n if n % 2 else "text",
        "flag": n % 2 == 0,
        "rubric": None,
    }
    for n in range(12)
]


def written(folder, rows, suffix=".jsonl"):
    path = folder / f"p{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_columns_of_json_are_unchanged(tmp_path, suffix):
    problems = load_problems(written(tmp_path, ROWS, suffix))
    for row, source in zip(problems, ROWS, strict=True):
        assert row.pop("prompt") == [{"role": "user", "content": source["problem"]}]
        assert row.pop("answer") == str(source["answer"])
        assert row == {name: value for name, value in source.items() if name != "answer"}
        assert type(row["mixed"]) is type(source["mixed"])


def test_columns_of_parquet_are_unchanged(tmp_path):
    rows = [{**row, "mixed": row["problem"], "meta": {"a": {"b": [n]}, "c": None}} for n, row in enumerate(ROWS)]
    problems = load_problems(written(tmp_path, rows, ".parquet"), shuffle_seed=3, size=5)
    by_problem = {row["problem"]: row for row in rows}
    assert len(problems) == 5
    for row in problems:
        source = by_problem[row["problem"]]
        assert {name: row[name] for name in source if name != "answer"} == {
            name: value for name, value in source.items() if name != "answer"
        }


def test_values_come_back_from_any_column():
    columns: dict[str, list] = {
        "bools_and_numbers": [True, 2, 0.5],
        "nan": [float("nan"), 1.0, None],
        "dicts": [{"a": 1}, {"b": [None, {"c": []}]}, None],
        "lists": [[1, "x"], [], None],
        "plain": [1, 2, 3],
    }
    rows = make_dataset(columns)
    for name, values in columns.items():
        assert json.dumps(list(rows[name])) == json.dumps(values)
    replaced = replace_columns(rows.select([2, 0]), {"plain": ["a", {"b": 1}], "new": [None, 1]})
    assert list(replaced["plain"]) == ["a", {"b": 1}] and list(replaced["new"]) == [None, 1]
    assert list(replaced["dicts"]) == [None, {"a": 1}]


@pytest.mark.parametrize(
    ("prompt_column", "answer_column", "kept"),
    [
        ("question", None, {"original_prompt": "own prompt", "solution": "s", "question": "q"}),
        (None, "gold", {"original_answer": "own answer", "gold": 7}),
        ("extra.text", "extra.gold", {"original_prompt": "own prompt", "original_answer": "own answer"}),
    ],
)
def test_an_existing_column_is_renamed(tmp_path, caplog, prompt_column, answer_column, kept):
    row: dict[str, Any] = {
        **{"prompt": "own prompt", "question": "q", "answer": "own answer", "gold": 7, "solution": "s"},
        "extra": {"text": "t", "gold": "g"},
    }
    path = written(tmp_path, [row])
    with caplog.at_level(logging.WARNING):
        problems = load_problems(path, prompt_column=prompt_column, answer_column=answer_column)
    assert problems[0] | kept == problems[0]
    assert len(caplog.records) == len([name for name in kept if name.startswith("original_")])
    assert (
        f"the existing column {next(iter(kept)).removeprefix('original_')} is renamed {next(iter(kept))}" in caplog.text
    )


def test_columns_that_trl_cannot_pass_are_left_out_with_a_warning(tmp_path, caplog):
    row = {"prompt": "p", "answer": "1", "completions": ["a"], "trainer_state": 1, "images": None, "completion": "c"}
    problems = load_problems(written(tmp_path, [row]))
    assert problems.column_names == ["prompt", "answer", "completion"]
    assert "completions, trainer_state left out: TRL passes" in caplog.text and "images left out" in caplog.text


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}
CONVERSATIONS: list[list[dict]] = [
    [{"role": "user", "content": "1+1"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}], "name": "ann"},
        {"role": "assistant", "content": "", "thinking": "two?", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"},
    ],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "is", "weight": 0}],
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_messages_keep_all_fields(tmp_path, suffix):
    path = written(tmp_path, [{"prompt": prompt, "answer": "1"} for prompt in CONVERSATIONS], suffix)
    assert list(load_problems(path)["prompt"]) == CONVERSATIONS
    with_system = load_problems(path, system_prompt="S")["prompt"]
    assert [prompt[0]["content"] for prompt in with_system] == ["S", "s", "S"]


def test_fields_that_arrow_added_are_removed(tmp_path):
    simple = [[{**message, "content": get_message_text(message)} for message in prompt] for prompt in CONVERSATIONS]
    simple[1][2]["tool_calls"] = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    path = written(tmp_path, [{"prompt": prompt, "answer": "1"} for prompt in simple], ".parquet")
    assert list(load_problems(path)["prompt"]) == simple


def test_a_tool_call_without_content_gets_an_empty_one(tmp_path):
    """TRL reads `content` of every message."""
    prompt: list[dict[str, Any]] = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]
    for message in (prompt[1], {**prompt[1], "content": None}):
        path = written(tmp_path, [{"prompt": [prompt[0], message], "answer": "1"}])
        assert load_problems(path)[0]["prompt"] == [prompt[0], {**prompt[1], "content": ""}]


def test_messages_of_parts_are_read_as_text_where_there_is_no_template():
    assert join_messages(CONVERSATIONS[1]) == "s\n\n1+1\n\n\n\n2\n"
    plain = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer)
    assert tokenize_prompt(plain, CONVERSATIONS[1]) == tokenize_prompt(plain, "s\n\n1+1\n\n\n\n2\n")


MESSAGES = [{"role": "user", "content": 'a "b"'}]
SERIALIZED = [
    json.dumps(MESSAGES),
    json.dumps(MESSAGES, indent=2),
    str(MESSAGES),
    f"  {json.dumps(MESSAGES)}\n",
    json.dumps(json.dumps(MESSAGES)),
    json.dumps(MESSAGES[0]),
    json.dumps({"messages": MESSAGES}),
    json.dumps([{"from": "human", "value": "q"}]),
    "[{'content': 'a', 'role': 'system'}\n {'content': 'b', 'role': 'user'}]",  # as numpy prints a column of a parquet file
    '\ufeff[{"role": "user", "content": "1+1="}]',
    '\u200b\n [{"role": "user", "content": "1+1="}]\u200b\n',
    "array([{'content': '1+1=', 'role': 'user'}], dtype=object)",
    "array([{'content': '1+1=', 'role': 'user'}],\n      dtype=object)",
    'b\'[{"role": "user", "content": "1+1="}]\'',
    "[ChatMessage(role='user', content='1+1=')]",
    '[{"type": "text", "text": "1+1="}]',
]
IN_WORDS = [
    "1+1",
    "[1, 2, 3] sorted is",
    'What is the role in [{"role": "user", "content": "x"}]?',
    '{"a": 1, "content": 2}',
    "{x : x > 0}",
    'Mend this JSON: {"role": "user", "content": }',
    '{"type": "review", "text": "a fine book"}',
    "f(role='x') = [content='y']",
    '[{"role": "user", "content": "x"}] is a list of how many messages?',
    "",
]


@pytest.mark.parametrize("prompt", SERIALIZED)
def test_messages_as_text_are_refused(tmp_path, prompt):
    assert is_serialized_messages(prompt)
    path = written(tmp_path, [{"prompt": "1+1", "answer": "1"}, {"prompt": prompt, "answer": "1"}])
    with pytest.raises(
        UserError, match=r"row 1: the prompt is messages written as text, .* store them as a list"
    ) as error:
        load_problems(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="problems, row 0: the prompt is messages written as text"):
        check_problems(Dataset.from_dict({"prompt": [prompt]}), "problems", ("prompt",))


@pytest.mark.parametrize("prompt", IN_WORDS)
def test_text_with_brackets_is_a_prompt(prompt):
    assert not is_serialized_messages(prompt)


def test_problems_without_answers_are_for_rewards_that_need_none(tmp_path):
    path = written(tmp_path, [{"prompt": "1+1", "topic": "sums"}, {"prompt": "2+2", "topic": "sums"}])
    with pytest.raises(UserError, match="has no answer column"):
        load_problems(path)
    problems = load_problems(path, needs_answers=False)
    assert problems.column_names == ["prompt", "topic"]
    with pytest.raises(UserError, match="has no answer column gold"):
        load_problems(path, needs_answers=False, answer_column="gold")
    odd = [{"prompt": "1+1", "answer": {"value": 2}}, {"prompt": "2+2", "answer": None}]
    assert list(load_problems(written(tmp_path, odd), needs_answers=False)["answer"]) == [{"value": 2}, None]


def test_the_checksum_counts_every_column(tmp_path):
    sums = {compute_problems_sha256(load_problems(written(tmp_path, rows))) for rows in (ROWS, ROWS[:-1])}
    changed = [*ROWS[:-1], {**ROWS[-1], "meta": {"source": {"book": "b", "page": 12}}}]
    assert len(sums | {compute_problems_sha256(load_problems(written(tmp_path, changed)))}) == 3


def test_the_checksum_is_that_of_the_values():
    """The texts of images and arrays hold a memory address, or leave numbers out."""
    rows = {"prompt": ["1+1="], "pixels": [[[0.0] * 64] * 64]}

    def problems(colour, pixel=0.0, kind="torch"):
        values = [[[0.0] * 64] * 63 + [[pixel] * 64]]
        picture = Image.new("RGB", (4, 4), (colour, 0, 0))
        return Dataset.from_dict({**rows, "pixels": values, "picture": [picture]}).with_format(kind, ["pixels"], True)

    same = {compute_problems_sha256(problems(1)) for _ in range(3)}
    assert len(same) == 1
    assert len(same | {compute_problems_sha256(problems(2)), compute_problems_sha256(problems(1, 1.0))}) == 3


SEEN: list[dict] = []


def looks(completion_ids, difficulty, meta, prompts, tags, mixed, rubric, answer, solution, **kwargs):
    """Record the arguments that TRL passes."""
    columns = zip(prompts, difficulty, meta, tags, mixed, rubric, answer, solution, strict=True)
    names = ("prompt", "difficulty", "meta", "tags", "mixed", "rubric", "answer", "solution")
    SEEN.extend(dict(zip(names, row, strict=True)) for row in columns)
    return [float(sum(ids) % 5) for ids in completion_ids]


OPTIONS: dict = {
    **{"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_generations": 4, "max_completion_length": 4},
    **{"max_steps": 4, "probe_every": 0, "report_to": "none", "save_strategy": "no", "logging_steps": 1},
}


@pytest.mark.parametrize(("phase", "template"), [(1, True), pytest.param(2, False, marks=pytest.mark.slow)])
def test_rewards_get_every_column_while_a_run_trains(tmp_path, monkeypatch, phase, template):
    """The dataset is a file, and one reward function is TRL's, which needs `solution`; prompts may be text."""
    monkeypatch.setattr("bupo.training.run.draw_figures", lambda *a: None)
    SEEN.clear()
    tokenizer = TOKENIZER if template else TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = TOKENIZER.pad_token, TOKENIZER.eos_token
    config = BuPOConfig(str(tmp_path / "run"), internal_layer=2, internal_steps=2 if phase == 1 else 0, **OPTIONS)
    options = TrainOptions(
        dataset=written(tmp_path, ROWS), reward_funcs=["tests.data.test_columns.looks", "trl.rewards.accuracy_reward"]
    )
    options.max_prompt_tokens = 60
    if not template:
        options.reward_funcs = ["tests.data.test_columns.looks"]
    train(model_of(), config, options, tokenizer=tokenizer)
    by_solution = {row["solution"]: row for row in ROWS}
    assert len(SEEN) == 16
    for row in SEEN:
        source = by_solution[row["solution"]]
        prompt = [{"role": "user", "content": source["problem"]}]
        assert row.pop("prompt") == (prompt if template else source["problem"] + "\n")
        assert row.pop("answer") == str(source["answer"])
        assert row == {name: source[name] for name in row}


def test_a_prompt_of_blanks_is_scanned_once():
    started = time.perf_counter()
    for text in ("  " * 1_500_000 + "1", "\ufeff " * 1_000_000 + "'" + " " * 1_000_000 + "1"):
        check_not_serialized(text, "problems", 0)
    assert time.perf_counter() - started < 5
