"""What a model is made of, read off the modules that transformers makes of its configuration, without any weight.

Sizes: D hidden, V vocabulary, H query heads, Hkv key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from latro.model.attention import decoder_of, layers_of, prepare
from latro.model.tree_model import head_of
from latro.plan.models import MODELS

# Linear modules that write to the residual stream; the others of an attention, or of an MLP, read what it is given.
OUTPUTS = {"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h"}
# Normalizations of what an MLP gives: behind others its last product is the end of a layer.
NORMS_OF_OUTPUT = {"post_feedforward_layernorm", "post_mlp_layernorm"}


@dataclass(frozen=True)
class Linear:
    """A product of every token with a weight."""

    name: str
    source: str  # linears that read the same tensor share it: "attention", "mlp", or a name of their own
    inputs: int
    outputs: int
    times: int = 1  # a token goes through: the experts that are chosen
    trained: bool = True
    own_input: bool = False  # reads a copy, as LoRA's do

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.times


@dataclass(frozen=True)
class Norm:
    width: int  # numbers of a token
    groups: int = 1  # heads that are normalized each by itself


@dataclass(frozen=True)
class Layer:
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    activated: int  # numbers of a token between the products of the MLP, other than what its last one reads
    parameters: int
    weights: int  # of them, what is multiplied with; of experts, all
    window: int | None
    ends_in_product: bool


@dataclass(frozen=True)
class Shape:
    layers: tuple[Layer, ...]
    D: int
    V: int
    H: int
    Hkv: int
    E: int
    base: int  # parameters, tied ones once
    unread: int  # of them, an embedding that is looked up and no product's weight
    adapter: int = 0  # LoRA's; the base is frozen then

    @property
    def trained(self) -> int:
        return self.adapter or self.base

    @property
    def cache(self) -> int:
        """Numbers that a token leaves to later ones: its keys and values."""
        return 2 * len(self.layers) * self.Hkv * self.E

    def with_adapter(self, rank: int) -> Shape:
        """As `latro train --lora` has it: beside each linear module of the layers."""
        if rank < 1:
            raise ValueError(f"plan: --lora must be a rank of at least 1, got {rank}")
        if any(linear.times > 1 for layer in self.layers for linear in layer.linears):
            raise ValueError(
                "plan: --lora must be left out for a mixture of experts, beside which no adapter is counted"
            )
        layers = tuple(
            replace(layer, linears=tuple(part for linear in layer.linears for part in _adapted(linear, rank)))
            for layer in self.layers
        )
        trained = sum(linear.size for layer in layers for linear in layer.linears if linear.trained)
        return replace(self, layers=layers, adapter=trained)


def _adapted(linear: Linear, rank: int) -> Iterator[Linear]:
    yield replace(linear, trained=False)
    yield replace(linear, name=f"{linear.name}.A", outputs=rank, own_input=True)
    yield replace(linear, name=f"{linear.name}.B", source=f"{linear.name}.B", inputs=rank)


def named_shape(name: str) -> Shape:
    """Of a built-in model, or of a folder with a config.json."""
    if name.lower() in MODELS:
        return shape_of_config(MODELS[name.lower()]())
    if not Path(name, "config.json").is_file():
        raise ValueError(
            f"plan: --model must be a folder with a config.json or one of {', '.join(MODELS)}, got {name!r}"
        )
    return shape_of_config(AutoConfig.from_pretrained(name))


def shape_of_config(config: PreTrainedConfig) -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config))


def shape_of(model: PreTrainedModel) -> Shape:
    prepare(model)  # refuses layers that no tree goes through
    config = decoder_of(model).config
    if any(path.endswith("kv_b_proj") for path, _ in model.named_modules()):
        raise ValueError(f"plan: {config.model_type} must keep keys and values of each head, got latent attention")
    H = config.num_attention_heads
    Hkv = getattr(config, "num_key_value_heads", None) or H
    E = getattr(config, "head_dim", None) or config.hidden_size // H
    layers = [layer for _, layer in layers_of(decoder_of(model))]
    head = head_of(model)
    embedding = model.get_input_embeddings()
    tied = head.weight is getattr(embedding, "weight", None)
    return Shape(
        layers=tuple(_layer(layer, config, i, H, Hkv, E) for i, layer in enumerate(layers)),
        D=head.in_features,
        V=head.out_features,
        H=H,
        Hkv=Hkv,
        E=E,
        base=sum(parameter.numel() for parameter in model.parameters()),
        unread=0 if tied else sum(parameter.numel() for parameter in embedding.parameters()),
    )


def _layer(layer: nn.Module, config: PreTrainedConfig, index: int, H: int, Hkv: int, E: int) -> Layer:
    linears, norms = [], []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if any(True for _ in module.parameters(recurse=False)):
            linears += _linears(path, module, config)
        if "Norm" in type(module).__name__:
            groups = {"q": H, "k": Hkv}.get(name[0]) if name.startswith(("q_", "k_")) else None
            norms.append(Norm(groups * E, groups) if groups else Norm(config.hidden_size))
    has_experts = any(linear.name.startswith("experts") for linear in linears)
    return Layer(
        linears=tuple(linears),
        norms=tuple(norms),
        activated=_activated(linears),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        weights=sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1),
        window=_window(config, index),
        ends_in_product=not has_experts and not NORMS_OF_OUTPUT & {name for name, _ in layer.named_children()},
    )


def _linears(path: str, module: nn.Module, config: PreTrainedConfig) -> list[Linear]:
    parent, _, name = path.rpartition(".")
    kind = type(module).__name__
    source = path if name in OUTPUTS else "attention" if "att" in parent else "mlp"
    sizes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear):
        return [Linear(path, source, module.in_features, module.out_features)]
    if isinstance(module, Conv1D):
        inputs, outputs = sizes["weight"]
        return [Linear(path, source, inputs, outputs)]
    if "Router" in kind:
        outputs, inputs = sizes["weight"]
        return [Linear("router", "mlp", inputs, outputs)]
    if "Experts" in kind and "gate_up_proj" in sizes:
        _, outputs, inputs = sizes["gate_up_proj"]
        chosen = config.num_experts_per_tok
        return [
            Linear("experts.up", "mlp", inputs, outputs, chosen),
            Linear("experts.down", "experts.down", outputs // 2, inputs, chosen),
        ]
    if any(len(size) > 1 for size in sizes.values()):
        raise ValueError(f"plan: layers must be made of linear modules, experts and normalizations, got {kind} {path}")
    return []


def _activated(linears: list[Linear]) -> int:
    """What goes into an activation, and, where it gates, what comes out and what it is multiplied with."""
    made = [linear for linear in linears if linear.source == "mlp" and linear.name != "router"]
    gates = len(made) > 1 or any(linear.name.endswith(("gate_up_proj", "experts.up")) for linear in made)
    numbers = sum(linear.outputs * linear.times for linear in made)
    return numbers * 3 // 2 if gates else numbers


def _window(config: PreTrainedConfig, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else True
    return getattr(config, "sliding_window", None) if slides else None
