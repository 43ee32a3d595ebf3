"""Decoding many continuations of each prompt, which is read once, as is what prompts have in common.

Keys and values are kept as the attention function is given them, call by call, so that it does not matter what a model
makes them of, or would store itself. All continuations have the same length, for they grow together; one that is
finished leaves, and another takes its place. The scores of a prompt's continuations against its keys are one matrix
product.

Sizes: N prompts of at most P tokens, B continuations, at most K of a prompt, H heads over Hkv key heads of size E,
G = H / Hkv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latro.model.attention import PathMask, TreeMask, prepare
from latro.model.tree_model import at_rows
from latro_kernels import PrefixTree

ROOM = 64  # tokens for which there is room in continuations at first; then it doubles


class Decoder:
    """Logits of the next token after each of the continuations of some prompts."""

    def __init__(self, model: PreTrainedModel) -> None:
        prepare(model)
        self.model = model

    @torch.no_grad()  # not inference mode: what a model computes once and keeps could then not be trained with
    def start(self, prompts: list[list[int]], continuations: list[int]) -> Tensor:
        """prompts: token lists; continuations: how many of each. -> logits [B, V], those of a prompt together."""
        device = cast(Tensor, self.model.get_input_embeddings().weight).device
        tree, rows = shared(prompts)
        tree = tree.to(device)
        self.paths = Paths(rows, continuations, device)
        logits = at_rows(
            self.model,
            torch.tensor([of_prompt[-1] for of_prompt in rows], device=device),
            input_ids=tree.tokens[None],
            attention_mask=PromptMask(tree, self.paths),
            position_ids=tree.positions[None],
            use_cache=False,
        )
        return logits[self.paths.prompt]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens [B], one more for each continuation -> logits [B, V]."""
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=ContinuationMask(self.paths),
            position_ids=self.paths.positions()[:, None],
            use_cache=False,
        ).logits
        self.paths.advance()
        return logits[:, -1]

    def drop(self, finished: list[int]) -> list[int]:
        """Leave out some of the continuations. -> which of the old ones each of the others was."""
        return self.paths.drop(finished)


@dataclass(frozen=True, eq=False)
class PromptMask(TreeMask):
    """Each token of a tree of prompts sees those before it, and keys and values of all are kept."""

    paths: Paths

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        self.paths.keep(k, v)
        return super().attention(q, k, v, scale, softcap, sinks)


@dataclass(frozen=True, eq=False)
class ContinuationMask(PathMask):
    """The newest token of each continuation sees its prompt, the tokens before it, and itself."""

    paths: Paths

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.paths.prompt), 1])

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        G = q.shape[1] // k.shape[1]
        q = q.reshape(*k.shape[:2], G, -1)  # [B, Hkv, G, E]
        parts = self.paths.attend(q, k, v, self.window, scale, softcap)
        tops = [part.top for part in parts]
        if sinks is not None:
            tops.append(sinks.float().view(1, -1, G, 1).expand_as(tops[0]))
        top = torch.stack(tops).amax(0)
        factors = [(of_one - top).exp_() for of_one in tops]  # a sink's too, which has no value
        totals = [part.total * factor for part, factor in zip(parts, factors, strict=False)] + factors[len(parts) :]
        out = sum(part.out * factor for part, factor in zip(parts, factors, strict=False)) / sum(totals)
        return cast(Tensor, out).to(q.dtype).flatten(1, 2)[:, None]


class _Part(NamedTuple):
    """Attention over some of the keys: Σ w v [..., E] and Σ w [..., 1], with weights w = exp(score − top)."""

    out: Tensor
    total: Tensor
    top: Tensor


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, mask: Tensor | None = None
) -> _Part:
    scores = (q @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    return _Part(weights.to(values.dtype) @ values, weights.sum(-1, keepdim=True), top)


class Paths:
    """The continuations of some prompts, with their keys and values in each call of attention of a forward pass."""

    def __init__(self, rows: list[list[int]], continuations: list[int], device: torch.device) -> None:
        """rows: where each prompt's tokens are in the tree of prompts."""
        self.lengths = [len(of_prompt) for of_prompt in rows]
        self.prompt = [n for n, count in enumerate(continuations) for _ in range(count)]  # [B]
        self.length = 0  # of the continuations
        self.device = device
        self._kept: list[tuple[_Kept, _Kept]] = []  # keys and values
        self._calls = 0  # in this forward pass
        self._masks: dict[int | None, Tensor | None] = {}
        P = max(self.lengths)
        self._in_row = torch.tensor([of_prompt + [0] * (P - len(of_prompt)) for of_prompt in rows], device=device)
        self._group()

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Keys and values [1, Hkv, T, E] of the row of prompts, in the next call."""
        keys, values = (_Kept(new[0][:, self._in_row].transpose(0, 1).contiguous(), len(self.prompt)) for new in (k, v))
        self._kept.append((keys, values))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, softcap: float | None
    ) -> list[_Part]:
        """q [B, Hkv, G, E], k and v [B, Hkv, 1, E] of the newest tokens, in the next call -> parts [B, Hkv, G, E]."""
        keys, values = self._kept[self._calls]
        self._calls += 1
        first = None if window is None else self.length + 1 - window  # of the continuation's tokens that are seen
        own_keys, own_values = (
            kept.appended(new, self.length, max(0, first or 0)) for kept, new in ((keys, k), (values, v))
        )
        parts = [_attention(q, own_keys, own_values, scale, softcap)]
        if first is None or first < 0:
            N, P = len(self.lengths), max(self.lengths)
            prompt_keys, prompt_values = (kept.of_prompts[:N, :, :P] for kept in (keys, values))
            heads = torch.arange(q.shape[1], device=self.device)
            together = q[self._members[:, None], heads[:, None]].flatten(2, 3)  # [N, Hkv, K * G, E]
            part = _attention(together, prompt_keys, prompt_values, scale, softcap, self._prompt_mask(first))
            apart = self._of_prompt[:, None], heads, self._place[:, None]
            parts.append(_Part(*(of_all.unflatten(2, (-1, q.shape[2]))[apart] for of_all in part)))
        return parts

    def _prompt_mask(self, first: int | None) -> Tensor | None:
        """What is added to scores [N, 1, 1, P], or None. first: which token is seen, from the prompt's end; or all."""
        if first not in self._masks:
            lengths = torch.tensor(self.lengths)[:, None]
            place = torch.arange(max(self.lengths))
            seen = place < lengths
            if first is not None:
                seen = seen & (place >= lengths + first)
            mask = None if bool(seen.all()) else torch.where(seen, 0.0, -torch.inf)[:, None, None].to(self.device)
            self._masks[first] = mask
        return self._masks[first]

    def positions(self) -> Tensor:
        """[B], of the newest tokens."""
        return self._prompt_lengths + self.length

    def advance(self) -> None:
        assert self._calls == len(self._kept), "a model calls attention as often for a token as for a prompt"
        self._calls = 0
        self.length += 1
        self._masks = {first: mask for first, mask in self._masks.items() if first is None}  # a window has moved

    def drop(self, finished: list[int]) -> list[int]:
        kept = [tensors for pair in self._kept for tensors in pair]
        alive = _filled(len(self.prompt), set(finished))
        for tensors in kept:
            _move(tensors.own[:, :, : self.length], alive)
        self.prompt = [self.prompt[row] for row in alive]
        prompts = _filled(len(self.lengths), set(range(len(self.lengths))) - set(self.prompt))
        for tensors in kept:
            _move(tensors.of_prompts, prompts)
        self.lengths = [self.lengths[n] for n in prompts]
        self.prompt = [prompts.index(n) for n in self.prompt]
        self._group()
        return alive

    def _group(self) -> None:
        """Which continuations are each prompt's [N, K]; the prompt of each and where it is among those [B]."""
        rows_of: list[list[int]] = [[] for _ in self.lengths]
        place = []
        for row, n in enumerate(self.prompt):
            place.append(len(rows_of[n]))
            rows_of[n].append(row)
        K = max(map(len, rows_of), default=0)
        members = [rows + [0] * (K - len(rows)) for rows in rows_of]
        self._members, self._of_prompt, self._place, self._prompt_lengths = (
            torch.tensor(numbers, dtype=torch.int64, device=self.device)
            for numbers in (members, self.prompt, place, [self.lengths[n] for n in self.prompt])
        )
        self._masks = {}


def shared(prompts: list[list[int]]) -> tuple[PrefixTree, list[list[int]]]:
    """A tree in which what prompts have in common from their beginning stands once, and where in it the tokens of each
    of them are."""
    nodes: list[list[int]] = []
    parents: list[int] = []
    paths: list[list[int]] = [[] for _ in prompts]
    waiting = [(list(range(len(prompts))), 0, -1)]
    while waiting:
        together, depth, parent = waiting.pop()  # these begin with the same tokens, so many
        going_on: dict[int, list[int]] = {}
        for n in together:
            if len(prompts[n]) > depth:
                going_on.setdefault(prompts[n][depth], []).append(n)
        for members in going_on.values():
            # What the first and the last of them in order have in common, all have.
            first, last = (pick(prompts[n] for n in members) for pick in (min, max))
            end = next((at for at, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
            for n in members:
                paths[n].append(len(nodes))
            waiting.append((members, end, len(nodes)))
            nodes.append(first[depth:end])
            parents.append(parent)
    tree = PrefixTree.pack(nodes, parents)
    order, counts = tree.node.unique_consecutive(return_counts=True)
    starts = dict(zip(order.tolist(), (counts.cumsum(0) - counts).tolist(), strict=True))
    rows = [[starts[node] + place for node in path for place in range(len(nodes[node]))] for path in paths]
    return tree, rows


class _Kept:
    """Keys or values in one call: of the prompts [N, Hkv, P, E], and of the continuations [B, Hkv, room, E]."""

    def __init__(self, of_prompts: Tensor, B: int) -> None:
        self.of_prompts = of_prompts
        self.own = of_prompts.new_empty(B, of_prompts.shape[1], 0, of_prompts.shape[3])

    def appended(self, new: Tensor, length: int, first: int) -> Tensor:
        """new [B, Hkv, 1, E] behind `length` tokens. -> the tokens from the first one on [B, Hkv, ..., E]."""
        if length == self.own.shape[2]:
            room = new.new_empty(*new.shape[:2], max(ROOM, 2 * length), new.shape[3])
            room[:, :, :length] = self.own[: len(new)]
            self.own = room
        self.own[: len(new), :, length] = new[:, :, 0]
        return self.own[: len(new), :, first : length + 1]


def _filled(count: int, gone: set[int]) -> list[int]:
    """Of so many things, those that are left, the last ones in the places of those that are gone."""
    left = count - len(gone)
    last = iter([row for row in range(left, count) if row not in gone])
    return [next(last) if row in gone else row for row in range(left)]


def _move(rows: Tensor, places: list[int]) -> None:
    """Those that `_filled` gave another place."""
    moved = [place for place, row in enumerate(places) if place != row]
    if moved:
        rows[moved] = rows[[places[place] for place in moved]]
