"""Problems from every source, and one-line errors for invalid ones."""

import hashlib
import json
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bupo import UserError, load_problems
from bupo.data.arithmetic import make_arithmetic_problem
from bupo.data.problems import compute_problems_sha256, shuffle_indices

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_arithmetic_is_right_and_depends_on_its_arguments_only():
    for index in range(300):
        problem = make_arithmetic_problem("train", 3, index)
        value = eval(problem.question)  # the expression has digits, + and - only
        assert problem.answer == str(value) and problem.direct_answer == f"\\boxed{{{value}}}"
        *steps, last = problem.worked_answer.split(";")
        assert last == problem.direct_answer and len(steps) == 2
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert problem == make_arithmetic_problem("train", 3, index)
    with pytest.raises(ValueError, match="'train' or 'test', got 'dev'"):
        make_arithmetic_problem("dev", 0, 0)


def test_train_and_test_share_no_question():
    train = {make_arithmetic_problem("train", seed, i).question for seed in range(3) for i in range(2000)}
    test = {make_arithmetic_problem("test", seed, i).question for seed in range(3) for i in range(2000)}
    assert not train & test and min(len(train), len(test)) > 5900


@pytest.mark.parametrize("name", ["arithmetic", "reasoning_gym:chain_sum"])
def test_procedural_tasks(name):
    train, again = load_problems(name, size=20, seed=1), load_problems(name, size=20, seed=1)
    assert train.to_list() == again.to_list() and len(train) == 20
    assert train[0]["prompt"][-1]["role"] == "user" and math.isfinite(float(train[0]["answer"]))
    test = load_problems(name, "test", size=20, seed=1)
    assert not {p["prompt"][0]["content"] for p in train} & {p["prompt"][0]["content"] for p in test}


def test_reasoning_gym_options():
    problems = load_problems("reasoning_gym:chain_sum", size=5, config='{"min_terms": 2, "max_terms": 2}')
    expressions = [re.search(r"[\d+*/ -]+(?= =)", p["prompt"][0]["content"]) for p in problems]
    assert [len(re.findall(r"\d+", found[0])) for found in expressions if found] == [2] * 5
    for config in ('{"min_terms": "x"}', '{"nope": 1}', "{"):
        with pytest.raises(UserError, match="reasoning_gym:chain_sum cannot be made with"):
            load_problems("reasoning_gym:chain_sum", size=5, config=config)
    with pytest.raises(UserError, match="reasoning_gym:nope cannot be made: ValueError: Dataset 'nope'"):
        load_problems("reasoning_gym:nope", size=5)
    with pytest.raises(UserError, match="splits train and test, not 'dev'"):
        load_problems("arithmetic", "dev")


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_files(tmp_path, suffix):
    rows = [{"problem": f"{i}+1", "solution": i + 1, "hint": f"{i}+2", "other": i + 2} for i in range(4)]
    path = write(tmp_path / f"p{suffix}", rows)
    problems = load_problems(path, system_prompt="Box it.", size=3)
    assert len(problems) == 3
    assert problems[1]["prompt"] == [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1+1"}]
    assert problems[1]["answer"] == "2"
    named = load_problems(path, prompt_column="hint", answer_column="other")
    assert len(named) == 4 and named[3] == {"prompt": [{"role": "user", "content": "3+2"}], "answer": "5", **rows[3]}


@pytest.mark.parametrize(
    ("seed", "order"),  # order of `sha256sum` and `sort`: printf "SEED NUMBER" | sha256sum
    [(0, [6, 4, 2, 1, 7, 5, 0, 8, 9, 3]), (7, [3, 7, 8, 6, 9, 1, 4, 2, 0, 5])],
)
@pytest.mark.parametrize("size", [None, 4, 99])
def test_a_random_subset_is_the_same_anywhere(tmp_path, seed, order, size):
    assert shuffle_indices(10, seed) == order
    path = write(tmp_path / "p.jsonl", [{"problem": f"{i}+1", "answer": i + 1} for i in range(10)])
    problems = load_problems(path, size=size, shuffle_seed=seed)
    assert problems["answer"] == [str(number + 1) for number in order[:size]]


def test_a_shuffle_is_even():
    firsts = [shuffle_indices(4, seed)[0] for seed in range(400)]
    assert all(60 < firsts.count(number) < 140 for number in range(4))  # 100 +- 4.6 standard deviations


@pytest.mark.parametrize("name", ["arithmetic", "reasoning_gym:chain_sum"])
def test_generated_problems_are_not_shuffled(name):
    with pytest.raises(UserError, match=f"shuffle_seed is 3, but the problems of {name} are made at random, by seed"):
        load_problems(name, size=4, shuffle_seed=3)


def test_the_checksum_of_problems(tmp_path):
    """Equal to printf '%s\\n%s\\n' ROW ROW | sha256sum. It depends on every row and on their order."""
    path = write(tmp_path / "p.jsonl", [{"problem": f"1+{i} \u00e9", "answer": i + 1} for i in (1, 2)])
    known = "96d8cdc7ad25fd3e98121e07da68539a5ef3d0ac4de51a300557e9106356f8b5"
    problems = load_problems(path).select_columns(["prompt", "answer"])
    assert compute_problems_sha256(problems) == known
    assert compute_problems_sha256(problems.select([1, 0])) != known
    row = '{"answer": "%s", "problem": "1+%s \\u00e9", "prompt": [{"content": "1+%s \\u00e9", "role": "user"}]}\n'
    lines = "".join(row % (number + 1, number, number) for number in (1, 2))  # every column counts
    assert compute_problems_sha256(load_problems(path)) == hashlib.sha256(lines.encode()).hexdigest()
    rows = [{"prompt": str(i), "answer": "1"} for i in range(2500)]
    whole = compute_problems_sha256(Dataset.from_list(rows))
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    assert whole == hashlib.sha256(lines.encode()).hexdigest()
    rows[1234]["answer"] = "2"
    assert compute_problems_sha256(Dataset.from_list(rows)) != whole


def test_nested_columns_and_messages(tmp_path):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = write(tmp_path / "p.parquet", [{"prompt": prompt, "reward_model": {"ground_truth": "5", "style": "rule"}}])
    row = {"prompt": prompt, "answer": "5", "reward_model": {"ground_truth": "5", "style": "rule"}}
    assert load_problems(path, system_prompt="other")[0] == row


@pytest.mark.skipif(not SHARED.exists(), reason="the problem sets are not here")
@pytest.mark.parametrize(
    ("file", "rows"),
    [("math500", 500), ("amc2023", 40), ("aime_2024", 30), ("aime_2025", 30), ("deepmath-5k", 5000)],
)
def test_the_papers_problem_sets(file, rows):
    problems = load_problems(str(SHARED / f"{file}.parquet"))
    assert len(problems) == rows
    assert [m["role"] for m in problems[0]["prompt"]][-1] == "user" and problems[0]["answer"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{not json", "cannot be read as jsonl"),
        ("[]", "holds no problems|cannot be read"),
        ('{"text": "a"}', "has no prompt column prompt or problem or question; its columns are text: name one with"),
        ('{"prompt": "a"}', "has no answer column answer or final_answer"),
        ('{"prompt": "a", "answer": null}', "row 0: the answer is empty"),
        ('{"prompt": "", "answer": "1"}', "row 0: the prompt is no text and no list of messages, or is empty"),
        ('{"prompt": 5, "answer": "1"}', "row 0: the prompt is no text and no list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "row 0: the prompt is no text"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_problems(str(path))


def test_missing_and_invalid_sources(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"absent\.parquet is no file"):
        load_problems(str(tmp_path / "absent.parquet"))
    with pytest.raises(UserError, match="is no file"):
        load_problems(str(tmp_path))
    (tmp_path / "p.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"is no \.parquet, \.jsonl, \.json file"):
        load_problems(str(tmp_path / "p.csv"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 rubbish")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        load_problems(str(tmp_path / "broken.parquet"))
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(UserError, match="has no answer column gold; its columns are"):
        load_problems(path, answer_column="gold")
    with pytest.raises(UserError, match="must be positive, got 0"):
        load_problems(path, size=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"dataset 'nobody/nothing' .* cannot be loaded.*give a hub id"):
        load_problems("nobody/nothing")


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", [{"problem": "1+1", "answer": "2"}])
    monkeypatch.setattr("bupo.data.problems.os.access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(UserError, match=r"p\.jsonl cannot be read: you have no read permission"):
        load_problems(path)


def test_rows_of_files_are_unchanged(tmp_path):
    """Dates are not parsed, and a column may exist in some rows only."""
    rows = [{"question": "1+1", "answer": "2024-01-01"}, {"question": "2+2", "answer": "4", "more": 1}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    for path in (write(tmp_path / "p.jsonl", rows), *(tmp_path / n for n in ("list.json", "lines.json", "p.parquet"))):
        problems = load_problems(str(path))
        assert problems["answer"] == ["2024-01-01", "4"]
        assert [messages[0]["content"] for messages in problems["prompt"]] == ["1+1", "2+2"]


def test_arithmetic_of_more_numbers_has_as_many_steps():
    problems = load_problems("arithmetic-5", "test", size=50)
    for prompt, answer in zip(problems["prompt"], problems["answer"], strict=True):
        question = prompt[0]["content"]
        assert len(re.findall(r"\d+", question)) == 5 and str(eval(question)) == answer
    assert load_problems("arithmetic-3", size=20).to_dict() == load_problems("arithmetic", size=20).to_dict()
    with pytest.raises(UserError, match="arithmetic-1"):
        load_problems("arithmetic-1")
