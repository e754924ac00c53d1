"""Every measure against an independent fp64 computation that holds whole tensors."""

import numpy as np
import pytest
import torch

from bupo.analysis import measures as measure_module
from bupo.analysis import vocab_streaming as fold_module
from bupo.analysis.measures import MEASURES, measure_completions
from bupo.models.residual_stream import Activation, ResidualStream
from tests.helpers.tiny_models import FAMILIES, tiny_model

ROLLOUTS = [([5, 6, 7], [8, 9, 10, 11, 12]), ([3], [4]), ([20, 21], [22, 23, 24]), ([9] * 6, [7, 8] * 4)]


@torch.no_grad()
def naive(model, prompt, answer, lens="raw", temperature=1.0):
    """Whole logits in fp64, each definition written out once more."""
    stream = ResidualStream(model)
    layers = range(1, stream.num_layers + 1)
    ids = torch.tensor([[*prompt, *answer]])
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    sites = [Activation(k, n) for n in layers for k in ("attn", "ffn", "attn_input", "ffn_input", "layer")] + [
        Activation("layer", 0)
    ]
    h = {site: x[0, rows] for site, x in stream.compute_activations(sites, ids).items()}
    theta = (model(ids).logits[0, rows].double() / temperature).log_softmax(-1)

    def log_p(site):
        x = h[site]
        if lens == "final_norm" and site.kind in ("layer", "attn", "ffn"):
            x = stream.final_norm(x)
        return (stream.logits(x).double() / temperature).log_softmax(-1)

    def entropy(site):
        p = log_p(site)
        return -(p.exp() * p).sum(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    def cosine(a, b):
        return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)

    target = torch.tensor(answer)[:, None]
    found = {name: [] for name in MEASURES}
    for n in layers:
        own, below = Activation("layer", n), Activation("layer", n - 1)
        for kind in ("attn_input", "attn", "ffn_input", "ffn", "layer"):
            found[f"entropy_{kind}"].append(entropy(Activation(kind, n)))
        found["entropy_layer_input"].append(entropy(below))
        found["d_entropy_layer"].append(entropy(own) - entropy(below))
        found["d_entropy_attn"].append(entropy(Activation("attn", n)) - entropy(Activation("attn_input", n)))
        found["d_entropy_ffn"].append(entropy(Activation("ffn", n)) - entropy(Activation("ffn_input", n)))
        last = n == stream.num_layers
        found["kl_next"].append(
            torch.full((len(answer),), torch.nan).double()
            if last
            else kl(log_p(own), log_p(Activation("layer", n + 1)))
        )
        found["kl_language_model"].append(kl(log_p(own), theta))
        found["top1_agreement"].append((log_p(own).argmax(-1) == theta.argmax(-1)).double())
        found["log_prob"].append(log_p(own).gather(-1, target)[:, 0])
        found["cosine_attn"].append(cosine(h[Activation("attn", n)], h[below]))
        found["cosine_ffn"].append(cosine(h[Activation("ffn", n)], h[below] + h[Activation("attn", n)]))
    pairs = torch.stack(
        [
            torch.stack([kl(log_p(Activation("layer", a)), log_p(Activation("layer", b))).sum() for b in layers])
            for a in layers
        ]
    )
    similarity = torch.stack(
        [
            torch.stack([cosine(h[Activation("layer", a)], h[Activation("layer", b)]).sum() for b in layers])
            for a in layers
        ]
    )
    return (
        {name: torch.stack(values).double().numpy() for name, values in found.items()},
        similarity.double().numpy(),
        pairs.double().numpy(),
        theta.gather(-1, target)[:, 0].numpy(),
        -(theta.exp() * theta).sum(-1).numpy(),
    )


def compare(found, wanted, **tolerance):
    values, similarity, kl, log_probs, entropy = wanted
    for name in MEASURES:
        np.testing.assert_allclose(found.values[name], values[name], err_msg=name, **tolerance)
    np.testing.assert_allclose(found.similarity, similarity, **tolerance)
    if found.kl is not None:
        np.testing.assert_allclose(found.kl, kl, **tolerance)
    np.testing.assert_allclose(found.log_probs, log_probs, **tolerance)
    np.testing.assert_allclose(found.entropy, entropy, **tolerance)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_naive_fp64(family, pairs, monkeypatch):
    monkeypatch.setattr(fold_module, "CPU_TILE_SIZE", 13)  # many merges, and a last tile that is short
    model = tiny_model(family, dtype=torch.float64)
    for rollout, found in zip(ROLLOUTS, measure_completions(ResidualStream(model), ROLLOUTS, pairs=pairs), strict=True):
        assert (found.kl is not None) == pairs
        compare(found, naive(model, *rollout), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [1, 7, 97, 4096])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("size", [1, 40])  # of the head: ordinary logits, and those of hundreds
def test_fp32_and_large_logits(monkeypatch, tile, size, pairs):
    monkeypatch.setattr(fold_module, "CPU_TILE_SIZE", tile)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= size
    for rollout, found in zip(ROLLOUTS, measure_completions(ResidualStream(model), ROLLOUTS, pairs=pairs), strict=True):
        # 1e-6 a token in fp32, and some of what is compared sums an answer's tokens: processors differ
        compare(found, naive(model.double(), *rollout), rtol=2e-4, atol=3e-5 * size)
        model.float()


def test_lens_and_temperature():
    model = tiny_model("gemma2", dtype=torch.float64)
    found = next(measure_completions(ResidualStream(model), ROLLOUTS[:1], lens="final_norm", temperature=0.7))
    compare(found, naive(model, *ROLLOUTS[0], lens="final_norm", temperature=0.7), rtol=1e-6, atol=1e-6)


def test_blocks_and_order_change_nothing(monkeypatch):
    stream = ResidualStream(tiny_model("qwen3"))
    together = list(measure_completions(stream, ROLLOUTS, pairs=True))
    backwards = list(measure_completions(stream, ROLLOUTS[::-1], pairs=True))[::-1]
    monkeypatch.setattr(
        measure_module._PositionBlock, "num_free", property(lambda self: min(3, self.capacity) - self.num_used)
    )
    split = list(
        measure_completions(stream, ROLLOUTS, pairs=True)
    )  # answers over several blocks, blocks over several answers
    for whole, *others in zip(together, backwards, split, strict=True):
        for other in others:
            compare(
                other, (whole.values, whole.similarity, whole.kl, whole.log_probs, whole.entropy), rtol=1e-4, atol=3e-5
            )


def test_sixteen_bits_stay_near():
    """bf16 rounds states to 2^-9: entropies of tiny models stay within 0.05 nats on average."""
    exact = list(measure_completions(ResidualStream(tiny_model("llama")), ROLLOUTS))
    rounded = list(measure_completions(ResidualStream(tiny_model("llama", dtype=torch.bfloat16)), ROLLOUTS))
    for a, b in zip(exact, rounded, strict=True):
        for kind in ("layer", "attn", "ffn"):
            assert np.abs(a.values[f"entropy_{kind}"] - b.values[f"entropy_{kind}"]).mean() < 0.05
