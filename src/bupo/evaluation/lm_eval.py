"""The general benchmarks of table 9 by lm-eval-harness, on the same model, policy and chat template as the sampled ones.

The harness asks once a question, with its own prompts and shots, and takes the most likely tokens; what it measures stands
beside each number.
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
# what its responses depend on, of what sampled answers do
RESPONSE_SETTINGS = ("weights", "dtype", "layer", "lens", "template", "max_new_tokens")
SECRET_VARIABLE = re.compile(r"(?i)token|key|secret|password|credential")  # in an environment variable's name
Z95 = 1.959964


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
        raise _make_unsafe_code_error(name)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric asks for leave once more
    task = get_task(name)
    wanted = task.get_name(chat and task.uses_chat_template)
    with wrap_library_errors(
        f"lm-eval-harness cannot load {wanted!r}"
    ):  # of a hundred tasks, their data and their code
        loaded = _get_task_manager(task).load([wanted])
    if wanted not in loaded["tasks"] and wanted not in loaded["groups"]:
        raise UserError(f"{name} stands for several tasks, {', '.join(loaded['tasks'])}: name one of them, or a group")
    if not run_code and any(part.get_config("unsafe_code") for part in loaded["tasks"].values()):
        raise _make_unsafe_code_error(name)


def _make_unsafe_code_error(name: str) -> UserError:
    return UserError(f"{name} runs code that the model writes, on this machine: allow it with --run_code true")


def _get_task_manager(task: HarnessTask) -> Any:
    """The harness' list of tasks, with those beside one's own file."""
    folder = task.yaml_path.parent if task.yaml_path else None
    files = sorted(folder.glob("*.yaml")) if folder else []
    return _load_task_manager(folder, tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.cache  # to list its 12,000 takes ten seconds
def _load_task_manager(folder: Path | None, files: tuple[tuple[Path, int], ...]) -> Any:
    """The list as of these files and the times that they were written."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@dataclass(frozen=True)
class HarnessRun:
    """A benchmark of the harness in a folder.

    Attributes:
        task ([`HarnessTask`]), wanted (`str`): the task, and its name for the model.
        chat (`bool`): whether questions go through the chat template.
        store ([`~bupo.run_files.result_cache.ResultCache`]): its numbers, by the task's name, beside the responses of a broken-off run.
    """

    task: HarnessTask
    task_name: str
    uses_chat_template: bool
    store: ResultCache[str, dict[str, Any]]


def prepare_harness_run(
    name: str, folder: Path, settings: Mapping[str, Any], options: EvalOptions, chat: bool, noted: Mapping[str, Any]
) -> HarnessRun:
    """A benchmark that `run_task` will run. Responses that its folder holds of other settings are refused here.

    Args:
        name (`str`): as for `check_task`.
        folder (`Path`): of the evaluation.
        settings (`dict`): of the evaluation, of which the responses depend on some.
        options ([`EvalOptions`]): size, system prompt, and whether to overwrite.
        chat (`bool`): whether the model has a chat template.
        noted (`dict`): of [`~bupo.run_files.result_cache.ResultCache`].

    Raises:
        UserError: if the folder holds responses of other settings.
    """
    task = get_task(name)
    chat = chat and task.uses_chat_template
    wanted = task.get_name(chat)
    depends = {key: settings[key] for key in RESPONSE_SETTINGS if key in settings} | {
        "size": options.size,
        "task": wanted,
    }
    depends["system_prompt"] = options.system_prompt
    if task.yaml_path:
        depends["task_sha256"] = hashlib.sha256(task.yaml_path.read_bytes()).hexdigest()
    store: ResultCache[str, dict[str, Any]] = ResultCache(
        get_label_folder(folder, "harness") / get_label_folder(folder / "harness", get_task_label(name)).name,
        RESULTS_FILE,
        "responses",
        _parse_result,
        lambda key, row: json.dumps(row),
        depends,
        metadata=noted,
        extra_patterns=[f"{RESPONSES_FILE}*", "harness.json"],  # the latter of an earlier version
        overwrite=options.overwrite,
    )
    for path in store.folder.glob(f"{RESPONSES_FILE}*"):  # SQLite would follow a link
        refuse_links(path, folder)
    return HarnessRun(task, wanted, chat, store)


def _parse_result(line: str) -> tuple[str, dict[str, Any]]:
    row = check_keys(json.loads(line), {"task": str, "metric": str, "score": float, "problems": int})
    return row["task"], row


def run_task(
    run: HarnessRun, engine: TransformersEngine, options: EvalOptions, template: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A benchmark's numbers. Those that the folder holds are given back, a broken-off run goes on.

    Args:
        run ([`HarnessRun`]): of `harness_run`.
        engine ([`~bupo.generation.seeded_sampling.TransformersEngine`]): its model, tokenizer, policy and longest answer.
        options ([`EvalOptions`]): size, system prompt, and whether a task may run what the model writes.
        template (`dict`, *optional*): arguments of the chat template besides the usual ones.

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
        max_gen_toks = engine.max_new_tokens  # of tasks that set no limit; the harness' own is 256

    # it warns of a model that it has not loaded itself
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
    """Inside, the harness keeps responses as JSON: unpickled, those of a folder that was copied could run anything."""
    import sqlitedict

    def read(kept: bytes | str) -> Any:
        try:
            found = json.loads(kept)
        except ValueError as error:
            raise UserError(
                f"{folder} holds responses that an earlier version pickled: {OTHER_SETTINGS_REMEDY}"
            ) from error
        return tuple(found) if isinstance(found, list) else found  # a log-likelihood, and whether it is the greatest

    pickling: Any = sqlitedict.SqliteDict

    class Readable(pickling):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, encode=json.dumps, decode=read, **kwargs)

    sqlitedict.SqliteDict = Readable
    try:
        yield
    finally:
        sqlitedict.SqliteDict = pickling


@contextmanager
def _hiding_secret_variables(run_code: bool) -> Iterator[None]:
    """Inside, where a task runs what the model writes, the environment that it inherits holds no token, key or password."""
    hidden = {name: value for name, value in os.environ.items() if run_code and SECRET_VARIABLE.search(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _extract_scores(results: dict, task: str, metric: str | None) -> dict[str, Any]:
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
