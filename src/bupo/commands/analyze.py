"""`bupo analyze`: what every layer and module of a model decides, as tables, figures and a page."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bupo.analysis.rollouts import Rollout, read_rollouts, sample_rollouts
from bupo.analysis.run import (
    ANSWERS_FILE,
    Analysis,
    analyze_rollouts,
    model_meta,
    token_views,
)
from bupo.analysis.tables import divergence, layer_table, perplexity, similarity, stages
from bupo.commands.keeping import keeping
from bupo.commands.parsing import parse
from bupo.data.problems import ARITHMETIC, load_problems
from bupo.data.templates import choose_template
from bupo.errors import UserError
from bupo.files import in_one_piece, write_json
from bupo.model.loading import EMBEDDED, fingerprint, load_on_device, load_tokenizer
from bupo.model.policy import InternalPolicies, Lens
from bupo.progress import progress
from bupo.report.figures import analysis_figures
from bupo.report.page import write_page

ROLLOUTS_FILE = "rollouts.jsonl"


@dataclass
class AnalyzeArguments:
    """Options of `bupo analyze`.

    Parameters:
        model (`list[str]`): models or checkpoints: hub ids, folders, `.gguf` files, or `embedded`.
        output (`str`): the run's folder.
        adapter (`str`, *optional*): a PEFT adapter put on each model.
        dataset (`str`, *optional*): prompts, answered by each model: a hub id, a file, `reasoning_gym:NAME`, `arithmetic`.
        rollouts (`str`, *optional*): a file of finished rollouts, used for every model instead.
    """

    model: list[str] = field(
        default_factory=lambda: [EMBEDDED],
        metadata={"help": "Models or checkpoints: hub ids, folders, .gguf files, or embedded."},
    )
    output: str = field(default="runs/analysis", metadata={"help": "Folder of the run."})
    adapter: str | None = field(default=None, metadata={"help": "PEFT adapter (folder or hub id) put on each model."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Prompts that each model answers: hub id, file, reasoning_gym:NAME, arithmetic."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or options of a reasoning_gym task as JSON."}
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the gold answers."})
    chat_template: str | None = field(
        default=None, metadata={"help": "qwen-math, octothinker or a .jinja file; by default chosen by the model."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message for prompts without one."})
    rollouts: str | None = field(
        default=None, metadata={"help": "File of finished rollouts (.jsonl): messages, or prompt and completion."}
    )
    answers: int = field(default=32, metadata={"help": "Answers to sample."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer that is sampled."})
    max_tokens: int = field(default=20_000, metadata={"help": "Start no further answer after so many tokens."})
    until: str | None = field(
        default=None,
        metadata={"help": "`settled`: stop when the sign of dH_FFN is settled in every layer.", "choices": ["settled"]},
    )
    lens: Lens = field(
        default="raw",
        metadata={"help": "raw (the paper's) or final_norm (the logit lens).", "choices": ["raw", "final_norm"]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of every policy."})
    dtype: str = field(default="auto", metadata={"help": "auto (fp32 on a CPU), float32, bfloat16 or float16."})
    device_map: str | None = field(default=None, metadata={"help": "As in from_pretrained, such as auto."})
    revision: str | None = field(default=None, metadata={"help": "Revision of hub models."})
    batch_size: int = field(default=8, metadata={"help": "Prompts answered at once."})
    kl_pairs: bool = field(
        default=False,
        metadata={"help": "Also the KL of every layer's policy to every other's (a few per cent more time)."},
    )
    per_token: bool = field(default=False, metadata={"help": "Also write every token's values (tokens.parquet)."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})


def run(arguments: list[str]) -> None:
    """Analyse each model, then write what compares them."""
    (options,) = parse((AnalyzeArguments,), arguments, "bupo analyze")
    _check(options)
    console, folder = Console(), Path(options.output)
    labels = _labels(options.model)
    reports = []
    with keeping(folder):
        for name, label in zip(options.model, labels, strict=True):
            reports.append(_analyze(name, label, options, folder, console))
        _write(reports, folder)
    for report in reports:
        console.print(_table(report))
        console.print(f"{report['meta']['model']}: {report['stages']['explanation']}", highlight=False)
    console.print(f"run folder: {folder}  (report.html, layers.parquet, summary.json, figures/)", highlight=False)


def _check(options: AnalyzeArguments) -> None:
    for name in ("answers", "max_new_tokens", "max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if not options.temperature > 0:
        raise UserError(f"temperature must be positive, got {options.temperature}")
    if options.dataset and options.rollouts:
        raise UserError(
            "both dataset and rollouts are given: prompts are answered, or finished answers are read, not both"
        )
    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, got {options.dtype!r}")


def _labels(names: list[str]) -> list[str]:
    """Short names of the models, each its own."""
    labels = [Path(name).stem if name.endswith(".gguf") else Path(name).name for name in names]
    return [label if labels.count(label) == 1 else f"{i + 1}-{label}" for i, label in enumerate(labels)]


def _problems(options: AnalyzeArguments) -> Dataset:
    return load_problems(
        options.dataset or ARITHMETIC,
        options.split,
        config=options.dataset_config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        system_prompt=options.system_prompt,
        size=options.answers,
        seed=options.seed,
    )


def _analyze(name: str, label: str, options: AnalyzeArguments, folder: Path, console: Console) -> dict:
    """One model: rollouts, measures, and what the tables and the page need."""
    loading = {"revision": options.revision} if options.revision else {}
    problems = None if options.rollouts else _problems(options)  # a bad dataset is refused before a model is loaded
    tokenizer = load_tokenizer(name, **loading)
    model = load_on_device(name, options.dtype, options.device_map, options.adapter, **loading)
    template = choose_template(tokenizer, options.chat_template)
    console.print(f"{label}: template {template}", highlight=False)
    policies = InternalPolicies(model, lens=options.lens, temperature=options.temperature)
    meta = model_meta(name, policies.stream, options.lens, options.temperature)
    meta |= {
        "adapter": options.adapter,
        "seed": options.seed,
        "dataset": options.rollouts or options.dataset or ARITHMETIC,
        "template": template,
        "weights": fingerprint(policies.stream.model),
        "kl_pairs": options.kl_pairs,
    }
    here = folder / label
    _keep_or_clear(here, meta | _sampling(options))
    context = getattr(policies.stream.config, "max_position_embeddings", None)
    with progress(console) as bar:
        if problems is None:
            rollouts = read_rollouts(str(options.rollouts), tokenizer, context)
        else:
            task = bar.add_task(f"{label}: answers", total=len(problems))
            rollouts = sample_rollouts(
                model,
                tokenizer,
                problems,
                here / ROLLOUTS_FILE,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                batch_size=options.batch_size,
                seed=options.seed,
                on_done=lambda done: bar.advance(task, done),
            )
        analysis = _measured(policies, rollouts, here, options, bar, label)
    return _report(label, meta, policies, tokenizer, rollouts[: len(analysis.answers)], analysis)


def _measured(policies, rollouts: list[Rollout], here: Path, options: AnalyzeArguments, bar, label: str) -> Analysis:
    total = min(options.max_tokens, sum(len(r.completion_ids) for r in rollouts))
    task = bar.add_task(f"{label}: tokens", total=total)
    return analyze_rollouts(
        policies,
        rollouts,
        here,
        until_settled=options.until == "settled",
        max_tokens=options.max_tokens,
        per_token=options.per_token,
        pairs=options.kl_pairs,
        on_answer=lambda answer: bar.advance(task, answer.tokens),
    )


def _sampling(options: AnalyzeArguments) -> dict:
    """What the answers depend on besides the model. Not their number: more answers never change earlier ones."""
    if options.rollouts and Path(options.rollouts).is_file():
        return {"rollouts_sha256": hashlib.sha256(Path(options.rollouts).read_bytes()).hexdigest()}
    return {name: getattr(options, name) for name in ("max_new_tokens", "split", "dataset_config", "system_prompt")}


def _keep_or_clear(here: Path, meta: dict) -> None:
    """Finished work is gone on with only if it was made with the same settings."""
    here.mkdir(parents=True, exist_ok=True)
    path, mine = here / "settings.json", json.loads(json.dumps(meta))
    before = json.loads(path.read_text()) if path.exists() else None
    if before != mine:
        for file in (ROLLOUTS_FILE, ANSWERS_FILE):
            (here / file).unlink(missing_ok=True)
        write_json(path, mine)


def _report(label: str, meta: dict, policies, tokenizer, rollouts: list[Rollout], analysis: Analysis) -> dict:
    answers = analysis.answers
    kl = divergence(answers)
    tokens = sum(a.tokens for a in answers)
    meta = meta | {
        "label": label,
        "answers": len(answers),
        "tokens": tokens,
        "seconds": round(analysis.seconds, 2),
        "stopped_when_settled": analysis.stopped_early,
    }
    return {
        "meta": meta,
        "table": layer_table(answers, label),
        "stages": stages(answers),
        "similarity": similarity(answers).round(6).tolist(),
        "kl": None if kl is None else kl.round(6).tolist(),
        "perplexity": perplexity(answers),
        "entropy_language_model": sum(a.entropy for a in answers) / tokens,
        "views": token_views(policies, tokenizer, rollouts),
    }


def _write(reports: list[dict], folder: Path) -> None:
    """Tables, figures and the page of all models."""
    table = pd.concat([report["table"] for report in reports], ignore_index=True)
    with in_one_piece(folder / "layers.parquet") as part:
        table.to_parquet(part)
    summary = [
        {
            "meta": report["meta"],
            **report["stages"],
            "perplexity": report["perplexity"],
            "entropy_language_model": report["entropy_language_model"],
            "similarity": report["similarity"],
            "kl": report["kl"],
        }
        for report in reports
    ]
    write_json(folder / "summary.json", {"schema_version": 1, "models": summary})
    write_json(folder / "views.json", {report["meta"]["label"]: report["views"] for report in reports})
    analysis_figures(table, summary, folder / "figures")
    write_page(table, summary, {report["meta"]["label"]: report["views"] for report in reports}, folder / "report.html")


def _table(report: dict) -> Table:
    """The layers in the terminal, with the numbers of `layers.parquet`: H and dH in nats, KL and top-1 to pi_theta."""
    meta, rows = report["meta"], report["table"].set_index(["measure", "layer"])
    title = f"{meta['label']}: {meta['answers']} answers, {meta['tokens']:,} tokens, lens {meta['lens']}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "H layer", "dH attn", "dH ffn  [95 %]", "KL", "top-1", "stage"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    colours = {"exploration": "green", "convergence": "red", "integration": "dim", "undecided": "dim"}
    for layer, stage in enumerate(report["stages"]["stages"], 1):

        def mean(measure: str, layer: int = layer) -> float:
            return rows.loc[(measure, layer), "mean"]

        ffn = rows.loc[("d_entropy_ffn", layer)]
        mark = "▶ " if layer == report["stages"]["boundary_layer"] else ""
        table.add_row(
            f"{mark}{layer}",
            f"{mean('entropy_layer'):.3f}",
            f"{mean('d_entropy_attn'):+.2f}",
            f"{ffn['mean']:+.2f} [{ffn['low']:+.2f}, {ffn['high']:+.2f}]",
            f"{mean('kl_language_model'):.2f}",
            f"{100 * mean('top1_agreement'):.0f} %",
            f"[{colours[stage]}]{stage}[/]",
        )
    return table
