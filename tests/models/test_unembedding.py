"""Logits of all users of the unembedding equal the naive ones, and no other code computes logits."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bupo
from bupo.analysis.vocab_streaming import StreamedPolicies
from bupo.models.token_scoring import score_states
from bupo.models.unembedding import Unembedding

SOURCE = Path(bupo.__file__).parent


def naive(hidden, head):
    """`softcap(scale (h W^T + b)) / T` in fp64."""
    x = hidden.double() @ head.weight.double().t()
    x = (x if head.bias is None else x + head.bias.double()) * head.scale
    x = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    return x / head.temperature


@st.composite
def heads(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, d, v = draw(st.integers(1, 20)), draw(st.integers(1, 24)), draw(st.integers(2, 90))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    head = Unembedding(
        torch.randn(v, d, generator=generator).to(dtype),
        torch.randn(v, generator=generator).to(dtype) if draw(st.booleans()) else None,
        draw(st.sampled_from([1.0, 0.25, 3.0])),
        draw(st.sampled_from([None, 5.0, 30.0])),
        draw(st.sampled_from([1.0, 0.6, 2.0])),
    )
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    return hidden, head, torch.randint(v, (n,), generator=generator), draw(st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(heads())
def test_full_tiled_scored_and_streamed_logits_are_the_naive_ones(problem):
    hidden, head, targets, size = problem
    expected = naive(hidden, head)
    near: dict = {"rtol": 1e-4, "atol": 1e-4}  # of fp32 logits near 100
    whole = head.logits(hidden)
    assert whole.dtype == torch.promote_types(hidden.dtype, torch.float32)
    torch.testing.assert_close(whole.double(), expected, **near)
    tiles = [slice(start, start + size) for start in range(0, head.weight.size(0), size)]
    tiled = torch.cat([head.slice_vocab(columns).logits(hidden) for columns in tiles], dim=1)
    torch.testing.assert_close(tiled.double(), expected, **near)
    states, out = hidden.to(head.state_dtype), torch.empty_like(whole)
    for columns in tiles:  # like the analysis
        tile = head.slice_vocab(columns, head.state_dtype)
        assert tile.logits(states, out[:, columns]).data_ptr() == out[:, columns].data_ptr()
    torch.testing.assert_close(out.double(), expected, **near)
    log_p = expected.log_softmax(-1)
    chosen, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    scores = score_states(hidden, head, targets)
    fold = StreamedPolicies([states], num_compared=1, pairs=False)
    fold.accumulate(head, targets)
    for found in (scores, (fold.chosen_logit[0] - fold.log_normalizers[0], fold.entropy[0])):
        torch.testing.assert_close(found[0].double(), chosen, **near)
        torch.testing.assert_close(found[1].double(), entropy, **near)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_full_logits_are_differentiable(softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,)))
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: Unembedding(w, b, 0.5, softcap, 0.8).logits(h), inputs)


PRODUCTS = {"matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "linear", "einsum", "tensordot", "inner", "dot", "vecdot"}


def find_logit_code(tree):
    """Yield the lines that multiply by an unembedding's weight, call the head's module, or apply a softcap."""

    def names(node):
        of = [getattr(n, "attr", None) or getattr(n, "id", None) for n in ast.walk(node)]
        return {name for name in of if name}

    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
            product = isinstance(node.op, ast.MatMult)
        elif isinstance(node, ast.AugAssign):
            parts = [node.target, node.value]
            product = isinstance(node.op, ast.MatMult)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            parts = [node.func, *node.args]
            product = called in PRODUCTS
            if called.rstrip("_") == "tanh" or names(node.func) & {"get_output_embeddings", "lm_head"} - {called}:
                yield node.lineno
        else:
            continue
        arithmetic = not isinstance(node, ast.Call) or product
        if (product and any("weight" in names(part) for part in parts)) or (
            arithmetic and any("softcap" in names(part) for part in parts)
        ):
            yield node.lineno


def test_no_other_code_computes_logits():
    found = {
        str(path.relative_to(SOURCE)): sorted(set(find_logit_code(ast.parse(path.read_text()))))
        for path in SOURCE.rglob("*.py")
    }
    places = {path: lines for path, lines in found.items() if lines}
    assert list(places) == ["models/unembedding.py"], places


@pytest.mark.parametrize(
    "line",
    [
        "hidden @ head.weight.t()",
        "torch.mm(hidden, weight.t())",
        "nn.functional.linear(x, stream.get_unembedding().weight)",
        "model.get_output_embeddings()(hidden)",
        "model.lm_head.forward(hidden)",
        "torch.tanh(x / c) * c",
        "x / head.softcap",
        "x *= self.softcap",
    ],
)
def test_code_that_computes_logits_is_found(line):
    assert list(find_logit_code(ast.parse(line)))
