"""Scoring against the naive float64 computation, values and gradients, over shapes, ties, masks and extreme logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo.models import token_scoring
from bupo.models.token_scoring import IGNORE_INDEX, score_tokens
from bupo.models.unembedding import Unembedding


def naive(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """Compute log-prob and entropy from full float64 logits."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    keep = targets != IGNORE_INDEX
    log_probs = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(keep, log_probs, 0.0), torch.where(keep, -(log_p.exp() * log_p).sum(-1), 0.0)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    n, d, v = draw(st.integers(1, 40)), draw(st.integers(1, 24)), draw(st.integers(1, 90))
    size = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 300.0]))  # of the logits: uniform to one-hot
    hidden = torch.randn(n, d, generator=generator) * size
    weight = torch.randn(v, d, generator=generator) / d**0.5
    if draw(st.booleans()):
        weight[torch.randint(v, (v,), generator=generator)] = weight[0].clone()  # ties
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = IGNORE_INDEX
    options = {
        "bias": torch.randn(v, generator=generator) if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([1.0, 0.25, 3.0])),
        "softcap": draw(st.sampled_from([None, 5.0, 30.0])),
        "temperature": draw(st.sampled_from([1.0, 0.6, 2.0])),
    }
    upstream = torch.randn(2, n, generator=generator)
    return hidden, weight, targets, options, upstream


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(problems(), st.integers(1, 16), st.integers(1, 32))
def test_values_and_gradients_are_the_naive_ones(problem, rows, columns):
    hidden, weight, targets, options, upstream = problem
    before = token_scoring.ROWS_PER_TILE, token_scoring.VOCABULARY_PER_TILE
    token_scoring.ROWS_PER_TILE, token_scoring.VOCABULARY_PER_TILE = rows, columns  # tiles that do not divide the sizes
    try:
        single, double = [], []
        for kind, leaves in ((torch.float32, single), (torch.float64, double)):
            for tensor in (hidden, weight, options["bias"]):
                leaves.append(None if tensor is None else tensor.to(kind).clone().requires_grad_())
        scores = score_tokens(single[0], single[1], targets, **{**options, "bias": single[2]})
        expected = naive(double[0], double[1], targets, **{**options, "bias": double[2]})
        # fp32 logits of size x have an error of x * 2^-24
        size = max(1.0, (hidden.abs().max() * weight.abs().sum(1).max() * options["scale"]).item())
        size = size / options["temperature"] if options["softcap"] is None else min(size, options["softcap"]) + 1
        slack = 1e-5 * max(1.0, size / 30)
        for actual, reference in zip(scores, expected, strict=True):
            torch.testing.assert_close(actual.double(), reference, rtol=slack, atol=slack)
        ((scores.log_probs * upstream[0]).sum() + (scores.entropy * upstream[1]).sum()).backward()
        ((expected[0] * upstream[0]).sum() + (expected[1] * upstream[1]).sum()).backward()
        # an error of `slack` in a probability changes a gradient by `slack` times the other factor
        factor = max(hidden.abs().max().item(), weight.abs().max().item(), 1.0)
        reach = factor * options["scale"] / options["temperature"] * upstream.abs().max().item()
        for actual, reference in zip(single, double, strict=True):
            if actual is not None:
                atol = 10 * slack * (1 + reach)
                torch.testing.assert_close(actual.grad.double(), reference.grad, rtol=10 * slack, atol=atol)
    finally:
        token_scoring.ROWS_PER_TILE, token_scoring.VOCABULARY_PER_TILE = before


def test_relative_error_in_fp32_at_ordinary_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=generator), torch.randn(20_000, 64, generator=generator) / 4
    targets, upstream = torch.randint(20_000, (300,), generator=generator), torch.randn(2, 300, generator=generator)
    single = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    double = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    scores, expected = score_tokens(single[0], single[1], targets), naive(double[0], double[1], targets)
    for actual, reference in zip(scores, expected, strict=True):
        assert relative_error(actual, reference) < 1e-6
    ((scores.log_probs * upstream[0]).sum() + (scores.entropy * upstream[1]).sum()).backward()
    ((expected[0] * upstream[0]).sum() + (expected[1] * upstream[1]).sum()).backward()
    for actual, reference in zip(single, double, strict=True):
        assert relative_error(actual.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_entropy_survives_large_logits(size):
    """Near-ties of large logits: `log Z - E[x]` would cancel, the running shift does not."""
    gaps = torch.tensor([0.0, -0.25, -0.5, -1.0])
    hidden, weight = torch.ones(1, 1), size + gaps[:, None]
    scores = score_tokens(hidden, weight, torch.tensor([1]))
    expected = naive(hidden, weight, torch.tensor([1]))  # of the weights rounded to fp32
    torch.testing.assert_close(scores.entropy.double(), expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.log_probs.double(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_lose_nothing_further(dtype):
    """The product of 16-bit factors is exact in fp32, so the scores equal the naive fp64 result of the same factors."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(50, 32, generator=generator) * 5).to(dtype).requires_grad_()
    weight = torch.randn(500, 32, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(500, (50,), generator=generator)
    scores = score_tokens(hidden, weight, targets)
    double = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = naive(double[0], double[1], targets)
    torch.testing.assert_close(scores.log_probs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    (scores.log_probs.sum() + scores.entropy.sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert relative_error(hidden.grad, double[0].grad) < 5e-3
    assert relative_error(weight.grad, double[1].grad) < 5e-3


def test_gradcheck_in_fp64():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), (7, 3), (7,)))
    targets = torch.tensor([0, 6, IGNORE_INDEX, 3, 3])

    def both(h, w, b):
        return tuple(score_tokens(h, w, targets, bias=b, scale=0.5, softcap=2.0, temperature=0.8))

    assert torch.autograd.gradcheck(both, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_unscored_positions_are_not_computed(monkeypatch):
    counts = []
    real = Unembedding.logits
    monkeypatch.setattr(Unembedding, "logits", lambda head, h: counts.append(h.size(0)) or real(head, h))
    targets = torch.full((4, 25), IGNORE_INDEX)
    targets[:, -3:] = 5
    hidden = torch.randn(4, 25, 8, requires_grad=True)
    scores = score_tokens(hidden, torch.randn(11, 8), targets)
    assert counts == [12]
    assert scores.log_probs.shape == scores.entropy.shape == (4, 25)
    scores.log_probs.sum().backward()
    assert hidden.grad[:, :-3].eq(0).all() and hidden.grad[:, -3:].ne(0).all()


def test_no_tensor_larger_than_a_tile(monkeypatch):
    monkeypatch.setattr(token_scoring, "ROWS_PER_TILE", 16)
    monkeypatch.setattr(token_scoring, "VOCABULARY_PER_TILE", 50)
    largest = 0

    class RecordLargest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // 4)
            return out

    hidden, weight = torch.randn(200, 4, requires_grad=True), torch.randn(400, 4, requires_grad=True)
    targets = torch.randint(400, (200,))
    with RecordLargest():
        scores = score_tokens(hidden, weight, targets)
        (scores.log_probs.sum() + scores.entropy.sum()).backward()
    assert largest <= max(16 * 50, 400 * 4)


def test_bad_arguments():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="below 5 or -100"):
        score_tokens(hidden, weight, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        score_tokens(hidden, weight, torch.tensor([0, 1]), temperature=0.0)
