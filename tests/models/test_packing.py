"""Packed rows against separate, unpadded rows through transformers' own forward, and packing in the trainer."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig

from bupo.models.packing import PackedLayout, PackedMask, build_packed_decoder, packed_attention_forward
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.training.objective import critic, policy_scoring
from bupo.training.objective.micro_batches import arrange_micro_batches, assign_rows, can_reorder_rows
from bupo.training.objective.policy_head import PolicyHead
from tests.helpers.tiny_models import FAMILIES, tiny_model
from tests.training.test_trainer import config, model_of, trainer_of

LAYER = Activation("layer", 2)


def rows_of(prompts, answers, vocabulary=97, seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels of rows padded as by TRL. Some prompts have several completions, whose rows are apart."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, vocabulary, (length,), generator=generator) for length in prompts]
    rows = [(texts[prompt], torch.randint(3, vocabulary, (n,), generator=generator)) for prompt, n in answers]
    width, longest = max(len(p) for p, _ in rows), max(len(a) for _, a in rows)
    ids, mask = (torch.zeros(len(rows), width + longest, dtype=torch.long) for _ in range(2))
    for row, (prompt, answer) in enumerate(rows):
        columns = slice(width - len(prompt), width + len(answer))
        ids[row, columns], mask[row, columns] = torch.cat([prompt, answer]), 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :width] = -100
    return ids, mask, labels


ROWS = rows_of([9, 4, 6], [(0, 3), (1, 7), (0, 12), (2, 1), (1, 2), (0, 5)])


def score_rows_separately(model, site, ids, mask, labels):
    """Return log-probs `(B, T - 1)` from full logits of one unpadded row at a time."""
    scores = torch.zeros(labels[:, 1:].shape)
    for row, real in enumerate(mask.bool()):
        tokens = ids[row][real]
        out = model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
        logits = out.logits[0] if site is None else raw_logits(model, out.hidden_states[site.layer][0])
        log_probs = logits.double().log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0].float()
        scored = labels[row, 1:] != -100
        scores[row, scored] = log_probs[len(log_probs) - int(scored.sum()) :]
    return scores


def raw_logits(model, states):
    """Compute logits with the family's scale and softcap, without the final norm."""
    return ResidualStream(model).logits(states)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_separate_rows(model, site=None, rows=ROWS):
    packing = build_packed_decoder(model)
    assert packing is not None
    packed = copy.deepcopy(model)
    PolicyHead(ResidualStream(packed), 1.0, "raw", packing=build_packed_decoder(packed))
    scores = packed(
        input_ids=rows[0],
        attention_mask=rows[1],
        labels=rows[2],
        fused_lm_head=True,
        **({"policy": site} if site else {}),
    )
    expected = score_rows_separately(model, site, *rows)
    torch.testing.assert_close(scores.log_probs, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    packed_grads = gradients(packed, (scores.log_probs * weights).sum())
    separate_grads = gradients(model, (expected * weights).sum())
    assert packed_grads.keys() == {
        name for name in separate_grads if separate_grads[name].any() or name in packed_grads
    }
    for name, gradient in packed_grads.items():
        tolerance = 1e-5 * max(1, separate_grads[name].abs().max())
        torch.testing.assert_close(gradient, separate_grads[name], atol=tolerance, rtol=1e-4, msg=name)


@pytest.mark.parametrize("site", [None, LAYER], ids=["full", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_scored_as_separate_rows(family, site):
    assert_as_separate_rows(tiny_model(family), site)


WINDOWS = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "olmo3": {"sliding_window": 4},
    "cohere2": {"sliding_window": 4},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_slide_over_positions_not_indices(family):
    model = tiny_model(family, **WINDOWS[family])
    assert_as_separate_rows(model)
    layout = PackedLayout.from_rows(ROWS[0], ROWS[1], 9)
    wide = tiny_model(family, **{**WINDOWS[family], "sliding_window": 64})
    with torch.no_grad():
        states = []
        for each in (model, wide):
            with build_packed_decoder(each).use_layout(layout):
                states.append(each.base_model(**layout.inputs, use_cache=False).last_hidden_state)
    assert not torch.allclose(states[0], states[1], atol=1e-3), "the window must matter here"


def test_eager_attention_is_packed_too():
    model = tiny_model("qwen3")
    model.set_attn_implementation("eager")
    assert_as_separate_rows(model)


def test_the_original_attention_is_restored():
    model = tiny_model("llama")
    packing, layout = build_packed_decoder(model), PackedLayout.from_rows(ROWS[0], ROWS[1], 9)
    with pytest.raises(RuntimeError, match="inside"), packing.use_layout(layout):
        assert model.config._attn_implementation != "sdpa"
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"
    with packing.keep_for_backward():
        with packing.use_layout(layout):
            pass
        assert model.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_the_original_attention_is_restored_after_an_error():
    model = tiny_model("llama")
    packing, layout = build_packed_decoder(model), PackedLayout.from_rows(ROWS[0], ROWS[1], 9)
    with pytest.raises(RuntimeError, match="inside"), packing.keep_for_backward():
        raise RuntimeError("inside")
    with packing.use_layout(layout):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_a_row_without_a_prompt_is_not_packed():
    """Its completion has no token before it. Scores are those of unpacked rows."""
    ids, mask, labels = (x.clone() for x in ROWS)
    mask[2, :9] = 0
    assert PackedLayout.from_rows(ids, mask, 9) is None
    found = []
    for packs in (True, False):
        model = tiny_model("llama")
        PolicyHead(ResidualStream(model), 1.0, "raw", packing=build_packed_decoder(model) if packs else None)
        found.append(model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs)
    assert torch.equal(*found)


def test_long_segments_are_not_grouped(monkeypatch):
    monkeypatch.setattr("bupo.models.packing.MAX_QUERY_KEY_PAIRS", 1)
    layout = PackedLayout.from_rows(ROWS[0], ROWS[1], 9)
    assert all(len(bucket.query_indices) == 1 for bucket in layout.buckets) and len(layout.buckets) == 9
    assert_as_separate_rows(tiny_model("gemma3_text", sliding_window=4))


def test_experts_are_balanced_over_the_rows_tokens():
    found = []
    for packs in (True, False):
        model = tiny_model("qwen3_moe", output_router_logits=True)
        PolicyHead(ResidualStream(model), 1.0, "raw", packing=build_packed_decoder(model) if packs else None)
        scores = model(input_ids=ROWS[0], attention_mask=ROWS[1], labels=ROWS[2], fused_lm_head=True)
        found.append((scores.aux_loss, gradients(model, scores.aux_loss)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    {
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # distances in the scores, not positions
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # a recurrent state
        "lfm2": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "layer_types": ["conv", "full_attention"]},
    }.items(),
)  # fmt: skip
def test_a_family_that_mixes_tokens_outside_attention_is_not_packed(kind, sizes, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_model(kind, **sizes)
    before = model.config._attn_implementation
    assert build_packed_decoder(model) is None
    assert model.config._attn_implementation == before


def test_an_answer_that_is_masked_costs_nothing_and_scores_nothing():
    ids, mask, labels = (x.clone() for x in ROWS)
    mask[2, 9:], labels[2, 9:] = 0, -100
    model = tiny_model("llama")
    assert len(PackedLayout.from_rows(ids, mask, 9).ids) == len(PackedLayout.from_rows(ROWS[0], ROWS[1], 9).ids) - 12
    assert_as_separate_rows(model, rows=(ids, mask, labels))


def test_rows_without_an_answer_are_a_differentiable_zero():
    model = tiny_model("llama")
    PolicyHead(ResidualStream(model), 1.0, "raw", packing=build_packed_decoder(model))
    scores = model(input_ids=ROWS[0], attention_mask=ROWS[1], labels=torch.full_like(ROWS[2], -100), fused_lm_head=True)
    assert not scores.log_probs.any()
    scores.log_probs.sum().backward()
    assert not model.lm_head.weight.grad.any()


# -- attention masks ----------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    prompts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    answers = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.integers(0, 20)), min_size=1, max_size=9))
    return rows_of(prompts, answers, seed=draw(st.integers(0, 99)))[:2], max(prompts[p] for p, _ in answers)


def visible_keys(layout, mask_function):
    """Return the keys that each packed token attends to, from the buckets' masks."""
    pairs = [set() for _ in layout.ids]
    packed_mask = PackedMask(layout, mask_function, "sdpa")
    for bucket in layout.buckets:
        mask = packed_mask.get_bucket_mask(bucket)
        assert torch.equal(packed_mask.get_bucket_mask(bucket), mask), "for the next layer"
        indices = zip(bucket.query_indices.tolist(), bucket.key_indices.tolist(), mask[:, 0], strict=True)
        for queries, keys, visible in indices:
            for query, row in zip(queries, visible, strict=True):
                pairs[query] |= {key for key, is_visible in zip(keys, row.tolist(), strict=True) if is_visible}
    return pairs


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([1, 3, 100]))
def test_a_token_attends_to_the_past_of_its_own_row_only(rows, window):
    (ids, mask), width = rows
    layout = PackedLayout.from_rows(ids, mask, width)

    def mask_function(batch, head, query, key):
        return (key <= query) & (key > query - window)

    expected = [set() for _ in layout.ids]
    for indices, real in zip(layout.token_indices.tolist(), mask.bool().tolist(), strict=True):
        row = [index for index, is_real in zip(indices, real, strict=True) if is_real]
        for position, index in enumerate(row):
            expected[index] |= set(row[max(0, position - window + 1) : position + 1])
            assert layout.positions[index] == position
    assert torch.equal(layout.ids[layout.token_indices][mask.bool()], ids[mask.bool()])
    assert len(layout.ids) == len(
        {p for row, m in zip(layout.token_indices, mask.bool(), strict=True) for p in row[m].tolist()}
    )
    assert visible_keys(layout, mask_function) == expected
    segments, prompts = layout.segment_ids()
    count = len(layout.ids)
    query, key = torch.arange(count)[:, None], torch.arange(count)[None]
    same_sequence = (segments[key] == segments[query]) | (segments[key] == prompts[query])
    dense = same_sequence & mask_function(0, 0, layout.positions[query], layout.positions[key])
    assert [set(row.nonzero()[:, 0].tolist()) for row in dense] == expected


@pytest.mark.slow
def test_flex_attention_by_blocks_is_attention_by_buckets():
    """On a CPU it is compiled, and has no backward pass."""
    layout = PackedLayout.from_rows(ROWS[0], ROWS[1], 9)
    block = tiny_model("qwen3").model.layers[0].self_attn
    segments, blocks = (PackedMask(layout, lambda batch, head, query, key: key <= query, x) for x in ("sdpa", None))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, len(layout.ids), 16, generator=generator)
    key, value = (torch.randn(1, 2, len(layout.ids), 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        expected, _ = packed_attention_forward(block, query, key, value, segments, scaling=0.25)
        found, _ = packed_attention_forward(block, query, key, value, blocks, scaling=0.25)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- training ------------------------------------------------------------------------------------------------------------


def trained(folder, packs, monkeypatch, peft=None, **changes):
    """Parameters and metrics of a run of two rollout batches, with or without packing, from the same weights and seed."""
    with monkeypatch.context() as patch:
        if not packs:
            patch.setattr(policy_scoring, "build_packed_decoder", lambda model: None)
            patch.setattr(critic, "build_packed_decoder", lambda model: None)
        options: dict = {
            "internal_steps": 1,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
        }
        # plain gradient steps: Adam amplifies gradients that are rounding errors
        options |= {
            "optim": "sgd",
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "internal_early_stopping": False,
            "logging_steps": 2,
        }
        model = model_of("qwen3", tie_word_embeddings=True)
        if "beta" in changes and not peft:  # the reference model is loaded from where the policy was
            model.save_pretrained(folder / "start")
            model = str(folder / "start")
        trainer = trainer_of(model, config(folder, **{**options, **changes}), peft_config=peft)
        assert (trainer.policy_alignment.packing is not None) == packs
        trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer.state.log_history


RUNS: dict[str, dict] = {
    "dapo": {},
    "grpo, with a reference": {"loss_type": "grpo", "beta": 0.05},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "a critic on the policy's states": {"advantage_estimator": "ppo", "critic_backbone": "shared"},
    "a critic of its own": {"advantage_estimator": "ppo", "critic_backbone": "copy", "gradient_checkpointing": True},
    "sequences": {"importance_sampling_level": "sequence", "loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "entropy in the loss": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "truncated answers masked": {"mask_truncated_completions": True},
    "all layers of an update twice": {"num_iterations": 2, "max_steps": 8},
    **{kind: {"loss_type": kind} for kind in ("cispo", "dr_grpo", "luspo", "sapo", "vespo")},
}
FAST = ("dapo", "grpo, with a reference", "checkpointing", "bnpo", "a critic on the policy's states")


@pytest.mark.slow
@pytest.mark.parametrize("run", [pytest.param(run, marks=() if run in FAST else pytest.mark.slow) for run in RUNS])
def test_a_run_is_that_of_unpacked_rows(tmp_path, run, monkeypatch):
    """Both phases: log-probs of old, reference and new policies, every loss, exchanged rows."""
    (mine, log), (theirs, other) = (trained(tmp_path / str(x), x, monkeypatch, **RUNS[run]) for x in (True, False))
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    for row, expected in zip(log[:-1], other[:-1], strict=True):
        assert row.keys() == expected.keys()
        for name in ("loss", "reward", "completions/mean_length", "phase"):
            assert row.get(name) == pytest.approx(expected.get(name), abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_adapters_are_trained_on_packed_rows(tmp_path, monkeypatch, beta):
    peft = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    (mine, _), (theirs, _) = (
        (torch.manual_seed(0), trained(tmp_path / str(x), x, monkeypatch, peft, beta=beta))[1] for x in (True, False)
    )
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_prompt_learning_keeps_its_rows(tmp_path):
    """Virtual tokens come from outside of the rows."""
    peft = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    trainer = trainer_of(
        model_of("llama"),
        config(tmp_path, internal_steps=0, max_steps=1, gradient_checkpointing=False),
        peft_config=peft,
    )
    layouts = []
    trainer.policy_alignment.packing.use_layout = layouts.append
    trainer.train()
    assert not layouts


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_rollout_batch_is_scored_once(tmp_path, beta):
    """In phase 1 the old log-probs of the layer and of the full model come from one pass, and a reference model runs its first layers."""
    model = model_of()
    folder = tmp_path / "start"
    model.save_pretrained(folder)
    trainer = trainer_of(str(folder), config(tmp_path, beta=beta, max_steps=1, internal_steps=1))
    passes: dict[str, list[int]] = {"model": [], "reference": []}
    counted: dict[str, list[int]] = {}
    inside: list[int] = []
    for name, each in (("model", trainer.model), ("reference", trainer.ref_model)):
        if each is not None:
            for layer in (1, 4):
                each.model.layers[layer - 1].register_forward_pre_hook(
                    lambda module, args, name=name, layer=layer: passes[name].append(layer) if inside else None
                )

    def scoring(inner):
        def score(*args, **kwargs):
            inside.extend([1] if kwargs.get("fused_lm_head") else [])
            try:
                return inner(*args, **kwargs)
            finally:
                inside.clear()

        return score

    for each in (trainer.model, trainer.ref_model):
        if each is not None:
            each.forward = scoring(each.forward)
    plain = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (counted.update(copy.deepcopy(passes)), plain(*args, **kwargs))[1]
    trainer.train()
    calls = 4  # micro-batches of a rollout batch
    assert counted["model"] == [1, 4] * calls
    assert counted["reference"] == ([1] * calls if beta else [])


# -- arrangement ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))
def test_rows_are_dealt_whole(groups, group, micro, seed):
    count = groups * group
    rows = next(size for size in range(min(micro, count), 0, -1) if count % size == 0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    prompts = [(row // group,) * 5 for row in order]
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    found = assign_rows(prompts, lengths, rows)
    assert sorted(place for places in found for place in places) == list(range(count))
    assert all(len(places) == rows for places in found)
    if rows % group == 0:  # whole groups fit
        assert all(sum(prompts[p] == key for p in places) in (0, group) for places in found for key in set(prompts))


def test_tokens_are_balanced():
    """Two long groups and two short ones, in two micro-batches of two groups: one of each."""
    prompts = [(g,) for g in range(4) for _ in range(4)]
    found = assign_rows(prompts, [50] * 4 + [60] * 4 + [5] * 4 + [6] * 4, 8)
    tokens = [sum(([50] * 4 + [60] * 4 + [5] * 4 + [6] * 4)[p] for p in places) for places in found]
    assert sorted(tokens) == [200 + 24, 240 + 20]


def test_rows_stay_within_an_update():
    pieces: list[dict] = [
        {
            "prompt_ids": torch.full((2, 1), piece % 2),
            "prompt_mask": torch.ones(2, 1),
            "completion_mask": torch.ones(2, 3),
            "row": torch.tensor([2 * piece, 2 * piece + 1]),
            "names": [f"{piece}a", f"{piece}b"],
            "num_items_in_batch": torch.tensor(7.0),
            "no_row": torch.arange(3) + piece,
        }
        for piece in range(4)
    ]
    for piece in pieces:
        piece["prompt_ids"][0] = 9  # the first rows of all belong together
    for accumulated, windows in ((1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (8, [[0, 1, 2, 3]])):
        found = arrange_micro_batches(pieces, accumulated)
        for window in windows:
            rows = sorted(row for index in window for row in found[index]["row"].tolist())
            assert rows == sorted(row for index in window for row in pieces[index]["row"].tolist())
        assert all(f["names"] == [f"{row // 2}{'ab'[row % 2]}" for row in f["row"].tolist()] for f in found)
        assert all(f["num_items_in_batch"] == 7 for f in found)
        assert [f["no_row"].tolist() for f in found] == [[p, p + 1, p + 2] for p in range(4)]
    assert {tuple(f["prompt_ids"][:, 0].tolist()) for f in arrange_micro_batches(pieces, 2)[:2]} == {(9, 9), (0, 1)}


def test_rows_move_only_where_the_loss_is_a_sum_over_rows(tmp_path):
    for changes, moves in (
        ({}, True),
        ({"loss_type": "grpo"}, True),
        ({"loss_type": "bnpo"}, False),
        ({"entropy_coef": 0.1}, False),
        ({"top_entropy_quantile": 0.5}, False),
    ):
        assert can_reorder_rows(config(tmp_path, **changes), False) == moves
    assert not can_reorder_rows(config(tmp_path), True)
