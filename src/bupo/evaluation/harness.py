"""The general benchmarks of table 9 by lm-eval-harness, on the same model, policy and chat template as the sampled ones.

The harness asks once a question, with its own prompts and shots, and takes the most likely tokens; what it measures stands
beside each number.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.templates import template_options
from bupo.errors import UserError, others
from bupo.evaluation.run import SETTINGS_FILE, check_settings
from bupo.files import write_json
from bupo.sampling import TransformersEngine

PREFIX = "harness:"
RESULTS_FILE, RESPONSES_FILE = "harness.json", "responses"
# what its answers depend on
SETTINGS = ("model", "revision", "weights", "adapter", "dtype", "layer", "lens", "template", "max_new_tokens")
Z95 = 1.959964


@dataclass(frozen=True)
class Task:
    """A task of the harness, and which of its metrics is the benchmark's number. None: the first one.

    Attributes:
        name, chat_name (`str`): for a model without and with a chat template.
        metric (`str`, *optional*): as the harness writes it, `metric,filter`.
        template (`bool`): whether questions go through the chat template of a model that has one.
    """

    name: str
    metric: str | None = None
    chat_name: str | None = None
    template: bool = True

    def for_model(self, chat: bool) -> str:
        """The task's name for a model with or without a chat template; that in the file of one's own task."""
        return _name_in(self.file) if self.file else (self.chat_name if chat else None) or self.name

    @property
    def file(self) -> Path | None:
        return Path(self.name) if self.name.endswith(".yaml") else None


HARNESS = {
    "mmlu-pro": Task("mmlu_pro", "exact_match,custom-extract"),
    "gpqa-diamond": Task("gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"),
    "arc-c": Task("arc_challenge", "acc_norm,none", template=False),  # compares the answers' likelihoods
    "bbh": Task("bbh", "exact_match,get-answer"),
    "humaneval": Task("humaneval", "pass@1,create_test", "humaneval_instruct"),
}


def is_harness(name: str) -> bool:
    """Whether a benchmark's name is the harness'."""
    return name in HARNESS or name.startswith(PREFIX)


def label_of(name: str) -> str:
    """The name without what says that it is the harness', or that it is a file."""
    name = name.removeprefix(PREFIX)
    return Path(name).stem if name.endswith(".yaml") else name


def _task(name: str) -> Task:
    return HARNESS.get(name) or Task(name.removeprefix(PREFIX))


def _name_in(path: Path) -> str:
    """The task's or group's name in its file, which may hold tags that plain YAML does not know."""
    name = re.search(r"^(?:task|group): *[\"']?([\w-]+)", path.read_text(), re.MULTILINE) if path.is_file() else None
    if name is None:
        raise UserError(f"{path} is no file that names a task or a group")
    return name[1]


def check_task(name: str, chat: bool, run_code: bool) -> None:
    """Load a task and its data, so that what cannot run is refused before anything is sampled.

    Args:
        name (`str`): of `HARNESS`, `harness:TASK` for any task of the harness, or `harness:FILE.yaml` for one's own.
        chat (`bool`): whether the model has a chat template.
        run_code (`bool`): whether a task may run what the model writes.

    Raises:
        UserError: if lm-eval-harness is not installed, it has no such task or cannot load its data, or it would run code
            without leave.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{name} needs lm-eval-harness: pip install 'bupo[harness]'")
    if name == "humaneval" and not run_code:
        raise _needs_leave(name)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric asks for leave once more
    task = _task(name)
    wanted = task.for_model(chat and task.template)
    with others(f"lm-eval-harness cannot load {wanted!r}"):  # of a hundred tasks, their data and their code
        loaded = _manager(task).load([wanted])
    if wanted not in loaded["tasks"] and wanted not in loaded["groups"]:
        raise UserError(f"{name} stands for several tasks, {', '.join(loaded['tasks'])}: name one of them, or a group")
    if not run_code and any(part.get_config("unsafe_code") for part in loaded["tasks"].values()):
        raise _needs_leave(name)


def _needs_leave(name: str) -> UserError:
    return UserError(f"{name} runs code that the model writes, on this machine: allow it with --run_code true")


def _manager(task: Task) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task.file and task.file.parent)


def run_task(
    name: str,
    engine: TransformersEngine,
    size: int | None,
    folder: Path,
    meta: dict,
    run_code: bool = False,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """A benchmark's numbers. A finished one is read from its folder, a broken-off one goes on.

    Args:
        name (`str`): as for `check_task`.
        engine ([`~bupo.sampling.TransformersEngine`]): its model, tokenizer, policy and longest answer.
        size (`int`, *optional*): the first so many questions of each task; a group such as bbh has several tasks.
        folder (`Path`): of the evaluation.
        meta (`dict`): the evaluation's, of which the answers depend on some.
        run_code (`bool`, *optional*): whether a task may run what the model writes.
        system_prompt (`str`, *optional*): the system message, for a model with a chat template.

    Raises:
        UserError: if the harness cannot run it.
    """
    task, here = _task(name), folder / "harness" / label_of(name)
    chat = engine.tokenizer.chat_template is not None and task.template
    wanted, path = task.for_model(chat), here / RESULTS_FILE
    settings = {key: meta[key] for key in SETTINGS if key in meta} | {"size": size, "task": wanted}
    settings["system_prompt"] = system_prompt
    if task.file:
        settings["task_sha256"] = hashlib.sha256(task.file.read_bytes()).hexdigest()
    check_settings(here, settings, "responses", path.exists() or any(here.glob(f"{RESPONSES_FILE}*")))
    if path.exists():
        return json.loads(path.read_text())
    here.mkdir(parents=True, exist_ok=True)
    write_json(here / SETTINGS_FILE, settings)
    options = {"limit": size, "confirm_run_unsafe_code": run_code, "system_instruction": system_prompt}
    with others(f"lm-eval-harness cannot run {wanted!r}"):
        results = _simple_evaluate(engine, task, wanted, chat, here, **options)
    found = _numbers(results, wanted, task.metric)
    write_json(path, found)
    return found


def _simple_evaluate(engine: TransformersEngine, task: Task, wanted: str, chat: bool, here: Path, **options) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        max_gen_toks = engine.max_new_tokens  # of tasks that set no limit; the harness' own is 256

    # it warns of a model that it has not loaded itself
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in record.getMessage())
    with engine.speaking():
        return simple_evaluate(
            model=Model(
                pretrained=engine.model,
                backend="causal",
                tokenizer=engine.tokenizer,
                batch_size=engine.batch_size,
                chat_template_args=template_options(engine.tokenizer),
            ),
            tasks=[wanted],
            task_manager=_manager(task),
            apply_chat_template=chat,
            use_cache=str(here / RESPONSES_FILE),
            log_samples=False,
            **options,
        )


def _numbers(results: dict, task: str, metric: str | None) -> dict[str, Any]:
    """The benchmark's number with its 95 % interval (normal, by the harness' standard error), and all others."""
    found = results["results"][task]
    metrics = [key for key, value in found.items() if "," in key and "_stderr" not in key and isinstance(value, float)]
    if not metrics or (metric or metrics[0]) not in metrics:
        raise UserError(f"lm-eval-harness gives no {metric or 'number'} for {task!r} as a whole: name one of its tasks")
    metric = metric or metrics[0]
    name, _, how = metric.partition(",")
    score, error = float(found[metric]), found.get(f"{name}_stderr,{how}")
    half = Z95 * error if isinstance(error, float) else None
    counts = results["n-samples"]
    return {
        "task": task,
        "problems": found.get("sample_len") or sum(count["effective"] for count in counts.values()),
        "metric": metric,
        "score": score,
        "interval": None if half is None else (score - half, score + half),
        "version": results["versions"].get(task),
        "shots": results["n-shot"],
        "all": {key: value for key, value in found.items() if isinstance(value, int | float)},
    }
