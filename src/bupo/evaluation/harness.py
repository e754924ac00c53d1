"""The general benchmarks of table 9 by lm-eval-harness, on the same model, policy and chat template as the sampled ones.

The harness asks once a question, with its own prompts, shots and greedy decoding; what it measures stands beside each number.
"""

import importlib.util
import json
import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bupo.data.templates import template_options
from bupo.errors import UserError, first_line
from bupo.evaluation.run import SETTINGS_FILE, check_settings
from bupo.files import write_json
from bupo.sampling import TransformersEngine

PREFIX = "harness:"
RESULTS_FILE, RESPONSES_FILE = "harness.json", "responses"
Z95 = 1.959964


@dataclass(frozen=True)
class Task:
    """A task of the harness, and which of its metrics is the benchmark's number. None: the first one.

    Attributes:
        name, chat_name (`str`): for a model without and with a chat template.
        metric (`str`, *optional*): as the harness writes it, `metric,filter`.
        template (`bool`): whether questions go through the chat template of a model that has one.
        runs_code (`bool`): whether it runs what the model writes.
    """

    name: str
    metric: str | None = None
    chat_name: str | None = None
    template: bool = True
    runs_code: bool = False


HARNESS = {
    "mmlu-pro": Task("mmlu_pro", "exact_match,custom-extract"),
    "gpqa-diamond": Task("gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"),
    "arc-c": Task("arc_challenge", "acc_norm,none", template=False),  # compares the answers' likelihoods
    "bbh": Task("bbh", "exact_match,get-answer"),
    "humaneval": Task("humaneval", "pass@1,create_test", "humaneval_instruct", runs_code=True),
}


def is_harness(name: str) -> bool:
    """Whether a benchmark's name is the harness'."""
    return name.strip() in HARNESS or name.strip().startswith(PREFIX)


def check_tasks(names: list[str], run_code: bool) -> None:
    """Refuse what cannot run, before anything is sampled.

    Raises:
        UserError: if lm-eval-harness is not installed, a task would run code without leave, or a task's file is missing.
    """
    if names and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{names[0]} needs lm-eval-harness: pip install 'bupo[harness]'")
    for name in names:
        if _task(name).runs_code:
            if not run_code:
                raise UserError(
                    f"{name} runs code that the model writes, on this machine: allow it with --run_code true"
                )
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric asks for leave once more
        path = Path(name.removeprefix(PREFIX))
        if path.suffix == ".yaml" and not path.is_file():
            raise UserError(f"{path} is no file of a task")


def _task(name: str) -> Task:
    return HARNESS.get(name) or Task(name.removeprefix(PREFIX))


def run_task(
    name: str, engine: TransformersEngine, size: int | None, folder: Path, settings: dict
) -> tuple[str, dict[str, Any]]:
    """One benchmark: its label and its numbers. A finished one is read from its folder, a broken-off one goes on.

    Args:
        name (`str`): of `HARNESS`, `harness:TASK` for any task of the harness, or `harness:FILE.yaml` for one's own.
        engine ([`~bupo.sampling.TransformersEngine`]): its model, tokenizer and policy.
        size (`int`, *optional*): the first so many questions of each task.
        folder (`Path`): of the evaluation.
        settings (`dict`): what the answers depend on.

    Raises:
        UserError: if the harness knows no such task, or cannot load or run it.
    """
    task, label = _task(name), Path(name.removeprefix(PREFIX)).stem
    here = folder / label
    path = here / RESULTS_FILE
    check_settings(here, settings | {"size": size}, "responses", bool(list(here.glob(f"{RESPONSES_FILE}*"))))
    if path.exists():
        return label, json.loads(path.read_text())
    here.mkdir(parents=True, exist_ok=True)
    write_json(here / SETTINGS_FILE, settings | {"size": size})
    chat = engine.tokenizer.chat_template is not None and task.template
    wanted: Any = (task.chat_name if chat else None) or task.name
    if str(wanted).endswith(".yaml"):
        wanted = yaml.safe_load(Path(wanted).read_text())
    try:
        results = _simple_evaluate(engine, wanted, chat, size, here)
    except Exception as error:  # of a hundred tasks, their data and their code
        raise UserError(f"lm-eval-harness cannot run {task.name!r}: {first_line(error)}") from error
    found = _numbers(results, wanted["task"] if isinstance(wanted, dict) else wanted, task.metric)
    write_json(path, found)
    return label, found


def _simple_evaluate(engine: TransformersEngine, wanted, chat: bool, size: int | None, here: Path) -> dict:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that it did not load itself
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=engine.model,
        backend="causal",
        tokenizer=engine.tokenizer,
        batch_size=engine.batch_size,
        chat_template_args=template_options(engine.tokenizer),
    )
    with engine.policy.speaking() if engine.policy else nullcontext():
        return simple_evaluate(
            model=model,
            tasks=[wanted],
            limit=size,
            apply_chat_template=chat,
            use_cache=str(here / RESPONSES_FILE),
            log_samples=False,
            confirm_run_unsafe_code=True,
        )


def _numbers(results: dict, task: str, metric: str | None) -> dict[str, Any]:
    """The benchmark's number with its 95 % interval (normal, by the harness' standard error), and all others."""
    found = results["results"][task]
    metric = metric or next(key for key, value in found.items() if "," in key and "_stderr" not in key)
    name, _, how = metric.partition(",")
    score, error = float(found[metric]), found.get(f"{name}_stderr,{how}")
    half = Z95 * error if isinstance(error, float) else float("nan")
    counts = results["n-samples"]
    parts = results.get("group_subtasks", {}).get(task) or [task]
    return {
        "task": task,
        "problems": sum(counts[part]["effective"] for part in parts if part in counts),
        "metric": metric,
        "score": score,
        "interval": (max(0.0, score - half), min(1.0, score + half)),
        "version": results["versions"].get(task),
        "all": {key: value for key, value in found.items() if isinstance(value, int | float)},
    }
