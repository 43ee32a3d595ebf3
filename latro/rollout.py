"""Sampling: K continuations of each prompt, which is read once.

A sample's random numbers come from its own key and its position alone, so that it does not depend on what else is in
the batch, on its size, or on the number of processes.

Sizes: B continuations, V vocabulary, K continuations of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.attention import check_rope
from latro.model.decoding import Decoder
from latro.model.verify import evaluating, verify_decoding

BLOCK = 256  # tokens that are looked for together: about the root of a vocabulary

# What the wrapped module is called in torch.compile's, in DistributedDataParallel's and DeepSpeed's, in PEFT's, in
# TreeModel and PEFT's tuners.
WRAPPED = ("_orig_mod", "module", "base_model", "model")


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn, and when they are over."""

    max_tokens: int
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: any token
    ends: frozenset[int] = frozenset()  # tokens that end a continuation, and are not part of it
    # Which of some continuations hold a stop string.
    are_over: Callable[[list[list[int]]], list[bool]] = lambda rows: [False] * len(rows)
    # The strings by which are_over decides: what looks for them in a growing text may end there by itself.
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"Sampling: {name} must be {rule}, got {value}")


@dataclass
class Sample:
    """One continuation: its tokens, the log-probs they were drawn with, and what ended it."""

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    end: int | None = None  # the end token, where one came
    ended_by: str = "length"  # or "end", or "stop"


class Engine(Protocol):
    """What draws samples. Others than LocalEngine may run in other processes, or on other machines.

    Every process of a training run has an engine, and calls `sync` and then `generate` before each update, with prompts
    of its own, whose number may differ from other processes'.
    """

    def generate(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: Callable[[int], object] = ...,
    ) -> list[list[Sample]]:
        """For each prompt, a sample for each of its keys, in that order.

        prompts: tokens, which go to the model as they are.
        keys: 64-bit integers. A sample should depend on its prompt and its key alone, as from a random seed.
        sampling: a sample is over with the first token that is one of `ends`, which becomes its `end`, or with the
            first by which `are_over` holds for its tokens, which may be looked at late if the tokens after it are then
            left out; or it is cut off. top_k applies before top_p, both at `temperature`.
        progress: called with the number of continuations that have ended since the last call.
        A sample's tokens are those that were drawn, never text that was encoded again. `logps` has the log-prob of each
        of them, and of the end, in the distribution that they were drawn from.
        """

    def sync(self, model: nn.Module) -> None:
        """From now on, sample from this model as it is: a model of transformers, or what wraps one for training, of
        which `unwrapped` is the model. Of a sharded one every process has a part: see `whole`."""


class LocalEngine:
    """Samples with the model itself, in this process."""

    def __init__(self, model: nn.Module, max_rows: int = 256, tolerance: float | None = None) -> None:
        """max_rows: continuations that grow at once; keys and values of all of them are in memory.
        tolerance: of `verify_decoding`, by which the model is checked before it first samples."""
        if max_rows < 1:
            raise ValueError(f"LocalEngine: max_rows must be at least 1, got {max_rows}")
        self.model = unwrapped(model)
        self.max_rows = max_rows
        self.tolerance = tolerance
        self._is_verified = False

    def sync(self, model: nn.Module) -> None:
        """Nothing to do where it is the model that samples; else its weights are gathered, for which every process of a
        sharded model must call."""
        inner = unwrapped(model)
        if inner is not self.model:
            copy_weights(inner, self.model)

    def generate(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: Callable[[int], object] = lambda ended: None,
    ) -> list[list[Sample]]:
        self._check(prompts, keys, sampling)
        if not self._is_verified:
            verify_decoding(self.model, tolerance=self.tolerance)
            self._is_verified = True
        with evaluating(self.model):
            samples: list[list[Sample]] = []
            for part in _parts([len(of_prompt) for of_prompt in keys], self.max_rows):
                samples += _grow(self.model, list(prompts[part]), keys[part], sampling, progress)
            return samples

    def _check(self, prompts: Sequence[list[int]], keys: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if len(keys) != len(prompts):
            raise ValueError(f"generate: keys must be one list for each of {len(prompts)} prompts, got {len(keys)}")
        vocabulary = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        for n, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: prompts must have at least one token each, got none in prompt {n}")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(
                    f"generate: prompts must be of tokens in [0, {vocabulary}), "
                    f"got {min(prompt)} to {max(prompt)} in prompt {n}"
                )
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        check_rope(self.model, torch.tensor([longest - 1]))


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model of transformers within what wraps it for training."""
    inner: nn.Module | None = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        inner = next((inner._modules[name] for name in WRAPPED if name in inner._modules), None)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, or wrap one, got {type(model).__name__}")
    return inner


@torch.no_grad()
def copy_weights(source: nn.Module, to: nn.Module) -> None:
    """Parameter by parameter, whole ones of shards; and buffers."""
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, own in (*to.named_parameters(), *to.named_buffers()):
        if name not in theirs:
            raise ValueError(f"sync: the model must have every weight of the one that samples, but {name} is not there")
        with whole(theirs[name]) as weight:
            own.copy_(weight)


@contextmanager
def whole(weight: Any) -> Iterator[Tensor]:
    """Of a sharded one every process must ask."""
    if hasattr(weight, "full_tensor"):  # FSDP2
        yield weight.full_tensor()
    elif hasattr(weight, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight


def _parts(counts: list[int], most: int) -> list[slice]:
    """Neighbouring prompts with at most so many continuations together, or a single prompt."""
    parts: list[slice] = []
    total = 0
    for n, count in enumerate(counts):
        if parts and total + count <= most:
            parts[-1] = slice(parts[-1].start, n + 1)
            total += count
        else:
            parts.append(slice(n, n + 1))
            total = count
    return parts


def _grow(
    model: PreTrainedModel,
    prompts: list[list[int]],
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: Callable[[int], object],
) -> list[list[Sample]]:
    samples = [[Sample() for _ in of_prompt] for of_prompt in keys]
    growing = [sample for of_prompt in samples for sample in of_prompt]
    if not growing:
        return samples
    decoder = Decoder(model)
    logits = decoder.start(prompts, [len(of_prompt) for of_prompt in keys])
    key = torch.tensor([number for of_prompt in keys for number in of_prompt], device=logits.device)
    for position in range(sampling.max_tokens):
        tokens, logps = draw(logits, uniform(key, position), sampling)
        finished = _add(growing, tokens.tolist(), logps.tolist(), sampling)
        if finished:
            progress(len(finished))
            alive = decoder.drop(finished)
            growing = [growing[row] for row in alive]
            tokens, key = tokens[alive], key[alive]
        if not growing or position + 1 == sampling.max_tokens:
            break
        logits = decoder.step(tokens)
    progress(len(growing))
    return samples


def _add(growing: list[Sample], tokens: list[int], logps: list[float], sampling: Sampling) -> list[int]:
    """One more token for each. -> the rows that are finished."""
    for sample, token, logp in zip(growing, tokens, logps, strict=True):
        if logp != logp:
            raise ValueError(f"generate: logits must be numbers, got NaN after {len(sample.tokens)} sampled tokens")
        sample.logps.append(logp)
        if token in sampling.ends:
            sample.end, sample.ended_by = token, "end"
        else:
            sample.tokens.append(token)
    for sample, over in zip(growing, sampling.are_over([sample.tokens for sample in growing]), strict=True):
        if over and sample.end is None:
            sample.ended_by = "stop"
    return [row for row, sample in enumerate(growing) if sample.ended_by != "length"]


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniform [B] in [0, 1) -> tokens [B], and the log-probs [B] that they were drawn with.

    By the inverse of the cumulative distribution, in the vocabulary's order: first a block of tokens is found, then the
    token in it.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        top, tokens = logits.max(-1)
        return tokens, top - logits.logsumexp(-1)
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = logits.masked_fill(logits < _lowest(logits, sampling), -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = F.pad(logits, (0, -logits.shape[-1] % BLOCK), value=-torch.inf).exp_().unflatten(-1, (-1, BLOCK))
    of_blocks = weights.sum(-1)
    block, share = _find(of_blocks, uniform[:, None].double())
    in_block, _ = _find(weights.take_along_dim(block[:, :, None], 1)[:, 0], share)
    tokens = (block * BLOCK + in_block).clamp(max=logits.shape[-1] - 1)  # for NaN
    logps = logits.gather(-1, tokens) - of_blocks.sum(-1, keepdim=True).log()
    return tokens[:, 0], logps[:, 0]


def _find(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where a share [B, 1] of weights [B, n], counted from the first, is reached; and at which share of that one."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # What is found has a weight, for this is below the total, and not below 0 as a rounded share may be.
    aim = torch.minimum((share * total).clamp(min=0), torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, aim, right=True).clamp(max=weights.shape[-1] - 1)  # NaN is beyond all
    weight = weights.gather(-1, index)
    return index, (aim - (cumulative.gather(-1, index) - weight)) / weight


def _lowest(logits: Tensor, sampling: Sampling) -> Tensor:
    """The lowest logit [B, 1] of the top_k likeliest tokens, and of those no more than it takes to have top_p."""
    V = logits.shape[-1]
    ordered = logits.topk(min(sampling.top_k or V, V)).values
    if sampling.top_p == 1:
        return ordered[:, -1:]
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = (before < sampling.top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, kept - 1)


def sample_key(*parts: Hashable) -> int:
    """A 64-bit number from anything that names a sample: (seed, step, example, k)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big", signed=True)


def uniform(key: Tensor, position: int) -> Tensor:
    """A number in [0, 1) for each key [B], int64: SplitMix64 of the key and the position."""
    x = key + _signed(0x9E3779B97F4A7C15 * (position + 1))
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _signed(x: int) -> int:
    x %= 1 << 64
    return x - (1 << 64) if x >= 1 << 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Without the sign's copies."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
