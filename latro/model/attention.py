"""Attention over a prefix tree, in any transformers decoder that can do with it.

The tree travels through the model as its attention mask: every decoder hands that to every attention layer, also when a
checkpointed layer is run again in the backward pass. While a module is given a `TreeMask`, hooks switch its
configuration to our attention implementation; in between, for generation, it is what the user configured.

Sizes: T tokens, H heads, E head size.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from latro_kernels import PrefixTree, tree_attention

IMPLEMENTATION = "latro_tree"

# `layer_types` of a configuration that a tree can express.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}

# What models pass to an attention function for others' sake. The window comes with the mask, as it does in eager.
IRRELEVANT = {"logits_to_keep", "position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache"}

# Modules, by a part of their class name, that no mask can make attend to a path alone.
UNABLE = {
    "Indexer": "selects the keys to attend to",
    "DogeAttention": "makes a mask of its values",
    "CrossAttention": "attends to other sequences",
    "GitLayer": "attends to an image",
}
# Children of layers that attend to another sequence, where their class does not say so.
CROSS_ATTENTION = {"encoder_attn", "crossattention", "cross_attn"}

# Rotary embeddings whose frequencies depend on the longest sequence of the batch.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, eq=False)
class PathMask(ABC):
    """An attention mask that is not stored, with as much of a tensor as models ask of a mask that they pass on."""

    window: int | None = field(default=None, kw_only=True)

    @property
    def ndim(self) -> int:
        return 1

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @abstractmethod
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """q [B, H, L, E], k [B, Hkv, L, E], v [B, Hkv, L, Ev] of this call's tokens -> [B, L, H, Ev]."""

    def view(self, *shape: int) -> PathMask:
        return self

    def __getitem__(self, index: tuple[slice, ...]) -> PathMask:
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise IndexError(
                f"tree_hidden: the attention mask is a tree, of which there is only the whole, got {index}"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"tree_hidden: the attention mask is a tree and has no {name}; a model must hand its mask on to "
            "transformers' masking and attention functions, and not compute with it"
        )


@dataclass(frozen=True, eq=False)
class TreeMask(PathMask):
    """Each token of a packed row sees its own path."""

    tree: PrefixTree

    @property
    def shape(self) -> torch.Size:
        return self.tree.tokens.shape

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        E, Ev = q.shape[-1], v.shape[-1]
        widest = max(E, Ev)  # the kernels have one head size; zeros change neither scores nor output
        out = tree_attention(
            F.pad(q[0], (0, widest - E)),
            F.pad(k[0], (0, widest - E)),
            F.pad(v[0], (0, widest - Ev)),
            self.tree,
            scale=scale,
            softcap=softcap,
            window=self.window,
            sinks=sinks,
        )
        return out[..., :Ev].transpose(0, 1)[None]


def _layer_mask(
    *,
    attention_mask: Any,
    mask_function: Callable[..., Tensor],
    config: PreTrainedConfig,
    local_size: int | None = None,
    **_: Any,
) -> PathMask:
    """The mask of one kind of layer, of which `mask_function` says which (query, key) pairs of one sequence it has."""
    if not isinstance(attention_mask, PathMask):
        got = type(attention_mask).__name__
        raise ValueError(f"tree_hidden: {config.model_type} must be given the tree as its attention_mask, got {got}")
    query = (local_size or 1) + 1  # with a window, the first query that no longer sees key 0 nor key 1
    key = torch.arange(query + 2)
    causal = (key <= query) if local_size is None else (key <= query) & (key > query - local_size)
    batch = torch.zeros_like(key)
    given = mask_function(batch, batch, torch.full_like(key, query), key)
    if not torch.equal(torch.as_tensor(given).expand_as(causal), causal):
        raise ValueError(
            f"tree_hidden: attention of {config.model_type} must be causal, with or without a sliding window, "
            f"got a mask by which token {query} sees {torch.as_tensor(given).expand_as(causal).tolist()}"
        )
    return replace(attention_mask, window=local_size)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function."""
    layer = type(module).__name__
    if not isinstance(attention_mask, PathMask):
        got = type(attention_mask).__name__
        raise ValueError(f"tree_hidden: {layer} must be given the tree as its attention_mask, got {got}")
    if dropout:
        raise ValueError(
            f"tree_hidden: {layer} must not drop attention weights, got dropout {dropout}; "
            "set attention_dropout=0 in the configuration"
        )
    unknown = [
        name for name, given in others.items() if name not in IRRELEVANT and given is not None and given is not False
    ]
    if unknown:
        raise ValueError(f"tree_hidden: {layer} must compute plain attention, got {', '.join(unknown)}")

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_mask.attention(query, key, value, scale, softcap, s_aux), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _layer_mask)


def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _leave(module, args, None)  # an interrupt may have kept the last call from doing so
    is_inside = module.config._attn_implementation_internal == IMPLEMENTATION
    if not is_inside and any(isinstance(given, PathMask) for given in (*args, *kwargs.values())):
        module._outside_tree = module.config._attn_implementation_internal
        module.config._attn_implementation_internal = IMPLEMENTATION


def _leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
    if "_outside_tree" in vars(module):
        module.config._attn_implementation_internal = vars(module).pop("_outside_tree")


def prepare(model: PreTrainedModel) -> None:
    """Refuse what cannot work; then let the model's modules find our attention whenever they are given a tree."""
    _refuse_layers(model)
    for module in model.modules():
        is_configured = hasattr(getattr(module, "config", None), "_attn_implementation")
        if is_configured and not any(hook is _enter for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder under the head. (Where `get_decoder` is misled by a name, the model below the head is one.)"""
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    return cast(PreTrainedModel, model.base_model)


def layers_of(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, module) for path, module in decoder.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]


def _refuse_layers(model: PreTrainedModel) -> None:
    """Raise with the type of the first layer that would not compute on a path of a tree what it computes on a row."""
    decoder = decoder_of(model)

    def refuse(layer: str, reason: str) -> None:
        raise ValueError(
            f"TreeModel: {type(model).__name__} must mix tokens by causal attention alone, but {layer} {reason}"
        )

    for i, layer_type in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if layer_type not in ATTENTION_LAYERS:
            refuse(f"layer {i} ({layer_type})", "is not full or sliding attention")
    for path, module in decoder.named_modules():
        parent, _, name = path.rpartition(".")
        name_of_class = type(module).__name__
        if isinstance(module, nn.Conv1d):
            refuse(type(decoder.get_submodule(parent)).__name__, "convolves them")
        if name in CROSS_ATTENTION:
            refuse(type(decoder.get_submodule(parent)).__name__, f"attends to another sequence ({name})")
        for part, reason in UNABLE.items():
            if part in name_of_class:
                refuse(name_of_class, reason)
        if hasattr(module, "create_position_ids_from_input_ids"):
            refuse(name_of_class, "counts positions from its padding token")
    mixers = [module for module in decoder.modules() if "Attention" in type(module).__name__]
    mixer = type((mixers or [module for _, module in layers_of(decoder)] or [decoder])[0])
    if not any(hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS") for kind in mixer.__mro__):
        refuse(mixer.__name__, "does not call transformers' attention interface")
    if decoder.config is not model.config:
        refuse(type(decoder).__name__, "is a part of it; load the text model by itself")
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            refuse(str(adapter.peft_type), "prepends learned tokens")


def check_rope(model: PreTrainedModel, positions: Tensor) -> None:
    """A path alone and in a row must be rotated alike: the row's longest path must be within the original length."""
    config = decoder_of(model).config
    parameters = getattr(config, "rope_parameters", None) or {}
    per_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in per_kind:
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            longest = int(positions.max()) + 1
            if longest > original:
                raise ValueError(
                    f"tree_hidden: with {rope['rope_type']} rotary embeddings a path must have at most {original} "
                    f"tokens, got {longest}"
                )
