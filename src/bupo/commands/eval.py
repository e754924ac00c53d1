"""`bupo eval`: avg@k, pass@k and majority@k of a model, or of a policy inside it, on benchmarks."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import bupo
from bupo.analysis.run import model_meta, write_json
from bupo.commands.analyze import load_on_device
from bupo.commands.parsing import parse
from bupo.data.templates import chat_template, chosen_template
from bupo.errors import UserError
from bupo.evaluation.benchmarks import load_benchmark
from bupo.evaluation.metrics import paired_difference
from bupo.evaluation.run import (
    GRADED_FILE,
    correct_by_problem,
    graded,
    sample_missing,
    summarize,
)
from bupo.evaluation.sampling import Engine, TransformersEngine
from bupo.evaluation.vllm import ServerEngine, VllmEngine
from bupo.models import EMBEDDED, load_tokenizer
from bupo.policy import InternalPolicies, Lens
from bupo.report.figures import pass_figure
from bupo.rewards.grader import check_golds
from bupo.training.callbacks import progress

SUMMARY_FILE = "summary.json"
VERDICT_COLUMNS = ("no answer", "not worked out", "timed out")  # on the terminal only where there are any


@dataclass
class EvalArguments:
    """Options of `bupo eval`.

    Parameters:
        model (`str`): hub id, folder, `.gguf` file, or `embedded`.
        benchmarks (`str`): names with commas between them: `math500`, `LABEL=FILE`, `reasoning_gym:NAME`, `arithmetic`, …
        k (`int`): answers a problem.
        engine (`str`): `transformers`, `vllm` (in this process) or `server` (with `server`, its address).
        layer (`int`, *optional*): evaluate this layer's policy.
        compare (`str`, *optional*): the folder of another evaluation of the same problems.
    """

    model: str = field(default=EMBEDDED, metadata={"help": "Hub id, folder, .gguf file, or embedded."})
    benchmarks: str = field(
        default="arithmetic",
        metadata={"help": "With commas: math500, amc23, aime24, aime25, LABEL=FILE, reasoning_gym:NAME, arithmetic …"},
    )
    k: int = field(default=16, metadata={"help": "Answers sampled to each problem."})
    size: int | None = field(default=None, metadata={"help": "The first so many problems of each benchmark."})
    output: str = field(default="runs/eval", metadata={"help": "Folder of the run."})
    layer: int | None = field(default=None, metadata={"help": "Evaluate the policy of this layer's output."})
    lens: Lens = field(
        default="raw",
        metadata={"help": "Of --layer: raw (the paper's) or final_norm.", "choices": ["raw", "final_norm"]},
    )
    engine: Literal["transformers", "vllm", "server"] = field(
        default="transformers",
        metadata={
            "help": "What samples: transformers, vllm in this process, or an OpenAI-compatible server.",
            "choices": ["transformers", "vllm", "server"],
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
    deadline: float = field(default=5.0, metadata={"help": "Seconds that grading an answer may take."})
    dtype: str = field(default="auto", metadata={"help": "auto (fp32 on a CPU), float32, bfloat16 or float16."})
    device_map: str | None = field(default=None, metadata={"help": "As in from_pretrained, such as auto."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})


def run(arguments: list[str]) -> None:
    """Load, sample, grade, sum up, benchmark by benchmark."""
    (options,) = parse((EvalArguments,), arguments, "bupo eval")
    _check(options)
    names = [name.strip() for name in options.benchmarks.split(",") if name.strip()]
    template = options.chat_template and chat_template(options.chat_template)
    benchmarks = dict(
        load_benchmark(name, size=options.size, system_prompt=options.system_prompt, seed=options.seed)
        for name in names
    )
    if len(benchmarks) < len(names):
        raise UserError(f"benchmarks {options.benchmarks!r} has one label twice: write LABEL=FILE for one of them")
    for label, problems in benchmarks.items():
        check_golds(problems["answer"], label)
    loading = {"revision": options.revision} if options.revision else {}
    tokenizer = load_tokenizer(options.model, **loading)
    if template:
        tokenizer.chat_template = template
    named, kwargs = chosen_template(tokenizer)
    named = options.chat_template or named
    engine, meta = _engine(options, tokenizer, loading)
    meta |= {
        "engine": options.engine,
        "layer": options.layer,
        "template": named,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
    console, folder = Console(), Path(options.output)
    console.print(f"{options.model}: template {named}", highlight=False)
    summary: dict[str, Any] = {"schema_version": 1, "meta": meta, "benchmarks": {}}
    for label, problems in benchmarks.items():
        table = _evaluate(engine, tokenizer, kwargs, label, problems, options, meta, folder, console)
        summary["benchmarks"][label] = summarize(table)
    if options.compare:
        _compare(summary, folder, Path(options.compare))
    _write(summary, folder)
    console.print(_table(summary, options.model))
    console.print(
        f"run folder: {folder}  (summary.json, table.md, table.csv, pass_at_k.png, */samples.jsonl)", highlight=False
    )


def _engine(options: EvalArguments, tokenizer, loading: dict) -> tuple[Engine, dict]:
    """What samples, and what of the model must stand beside the numbers."""
    sampling = (options.max_new_tokens, options.temperature, options.top_p)
    engine: Engine
    if options.engine == "transformers":
        model = load_on_device(options.model, options.dtype, options.device_map, loading)
        policies = InternalPolicies(model, lens=options.lens, temperature=options.temperature or 1.0)
        policy = policies.layer(options.layer) if options.layer else None
        engine = TransformersEngine(
            policies.stream.model, tokenizer, *sampling, policy=policy, batch_size=options.batch_size
        )
        return engine, model_meta(options.model, policies.stream, options.lens, options.temperature)
    meta: dict[str, Any] = {"model": options.model, "revision": options.revision}
    meta |= {"temperature": options.temperature, "versions": {"bupo": bupo.__version__}}
    if options.engine == "server":
        engine = ServerEngine(str(options.server), *sampling, parallel=options.batch_size)
        return engine, meta | {"served": engine.model}
    engine = VllmEngine(options.model, *sampling, dtype=options.dtype, **loading)
    return engine, meta | {"dtype": options.dtype}


def _check(options: EvalArguments) -> None:
    if options.engine != "transformers" and options.layer:
        raise UserError(f"engine {options.engine} samples whole models: an internal policy needs transformers")
    if (options.engine == "server") != bool(options.server):
        raise UserError("engine server and its address go together: --engine server --server http://localhost:8000")
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


def _evaluate(
    engine, tokenizer, kwargs: dict, label: str, problems: Dataset, options, meta: dict, folder: Path, console
):
    """One benchmark: its graded table, written into its folder."""
    prompts = [
        tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs))
        for messages in problems["prompt"]
    ]
    here = folder / label
    settings = {key: value for key, value in meta.items() if key != "versions"} | {"prompts_sha256": _digest(prompts)}
    with progress(console) as bar:
        task = bar.add_task(f"{label}: answers", total=len(prompts) * options.k)
        try:
            answers = sample_missing(
                engine, prompts, options.k, options.seed, here, settings, on_answer=lambda done: bar.advance(task, done)
            )
        except KeyboardInterrupt:
            raise UserError(
                f"interrupted: finished answers are kept in {here}; the same command goes on from them"
            ) from None
    table = graded(problems, answers, options.deadline)
    part = here / "graded.part"
    table.to_parquet(part)
    part.replace(here / GRADED_FILE)
    return table


def _digest(prompts: list[tuple[int, ...]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _compare(summary: dict, folder: Path, other: Path) -> None:
    """Paired differences to another run, of the benchmarks that both hold."""
    before = other / SUMMARY_FILE
    if not before.is_file():
        raise UserError(f"{other} holds no finished evaluation ({SUMMARY_FILE} is missing)")
    theirs = json.loads(before.read_text())["benchmarks"]
    for label, row in summary["benchmarks"].items():
        if label in theirs and theirs[label]["problems"] == row["problems"]:
            difference, interval = paired_difference(
                correct_by_problem(other / label), correct_by_problem(folder / label)
            )
            row["difference"], row["difference_interval"] = difference, interval
    summary["compared_with"] = str(other)


def _rows(summary: dict) -> list[dict]:
    """One row a benchmark, for people."""

    def percent(value: float, interval: tuple[float, float]) -> str:
        return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    rows = []
    for label, found in summary["benchmarks"].items():
        k, verdicts = found["k"], found["verdicts"]
        row = {
            "benchmark": label,
            "n": str(found["problems"]),
            f"avg@{k} [95 %]": percent(found["avg@k"], found["avg@k_interval"]),
            f"pass@{k}": f"{100 * found['pass@k'][str(k)]:.1f}",
            f"majority@{k}": f"{100 * found['majority@k']:.1f}",
            "tokens": f"{found['mean_tokens']:.0f}",
            "cut": f"{100 * found['truncated'] / (found['problems'] * k):.1f} %",
            "no answer": str(verdicts["unparsable"]),
            "not worked out": str(verdicts["unevaluated"]),
            "timed out": str(verdicts["timeout"]),
        }
        if "difference" in found:
            row["difference [95 %]"] = percent(found["difference"], found["difference_interval"])
        rows.append(row)
    return rows


def _table(summary: dict, model: str) -> Table:
    layer = f", layer {summary['meta']['layer']}" if summary["meta"]["layer"] else ""
    table = Table(title=f"{model}{layer}, in percent", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = _rows(summary)
    shown = [name for name in rows[0] if name not in VERDICT_COLUMNS or any(row[name] != "0" for row in rows)]
    for name in shown:
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in shown))
    return table


def _write(summary: dict, folder: Path) -> None:
    """`summary.json`, the table as CSV and Markdown, and the figure."""
    write_json(folder / SUMMARY_FILE, summary)
    rows = _rows(summary)
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row.get(name, "") for name in head) + " |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    pass_figure({label: found["pass@k"] for label, found in summary["benchmarks"].items()}, folder / "pass_at_k.png")
