"""Make the worlds of `bupo reproduce --scale worlds`: base models that differ in properties that may matter to BuPO.

| world | property |
|---|---|
| `supervised` | every layer's policy was trained to answer: the boundary is late, as in Llama |
| `weak` | few worked answers: low accuracy and high entropy, which falls layer by layer, as in Qwen3 |
| `long` | five numbers instead of three: four steps to reason over |
| `deep16` | 16 layers, 96 wide |
| `deep32` | 32 layers, 64 wide |

The first three start from the embedded model, the others from random weights. Each has about 1.2 M parameters (5 MB). Seeds
and the number of threads are fixed; another number of threads, or another kind of processor, may give other weights. A world
takes one to forty minutes on one CPU core:

    python tools/make_worlds.py runs/worlds                     # all missing worlds
    python tools/make_worlds.py runs/worlds --only supervised
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from make_embedded_model import make_model, make_tokenizer, save, train
from transformers import Qwen3ForCausalLM

from bupo.models.loading import compute_weight_fingerprint

EMBEDDED = Path(__file__).parents[1] / "src/bupo/embedded/model"


@dataclass(frozen=True)
class World:
    """Recipe of a base model: its shape, updates on worked answers, then updates on worked and direct answers."""

    layers: int = 8  # with 8, training starts from the embedded model
    width: int = 128
    worked_steps: int = 0
    mixed_steps: int = 200
    worked_share: float = 0.35
    worked_rate: float = 1e-3
    numbers: int = 3
    supervision: float = 0.0  # weight of the cross-entropy of every layer's policy


WORLDS = {
    "supervised": World(worked_steps=1000, supervision=1.0),
    "weak": World(mixed_steps=150, worked_share=0.08),
    "long": World(worked_steps=1000, numbers=5),
    "deep16": World(layers=16, width=96, worked_steps=1800, worked_rate=3e-3),
    "deep32": World(layers=32, width=64, worked_steps=1800, worked_rate=3e-3),
}


def make(world: World, folder: Path, minutes: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    if world.layers == 8:
        model = Qwen3ForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    else:
        model = make_model(tokenizer, world.layers, world.width)
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    same = {"batch_size": 64, "minutes": minutes, "numbers": world.numbers, "supervision": world.supervision}
    if world.worked_steps:
        stage = {"steps": world.worked_steps, "peak_rate": world.worked_rate, "worked_share": 1.0, "seed": 1}
        train(model, tokenizer, name="worked", **stage, **same)
    stage = {"steps": world.mixed_steps, "peak_rate": 5e-4, "worked_share": world.worked_share, "seed": 2}
    train(model, tokenizer, name="mixed", **stage, **same)
    save(model, tokenizer, folder, world.numbers)
    print(f"{folder.name}: weights {compute_weight_fingerprint(model)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the worlds, each in a subfolder")
    parser.add_argument("--only", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--minutes", type=float, default=60, help="limit of a stage")
    args = parser.parse_args()
    for name in args.only:
        if not (args.folder / name / "model.safetensors").exists():
            make(WORLDS[name], args.folder / name, args.minutes)


if __name__ == "__main__":
    main()
