"""A causal language model over a prefix tree, up to its head or up to its loss.

The output head is called as the model calls it, with the fused loss in place of its product, so that its own hooks
(FSDP, ZeRO-3) gather the weight before and reduce the gradient after, and what a model does before its head is done.

Sizes: T tokens, M scored tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from latro.model.attention import TreeMask, check_rope, decoder_of, prepare
from latro_kernels import PrefixTree, ScoredTokens, SelfRewardLoss, fused_self_reward_loss
from latro_kernels.checks import check_range


class TreeModel(nn.Module):
    """A causal language model whose forward is the self-reward loss of a packed tree.

    This is the module to wrap (DDP, FSDP, DeepSpeed), for a wrapper acts in the forward and on the output of what it
    wraps. Its layers and its head may be sharded as units of their own. `model` stays usable, for generation, but not
    during a call: no other thread may then use it, or a model that shares its configuration.
    """

    accepts_loss_kwargs = False  # transformers' Trainer asks

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"TreeModel: model must be a model of transformers, got {type(model).__name__}")
        prepare(model)
        self.model = model
        self.head_options = _HeadOptions.of(model)
        # For accelerate, which wraps these.
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same under the name of transformers 5.23, which is asked for where it is there."""
        self.model.activation_checkpointing_enable(**options)

    def forward(self, tree: PrefixTree, scored: ScoredTokens, **options: Any) -> SelfRewardLoss:
        """`options` are those of fused_self_reward_loss, except the head's own: bias, softcap and logit_scale."""

        def loss(hidden: Tensor, head: nn.Linear) -> SelfRewardLoss:
            return fused_self_reward_loss(
                hidden,
                head.weight,
                scored,
                bias=head.bias,
                softcap=self.head_options.softcap,
                logit_scale=self.head_options.logit_scale,
                **options,
            )

        return _at_head(self.model, tree, loss)

    @torch.no_grad()
    def logprobs(
        self, tree: PrefixTree, scored: ScoredTokens, *, temperature: float = 1.0, impl: str = "auto"
    ) -> Tensor:
        """The log-probs [M] alone, for a reference model."""
        return logprobs(self, tree, scored, temperature=temperature, impl=impl)


@torch.no_grad()
def logprobs(
    model: nn.Module, tree: PrefixTree, scored: ScoredTokens, *, temperature: float = 1.0, impl: str = "auto"
) -> Tensor:
    """The log-probs [M] of a TreeModel, or of what wraps it, whose hooks gather what is sharded."""
    advantage = torch.zeros(scored.prompt.shape[0], device=scored.prompt.device)
    return model(tree, scored, beta=0.0, advantage=advantage, temperature=temperature, impl=impl).logps


def tree_hidden(model: PreTrainedModel, tree: PrefixTree) -> Tensor:
    """What the model's head is given [T, D], each token having attended to its own path."""
    prepare(model)
    return _at_head(model, tree, lambda hidden, head: hidden)


@dataclass(frozen=True)
class _HeadOptions:
    """logits = softcap(logit_scale · (hidden Wᵀ + bias)), with softcap(x) = cap · tanh(x / cap)."""

    softcap: float | None
    logit_scale: float

    @staticmethod
    def of(model: PreTrainedModel) -> _HeadOptions:
        """What `model.forward` does to logits, observed on numbers of ours in place of its decoder's and its head's."""
        head, decoder = head_of(model), decoder_of(model)
        logits = torch.tensor([-3.0, -0.5, 2.0**-20, 1.0, 7.0, 20.0, 1e6], dtype=torch.float64)
        hidden = head.weight.new_zeros(1, len(logits), decoder.config.hidden_size)
        output = _AnyOutput(last_hidden_state=hidden)
        with (
            torch.no_grad(),
            _replaced_forward(decoder, lambda *args, **kwargs: output),
            _replaced_forward(head, lambda _: logits[None, :, None]),
        ):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            given = model(input_ids=ids, use_cache=False, return_dict=True).logits.flatten().double()
        logit_scale = round(float(given[2] / logits[2]), 12)  # to 1 where the softcap's tanh rounded it off
        linear = logit_scale * logits
        softcap = None if torch.allclose(given, linear, rtol=1e-5) else float(given[-1])
        if softcap is not None and not torch.allclose(given, softcap * torch.tanh(linear / softcap), rtol=1e-5):
            raise ValueError(
                f"TreeModel: {type(model).__name__} must scale or softcap its logits, if anything, "
                f"got {logits.tolist()} mapped to {given.tolist()}"
            )
        return _HeadOptions(softcap, logit_scale)


class _AnyOutput(BaseModelOutputWithPast):
    """A decoder's output: whatever else a head looks for in it is not there."""

    def __getattr__(self, name: str) -> None:
        return None


def _at_head(model: PreTrainedModel, tree: PrefixTree, compute: Callable[[Tensor, nn.Linear], Any]) -> Any:
    """compute(hidden [T, D], head), run in the place and under the hooks of the model's head."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"TreeModel: tree must be a PrefixTree, got {type(tree).__name__}")
    head = head_of(model)
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    check_range("TreeModel", "tree.tokens", tree.tokens, vocabulary, "vocabulary")
    check_rope(model, tree.positions)
    results = []

    def at_head(hidden: Tensor) -> Tensor:
        results.append(compute(hidden[0], head))
        # The hooks of the head look for gradients in its output, and the model goes on to scale it: the tensor itself.
        return results[0].loss if isinstance(results[0], SelfRewardLoss) else results[0]

    # ZeRO-3's hooks put a tensor of their own in the output's place, and gather the weight when its gradient comes.
    hooked: list[Tensor] = []
    last_hook = head.register_forward_hook(lambda head, given, output: hooked.append(output))
    try:
        with _replaced_forward(head, at_head):
            model(
                input_ids=tree.tokens[None],
                attention_mask=TreeMask(tree),
                position_ids=tree.positions[None],
                use_cache=False,
            )
    finally:
        last_hook.remove()
    return results[0]._replace(loss=hooked[0]) if isinstance(results[0], SelfRewardLoss) else hooked[0]


def at_rows(model: PreTrainedModel, rows: Tensor, **inputs: Any) -> Tensor:
    """The logits [rows, V] at some rows of one sequence of inputs, others not being made."""
    head = head_of(model)
    all_rows = head.forward
    with _replaced_forward(head, lambda hidden: all_rows(hidden[:, rows])):
        return model(**inputs).logits[0]


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    outer = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if outer is not None:
            module.forward = outer


def head_of(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    kind = type(head)
    if getattr(kind, "forward", None) is not nn.Linear.forward:
        raise ValueError(
            f"TreeModel: the output head of {type(model).__name__} must be a plain torch.nn.Linear, "
            f"got {kind.__module__}.{kind.__name__}; merge an adapter into it, or leave the head out of what it adapts"
        )
    if hasattr(head, "_hf_hook"):
        raise ValueError(
            f"TreeModel: the output head of {type(model).__name__} must be on one device for good, "
            "got a head that accelerate dispatches; load the model without device_map and without offloading"
        )
    return head
