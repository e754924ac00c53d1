"""General benchmarks of table 9 with lm-eval-harness, on the same model, policy and chat template as the sampled ones.

The harness decodes greedily, once per question, with its prompts and shots. Each number is reported with its metric.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.chat_templates import get_template_kwargs
from bupo.evaluation.lm_eval_tasks import HarnessTask, get_task, get_task_label
from bupo.evaluation.options import EvalOptions
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.run_files.reading import check_keys
from bupo.run_files.result_cache import OTHER_SETTINGS_REMEDY, ResultCache, get_label_folder
from bupo.utils.errors import UserError, wrap_library_errors
from bupo.utils.files import refuse_links

RESULTS_FILE, RESPONSES_FILE = "harness.jsonl", "responses"
# settings of sampled answers that the harness's responses depend on, too
RESPONSE_SETTINGS = ("weights", "dtype", "layer", "lens", "template", "max_new_tokens")
SECRET_VARIABLE = re.compile(r"(?i)token|key|secret|password|credential")  # in an environment variable's name
Z95 = 1.959964


def check_task(name: str, chat: bool, run_code: bool) -> None:
    """Load a task and its data, so that a task that cannot run is refused before any sampling.

    Args:
        name (`str`): a name in `HARNESS_TASKS`, `harness:TASK` for any task of the harness, or `harness:FILE.yaml`.
        chat (`bool`): whether the model has a chat template.
        run_code (`bool`): whether a task may run code that the model writes.

    Raises:
        UserError: if lm-eval-harness is not installed, the task does not exist or cannot be loaded, or it needs `run_code`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{name} needs lm-eval-harness: pip install 'bupo[harness]'")
    if name == "humaneval" and not run_code:
        raise _make_unsafe_code_error(name)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric needs this permission, too
    task = get_task(name)
    task_name = task.get_name(chat and task.uses_chat_template)
    with wrap_library_errors(f"lm-eval-harness cannot load {task_name!r}"):
        loaded = _get_task_manager(task).load([task_name])
    if task_name not in loaded["tasks"] and task_name not in loaded["groups"]:
        raise UserError(f"{name} names several tasks, {', '.join(loaded['tasks'])}: name one of them, or a group")
    if not run_code and any(part.get_config("unsafe_code") for part in loaded["tasks"].values()):
        raise _make_unsafe_code_error(name)


def _make_unsafe_code_error(name: str) -> UserError:
    return UserError(f"{name} runs code that the model writes, on this machine: allow it with --run_code true")


def _get_task_manager(task: HarnessTask) -> Any:
    """Return the harness's list of tasks, including those next to a task's YAML file."""
    folder = task.yaml_path.parent if task.yaml_path else None
    files = sorted(folder.glob("*.yaml")) if folder else []
    return _load_task_manager(folder, tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.cache  # listing 12,000 tasks takes ten seconds
def _load_task_manager(folder: Path | None, files: tuple[tuple[Path, int], ...]) -> Any:
    """Return the list of tasks; files and their modification times are the key of the cache."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@dataclass(frozen=True)
class HarnessRun:
    """A harness benchmark with its cache.

    Attributes:
        task ([`HarnessTask`]), task_name (`str`): the task, and its name for this model.
        uses_chat_template (`bool`): whether questions are formatted with the chat template.
        store ([`~bupo.run_files.result_cache.ResultCache`]): results by the task's name; responses of an interrupted run
            are in the same folder.
    """

    task: HarnessTask
    task_name: str
    uses_chat_template: bool
    store: ResultCache[str, dict[str, Any]]


def prepare_harness_run(
    name: str, folder: Path, settings: Mapping[str, Any], options: EvalOptions, chat: bool, metadata: Mapping[str, Any]
) -> HarnessRun:
    """Prepare a benchmark for `run_task`, and refuse cached responses of other settings.

    Args:
        name (`str`): as for `check_task`.
        folder (`Path`): folder of the evaluation.
        settings (`dict`): settings of the evaluation's answers.
        options ([`EvalOptions`]): size, system prompt, and whether to overwrite.
        chat (`bool`): whether the model has a chat template.
        metadata (`dict`): further facts recorded with the settings.

    Raises:
        UserError: if the folder holds responses of other settings.
    """
    task = get_task(name)
    chat = chat and task.uses_chat_template
    task_name = task.get_name(chat)
    cache_settings = {key: settings[key] for key in RESPONSE_SETTINGS if key in settings} | {
        "size": options.size,
        "task": task_name,
    }
    cache_settings["system_prompt"] = options.system_prompt
    if task.yaml_path:
        cache_settings["task_sha256"] = hashlib.sha256(task.yaml_path.read_bytes()).hexdigest()
    store: ResultCache[str, dict[str, Any]] = ResultCache(
        get_label_folder(folder, "harness") / get_label_folder(folder / "harness", get_task_label(name)).name,
        RESULTS_FILE,
        "responses",
        _parse_result,
        lambda key, row: json.dumps(row),
        cache_settings,
        metadata=metadata,
        extra_patterns=[f"{RESPONSES_FILE}*"],
        overwrite=options.overwrite,
    )
    for path in store.folder.glob(f"{RESPONSES_FILE}*"):  # SQLite would follow a link
        refuse_links(path, folder)
    return HarnessRun(task, task_name, chat, store)


def _parse_result(line: str) -> tuple[str, dict[str, Any]]:
    row = check_keys(json.loads(line), {"task": str, "metric": str, "score": float, "problems": int})
    return row["task"], row


def run_task(
    run: HarnessRun, engine: TransformersEngine, options: EvalOptions, template: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a benchmark's results from the cache, or run it and resume an interrupted run.

    Args:
        run ([`HarnessRun`]): from `prepare_harness_run`.
        engine ([`~bupo.generation.seeded_sampling.TransformersEngine`]): model, tokenizer, policy and longest answer.
        options ([`EvalOptions`]): size, system prompt, and whether a task may run code that the model writes.
        template (`dict`, *optional*): additional arguments of the chat template.

    Raises:
        UserError: if the harness cannot run it.
    """
    run.store.begin()
    if run.task_name in run.store.rows:
        return run.store.rows[run.task_name]
    with wrap_library_errors(f"lm-eval-harness cannot run {run.task_name!r}"):
        results = _simple_evaluate(
            engine,
            run,
            template or {},
            limit=options.size,
            confirm_run_unsafe_code=options.run_code,
            system_instruction=options.system_prompt,
        )
    run.store.add(run.task_name, _extract_scores(results, run.task_name, run.task.metric))
    return run.store.rows[run.task_name]


def _simple_evaluate(engine: TransformersEngine, run: HarnessRun, template: Mapping[str, Any], **options) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        max_gen_toks = engine.max_new_tokens  # for tasks without a limit; the harness's default is 256

    # hide the warning about a model that is already loaded
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in record.getMessage())
    with (
        engine.policy_generation(),
        _storing_responses_as_json(run.store.folder),
        _hiding_secret_variables(options["confirm_run_unsafe_code"]),
    ):
        return simple_evaluate(
            model=Model(
                pretrained=engine.model,
                backend="causal",
                tokenizer=engine.tokenizer,
                batch_size=engine.batch_size,
                chat_template_args={**get_template_kwargs(engine.tokenizer), **template},
            ),
            tasks=[run.task_name],
            task_manager=_get_task_manager(run.task),
            apply_chat_template=run.uses_chat_template,
            use_cache=str(run.store.folder / RESPONSES_FILE),
            log_samples=False,
            **options,
        )


@contextmanager
def _storing_responses_as_json(folder: Path) -> Iterator[None]:
    """Let the harness store responses as JSON, because unpickling a copied folder could run any code."""
    import sqlitedict

    def decode(text: bytes | str) -> Any:
        try:
            response = json.loads(text)
        except ValueError as error:
            raise UserError(f"{folder} holds responses that are not JSON: {OTHER_SETTINGS_REMEDY}") from error
        return tuple(response) if isinstance(response, list) else response  # log-likelihood and whether it is greedy

    original: Any = sqlitedict.SqliteDict

    class JsonDict(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, encode=json.dumps, decode=decode, **kwargs)

    sqlitedict.SqliteDict = JsonDict
    try:
        yield
    finally:
        sqlitedict.SqliteDict = original


@contextmanager
def _hiding_secret_variables(run_code: bool) -> Iterator[None]:
    """Remove tokens, keys and passwords from the environment while a task runs code that the model writes."""
    hidden = {name: value for name, value in os.environ.items() if run_code and SECRET_VARIABLE.search(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _extract_scores(results: dict, task: str, metric: str | None) -> dict[str, Any]:
    """Return the benchmark's score with its 95 % interval (normal, from the harness's standard error), and all metrics."""
    values = results["results"][task]
    metrics = [key for key, value in values.items() if "," in key and "_stderr" not in key and isinstance(value, float)]
    if not metrics or (metric or metrics[0]) not in metrics:
        raise UserError(f"lm-eval-harness gives no {metric or 'score'} for all of {task!r}: name one of its tasks")
    metric = metric or metrics[0]
    name, _, filter_name = metric.partition(",")
    score, error = float(values[metric]), values.get(f"{name}_stderr,{filter_name}")
    half = Z95 * error if isinstance(error, float) else None
    counts = results["n-samples"]
    return {
        "task": task,
        "problems": values.get("sample_len") or sum(count["effective"] for count in counts.values()),
        "metric": metric,
        "score": score,
        "interval": None if half is None else (score - half, score + half),
        "version": results["versions"].get(task),
        "shots": results["n-shot"],
        "all": {key: value for key, value in values.items() if isinstance(value, int | float)},
    }
