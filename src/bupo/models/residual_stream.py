"""A causal LM as a residual stream: its parts, and its states while it runs.

Layers count from 1 as in the paper; layer 0 is the embedding. [`ResidualStream.block`] is the one place that converts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from bupo.models.families import FAMILIES, Family, guess_family, module_at
from bupo.models.hooks import Put, on_input, on_output
from bupo.models.unembedding import Unembedding
from bupo.models.verification import Identity, check_finite, check_head, check_layer, find_middle, name_of, probe_tokens
from bupo.utils.errors import UserError

Lens = Literal["raw", "final_norm"]


def check_lens(lens: str) -> Lens:
    """The lens mode, if it is one."""
    if lens not in get_args(Lens):
        raise UserError(f"unknown lens mode {lens!r}: choose {' or '.join(get_args(Lens))}")
    return lens  # type: ignore[return-value]


class Site(NamedTuple):
    """A place of the stream. Kinds: `layer` (H^l, l from 0), `attn` and `ffn` (writes), `attn_input` and `ffn_input` (what
    the modules read)."""

    kind: str
    layer: int


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


class ResidualStream:
    """A causal LM as a residual stream: its blocks, its writes, its final norm and its unembedding.

    Args:
        model (`PreTrainedModel` or a PEFT, DDP or FSDP wrapper around one): the model. It is not changed.
        family ([`Family`], *optional*): where the writes are; by default from the model's type, or found by name.
        like ([`ResidualStream`], *optional*): of a model of the same architecture, whose proof holds for this one: one that is
            sharded already cannot be looked at outside its forward.

    Attributes:
        model (`PreTrainedModel`): the causal LM without wrappers.
        num_layers (`int`): L.
        identity ([`Identity`]): what the check measured.

    Raises:
        UserError: if the writes do not add up in some layer, or the head does not give the model's logits.
        NotFinite: if states or logits are infinite or NaN.
    """

    def __init__(self, model: nn.Module, family: Family | None = None, like: "ResidualStream | None" = None):
        self.model = causal_lm(model)
        self.decoder = self.model.get_decoder()
        self.config = self.model.config.get_text_config()
        known = like.family if like else family or FAMILIES.get(self.config.model_type)
        self.family: Family = known or guess_family(self.model)
        for part in ("layers", "norm"):
            if self.decoder is None or module_at(self.decoder, getattr(self.family, part)) is None:
                raise UserError(
                    f"{type(self.model).__name__} has no {getattr(self.family, part)!r} in its decoder; pass "
                    "family=bupo.Family(...) with the names of its parts"
                )
        self.num_layers = len(self._layers)
        self.identity: Identity = like.identity if like else self._proven(guessed=known is None)

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> nn.ModuleList:
        return module_at(self.decoder, self.family.layers)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return module_at(self.decoder, self.family.norm)

    def block(self, layer: int | None) -> nn.Module:
        """The block of a layer, counted from 1.

        Raises:
            UserError: if there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= self.num_layers:
            raise UserError(f"layer {layer!r} does not exist: {name_of(self.model)} has layers 1 to {self.num_layers}")
        return self._layers[layer - 1]

    def _part(self, layer: int, path: str) -> nn.Module:
        module = module_at(self.block(layer), path)
        if module is None:
            raise UserError(
                f"layer {layer} of {type(self.model).__name__} has no module {path!r}; pass family=bupo.Family(...) "
                "with the names of its parts"
            )
        return module

    def lensed(self, states: torch.Tensor, lens: Lens) -> torch.Tensor:
        """States `(..., D)` as they meet the unembedding: as they are (`raw`), or through the final norm (`final_norm`)."""
        if lens == "raw":
            return states
        # a device_map may hold the norm and the last block on two devices
        return self.norm(states.to(next((p.device for p in self.norm.parameters()), states.device)))

    def head(self, temperature: float = 1.0) -> Unembedding:
        """The unembedding, with the family's scale and softcap, over a temperature."""
        linear, family = self.model.get_output_embeddings(), self.family

        def entry(name: str | None) -> float | None:
            return None if name is None else getattr(self.config, name, None)

        scale = (entry(family.logit_scale) or 1.0) / (entry(family.logit_divisor) or 1.0)
        return Unembedding(linear.weight, getattr(linear, "bias", None), scale, entry(family.softcap), temperature)

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """States `(..., D)`, lensed already if they should be, through the unembedding: fp32 logits `(..., V)`."""
        return self.head(temperature).logits(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))

    # -- running and recording ---------------------------------------------------------------------------------------

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Inside, the decoder computes layers 1..count only (and its final norm)."""
        self.block(count)
        parent, _, name = self.family.layers.rpartition(".")
        owner = module_at(self.decoder, parent) if parent else self.decoder
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
        """Keep what passes a site, until `hooks` closes."""

        def keep(value: torch.Tensor) -> None:
            states[site] = select(value)

        kind, layer = site
        if kind == "layer" and layer == 0:
            on_input(self.block(1), keep, hooks)
        elif kind == "layer":
            on_output(self.block(layer), keep, hooks)
        elif kind in ("attn_input", "ffn_input"):
            on_input(self._part(layer, self.family.attn if kind == "attn_input" else self.family.ffn), keep, hooks)
        elif kind not in ("attn", "ffn"):
            raise ValueError(f"unknown kind of site: {kind!r}")
        elif self.family.middle is None:
            self._watch_write(site, keep, hooks)
        else:
            self._watch_difference(site, states, select, hooks)

    def _watch_write(self, site: Site, keep: Put, hooks: ExitStack) -> None:
        """What a module returns is what is added, but for a scale."""
        family = self.family
        scale = getattr(self.config, family.write_scale) if family.write_scale else 1.0
        path = (family.attn_write or family.attn) if site.kind == "attn" else (family.ffn_write or family.ffn)
        on_output(self._part(site.layer, path), lambda x: keep(x if scale == 1.0 else x * scale), hooks)

    def _watch_difference(self, site: Site, states: dict, select: Callable, hooks: ExitStack) -> None:
        """What is added is the stream after the module less the stream before it."""

        def before(value: torch.Tensor) -> None:
            states[site] = select(value)

        def after(value: torch.Tensor) -> None:
            states[site] = select(value) - states[site]

        block, middle = self.block(site.layer), self._part(site.layer, self.family.middle or self.family.ffn)
        if site.kind == "attn":
            on_input(block, before, hooks)
            on_input(middle, after, hooks)
        else:
            on_input(middle, before, hooks)
            on_output(block, after, hooks)

    @torch.no_grad()
    def _proven(self, guessed: bool) -> Identity:
        """Prove on a few tokens that the writes add up, and that the head gives the model's own logits."""
        with evaluating(self.model):
            if guessed:
                with self.record(self._stream) as states:
                    self.model(input_ids=probe_tokens(self.model), use_cache=False)
                check_finite(self.model, [states[site] for site in self._stream])
                self.family = replace(self.family, middle=find_middle(self.model, self._layers, self.family))
            return self._verify()

    @property
    def _stream(self) -> list[Site]:
        """H^0 to H^L."""
        return [Site("layer", layer) for layer in range(self.num_layers + 1)]

    def _verify(self) -> Identity:
        layers = range(1, self.num_layers + 1)
        sites = [Site("layer", 0)] + [Site(kind, layer) for layer in layers for kind in ("attn", "ffn", "layer")]
        with self.record(sites) as states:
            logits = self.model(input_ids=probe_tokens(self.model), use_cache=False).logits
        check_finite(self.model, [states[site] for site in self._stream])
        errors = []
        for layer in layers:
            parts = [states[site] for site in (Site("layer", layer - 1), Site("attn", layer), Site("ffn", layer))]
            errors.append(check_layer(self.model, layer, parts, states[Site("layer", layer)]))
        mine = self.logits(self.lensed(states[Site("layer", self.num_layers)], "final_norm"))
        return Identity(tuple(errors), check_head(self.model, mine, logits))


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
