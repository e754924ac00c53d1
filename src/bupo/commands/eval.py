"""`bupo eval`: avg@k, pass@k and majority@k of a model, or of a policy inside it, on benchmarks."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

import bupo
from bupo.analysis.run import model_meta
from bupo.commands.keeping import keeping
from bupo.commands.parsing import parse
from bupo.data.templates import chat_template, choose_template
from bupo.errors import UserError
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.evaluation.harness import HARNESS, check_task, is_harness, label_of, run_task
from bupo.evaluation.metrics import paired_difference
from bupo.evaluation.run import (
    DEADLINE,
    GRADED_FILE,
    SETTINGS_FILE,
    Samples,
    correct_of,
    finished,
    graded,
    prompts_of,
    sample,
    summarize,
)
from bupo.evaluation.vllm import ServerEngine, VllmEngine
from bupo.files import in_one_piece, write_json
from bupo.model.loading import EMBEDDED, fingerprint, load_on_device, load_tokenizer
from bupo.model.policy import InternalPolicies, Lens
from bupo.progress import progress
from bupo.report.samples import write_samples_page
from bupo.report.scores import score_tables, write_scores
from bupo.sampling import Answer, Engine, TransformersEngine

SUMMARY_FILE = "summary.json"
# what an answer depends on besides its problem: answers of other settings are never mixed
SETTINGS = (
    *("model", "revision", "weights", "served", "engine", "dtype", "layer", "lens", "template"),
    *("temperature", "top_p", "max_new_tokens", "seed"),
)
EngineName = Literal["transformers", "vllm", "server", "kept"]


@dataclass
class EvalArguments:
    """Options of `bupo eval`.

    Parameters:
        model (`str`, *optional*): hub id, folder, `.gguf` file, or `embedded`, the default; with a server, what it serves.
        benchmarks (`str`): names with commas between them: `math500`, `LABEL=FILE`, `reasoning_gym:NAME`, `arithmetic`, and
            of lm-eval-harness `mmlu-pro`, `gpqa-diamond`, `arc-c`, `bbh`, `humaneval` or `harness:TASK`.
        k (`int`): answers a problem.
        engine (`str`): `transformers`, `vllm` (in this process), `server` (with `server`, its address), or `kept`: only the
            answers that `output` holds.
        layer (`int`, *optional*): evaluate this layer's policy.
        compare (`str`, *optional*): the folder of another evaluation of the same problems.
    """

    model: str = field(
        default="",
        metadata={"help": "Hub id, folder, .gguf file, or embedded (the default). With server: what it serves."},
    )
    benchmarks: str = field(
        default="arithmetic",
        metadata={
            "help": "With commas: math500, amc23, aime24, aime25, olympiadbench, minerva, gsm8k, LABEL=FILE, "
            f"reasoning_gym:NAME, arithmetic; by lm-eval-harness {', '.join(HARNESS)}, harness:TASK."
        },
    )
    k: int = field(default=16, metadata={"help": "Answers sampled to each problem."})
    size: int | None = field(
        default=None, metadata={"help": "The first so many problems of each benchmark (of each task, in the harness)."}
    )
    output: str = field(default="runs/eval", metadata={"help": "Folder of the run."})
    layer: int | None = field(default=None, metadata={"help": "Evaluate the policy of this layer's output."})
    lens: Lens = field(
        default="raw",
        metadata={"help": "Of --layer: raw (the paper's) or final_norm.", "choices": ["raw", "final_norm"]},
    )
    engine: EngineName = field(
        default="transformers",
        metadata={
            "help": "What samples: transformers, vllm in this process, an OpenAI-compatible server; or kept: nothing, the "
            "answers that the output folder holds are graded.",
            "choices": list(get_args(EngineName)),
        },
    )
    server: str | None = field(default=None, metadata={"help": "Address of the server, such as http://localhost:8000."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 takes the most likely token."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the most likely tokens that make up this share."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer."})
    chat_template: str | None = field(
        default=None, metadata={"help": "qwen-math, octothinker or a .jinja file; by default chosen by the model."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message for problems without one."})
    compare: str | None = field(
        default=None, metadata={"help": "Folder of another evaluation, for paired differences."}
    )
    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once."})
    deadline: float = field(default=DEADLINE, metadata={"help": "Seconds that grading an answer may take."})
    dtype: str = field(default="auto", metadata={"help": "auto (fp32 on a CPU), float32, bfloat16 or float16."})
    device_map: str | None = field(default=None, metadata={"help": "As in from_pretrained, such as auto."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a PEFT adapter on the model."})
    run_code: bool = field(
        default=False, metadata={"help": "Let humaneval run what the model writes, on this machine."}
    )
    seed: int = field(default=0, metadata={"help": "Of sampling."})


def run(arguments: list[str]) -> None:
    """Load, sample, grade, sum up, benchmark by benchmark."""
    (options,) = parse((EvalArguments,), arguments, "bupo eval")
    _check(options)
    options.model = options.model or EMBEDDED
    names = [name.strip() for name in options.benchmarks.split(",") if name.strip()]
    tasks = {label_of(name): name for name in names if is_harness(name)}
    benchmarks = load_benchmarks(
        [name for name in names if not is_harness(name)], options.size, options.system_prompt, options.seed
    )
    if not names or len(tasks) + len(benchmarks) < len(names) or tasks.keys() & benchmarks.keys():
        raise UserError(f"benchmarks {options.benchmarks!r} names none, or two of one label: write LABEL=FILE for one")
    theirs = _finished_summary(options.compare, benchmarks)
    console, folder = Console(), Path(options.output)
    summary: dict[str, Any] = {"schema_version": 2, "meta": {}, "benchmarks": {}, "harness": {}}
    tables, prompts = {}, {}
    with keeping(folder):
        source = None if options.engine == "kept" else _Source(options)
        summary["meta"] = source.meta if source else _kept_meta(folder, list(benchmarks))
        console.print(f"{summary['meta']['model']}: template {summary['meta']['template']}", highlight=False)
        for name in tasks.values():
            check_task(name, bool(source and source.tokenizer.chat_template), options.run_code)
        for label, problems in benchmarks.items():
            tables[label], prompts[label] = _evaluate(source, label, problems, options, console)
            summary["benchmarks"][label] = summarize(tables[label])
            if theirs:
                _compare(summary, label, tables[label], theirs, Path(options.compare or ""))
            _write(summary, tables, prompts, folder)
        for label, name in tasks.items():
            engine: Any = source and source.engine
            summary["harness"][label] = run_task(
                name, engine, options.size, folder, summary["meta"], options.run_code, options.system_prompt
            )
            _write(summary, tables, prompts, folder)
    for table in score_tables(summary):
        console.print(table)
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    console.print(f"run folder: {folder}  ({files})", highlight=False)


def _write(summary: dict, tables: dict[str, pd.DataFrame], prompts: dict[str, str], folder: Path) -> None:
    """What is known so far."""
    write_json(folder / SUMMARY_FILE, summary)
    write_scores(summary, folder)
    if tables:
        write_samples_page(tables, summary, prompts, folder / "report.html")


def _check(options: EvalArguments) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # every process would sample everything into the same files
        raise UserError("bupo eval is one process: for several GPUs give device_map auto, or serve the model with vLLM")
    if options.engine != "transformers" and options.layer is not None:
        raise UserError(f"engine {options.engine} samples whole models: an internal policy needs transformers")
    if options.engine != "transformers" and options.adapter:
        raise UserError(f"engine {options.engine} takes no adapter: merge it, or evaluate with transformers")
    if (options.engine == "server") != bool(options.server):
        raise UserError("engine server and its address go together: --engine server --server http://localhost:8000")
    if options.server and not options.model:
        raise UserError("model is not set: name the model that the server serves, for its tokenizer and template")
    for name in ("k", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if options.temperature < 0:
        raise UserError(f"temperature must be 0 or more, got {options.temperature}")
    if options.temperature == 0 and options.k > 1:
        raise UserError(f"temperature 0 gives {options.k} answers that are the same: set k to 1")
    if not 0 < options.top_p <= 1:
        raise UserError(f"top_p must lie above 0 and up to 1, got {options.top_p}")
    if not options.deadline > 0:
        raise UserError(f"deadline must be positive, got {options.deadline}")
    if any(is_harness(name.strip()) for name in options.benchmarks.split(",")) and options.engine != "transformers":
        raise UserError(f"lm-eval-harness runs with engine transformers here, not {options.engine}")
    if options.chat_template:
        chat_template(options.chat_template)  # a bad one is refused before anything is loaded


class _Source:
    """The model: what samples, and what must stand beside the numbers.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): with the template that was chosen.
        engine (`Engine`): samples.
        meta (`dict`): model, template, sampling, versions.
        context (`int`): the longest sequence that the model was made for; 0 where it is not known here.
    """

    def __init__(self, options: EvalArguments):
        loading = {"revision": options.revision} if options.revision else {}
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.model, **loading)
        template = choose_template(self.tokenizer, options.chat_template)
        self.engine, meta = _engine(options, self.tokenizer, loading)
        config = self.engine.model.config if isinstance(self.engine, TransformersEngine) else None
        self.context: int = getattr(config, "max_position_embeddings", 0)
        chosen = ("engine", "adapter", "layer", "top_p", "max_new_tokens", "seed")
        self.meta = meta | {name: getattr(options, name) for name in chosen} | {"template": template}

    @property
    def settings(self) -> dict:
        """What an answer depends on."""
        return {name: self.meta[name] for name in SETTINGS if name in self.meta}


def _engine(options: EvalArguments, tokenizer, loading: dict) -> tuple[Engine, dict]:
    sampling = (options.max_new_tokens, options.temperature, options.top_p)
    engine: Engine
    if options.engine == "transformers":
        model = load_on_device(options.model, options.dtype, options.device_map, options.adapter, **loading)
        policies = InternalPolicies(model, lens=options.lens, temperature=options.temperature or 1.0)
        policy = None if options.layer is None else policies.layer(options.layer)
        model = policies.stream.model
        engine = TransformersEngine(model, tokenizer, *sampling, policy=policy, batch_size=options.batch_size)
        meta = model_meta(options.model, policies.stream, options.lens, options.temperature)
        return engine, meta | {"weights": fingerprint(model)}
    meta = {"model": options.model, "revision": options.revision}
    meta |= {"temperature": options.temperature, "versions": {"bupo": bupo.__version__}}
    if options.engine == "server":
        engine = ServerEngine(str(options.server), *sampling, parallel=options.batch_size)
        return engine, meta | {"served": engine.model}
    engine = VllmEngine(options.model, *sampling, dtype=options.dtype, **loading)
    return engine, meta | {"dtype": options.dtype}


def _kept_meta(folder: Path, labels: list[str]) -> dict:
    """What the answers that a folder holds were made with."""
    found = []
    for label in labels:
        path = folder / label / SETTINGS_FILE
        if not path.is_file():
            raise UserError(f"{folder / label} holds no answers to grade: {SETTINGS_FILE} is missing")
        settings = json.loads(path.read_text())
        found.append({name: settings[name] for name in SETTINGS if name in settings})
    if any(settings != found[0] for settings in found):
        raise UserError(f"the benchmarks in {folder} were answered with different settings: grade one at a time")
    return found[0] | {"versions": {"bupo": bupo.__version__}}


def _evaluate(
    source: _Source | None, label: str, problems: Dataset, options: EvalArguments, console: Console
) -> tuple[pd.DataFrame, str]:
    """One benchmark: its graded table, written into its folder, and its first prompt as the model reads it."""
    here = Path(options.output) / label
    samples = Samples(here)
    asked = [hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12] for messages in problems["prompt"]]
    if source is None:
        answers, prompt = _kept(samples, asked, options.k)
    else:
        prompts = prompts_of(problems, source.tokenizer)
        prompt = source.tokenizer.decode(prompts[0])
        samples.made_with(source.settings | {"prompt": prompt}, asked)
        longest = max(map(len, prompts)) + options.max_new_tokens
        if source.context and longest > source.context:
            console.print(
                f"{label}: prompts and answers may reach {longest} tokens, beyond the model's context of {source.context}",
                highlight=False,
            )
        with progress(console) as bar:
            task = bar.add_task(f"{label}: answers", total=len(prompts) * options.k)
            answers = sample(
                source.engine, prompts, options.k, options.seed, samples, lambda done: bar.advance(task, done)
            )
    with progress(console) as bar:
        task = bar.add_task(f"{label}: grades", total=len(answers) * options.k)
        table = graded(problems, answers, options.deadline, lambda done: bar.advance(task, done))
    with in_one_piece(here / GRADED_FILE) as part:
        table.to_parquet(part)
    return table, prompt


def _kept(samples: Samples, asked: list[str], k: int) -> tuple[list[list[Answer]], str]:
    """The answers that a folder holds, and the prompt that it notes."""
    settings = json.loads((samples.folder / SETTINGS_FILE).read_text())
    for problem, digest in enumerate(asked):
        held = sum((problem, n) in samples.found for n in range(k))
        if settings["problems"][problem : problem + 1] not in ([], [digest]):
            raise UserError(f"{samples.folder} holds answers to other problems: problem {problem} is not the one given")
        if held < k:
            raise UserError(
                f"{samples.folder} holds {held} answers to problem {problem}, and k is {k}: lower k or size, or sample the "
                "rest with another engine"
            )
    return [[samples.found[p, n] for n in range(k)] for p in range(len(asked))], settings["prompt"]


def _finished_summary(folder: str | None, benchmarks: dict[str, Dataset]) -> dict[str, dict]:
    """The numbers of the run that is compared with, by label.

    Raises:
        UserError: if there is none, or it has no benchmark in common with this one.
    """
    if folder is None:
        return {}
    path = Path(folder) / SUMMARY_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no finished evaluation ({SUMMARY_FILE} is missing)")
    theirs = json.loads(path.read_text())["benchmarks"]
    if not theirs.keys() & benchmarks.keys():
        raise UserError(f"{folder} holds none of {', '.join(benchmarks)}: its benchmarks are {', '.join(theirs)}")
    return theirs


def _compare(summary: dict, label: str, table: pd.DataFrame, theirs: dict[str, dict], other: Path) -> None:
    """The paired difference to another run, of a benchmark that both hold."""
    if label not in theirs:
        return
    before, row = finished(other / label), summary["benchmarks"][label]
    if _questions(before) != _questions(table):
        raise UserError(f"{other / label} holds other problems than {label}: a paired difference needs the same ones")
    row["compared_pass@k"] = theirs[label]["pass@k"]
    row["difference"], row["difference_interval"] = paired_difference(correct_of(before), correct_of(table))
    summary["compared_with"] = str(other)


def _questions(table: pd.DataFrame) -> list[str]:
    return table.groupby("problem", sort=True)["question"].first().tolist()
