"""Private names, signatures and values of TRL and transformers that `bupo.training.trl_internals` relies on.

Each check names the entry that has changed. `make test-newest` runs this file with the newest releases.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from bupo import BuPOConfig, BuPOTrainer, UserError
from bupo.generation.seeded_sampling import SeededLogitsProcessor
from bupo.models import cpu_decoding
from bupo.models.generation_settings import warn_once
from bupo.training import trl_internals
from bupo.training.trl_contract import (
    ACCELERATE_PRIVATE_NAMES,
    ACCEPTED_VALUES,
    PRIVATE_NAMES,
    ROLLOUT_KEYS,
    TRAINER_ATTRIBUTES,
    TRL_METRICS,
    UNDOCUMENTED_FUNCTIONS,
)
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.training.test_trainer import PROBLEMS, TOKENIZER, model_of, token_reward

SOURCE = Path(trl_internals.__file__).parents[2]
SEAM = Path(trl_internals.__file__)
METHODS = {name: private for name, private in PRIVATE_NAMES.items() if private.signature}
ATTRIBUTES = [name for name, private in PRIVATE_NAMES.items() if not private.signature]


def differs(name, owner=GRPOTrainer):
    """Describe a change of a method's parameters, or return None. A final `*` allows further parameters."""
    wanted = [part.strip() for part in METHODS[name].signature.strip("()").split(",")]
    method = getattr(owner, name, None)
    if method is None:
        return f"{owner.__name__}.{name} is gone ({METHODS[name].reason})"
    found = list(inspect.signature(method).parameters)
    more = wanted[-1] == "*"
    wanted = wanted[:-1] if more else wanted
    if found[: len(wanted)] != wanted or (len(found) > len(wanted) and not more):
        return f"{owner.__name__}.{name} takes ({', '.join(found)}), not {METHODS[name].signature}"
    return None


@pytest.mark.parametrize("name", METHODS)
def test_a_private_method_has_the_parameters_that_are_relied_on(name):
    assert differs(name) is None, differs(name)


def test_a_changed_signature_is_named():
    """The check finds a method that lost a parameter, gained one, has another order, or is missing."""

    class Lost(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions): ...

    class Gained(GRPOTrainer):
        def _compute_loss(self, model, inputs, scale): ...

    class Turned(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, attention_mask, input_ids, logits_to_keep): ...

    class Gone:
        pass

    for owner, name in (
        (Lost, "_calculate_rewards"),
        (Gained, "_compute_loss"),
        (Turned, "_get_per_token_logps_and_entropies"),
        (Gone, "_save_checkpoint"),
    ):
        found = differs(name, owner)
        assert found and f"{owner.__name__}.{name}" in found


def options(folder, **changes):
    common = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_generations": 4, "max_steps": 2}
    return {
        **common, "output_dir": str(folder), "max_completion_length": 6, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "use_cpu": True, "bf16": False, "beta": 0.1, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run two updates of GRPOTrainer, and record the arguments and results of its private methods."""
    folder = tmp_path_factory.mktemp("trl")
    model_of().save_pretrained(folder / "start")
    seen: dict = {name: [] for name in METHODS}

    class Listening(GRPOTrainer):
        pass

    def listen(name):
        inner = getattr(GRPOTrainer, name)

        def method(self, *args, **kwargs):
            result = inner(self, *args, **kwargs)
            seen[name].append((args, kwargs, result))
            return result

        return method

    for name in METHODS:
        setattr(Listening, name, listen(name))
    trainer = Listening(
        str(folder / "start"),
        token_reward,
        GRPOConfig(**options(folder)),
        train_dataset=PROBLEMS,
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer, seen


def test_scoring_gives_log_probs_entropies_and_the_auxiliary_loss(run):
    _, seen = run
    for _, _, result in seen["_get_per_token_logps_and_entropies"]:
        assert isinstance(result, tuple) and len(result) == 3, "_get_per_token_logps_and_entropies gives a triple"
    updates = [
        result for _, kwargs, result in seen["_get_per_token_logps_and_entropies"] if kwargs.get("compute_entropy")
    ]
    assert updates and all(a.shape == b.shape for a, b, _ in updates), "compute_entropy gives an entropy a token"


def test_the_first_scoring_of_a_rollout_is_the_policys_and_the_second_the_references(run):
    trainer, seen = run
    asked = [args[0] for args, _, _ in seen["_get_per_token_logps_and_entropies"]]
    assert asked[0] is trainer.model, "old log-probs are scored first"
    assert asked[1] is trainer.ref_model, "the reference's log-probs are scored second"


def test_rollouts_hold_the_keys_that_are_read(run):
    _, seen = run
    ((_, _, output),) = seen["_generate_and_score_completions"]
    missing = [key for key in ROLLOUT_KEYS if key not in output]
    assert not missing, f"_generate_and_score_completions leaves no {', '.join(missing)}"
    ids, mask = output["completion_ids"], output["completion_mask"]
    assert ids.shape == mask.shape == output["old_per_token_logps"].shape == output["ref_per_token_logps"].shape
    assert output["advantages"].shape == ids.shape[:1]


def test_rewards_are_of_all_answers_and_functions(run):
    _, seen = run
    ((_, _, rewards),) = seen["_calculate_rewards"]
    assert rewards.shape == (16, 1), "_calculate_rewards gives (answers, functions)"


def test_the_loss_uses_its_model_for_scores_only(run):
    """`_compute_loss` must accept a plain callable in place of the model, without the attributes of one."""
    trainer, seen = run
    (_, inputs), _, loss = seen["_compute_loss"][0]
    real, calls = trainer.model, []

    def policy(**question):
        calls.append(set(question))
        return real(**question)

    with torch.no_grad():
        found = GRPOTrainer._compute_loss(trainer, policy, inputs)
    assert torch.isfinite(found) and loss.dim() == 0
    assert calls == [{"input_ids", "attention_mask", "labels", "fused_lm_head"}], "the scoring call's arguments"


def test_metrics_are_logged_under_the_names_that_are_read(run):
    trainer, _ = run
    logged = {name for row in trainer.state.log_history for name in row}
    missing = [name for name in TRL_METRICS if name not in logged]
    assert not missing, f"GRPOTrainer logs no {', '.join(missing)}"


@pytest.mark.parametrize("path", UNDOCUMENTED_FUNCTIONS)
def test_an_undocumented_function_has_the_parameters_that_are_relied_on(path):
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    parameters = ", ".join(inspect.signature(function).parameters)
    assert f"({parameters})" == UNDOCUMENTED_FUNCTIONS[path], f"{path} takes ({parameters})"


@pytest.mark.parametrize("name", TRAINER_ATTRIBUTES)
def test_a_public_attribute_is_there(run, name):
    assert hasattr(run[0], name), f"GRPOTrainer has no {name}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_is_there(run, name):
    assert hasattr(run[0], name), f"GRPOTrainer has no {name} ({PRIVATE_NAMES[name].reason})"


def test_private_state_has_the_expected_types(run):
    trainer, _ = run
    assert trainer._step == 2 and len(trainer._buffered_inputs) == 4
    trainer._metrics["train"]["new"].append(1.0)
    trainer._logs["advantages"].append(0.5)
    assert trainer._logs["advantages"].pop() == 0.5
    sampler = trainer._get_train_sampler()
    assert sampler.shuffle and sampler.seed == trainer.args.seed and isinstance(sampler.generator, torch.Generator)


def list_compared_values(option):
    """Return the values that TRL's loss compares an option with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    compared = [
        node for node in ast.walk(tree) if isinstance(node, ast.Compare) and getattr(node.left, "attr", None) == option
    ]
    constants = [part for node in compared for side in node.comparators for part in ast.walk(side)]
    return {part.value for part in constants if isinstance(part, ast.Constant)}


@pytest.mark.parametrize("option", ACCEPTED_VALUES)
def test_the_accepted_values_are_those_of_trls_loss(tmp_path, option):
    assert set(ACCEPTED_VALUES[option]) == list_compared_values(option)
    for value in (*ACCEPTED_VALUES[option], "token_mean"):
        changed: Any = {option: value, "internal_layer": 1}
        with nullcontext() if value != "token_mean" else pytest.raises(UserError, match=f"{option}.*token_mean"):
            assert getattr(BuPOConfig(str(tmp_path), **changed), option) == value


# -- the loop of bupo.models.cpu_decoding ---------------------------------------------------------------------------------


@pytest.fixture
def looped(monkeypatch):
    """Record the number of completions of each decoding loop, and repeat the warning of an unused loop."""
    rows, decode = [], cpu_decoding.run_decoding_loop

    @functools.wraps(decode)  # generate reads the signature
    def counted(*args, **kwargs):
        out = decode(*args, **kwargs)
        rows.append(len(out))
        return out

    monkeypatch.setattr(cpu_decoding, "run_decoding_loop", counted)
    warn_once.cache_clear()
    return rows


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_generate_passes_the_arguments_that_the_loop_expects(family, looped, caplog):
    """The loop depends on names of arguments and on the interfaces of cache and attention; else generate's loop runs."""
    model = tiny_model(family)
    for seeded in (None, SeededLogitsProcessor([1, 2, 3], 5, 4, 1.0, 1.0)):
        settings = GenerationConfig(max_new_tokens=4, do_sample=seeded is None, pad_token_id=0)
        out = cpu_decoding.generate(model, input_ids=random_ids(3, 5), generation_config=settings, seeded=seeded)
        assert out.shape == (3, 9)
    assert looped == [3, 3] and cpu_decoding.supports_fast_generate(model), (
        "the decoding loop of bupo.models.cpu_decoding is not used any more"
    )
    assert cpu_decoding.can_share_prompts(model), (
        "prompts are copied for their answers: attention or cache have changed"
    )
    assert not [record for record in caplog.records if "slower decoding loop" in record.getMessage()]


def test_rollouts_are_sampled_by_the_loop(looped, tmp_path, caplog):
    args = BuPOConfig(**options(tmp_path, beta=0.0), internal_layer=1, internal_steps=1)
    BuPOTrainer(model_of(), token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER).train()
    assert looped and set(looped) == {16}, "the decoding loop of bupo.models.cpu_decoding is not used any more"


# -- nothing else knows a private name -------------------------------------------------------------------------------


def private_names(path):
    """Yield the attributes, imports and names in `getattr` of a file, with their lines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.name, node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value, node.lineno


def defined_names(path):
    """Yield the names that a file defines: functions, classes, methods and assigned attributes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def is_private(name):
    """Return whether a name is private, except for documented names and those without a public way.

    `os._exit` and `sys._current_frames` are documented, and transformers' guide uses `config._attn_implementation`.
    `threading._shutdown` and `atexit._run_exitfuncs` end a process; without them it ends by `sys.exit`.
    """
    return (
        name not in ("_exit", "_current_frames", "_attn_implementation", "_shutdown", "_run_exitfuncs")
        and len(name) > 1
        and name.startswith("_")
        and not name.startswith("__")
    )


# private names of the grading libraries, which have no public way
OF_GRADING = {
    "_Latex2Sympy": "the parser class, whose products of a number and a factor are overridden",
    "_prec": "the precision of a sympy Float, which is 1 where no digit is known",
}


def test_the_private_names_of_grading_exist():
    import sympy
    from latex2sympy2_extended import latex2sympy2

    assert {"convert_postfix", "convert_postfix_list", "mul_flat"} <= set(dir(latex2sympy2._Latex2Sympy))
    assert (sympy.sqrt(2) ** 2 - 2).evalf() == 0
    assert (sympy.cos(1) ** 2 + sympy.sin(1) ** 2 - 1).evalf(30)._prec == 1


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_name_of_another_library_outside_trl_internals(path):
    """A file uses only the private names that it defines; all others belong in trl_internals."""
    if path == SEAM:
        return
    own = set(defined_names(path)) | (set(OF_GRADING) if "rewards" in path.parts else set())
    strange = [f"{name} (line {line})" for name, line in private_names(path) if is_private(name) and name not in own]
    overridden = [
        name for name in own if name in PRIVATE_NAMES and path.parent.name == "training"
    ]  # the subclass of TRL's trainer is there
    assert not strange and not overridden, f"{path.name} uses {', '.join(strange + overridden)}"


def test_the_contract_lists_all_private_names_of_trl_internals():
    names = {name for name, _ in private_names(SEAM)} | set(defined_names(SEAM))
    assert {name for name in names if is_private(name)} == set(PRIVATE_NAMES) | set(ACCELERATE_PRIVATE_NAMES)
    assert all(hasattr(AcceleratorState, name) for name in ACCELERATE_PRIVATE_NAMES)
    assert all(private.reason for private in PRIVATE_NAMES.values())


def test_the_check_sees_a_private_name(tmp_path):
    (tmp_path / "x.py").write_text(
        textwrap.dedent("""
            from trl.trainer.utils import _hidden
            def f(trainer):
                return trainer._metrics, getattr(trainer, "_step"), trainer.__class__
        """)
    )
    assert {name for name, _ in private_names(tmp_path / "x.py") if is_private(name)} == {
        "_hidden",
        "_metrics",
        "_step",
    }
