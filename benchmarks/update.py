"""The update of a rollout batch, against TRL's own and against the paper's published way, as ratios in one run.

    python -m benchmarks.update --model SmolLM2.gguf --json out.json

All trainers are given the same answers (random tokens), and take turns, each in a process of its own (`benchmarks.turns`). An
update is what comes after the rollouts: TRL's shuffling and cutting, forward and backward passes, clipping, the optimizer's
step and the log. That all compute the same is checked on the gradients of the first update and on the logged entropies.

- `equal`: 32 answers of 12 tokens to prompts of 44, groups of 8, one micro-batch;
- `unequal`: 32 answers of 8 to 512 tokens (log-normal, median 96, sigma 0.9, cut at both ends), four micro-batches of 8 rows.

`phase 1 as published` is TRL's trainer with phase 1 by a forward pass that keeps all states, and the head on every position of
layer l's states and of the last ones.
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
SAME = 1e-4  # of gradients, as a share of the largest, and of entropies in nats: fp32, summed in another order
SETTINGS = {
    "equal": f"{ROWS} answers of {ANSWER} tokens to prompts of {PROMPT}, groups of {GROUP}, one micro-batch",
    "unequal": f"{ROWS} answers of {SHORTEST} to {LONGEST} tokens to prompts of {PROMPT}, groups of {GROUP}, 4 micro-batches",
}


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Of answers, log-normal, cut at both ends."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, rows)
    return [int(length) for length in drawn.clip(SHORTEST, LONGEST)]


def same_work(done: dict[str, Update]) -> float:
    """The largest difference between what must be equal, of the first updates.

    Raises:
        AssertionError: if it is more than rounding.
    """
    found = 0.0
    for mine, theirs in ((SECOND, TRL), (FIRST, PUBLISHED)):
        if mine not in done or theirs not in done:
            continue
        a, b = done[mine], done[theirs]
        assert a.gradients.keys() == b.gradients.keys(), f"{mine} and {theirs} move different parameters"
        apart = [np.abs(a.gradients[n] - b.gradients[n]).max() / np.abs(b.gradients[n]).max() for n in b.gradients]
        found = max(found, float(max(apart)), abs(a.entropy - b.entropy))
    assert found < SAME, f"the variants differ by {found:.1e}: they do not do the same work"
    return found


def measured(
    running: Trainers, jobs: dict[str, Job], profiled: bool
) -> tuple[dict[str, list[Update]], dict[str, str], float]:
    """The updates of each variant but for the first, which warms up; profiles; and the largest difference."""
    rounds = list(running.run(jobs))
    apart = same_work(rounds[0])
    kept = rounds[1:-1] if profiled else rounds[1:]
    return {name: [done[name] for done in kept] for name in jobs}, profiles_of(rounds[-1]), apart


def table_of(title: str, updates: dict[str, list[Update]]) -> Table:
    """Seconds and memory of each variant, and both as ratios to TRL's."""
    rows = []
    for name, done in updates.items():
        seconds, bytes_ = [update_alone(u) for u in done], [memory(u) for u in done]
        theirs = updates[TRL]
        rows.append(
            {
                "": name,
                "update, s": middle(seconds, 1),
                "of TRL's": middle(ratios(seconds, [update_alone(u) for u in theirs])),
                "with the scoring before it": middle(
                    ratios([with_scoring(u) for u in done], [with_scoring(u) for u in theirs])
                ),
                "memory above the model, GB": f"{statistics.median(bytes_) / 1e9:.1f}",
                "of TRL's memory": f"{statistics.median(bytes_) / statistics.median([memory(u) for u in theirs]):.2f}",
            }
        )
    return Table(title, rows)


def ratio(updates: dict[str, list[Update]], mine: str, theirs: str, cost: Callable[[Update], float]) -> float:
    """The median over rounds."""
    return statistics.median(ratios(*([cost(update) for update in updates[name]] for name in (mine, theirs))))


def update_alone(update: Update) -> float:
    return update.seconds["update"]


def with_scoring(update: Update) -> float:
    """Seconds of the update and of the log-probs and entropies that are made before it."""
    return update.seconds["update"] + update.seconds["scoring"]


def memory(update: Update) -> float:
    """Bytes above the model, of the update or of the scoring before it, whichever takes more."""
    return max(update.memory["update"], update.memory["scoring"])


def beside_published(updates: dict[str, list[Update]]) -> Table:
    """Phase 1 with what is made before its update: the published update makes pi_theta's entropies itself.

    What the published way scores before its update is not counted.
    """
    rows = [
        {"": what, "of the published update's time": f"{ratio(updates, FIRST, PUBLISHED, cost):.2f}"}
        for what, cost in (("its update", update_alone), ("its update and the scoring before it", with_scoring))
    ]
    return Table("Phase 1 beside the published update", rows)


def targets_of(name: str, updates: dict[str, list[Update]]) -> list[Target]:
    """What is wanted of an update."""
    most = {"equal": (0.14, 0.28), "unequal": (0.20, 0.40)}[name]
    found = [
        Target(f"{name} answers: {phase}, of TRL's time", ratio(updates, variant, TRL, update_alone), limit)
        for phase, variant, limit in zip(("phase 1", "phase 2"), (FIRST, SECOND), most, strict=True)
    ]
    if PUBLISHED in updates:
        cost = ratio(updates, FIRST, PUBLISHED, update_alone), ratio(updates, FIRST, PUBLISHED, memory)
        found.append(Target("phase 1, of the published update's time", cost[0], 0.20))
        found.append(Target("phase 1, of the published update's memory", cost[1], 0.50))
    return found


def benchmark(
    model, layer: int, vocabulary: int, rounds: int, long_rounds: int, profiled: bool, threads: int
) -> Result:
    """All of it. `model` as of [`benchmarks.turns.Job`]."""
    named = Path(model).name if isinstance(model, str) else model["model_type"]
    result = Result(f"python -m benchmarks.update --model {named}", f"{named}, layer {layer}, against TRL's own update")
    warm = made_up(PROMPT, [ANSWER] * ROWS, GROUP, vocabulary)
    equal = [made_up(PROMPT, [ANSWER] * ROWS, GROUP, vocabulary, seed) for seed in range(1, rounds + 1)]
    unequal = [made_up(PROMPT, lengths(ROWS), GROUP, vocabulary, seed) for seed in range(1, long_rounds + 1)]
    every = (TRL, FIRST, SECOND, PUBLISHED)

    def job(batches: Sequence[Rollouts], passes: int) -> Job:
        given = (warm, *batches, *(batches[-1:] if profiled else ()))
        return Job(model, (layer,) * len(given), given, ROWS, passes, GROUP, profiled=profiled)

    with trainers(every, threads) as running:
        for name, variants, batches, passes in (("equal", every, equal, 1), ("unequal", every[:3], unequal, 4)):
            if not batches:
                continue
            updates, profiles, apart = measured(running, dict.fromkeys(variants, job(batches, passes)), profiled)
            result.tables.append(table_of(SETTINGS[name], updates))
            if PUBLISHED in updates:
                result.tables.append(beside_published(updates))
            result.targets += targets_of(name, updates)
            result.profiles |= {f"{name} answers, {variant}": text for variant, text in profiles.items()}
            result.raw[name] = {
                variant: [{"seconds": u.seconds, "memory": u.memory, "tokens": u.tokens} for u in done]
                for variant, done in updates.items()
            } | {"largest_difference": apart}
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measured, of equal answers")
    parser.add_argument(
        "--long_rounds", type=int, default=2, help="measured, of unequal answers: minutes each; 0 leaves them out"
    )
    parser.add_argument("--profile", action="store_true", help="show where one more update of each spends its time")
    given = parser.parse_args()
    vocabulary = load_config(given.model).get_text_config().vocab_size
    result = benchmark(
        given.model, given.layer, vocabulary, given.rounds, given.long_rounds, given.profile, torch.get_num_threads()
    )
    result.show()
    result.write(given.json)


if __name__ == "__main__":
    main()
