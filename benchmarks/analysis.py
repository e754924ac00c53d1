"""Speed and memory of the analysis, relative to a baseline measured in the same run.

    python -m benchmarks.analysis --model SmolLM2.gguf --json out.json

The work is all statistics of `bupo analyze` on answers of 128 to 512 tokens, with five projections per layer: the inputs and
outputs of attention and FFN, and the layer's output. Three rates are compared, each projection counted once:

- `bupo`: `bupo.analysis.measures`, in tokens per second;
- `baseline`: the published code's algorithm: hooks that store every activation, then a head product, softmax, log_softmax and
  sum over all positions for the input and output of each module and layer;
- `floor`: one plain matrix product with the best row-block size in this process, the arithmetic that cannot be avoided.
"""

import argparse
import gc
import json
import resource
import threading
import time
from pathlib import Path

import psutil
import torch

from bupo.analysis.measures import measure_completions
from bupo.models.loading import load_model
from bupo.models.residual_stream import Activation, ResidualStream


def answers(stream, lengths, seed=0):
    """Return random prompts of 16 tokens and answers of the given lengths: the cost does not depend on the text."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = stream.get_unembedding().weight.size(0)
    draw = lambda n: torch.randint(5, min(vocabulary, 40_000), (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(16), draw(n)) for n in lengths]


class PeakMemory:
    """Context manager that samples the largest resident set of this process every 5 ms, in bytes."""

    def __enter__(self):
        gc.collect()
        self.process, self.running = psutil.Process(), True
        self.top = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.top = max(self.top, self.process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *error):
        self.running = False
        self.thread.join()


@torch.no_grad()
def run_baseline(stream, rollouts):
    """Run the published algorithm. Return the mean of each entropy by layer over answer tokens, and the seconds."""
    kinds = ("attn_input", "attn", "ffn_input", "ffn", "layer_input", "layer")
    layers = range(1, stream.num_layers + 1)
    head = stream.model.get_output_embeddings()
    sums = {kind: torch.zeros(stream.num_layers, dtype=torch.float64) for kind in kinds}
    tokens, started = 0, time.perf_counter()
    for prompt, answer in rollouts:
        activations = [Activation(kind, n) for n in layers for kind in kinds if kind != "layer_input"]
        activations.append(Activation("layer", 0))
        states = stream.run(activations, torch.tensor([[*prompt, *answer]]))
        for n in layers:
            for kind in kinds:
                state = states[Activation("layer", n - 1) if kind == "layer_input" else Activation(kind, n)]
                logits = head(state[0])
                entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
                sums[kind][n - 1] += entropy[len(prompt) - 1 : -1].double().sum()
        tokens += len(answer)
    return {kind: (total / tokens) for kind, total in sums.items()}, time.perf_counter() - started


def run_bupo(stream, rollouts):
    """Run bupo's algorithm. Return the same means, and the seconds."""
    started = time.perf_counter()
    measured = list(measure_completions(stream, rollouts))
    seconds = time.perf_counter() - started
    tokens = sum(answer.num_tokens for answer in measured)
    return {
        kind: sum(torch.from_numpy(answer.values[f"entropy_{kind}"]).sum(1) for answer in measured) / tokens
        for kind in ("attn_input", "attn", "ffn_input", "ffn", "layer")
    }, seconds


@torch.no_grad()
def floor_rate(stream, rows: int, seconds: float = 4.0) -> float:
    """Return the tokens per second of plain products of `rows` states with the unembedding, one for each projection."""
    weight = stream.head().weight
    hidden, out = torch.randn(rows, weight.size(1)), torch.empty(rows, weight.size(0))
    torch.mm(hidden, weight.t(), out=out)
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(hidden, weight.t(), out=out)
        products += 1
    return rows * products / (time.perf_counter() - started) / (5 * stream.num_layers + 2)


def best_rows(stream) -> int:
    """Return the row-block size with the fastest plain product in this process."""
    fitting = [rows for rows in (128, 256, 512, 1024, 2048) if rows * stream.head().weight.size(0) * 4 <= 1 << 29]
    return max(fitting, key=lambda rows: floor_rate(stream, rows, 2.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--no_baseline", action="store_true", help="memory and floor only (large vocabularies)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 512, 256, 384],
        help="tokens of the answers, an even number of them",
    )
    args = parser.parse_args()
    stream = ResidualStream(load_model(args.model, dtype=torch.float32).eval())
    rollouts = answers(stream, args.lengths)
    loaded = psutil.Process().memory_info().rss  # before any buffer is kept for reuse
    run_bupo(stream, answers(stream, [16]))  # warm-up
    rows = best_rows(stream)
    tokens = sum(args.lengths)
    bupo_seconds = baseline_seconds = difference = 0.0
    floors, peak = [floor_rate(stream, rows)], 0
    for pair in zip(rollouts[::2], rollouts[1::2], strict=True):  # alternate the three: the speed of the machine drifts
        with PeakMemory() as memory:
            bupo_means, seconds = run_bupo(stream, pair)
        bupo_seconds, peak = bupo_seconds + seconds, max(peak, memory.top - loaded)
        floors.append(floor_rate(stream, rows))
        if not args.no_baseline:
            baseline_means, seconds = run_baseline(stream, pair)
            baseline_seconds += seconds
            difference = max(
                difference, *((bupo_means[kind] - baseline_means[kind]).abs().max().item() for kind in bupo_means)
            )
            floors.append(floor_rate(stream, rows))
    floor = sum(floors) / len(floors)
    result = {
        "model": args.model.rpartition("/")[2],
        "layers": stream.num_layers,
        "vocabulary": stream.get_unembedding().weight.size(0),
        "answers": args.lengths,
        "tokens": tokens,
        "projections": 5 * stream.num_layers + 2,
        "threads": torch.get_num_threads(),
        "tokens_per_second": tokens / bupo_seconds,
        "floor_tokens_per_second": floor,
        "floor_rows": rows,
        "of_floor": tokens / bupo_seconds / floor,
        "peak_bytes_above_model": peak,
    }
    if not args.no_baseline:
        result["baseline_tokens_per_second"] = tokens / baseline_seconds
        result["over_baseline"] = baseline_seconds / bupo_seconds
        result["largest_difference_nats"] = difference
        small, large = answers(stream, [128] * 2), answers(stream, [128] * 8)
        short = run_bupo(stream, small)[1]
        result["time_of_4x_the_tokens"] = run_bupo(stream, large)[1] / short
    result["max_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
