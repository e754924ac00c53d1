"""The card beside a saved model, read back as the hub reads it."""

import os
import re

import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from transformers import Trainer

from bupo import BuPOConfig, TrainOptions, train
from bupo.training.model_card import CARD_FILE
from bupo.version import VERSION
from tests.training.test_trainer import config, model_of, trainer_of


def table_of(text):
    """The rows of a card's tables, cell by cell."""
    return [
        re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def trained(folder, **changes):
    trainer = trainer_of(model_of(), config(folder, **changes))
    trainer.train()
    trainer.save_model()
    return trainer, ModelCard.load(folder / CARD_FILE)


def test_it_says_what_the_run_was_and_came_to(tmp_path):
    trainer, card = trained(tmp_path / "my run")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"bupo", "trl"} <= set(card.data.tags) and card.data.base_model is None
    rows = {row[0]: row[1:] for row in table_of(card.text)}
    assert rows["first phase"] == ["layer 2 for 2 rollout batches"] and rows["updates"] == ["8 of 8"]
    assert rows["rollout batch"] == ["4 prompts, 4 answers each"] and rows["seed"] == [str(trainer.args.seed)]
    assert rows["learning rate"] == ["0.01, constant"]
    logged = [row for row in trainer.state.log_history if "reward" in row and "rollout_batch" in row]
    for number, row in (("1", logged[0]), ("2", logged[-1])):
        assert rows[number] == [f"{row[name]:.3f}" for name in ("reward", "entropy", "completions/mean_length")]
    assert "# my run\n" in card.text and f"BuPO (GRPO advantages) with bupo {VERSION} " in card.text
    assert "eprint        = {2512.19673}" in card.text and str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("changes", "method", "row"),
    [
        ({"internal_layer": None, "internal_steps": 0}, "Trained by GRPO with", ("first phase", "none")),
        ({"advantage_estimator": "rloo"}, "BuPO (RLOO advantages)", ("first phase", "layer 2 for 2 rollout batches")),
        ({"internal_schedule": [[1, 1], [2, 1]], "internal_layer": None, "internal_steps": None}, "BuPO",
         ("first phase", "layer 1 for 1 rollout batch, then layer 2 for 1 rollout batch")),
        ({"frozen_up_to_layer": 1, "internal_layer": None, "internal_steps": 0}, "GRPO", ("layers", "1 to 1 frozen")),
        ({"layer_lr_multipliers": {3: 0.5}}, "BuPO", ("layers", "3 and above at 0.5 of the learning rate")),
        ({"frozen_up_to_layer": 1, "layer_lr_multipliers": {3: 0.1}}, "BuPO", ("layers", "1 to 1 frozen; 3 and above at 0.1 of the learning rate")),
        ({"internal_steps": 0, "internal_loss_weight": 0.3}, "BuPO", ("second phase", "the layer's objective has weight 0.3")),
        ({"internal_fade_batches": 2}, "BuPO", ("second phase", "the layer's objective fades out over 2 rollout batches")),
        ({"internal_objective": "shuffled_vocab"}, "BuPO", ("objective of the first phase", "the layer's policy over a shuffled vocabulary (a control), lens raw")),
    ],
)  # fmt: skip
def test_methods_have_their_words(tmp_path, changes, method, row):
    trainer = trainer_of(model_of(), config(tmp_path, **changes))
    trainer.save_model()
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert method in card.text and list(row) in table_of(card.text) and "Nothing was logged." in card.text


def test_a_run_of_the_command_has_one_with_its_data_set(tmp_path, monkeypatch):
    """A name of the hub is told to the hub; a file's and a folder's are this machine's own."""
    args = BuPOConfig(
        str(tmp_path / "run"), internal_steps=0, per_device_train_batch_size=4, num_generations=4, max_steps=1,
        max_completion_length=4, report_to="none", eval_benchmarks=["arithmetic"], eval_problems=4, eval_k=2,
    )  # fmt: skip
    run = train("embedded", args, TrainOptions(dataset="arithmetic", size=8))
    card = ModelCard.load(run.folder / CARD_FILE)
    assert card.data.datasets is None and card.data.base_model is None
    assert "bupo train --config FOLDER/config.yaml" in card.text and "bupo eval --model FOLDER " in card.text
    (evaluated,) = [row for row in table_of(card.text) if row[0].startswith("arithmetic/avg@2")]
    assert all(re.fullmatch(r"\d+\.\d %", cell) for cell in evaluated[1:])
    trainer = trainer_of(model_of(), config(tmp_path / "two"))
    trainer.model.config.name_or_path, trainer.dataset_name = "Qwen/Qwen3-4B", "zwhe99/DeepMath-103K"
    trainer.save_model()
    card = ModelCard.load(tmp_path / "two" / CARD_FILE)
    assert card.data.base_model == "Qwen/Qwen3-4B" and card.data.datasets == "zwhe99/DeepMath-103K"
    monkeypatch.chdir(tmp_path)
    os.makedirs("Qwen/Qwen3-4B")
    trainer.save_model()
    assert ModelCard.load(tmp_path / "two" / CARD_FILE).data.base_model is None


def test_an_adapters_card_is_pefts(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model()
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.library_name == "peft" and "bupo eval --model BASE --adapter FOLDER" in card.text
    assert "config.yaml" not in card.text  # of a script's trainer there is none


def test_names_of_others_steer_nothing(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path / "x|y](a)\n# z <b>"))
    trainer.state.log_history = [{"eval_a|b\n| c |/avg@2": 0.5}, {"eval_a|b\n| c |/avg@2": 0.75}]
    trainer.save_model()
    text = ModelCard.load(next(tmp_path.iterdir()) / CARD_FILE).text
    assert text.strip().splitlines()[0] == r"# x\|y\](a) # z \<b\>"
    assert [r"a\|b \| c \|/avg@2", "50.0 %", "75.0 %"] in table_of(text)


def test_push_to_hub_sends_it_along(tmp_path, monkeypatch):
    """As TRL's: `trainer.push_to_hub(dataset_name=…, tags=…)`, with the hub's calls looked at instead of made."""
    sent = {}
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/mine"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: sent.update(kwargs))
    trainer, _ = trained(tmp_path)
    trainer.hub_model_id = None
    trainer.push_to_hub(dataset_name="gsm8k", tags=["math"])
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert sent["repo_id"] == "me/mine" and str(sent["folder_path"]) == str(tmp_path)
    assert card.data.datasets == "gsm8k" and {"math", "bupo"} <= set(card.data.tags)
