"""Growth of an update's cost with answers, layers, prompts, groups and the vocabulary: a figure and a table.

    python -m benchmarks.growth --model SmolLM2.gguf --json out.json --figure out.png

One variable changes at a time. All trainers get the same answers (random tokens) and take turns (`benchmarks.turns`). An update
is the part of a step after the rollouts.

- `answer`: 8 answers of a prompt of 44 tokens, of 8 to 256 tokens each;
- `layer`: the same with 64 tokens, and phase 1 at layers from 1 to the last;
- `prompt`: 8 answers of a prompt, 128 tokens of prompt and answer, by the share of the prompt;
- `group`: 16 answers of 16 tokens to prompts of 64, by the number of answers per prompt;
- `vocabulary`: models of two layers with random weights that differ only in their vocabulary: time, and memory of forward and
  backward passes above weights, optimizer and gradients.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks.result import Result, Table, options
from benchmarks.turns import FIRST, SECOND, TRL, Job, Rollouts, Trainers, made_up, trainers
from bupo.models.loading import load_config
from bupo.reports.figures.style import BLUE, GREY, ORANGE, add_legend, create_panels, hide_spines, save_figure

ALL = (TRL, FIRST, SECOND)
COLOURS = {TRL: GREY, FIRST: ORANGE, SECOND: BLUE}
PROMPT, ANSWERS, MIDDLE, SUM = 44, (8, 16, 32, 64, 128, 256), 64, 128
SHARES = (0.0625, 0.25, 0.5, 0.75, 0.9375)
GROUPS = (1, 2, 4, 8, 16)
VOCABULARIES = (1 << 10, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Point:
    """Medians of a variant at a value of a panel's x axis; `passes`: bytes of the forward and backward passes."""

    panel: str
    x: float
    variant: str
    seconds: float
    passes: float


@dataclass(frozen=True)
class Series:
    """Rollout batches that differ in one variable.

    Attributes:
        panel (`str`): of the figure.
        xs (`tuple[float, ...]`): values of the variable.
        batches (`tuple[Rollouts, ...]`): one for each value.
        layers (`tuple[int, ...]`): layer of phase 1, one for each value.
        group (`int`): TRL's `num_generations`. BuPO finds shared prompts by comparing them.
        model (`str` or `dict`): of [`benchmarks.turns.Job`].
    """

    panel: str
    xs: tuple[float, ...]
    batches: tuple[Rollouts, ...]
    layers: tuple[int, ...]
    group: int
    model: str | dict[str, Any]

    def measured(self, running: Trainers, variants: Sequence[str], rounds: int) -> list[Point]:
        """Return the points of all values, each measured once per round. The first update is a warm-up and not counted."""
        batches = (self.batches[0], *self.batches * rounds)
        layers = (self.layers[0], *self.layers * rounds)
        job = Job(self.model, layers, batches, len(batches[0].answers), 1, self.group)
        done = list(running.run(dict.fromkeys(variants, job)))[1:]
        points = []
        for index, x in enumerate(self.xs):
            for variant in variants:
                updates = [round_updates[variant] for round_updates in done[index :: len(self.xs)]]
                seconds = statistics.median(update.seconds["update"] for update in updates)
                passes = statistics.median(update.memory["passes"] for update in updates)
                points.append(Point(self.panel, x, variant, seconds, passes))
        return points

    def only(self, indices: Sequence[int]) -> "Series":
        """Return the series of some of the values."""
        xs, batches = tuple(self.xs[i] for i in indices), tuple(self.batches[i] for i in indices)
        return replace(self, xs=xs, batches=batches, layers=tuple(self.layers[i] for i in indices))


def series_of(model, layer: int, layers: Sequence[int], vocabulary: int) -> dict[str, Series]:
    """Return the series of the panels of a model, with the sizes at the top of the module."""

    def make_series(
        panel: str, xs: Sequence[float], batches: Sequence[Rollouts], at: Sequence[int] = (), group: int = 8
    ) -> Series:
        return Series(panel, tuple(xs), tuple(batches), tuple(at) or (layer,) * len(batches), group, model)

    answers = [made_up(PROMPT, [length] * 8, 8, vocabulary) for length in ANSWERS]
    prompts = [round(share * SUM) for share in SHARES]
    shares = [made_up(prompt, [SUM - prompt] * 8, 8, vocabulary) for prompt in prompts]
    groups = [made_up(64, [16] * 16, group, vocabulary) for group in GROUPS]
    return {
        "answer": make_series("answer", ANSWERS, answers),
        "layer": make_series("layer", layers, [answers[ANSWERS.index(MIDDLE)]] * len(layers), layers),
        "prompt": make_series("prompt", SHARES, shares),
        "group": make_series("group", GROUPS, groups, group=16),
    }


def in_vocabulary(
    running: Trainers, vocabularies: Sequence[int], rounds: int, variants: Sequence[str] = ALL
) -> list[Point]:
    """Return the points of models with different vocabularies."""
    points = []
    for size in vocabularies:
        batch = made_up(16, [48] * 8, 8, 256)  # ids of the smallest vocabulary: they do not change the cost
        series = Series("vocabulary", (size,), (batch,), (1,), 8, {**TINY, "vocab_size": size})
        points += series.measured(running, variants, rounds)
    return points


def benchmark(model, layer: int, layers: Sequence[int], vocabulary: int, rounds: int, threads: int) -> Result:
    """Measure all panels. TRL is measured only at the ends of panels where only its padding could differ."""
    named = Path(model).name if isinstance(model, str) else model["model_type"]
    result = Result(f"python -m benchmarks.growth --model {named}", f"{named}, layer {layer} unless stated otherwise")
    series = series_of(model, layer, layers, vocabulary)
    with trainers(ALL, threads) as running:
        points = series["answer"].measured(running, (FIRST, SECOND), rounds)
        points += series["answer"].measured(running, (TRL,), 1)
        points += series["layer"].measured(running, (FIRST,), rounds)
        for name in ("prompt", "group"):
            points += series[name].measured(running, (FIRST, SECOND), rounds)
            points += series[name].only((0, -1)).measured(running, (TRL,), 1)
        points += in_vocabulary(running, VOCABULARIES, rounds)
    result.raw["points"] = [vars(point) for point in points]
    result.tables = [table_of(points)]
    return result


def table_of(points: Sequence[Point]) -> Table:
    """Return the growth of cost from one end of each panel to the other."""
    rows = []
    for panel, value, label in (
        ("answer", "seconds", "time, answers of {:.0f} to {:.0f} tokens"),
        ("layer", "seconds", "time, layer {:.0f} to {:.0f}"),
        ("prompt", "seconds", "time, prompt {:.0%} to {:.0%} of the tokens"),
        ("group", "seconds", "time, {:.0f} to {:.0f} answers a prompt"),
        ("vocabulary", "seconds", "time, vocabulary of {:.0f} to {:.0f}"),
        ("vocabulary", "passes", "memory of the passes, vocabulary of {:.0f} to {:.0f}"),
    ):
        panel_points = [point for point in points if point.panel == panel]
        ends = min(point.x for point in panel_points), max(point.x for point in panel_points)
        row = {"from one end to the other": label.format(*ends)}
        for variant in ALL:
            first, last = (
                next((getattr(p, value) for p in panel_points if p.variant == variant and p.x == x), None) for x in ends
            )
            row[variant] = "" if first is None or last is None else f"{last / max(first, 1e-9):.2f}x"
        rows.append(row)
    return Table("Growth of an update's cost", rows)


def figure(points: Sequence[Point], path: Path, layer: int) -> None:
    """Draw six panels with a line for each trainer."""
    shape, axes = create_panels(2, 3, (12, 6.6))
    for axis, (panel, value, title, label) in zip(
        axes.flat,
        (
            ("answer", "seconds", "longer answers", "tokens of each of 8 answers"),
            ("layer", "seconds", f"more layers (answers of {MIDDLE} tokens)", "layer that phase 1 optimises"),
            ("prompt", "seconds", "a larger part is prompt", f"prompt's share of {SUM} tokens (%)"),
            ("group", "seconds", "more answers share a prompt", "answers a prompt, of 16"),
            ("vocabulary", "seconds", "larger vocabulary, two-layer model", "vocabulary"),
            ("vocabulary", "passes", "memory of the passes over the vocabulary", "vocabulary"),
        ),
        strict=True,
    ):
        _panel(axis, [point for point in points if point.panel == panel], value)
        if panel == "layer":
            _references(axis, points)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylabel("an update (s)" if value == "seconds" else "MB", fontsize=9)
        axis.set_ylim(bottom=0)
        hide_spines(axis)
    axes[0, 2].xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
    axes[1, 0].set_xticks(GROUPS, [str(group) for group in GROUPS])
    for axis in axes[1, 1:]:
        axis.set_xticks([1 << 15, 1 << 16, 1 << 17], ["32k", "64k", "128k"])
    add_legend(axes[0, 0], fontsize=9)
    shape.suptitle(f"Cost of an update; phase 1 at layer {layer} unless stated otherwise", fontsize=11)
    save_figure(shape, path)


def _panel(axis: Axes, points: Sequence[Point], value: str) -> None:
    for variant in ALL:
        line = sorted((p for p in points if p.variant == variant), key=lambda p: p.x)
        ys = [getattr(p, value) / (1 if value == "seconds" else 1e6) for p in line]
        if line:
            axis.plot([p.x for p in line], ys, color=COLOURS[variant], marker="o", ms=3.5, lw=1.6, label=variant)


def _references(axis: Axes, points: Sequence[Point]) -> None:
    """Draw TRL and phase 2 at the panel's answer length as dashed lines with their names."""
    for variant in (TRL, SECOND):
        seconds = [p.seconds for p in points if (p.panel, p.variant, p.x) == ("answer", variant, MIDDLE)]
        if seconds:
            axis.axhline(seconds[0], color=COLOURS[variant], lw=1.2, ls="--")
            transform = axis.get_yaxis_transform()
            axis.text(0.02, seconds[0], variant, transform=transform, va="bottom", color=COLOURS[variant], fontsize=8)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 5, 10, 20, 30], help="layers of the panel of layers"
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds that medians are taken of")
    parser.add_argument("--figure", type=Path, help="file of the figure")
    given = parser.parse_args()
    vocabulary = load_config(given.model).get_text_config().vocab_size
    result = benchmark(given.model, given.layer, given.layers, vocabulary, given.rounds, torch.get_num_threads())
    result.show()
    result.write(given.json)
    if given.figure:
        figure([Point(**point) for point in result.raw["points"]], given.figure, given.layer)


if __name__ == "__main__":
    main()
