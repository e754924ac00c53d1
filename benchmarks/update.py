"""Time and memory of a rollout batch's update, relative to TRL's and to the published code's algorithm.

    python -m benchmarks.update --model SmolLM2.gguf --json out.json

All trainers get the same answers (random tokens) and take turns, each in a separate process (`benchmarks.turns`). An update
is the part of a step after the rollouts: TRL's shuffling and splitting, forward and backward passes, clipping, the
optimizer's step and the log. Gradients of the first update and logged entropies are compared to check that all trainers do
the same work.

- `equal`: 32 answers of 12 tokens to prompts of 44, groups of 8, one micro-batch;
- `unequal`: 32 answers of 8 to 512 tokens (log-normal, median 96, sigma 0.9, cut at both ends), four micro-batches of 8 rows.

`phase 1 as published` is TRL's trainer with phase 1 by a forward pass that keeps all hidden states, and the head on every
position of layer l's states and of the last layer's.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import Result, Table, Target, middle, options, ratios
from benchmarks.turns import (
    FIRST,
    PUBLISHED,
    SECOND,
    TRL,
    Job,
    Rollouts,
    Trainers,
    Update,
    made_up,
    profiles_of,
    trainers,
)
from bupo.models.loading import load_config

PROMPT, ANSWER, ROWS, GROUP = 44, 12, 32, 8
SHORTEST, MEDIAN, SIGMA, LONGEST = 8, 96, 0.9, 512
SAME = 1e-4  # tolerance of gradients, relative to the largest, and of entropies in nats: fp32 sums in another order
SETTINGS = {
    "equal": f"{ROWS} answers of {ANSWER} tokens to prompts of {PROMPT}, groups of {GROUP}, one micro-batch",
    "unequal": f"{ROWS} answers of {SHORTEST} to {LONGEST} tokens to prompts of {PROMPT}, groups of {GROUP}, 4 micro-batches",
}


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Return log-normal answer lengths, cut at both ends."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, rows)
    return [int(length) for length in drawn.clip(SHORTEST, LONGEST)]


def same_work(done: dict[str, Update]) -> float:
    """Return the largest difference between variants that must agree in their first update.

    Raises:
        AssertionError: if it is larger than rounding.
    """
    largest = 0.0
    for variant, reference in ((SECOND, TRL), (FIRST, PUBLISHED)):
        if variant not in done or reference not in done:
            continue
        a, b = done[variant], done[reference]
        assert a.gradients.keys() == b.gradients.keys(), f"{variant} and {reference} train different parameters"
        errors = [np.abs(a.gradients[n] - b.gradients[n]).max() / np.abs(b.gradients[n]).max() for n in b.gradients]
        largest = max(largest, float(max(errors)), abs(a.entropy - b.entropy))
    assert largest < SAME, f"the variants differ by {largest:.1e}: they do not do the same work"
    return largest


def measured(
    running: Trainers, jobs: dict[str, Job], profiled: bool
) -> tuple[dict[str, list[Update]], dict[str, str], float]:
    """Return the updates of each variant after the warm-up, the profiles and the largest difference between variants."""
    rounds = list(running.run(jobs))
    difference = same_work(rounds[0])
    timed = rounds[1:-1] if profiled else rounds[1:]
    return {name: [done[name] for done in timed] for name in jobs}, profiles_of(rounds[-1]), difference


def table_of(title: str, updates: dict[str, list[Update]]) -> Table:
    """Return seconds and memory of each variant, and their ratios to TRL's."""
    rows = []
    for name, done in updates.items():
        seconds, bytes_ = [update_alone(u) for u in done], [memory(u) for u in done]
        trl_updates = updates[TRL]
        rows.append(
            {
                "": name,
                "update, s": middle(seconds, 1),
                "of TRL's": middle(ratios(seconds, [update_alone(u) for u in trl_updates])),
                "with the scoring before it": middle(
                    ratios([with_scoring(u) for u in done], [with_scoring(u) for u in trl_updates])
                ),
                "memory above the model, GB": f"{statistics.median(bytes_) / 1e9:.1f}",
                "of TRL's memory": f"{statistics.median(bytes_) / statistics.median([memory(u) for u in trl_updates]):.2f}",
            }
        )
    return Table(title, rows)


def ratio(updates: dict[str, list[Update]], variant: str, reference: str, cost: Callable[[Update], float]) -> float:
    """Return the median ratio of two variants' costs over rounds."""
    return statistics.median(ratios(*([cost(update) for update in updates[name]] for name in (variant, reference))))


def update_alone(update: Update) -> float:
    return update.seconds["update"]


def with_scoring(update: Update) -> float:
    """Return the seconds of the update and of the scoring before it."""
    return update.seconds["update"] + update.seconds["scoring"]


def memory(update: Update) -> float:
    """Return the bytes above the model, of the update or of the scoring before it, whichever is larger."""
    return max(update.memory["update"], update.memory["scoring"])


def beside_published(updates: dict[str, list[Update]]) -> Table:
    """Return a table of phase 1 with the scoring before it, relative to the published update.

    The published update computes the final policy's entropies itself; its own scoring is not counted.
    """
    rows = [
        {"": label, "of the published update's time": f"{ratio(updates, FIRST, PUBLISHED, cost):.2f}"}
        for label, cost in (("its update", update_alone), ("its update and the scoring before it", with_scoring))
    ]
    return Table("Phase 1 relative to the published update", rows)


def targets_of(name: str, updates: dict[str, list[Update]]) -> list[Target]:
    """Return the targets of an update."""
    limits = {"equal": (0.14, 0.28), "unequal": (0.20, 0.40)}[name]
    targets = [
        Target(f"{name} answers: {phase}, of TRL's time", ratio(updates, variant, TRL, update_alone), limit)
        for phase, variant, limit in zip(("phase 1", "phase 2"), (FIRST, SECOND), limits, strict=True)
    ]
    if PUBLISHED in updates:
        cost = ratio(updates, FIRST, PUBLISHED, update_alone), ratio(updates, FIRST, PUBLISHED, memory)
        targets.append(Target("phase 1, of the published update's time", cost[0], 0.20))
        targets.append(Target("phase 1, of the published update's memory", cost[1], 0.50))
    return targets


def benchmark(
    model, layer: int, vocabulary: int, rounds: int, long_rounds: int, profiled: bool, threads: int
) -> Result:
    """Run the benchmark. `model` as in [`benchmarks.turns.Job`]."""
    named = Path(model).name if isinstance(model, str) else model["model_type"]
    result = Result(f"python -m benchmarks.update --model {named}", f"{named}, layer {layer}, against TRL's own update")
    warm = made_up(PROMPT, [ANSWER] * ROWS, GROUP, vocabulary)
    equal = [made_up(PROMPT, [ANSWER] * ROWS, GROUP, vocabulary, seed) for seed in range(1, rounds + 1)]
    unequal = [made_up(PROMPT, lengths(ROWS), GROUP, vocabulary, seed) for seed in range(1, long_rounds + 1)]
    every = (TRL, FIRST, SECOND, PUBLISHED)

    def job(batches: Sequence[Rollouts], passes: int) -> Job:
        rollouts = (warm, *batches, *(batches[-1:] if profiled else ()))
        return Job(model, (layer,) * len(rollouts), rollouts, ROWS, passes, GROUP, profiled=profiled)

    with trainers(every, threads) as running:
        for name, variants, batches, passes in (("equal", every, equal, 1), ("unequal", every[:3], unequal, 4)):
            if not batches:
                continue
            updates, profiles, difference = measured(running, dict.fromkeys(variants, job(batches, passes)), profiled)
            result.tables.append(table_of(SETTINGS[name], updates))
            if PUBLISHED in updates:
                result.tables.append(beside_published(updates))
            result.targets += targets_of(name, updates)
            result.profiles |= {f"{name} answers, {variant}": text for variant, text in profiles.items()}
            result.raw[name] = {
                variant: [{"seconds": u.seconds, "memory": u.memory, "tokens": u.tokens} for u in done]
                for variant, done in updates.items()
            } | {"largest_difference": difference}
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measured updates of equal answers")
    parser.add_argument(
        "--long_rounds", type=int, default=2, help="measured updates of unequal answers, minutes each; 0 skips them"
    )
    parser.add_argument("--profile", action="store_true", help="profile one more update of each trainer")
    given = parser.parse_args()
    vocabulary = load_config(given.model).get_text_config().vocab_size
    result = benchmark(
        given.model, given.layer, vocabulary, given.rounds, given.long_rounds, given.profile, torch.get_num_threads()
    )
    result.show()
    result.write(given.json)


if __name__ == "__main__":
    main()
