"""A resumed run is the uninterrupted one under every option that moves logs, evaluations, checkpoints or problems, and over
streams; where it could not be, the option is refused before the run begins.
"""

import random
import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import IterableDataset

from bupo import BuPOConfig, BuPOTrainer, UserError
from bupo.training.checkpoints.stream_position import StreamPosition
from bupo.training.run import check_run_options
from tests.helpers.resumed_runs import OPTIONS, ROWS, CutAfter, differences, streams, train
from tests.training.test_trainer import TOKENIZER, model_of

EVAL_EPOCH: dict[str, Any] = {"eval_strategy": "epoch"}
PLATEAU: dict[str, Any] = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "metric_for_best_model": "reward",
    "lr_scheduler_kwargs": {"patience": 0},
}
# options, and the updates after which the run is resumed; an epoch ends after updates 6 and 12
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "logs and evaluations at an epoch's end": ({**EVAL_EPOCH, "logging_strategy": "epoch", "max_steps": 8}, (6,)),
    "an evaluation at an epoch's end, the last update": ({**EVAL_EPOCH, "max_steps": 6}, (6,)),
    "a log at the end, inside an epoch": ({"logging_strategy": "epoch", "max_steps": 9}, (9,)),
    "all at an epoch's end": ({**EVAL_EPOCH, "logging_strategy": "epoch", "save_strategy": "epoch"}, (6,)),
    "whole phases": ({}, (5, 6, 12)),
    "evaluations at an epoch's end, PPO": ({**EVAL_EPOCH, "advantage_estimator": "ppo"}, (6,)),
    "a delayed evaluation": ({**EVAL_EPOCH, "eval_delay": 1.5}, (6,)),
    "workers": ({"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}, (6, 7)),
    "persistent workers": ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, (5, 6)),
    "persistent workers that evaluate": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "eval_strategy": "steps", "eval_steps": 3},
        (7,),
    ),
    "fractions": ({"eval_strategy": "steps", "eval_steps": 0.25, "logging_steps": 0.3}, (5, 6)),
    "an evaluation at the start": ({"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}, (6,)),
    "part of an epoch": ({**EVAL_EPOCH, "num_train_epochs": 1.4, "max_steps": -1}, (5, 6, 9)),
    "a plateau": ({**EVAL_EPOCH, **PLATEAU}, (6, 7)),
    "restarts": ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}}, (7,)),
    "the best checkpoints": (
        {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "reward"},
        (),
    ),
    "the best model": (
        {**EVAL_EPOCH, "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "reward"},
        (6,),
    ),
    "split batches": ({"accelerator_config": {"split_batches": True}}, (7,)),
    "an unseeded sampler": ({"accelerator_config": {"use_seedable_sampler": False}}, (6, 8)),
    "another seed for data": ({"data_seed": 7}, (7,)),
    "an adaptive entropy bonus": (
        {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0, "internal_steps": 0},
        (6, 7),
    ),
    "in the order of the data set": ({"shuffle_dataset": False}, (8,)),
    "by length": ({"train_sampling_strategy": "group_by_length"}, (8,)),
    "a dropped last batch": ({"dataloader_drop_last": True}, (7,)),
    "counted tokens": ({"include_num_input_tokens_seen": "all"}, (7,)),
    "an emptied cache": ({"torch_empty_cache_steps": 2}, (7,)),
    "noise on embeddings": ({"neftune_noise_alpha": 5.0}, (7,)),
    "another optimizer": ({"optim": "adafactor"}, (7,)),
    "gradients of several passes": ({**EVAL_EPOCH, "gradient_accumulation_steps": 2, "max_steps": 7}, (3, 6)),
    "several iterations": ({**EVAL_EPOCH, "num_iterations": 2, "max_steps": 14}, (7, 12)),
    "a table of completions": (
        {"log_completions": True, "log_unique_prompts": True, "logging_strategy": "epoch"},
        (6,),
    ),
}
FAST = ("logs and evaluations at an epoch's end",)


def cases(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases(CASES, FAST))
def test_a_resumed_run_is_the_whole_one(tmp_path, name):
    options, updates = CASES[name]
    options = {"max_steps": 9, **({"save_steps": updates[0]} if len(updates) == 1 else {}), **options}
    whole = train(tmp_path / "whole", **options)
    there = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    for update in [number for number in updates if number <= there[-1]] or there[:2]:
        folder = tmp_path / str(update)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{update}", folder / f"checkpoint-{update}")
        resumed = train(folder, folder / f"checkpoint-{update}", **options)
        assert differences(whole, resumed, update) == [], update


@pytest.mark.slow
def test_a_run_that_is_cut_twice_at_an_epochs_end_is_the_whole_one(tmp_path):
    """Before the evaluation, and again between the evaluation and the checkpoint that the epoch's end saves."""
    options: dict[str, Any] = {**EVAL_EPOCH, "logging_strategy": "epoch", "max_steps": 9}
    whole = train(tmp_path / "whole", **options)
    folder = tmp_path / "cut"
    train(folder, cut=CutAfter(6), **options)
    train(folder, folder / "checkpoint-6", cut=CutAfter(7), **options)
    resumed = train(folder, folder / "checkpoint-7", **options)
    assert differences(whole, resumed, 7) == []


def test_the_comparison_sees_what_differs(tmp_path):
    whole, other = (train(tmp_path / str(seed), max_steps=2, save_strategy="no", seed=seed) for seed in (0, 1))
    found = " ".join(differences(whole, other, 0))
    assert all(name in found for name in ("prompts", "log", "weights"))
    assert differences(whole, whole, 0) == []


# -- streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases(streams(), ("shuffled in a buffer",)))
def test_a_resumed_stream_goes_on_in_its_pass(tmp_path, kind):
    """Resumed inside a later pass, inside a rollout batch of it, and right where a pass ends."""
    make = streams()[kind]
    updates = {"shuffled in a buffer": (10,)}.get(kind, (4, 6, 7, 8, 10, 12))
    options: dict[str, Any] = {"max_steps": 13} if len(updates) > 1 else {"max_steps": 11, "save_steps": updates[0]}
    whole = train(tmp_path / "whole", problems=make(), **options)
    batches = [whole.prompts[start][1] for start in range(0, len(whole.prompts), 4)]
    assert len(set(batches)) < len(batches), "no second pass"
    for update in updates:
        folder = tmp_path / str(update)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{update}", folder / f"checkpoint-{update}")
        resumed = train(folder, folder / f"checkpoint-{update}", problems=make(), **options)
        assert differences(whole, resumed, update) == [], update


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["eval_strategy", "logging_strategy", "save_strategy"])
def test_a_stream_ends_its_epochs_as_the_whole_run(tmp_path, strategy):
    """An epoch is a pass: three rollout batches of the seven problems."""
    make = streams()["generator"]
    options: dict[str, Any] = {strategy: "epoch", "max_steps": 13}
    whole = train(tmp_path / "whole", problems=make(), **options)
    for update in (6, 12):
        folder = tmp_path / str(update)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{update}", folder / f"checkpoint-{update}")
        resumed = train(folder, folder / f"checkpoint-{update}", problems=make(), **options)
        assert differences(whole, resumed, update) == [], update


def numbers(count):
    return IterableDataset.from_generator(lambda: ({"prompt": f"{n}+1="} for n in range(count)))


def drawn():
    return IterableDataset.from_generator(lambda: ({"prompt": f"{random.randrange(10**9)}+1="} for _ in range(6)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda: numbers(8).skip(1), pytest.param(lambda: numbers(4), marks=pytest.mark.slow), drawn],
    ids=["skipped", "fewer", "drawn"],
)
def test_a_stream_that_gives_other_rows_is_refused(tmp_path, make):
    """Another one, a shorter one, and one that is random."""
    make_first = drawn if make is drawn else lambda: numbers(7)
    train(tmp_path, problems=make_first(), max_steps=5, save_steps=5)
    with pytest.raises(UserError, match="train_dataset, a stream, does not yield the same rows as before"):
        train(tmp_path, tmp_path / "checkpoint-5", problems=make(), max_steps=7)


def test_messages_as_text_in_a_stream_are_refused(tmp_path):
    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}, {"prompt": '[{"role": "user", "content": "1+3="}]'}]
    with pytest.raises(UserError, match=r"a stream, row \d: the prompt is messages written as text"):
        train(tmp_path, problems=IterableDataset.from_generator(lambda: iter(rows)))


def test_a_place_is_that_of_the_rows_that_were_trained_on():
    """A loader reads ahead; the checksum is that of the batches before the place, whatever was read after."""
    rows = [[{"prompt": str(n), "image": object(), "array": [n]}] for n in range(9)]
    one, other, third = StreamPosition(), StreamPosition(), StreamPosition()
    one.begin_pass(2, 100, 0)
    for batch in rows[:5]:
        assert one.wrap_collator(lambda batch: batch)(batch) is batch
    state = one.state(103, ended=False)
    assert (state["pass"], state["batches"]) == (2, 3)
    assert one.state(105, ended=True) == {"pass": 3, "batches": 0, "checksum": ""}
    other.load(state)
    other.begin_pass(2, 103, other.get_batches_to_skip("checkpoint"))
    for batch in rows[:3]:
        other.wrap_collator(list)(batch)
    other.check_position_reached()
    third.load(state)
    third.begin_pass(2, 103, 3)
    with pytest.raises(UserError, match="does not yield the same rows"):
        for batch in [*rows[:2], rows[4]]:
            third.wrap_collator(list)(batch)
    with pytest.raises(UserError, match="holds no position in the stream"):
        StreamPosition().get_batches_to_skip("checkpoint")


# -- refused before the run begins ---------------------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "ignore_data_skip": {"ignore_data_skip": True},
    "dataloader_in_order": {"dataloader_in_order": False, "dataloader_num_workers": 2},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("phase", [1, 2])
def test_an_option_that_keeps_a_run_from_resuming_is_refused_at_the_start(tmp_path, name, phase):
    args = BuPOConfig(str(tmp_path / "run"), **{**OPTIONS, "internal_steps": phase % 2, **REFUSED[name]})
    with pytest.raises(UserError, match=f"{name} is .*leave the option out"):
        BuPOTrainer(model_of(), len, args, train_dataset=ROWS, processing_class=TOKENIZER)
    with pytest.raises(UserError, match=f"{name} is "):
        check_run_options(cast(Any, SimpleNamespace(config=args, options=SimpleNamespace(check=lambda: None))))
    assert not (tmp_path / "run").exists()


def test_a_cut_is_as_a_kill(tmp_path):
    seen = train(tmp_path, cut=CutAfter(2), max_steps=4)
    assert not seen.rows and sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
