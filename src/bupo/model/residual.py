"""Where the residual stream of a causal LM is written, by model family, and proof that the rules hold for a model.

Every block of a decoder adds two writes to the stream, `H^l = H^(l-1) + A^l + F^l` (eq. 4 of arXiv 2512.19673, where
`H^l` is its `H^(2l)`). What is added is not always what the attention or FFN module returns: some families normalise
or scale it first. A [`Family`] names the modules to read; [`ResidualStream`] runs a model, records the states and checks,
on load, that the writes add up in every layer and that the head gives the model's own logits.

Layers count from 1 as in the paper; layer 0 is the embedding. `ResidualStream.block` is the one place that converts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from bupo.errors import UserError


@dataclass(frozen=True)
class Family:
    """The modules of one model family. Paths are relative to the decoder (`layers`, `norm`) or to a block (the rest).

    Args:
        layers (`str`): the list of blocks.
        norm (`str`): the norm between the last block and the head.
        attn, ffn (`str`): the two modules of a block; their inputs are what they read, after any norm.
        attn_write, ffn_write (`str`, *optional*): the modules whose outputs are added to the stream, where it is not
            the module's own output.
        middle (`str`, *optional*): a module whose *input* is the stream between the two writes. Where set, the writes
            are differences of the stream, `A = middle - in`, `F = out - middle`, which costs precision in 16 bits.
        write_scale (`str`, *optional*): the config's entry that multiplies both writes.
        logit_scale, logit_divisor, softcap (`str`, *optional*): the config's entries for the head.
    """

    layers: str = "layers"
    norm: str = "norm"
    attn: str = "self_attn"
    ffn: str = "mlp"
    attn_write: str | None = None
    ffn_write: str | None = None
    middle: str | None = None
    write_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = "final_logit_softcapping"


_SANDWICH = Family(attn_write="post_attention_layernorm", ffn_write="post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "qwen3_moe", "deepseek_v3"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), _SANDWICH),
    "glm4": Family(attn_write="post_self_attn_layernorm", ffn_write="post_mlp_layernorm"),
    "granite": Family(write_scale="residual_multiplier", logit_divisor="logits_scaling"),
    "cohere2": Family(logit_scale="logit_scale"),
    "gpt_neox": Family(norm="final_layer_norm", attn="attention"),
    "gpt2": Family(layers="h", norm="ln_f", attn="attn"),
}

# What an unknown family may call its parts, tried in this order.
_USUAL_NAMES = {
    "layers": ("layers", "h", "blocks"),
    "norm": ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f"),
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "ffn": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}

# Largest error of the identity and of the head, relative to the largest entry. Rounding alone gives 1e-7 in fp32 and
# half a unit of the last place, twice, in 16 bits; a wrong rule gives 0.4 and more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Site(NamedTuple):
    """A place of the stream. Kinds: `layer` (H^l, l from 0), `attn` and `ffn` (writes), `attn_input` and `ffn_input` (what
    the modules read)."""

    kind: str
    layer: int


class Identity(NamedTuple):
    """What the check on load measured: relative errors, one per layer, and of the head's logits."""

    layers: tuple[float, ...]
    head: float

    @property
    def worst(self) -> float:
        return max(*self.layers, self.head)


def _child(root: Any, path: str) -> Any:
    """The module at a path, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
        if not isinstance(root, nn.Module):
            return None
    return root


def _first(output) -> torch.Tensor:
    """The tensor of a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _argument(args: tuple, kwargs: dict) -> torch.Tensor:
    """The states a module reads: its first argument, or `hidden_states` by name."""
    return args[0] if args else kwargs["hidden_states"]


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers causal LM inside a PEFT, DDP or FSDP wrapper.

    Raises:
        UserError: if there is none.
    """
    model = getattr(model, "module", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} is no causal language model: it has no unembedding; load it with "
            "AutoModelForCausalLM"
        )
    return model


def _guess_family(model: PreTrainedModel) -> Family:
    """Names of an unknown family's parts; `middle` is found by a trace."""
    decoder = model.get_decoder()
    found: dict[str, str] = {}
    for part, names in _USUAL_NAMES.items():
        root = decoder if part in ("layers", "norm") else _child(decoder, found["layers"])[0]
        present = [name for name in names if _child(root, name) is not None]
        if present:
            found[part] = present[0]
        else:
            raise UserError(
                f"unknown model family {model.config.model_type!r}: none of {', '.join(names)} in "
                f"{type(root).__name__}; pass family=bupo.Family(...) with the names of its parts"
            )
    return Family(**found)


class ResidualStream:
    """A causal LM as a residual stream: its blocks, its writes, its final norm and its unembedding.

    Args:
        model (`PreTrainedModel` or a PEFT, DDP or FSDP wrapper around one): the model. It is not changed.
        family ([`Family`], *optional*): where the writes are; by default from the model's type, or found by name.

    Attributes:
        model (`PreTrainedModel`): the causal LM without wrappers.
        num_layers (`int`): L.
        identity ([`Identity`]): what the check measured.

    Raises:
        UserError: if the writes do not add up in some layer, or the head does not give the model's logits.
    """

    def __init__(self, model: nn.Module, family: Family | None = None):
        self.model = causal_lm(model)
        self.decoder = self.model.get_decoder()
        self.config = self.model.config.get_text_config()
        known = family or FAMILIES.get(self.config.model_type)
        self.family = known or _guess_family(self.model)
        for part in ("layers", "norm"):
            if self.decoder is None or _child(self.decoder, getattr(self.family, part)) is None:
                raise UserError(
                    f"{type(self.model).__name__} has no {getattr(self.family, part)!r} in its decoder; pass "
                    "family=bupo.Family(...) with the names of its parts"
                )
        self.num_layers = len(self._layers)
        with evaluating(self.model), torch.no_grad():
            if known is None:
                self.family = replace(self.family, middle=self._find_middle())
            self.identity = self._verify()

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> nn.ModuleList:
        return _child(self.decoder, self.family.layers)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return _child(self.decoder, self.family.norm)

    def block(self, layer: int | None) -> nn.Module:
        """The block of a layer, counted from 1.

        Raises:
            UserError: if there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= self.num_layers:
            raise UserError(f"layer {layer!r} does not exist: {self._name} has layers 1 to {self.num_layers}")
        return self._layers[layer - 1]

    @property
    def _name(self) -> str:
        return self.config.name_or_path or type(self.model).__name__

    def _part(self, layer: int, path: str) -> nn.Module:
        module = _child(self.block(layer), path)
        if module is None:
            raise UserError(
                f"layer {layer} of {type(self.model).__name__} has no module {path!r}; pass family=bupo.Family(...) "
                "with the names of its parts"
            )
        return module

    def head(self) -> dict:
        """The unembedding as arguments of [`bupo.model.scoring.score_tokens`]: weight, bias, scale, softcap."""
        linear = self.model.get_output_embeddings()

        def entry(name: str | None) -> float | None:
            return None if name is None else getattr(self.config, name, None)

        scale = entry(self.family.logit_scale) or 1.0
        return {
            "weight": linear.weight,
            "bias": getattr(linear, "bias", None),
            "scale": scale / (entry(self.family.logit_divisor) or 1.0),
            "softcap": entry(self.family.softcap),
        }

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """States `(..., D)`, already normed if they should be, through the unembedding: fp32 logits `(..., V)`."""
        head = self.head()
        precise = torch.promote_types(hidden.dtype, torch.float32)
        x = nn.functional.linear(hidden.to(precise), head["weight"].to(precise))
        if head["bias"] is not None:
            x = x + head["bias"]
        x = x * head["scale"]
        if head["softcap"] is not None:
            x = head["softcap"] * torch.tanh(x / head["softcap"])
        return x / temperature

    # -- running and recording ---------------------------------------------------------------------------------------

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Inside, the decoder computes layers 1..count only (and its final norm)."""
        self.block(count)
        parent, _, name = self.family.layers.rpartition(".")
        owner = _child(self.decoder, parent) if parent else self.decoder
        layers = self._layers
        setattr(owner, name, layers[:count])
        try:
            yield
        finally:
            setattr(owner, name, layers)

    @contextmanager
    def record(
        self, sites: Iterable[Site], select: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    ) -> Iterator[dict[Site, torch.Tensor]]:
        """Inside, a run of the decoder fills the yielded dict: `(batch, time, D)` for each site, with its graph.

        `select` may keep a part of each, at once. Nothing is copied: what the model goes on to change in place changes
        here too (no family of the table does).
        """
        states: dict[Site, torch.Tensor] = {}
        with ExitStack() as hooks:
            for site in dict.fromkeys(sites):
                self._watch(site, states, select, hooks)
            yield states

    def run(
        self,
        sites: Iterable[Site],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        up_to: int | None = None,
        select: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
    ) -> dict[Site, torch.Tensor]:
        """One pass of the decoder over `(batch, time)` ids, through layers 1..up_to: the states of the sites.

        Padding may stand on either side: positions count real tokens only.
        """
        kwargs = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
            kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with self.record(sites, select) as states, self.first_layers(up_to or self.num_layers):
            self.decoder(**kwargs)
        return states

    def _watch(self, site: Site, states: dict, select: Callable, hooks: ExitStack) -> None:
        kind, layer = site
        family = self.family
        scale = getattr(self.config, family.write_scale) if family.write_scale else 1.0

        def output(module: nn.Module, put: Callable[[torch.Tensor], None]) -> None:
            handle = module.register_forward_hook(lambda _module, _args, out: put(_first(out)))
            hooks.callback(handle.remove)

        def input(module: nn.Module, put: Callable[[torch.Tensor], None]) -> None:
            handle = module.register_forward_pre_hook(
                lambda _module, args, kwargs: put(_argument(args, kwargs)), with_kwargs=True
            )
            hooks.callback(handle.remove)

        def keep(value: torch.Tensor) -> None:
            states[site] = select(value)

        if kind == "layer" and layer == 0:
            input(self.block(1), keep)
        elif kind == "layer":
            output(self.block(layer), keep)
        elif kind in ("attn_input", "ffn_input"):
            input(self._part(layer, family.attn if kind == "attn_input" else family.ffn), keep)
        elif kind not in ("attn", "ffn"):
            raise ValueError(f"unknown kind of site: {kind!r}")
        elif family.middle is None:
            path = (family.attn_write or family.attn) if kind == "attn" else (family.ffn_write or family.ffn)
            output(self._part(layer, path), lambda write: keep(write if scale == 1.0 else write * scale))
        elif kind == "attn":
            input(self.block(layer), keep)
            input(self._part(layer, family.middle), lambda middle: states.update({site: select(middle) - states[site]}))
        else:
            input(self._part(layer, family.middle), keep)
            output(self.block(layer), lambda out: states.update({site: select(out) - states[site]}))

    # -- proof -------------------------------------------------------------------------------------------------------

    def _probe_tokens(self) -> torch.Tensor:
        """A few token ids, spread over the vocabulary."""
        embedding = self.model.get_input_embeddings().weight
        count = min(8, embedding.size(0))
        return torch.linspace(0, embedding.size(0) - 1, count, device=embedding.device).long()[None]

    def _verify(self) -> Identity:
        layers = range(1, self.num_layers + 1)
        tolerance = TOLERANCE.get(self.decoder.dtype, 3e-2)
        ids = self._probe_tokens()
        sites = [Site("layer", 0)] + [Site(kind, layer) for layer in layers for kind in ("attn", "ffn", "layer")]
        with self.record(sites) as states:
            logits = self.model(input_ids=ids, use_cache=False).logits
        errors = []
        for layer in layers:
            out = states[Site("layer", layer)].double()
            parts = [
                states[site].to(out) for site in (Site("layer", layer - 1), Site("attn", layer), Site("ffn", layer))
            ]
            shapes_agree = all(part.shape == out.shape for part in parts)
            errors.append(_relative(torch.stack(parts).sum(0), out) if shapes_agree else torch.inf)
            if not errors[-1] <= tolerance:
                raise UserError(
                    f"{self._name} ({self.config.model_type}): layer {layer} does not add its writes to the residual "
                    f"stream as expected: H^{layer} differs from H^{layer - 1} + A + F by {errors[-1]:.2g} of its "
                    f"largest entry (at most {tolerance:g} allowed); pass family=bupo.Family(...) that names the "
                    "modules whose outputs are added"
                )
        top = states[Site("layer", self.num_layers)]
        error = _relative(self.logits(self.norm(top.to(self.norm_device(top)))).to(logits.device), logits)
        if not error <= tolerance:
            raise UserError(
                f"{self._name} ({self.config.model_type}): the final norm and unembedding give logits that differ from "
                f"the model's own by {error:.2g} of the largest (at most {tolerance:g} allowed); pass "
                "family=bupo.Family(...) with its norm, logit_scale, logit_divisor or softcap"
            )
        return Identity(tuple(errors), error)

    def norm_device(self, default: torch.Tensor) -> torch.device:
        """The device of the final norm, which may differ from the last block's under a `device_map`."""
        return next((p.device for p in self.norm.parameters()), default.device)

    def _find_middle(self) -> str:
        """For an unknown sequential family: the module whose input is the stream between attention and FFN.

        It is the module that feeds the FFN (a norm), or the FFN itself. The stream's difference across the FFN must be
        a multiple of what some module of the block returns: a block that adds the stream inside its modules, or that
        reads the same stream twice, is refused.
        """
        for layer in range(1, self.num_layers + 1):
            inputs, outputs = self._trace(layer)
            middle = next(
                (name for name in inputs if name and outputs.get(name) is inputs[self.family.ffn]),
                self.family.ffn,
            )
            start, out = inputs[""].double(), outputs[""].double()
            split = inputs[middle].double()
            for name, module, write in (
                ("attention", self.family.attn, split - start),
                ("FFN", self.family.ffn, out - split),
            ):
                after = list(outputs)[list(outputs).index(module) :]
                errors = [
                    _multiple_error(write, outputs[n].double()) for n in after if n and outputs[n].shape == write.shape
                ]
                error = min(errors, default=torch.inf)
                if not error <= max(TOLERANCE.get(self.decoder.dtype, 3e-2), 1e-4):
                    raise UserError(
                        f"{self._name}: the family {self.config.model_type!r} is unknown, and in layer {layer} what the "
                        f"stream gains from the {name} is no output of a module (it differs by {error:.2g} of its "
                        "largest entry); pass family=bupo.Family(...) that names the modules whose outputs are added"
                    )
        return middle

    def _trace(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs and outputs of a block (under "") and of its direct children, in the order of their calls."""
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        block = self.block(layer)
        with ExitStack() as hooks:
            for name, module in [*block.named_children(), ("", block)]:

                def before(_module, args, kwargs, name=name):
                    if args or "hidden_states" in kwargs:
                        inputs[name] = _argument(args, kwargs)

                def after(_module, _args, out, name=name):
                    if isinstance(_first(out), torch.Tensor):
                        outputs[name] = _first(out)

                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            self.model(input_ids=self._probe_tokens(), use_cache=False)
        return inputs, outputs


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry; NaN where either holds one."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def _multiple_error(write: torch.Tensor, output: torch.Tensor) -> float:
    """How far a write is from the nearest multiple of a module's output, relative to its largest entry."""
    square = (output * output).sum()
    if square == 0 or write.abs().max() == 0:
        return torch.inf
    return _relative((write * output).sum() / square * output, write)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
