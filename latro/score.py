"""Log-probs of answers behind rationales, without gradients, for evaluation and inspection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn

from latro.model import logprobs
from latro.sharding import device_of, reshard
from latro.text import Rationale, Text
from latro_kernels import pack_rationales
from latro_kernels.tree import ANSWER

BATCH_TOKENS = 16384  # scored at once


class ScoredPath(NamedTuple):
    """A prompt and a rationale, behind which each of some answers is scored."""

    prompt: tuple[int, ...]
    rationale: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def shares_prompt(self, other: ScoredPath) -> bool:
        """Whether they may be packed as one group, in which there are as many answers to each rationale."""
        return self.prompt == other.prompt and len(self.answers) == len(other.answers)


def path_of(text: Text, prompt: Sequence[int], rationale: Rationale, answers: Sequence[str]) -> ScoredPath:
    tokens = tuple(tuple(text.answer(rationale, answer)) for answer in answers)
    return ScoredPath(tuple(prompt), tuple(rationale.tokens), tokens)


# Scored by a process that has nothing left, while others have.
IDLE = ScoredPath((0,), (), ((0,),))


def answer_logps(
    model: nn.Module, paths: Sequence[ScoredPath], batch_tokens: int = BATCH_TOKENS, *, in_step: bool = False
) -> list[list[float]]:
    """For each path, the log-probs of its answers. Neighbours that share their prompt share its tokens.

    model: a TreeModel, or what wraps it.
    in_step: the model's parameters are sharded. Every process must call, and calls the model as often as any.
    """
    batches = list(_batches(paths, batch_tokens))
    if in_step:
        batches += [[IDLE]] * (max(gather_object([len(batches)])) - len(batches))
    logps = [of_path for batch in batches for of_path in _of_batch(model, batch)]
    reshard(model)
    return logps[: len(paths)]


def _of_batch(model: nn.Module, batch: Sequence[ScoredPath]) -> list[list[float]]:
    groups = _groups(batch)
    tree, scored = pack_rationales(
        [group[0].prompt for group in groups],
        [[path.rationale for path in group] for group in groups],
        [[path.answers for path in group] for group in groups],
    )
    device = device_of(model)
    of_token = logprobs(model, tree.to(device), scored.to(device)).double().cpu()
    of_segment = torch.zeros(len(scored.kind), dtype=torch.float64).index_add(0, scored.segment, of_token)
    of_answer = iter(of_segment[scored.kind == ANSWER].tolist())
    return [[next(of_answer) for _ in path.answers] for path in batch]


def _groups(paths: Sequence[ScoredPath]) -> list[list[ScoredPath]]:
    groups: list[list[ScoredPath]] = []
    for path in paths:
        if groups and groups[-1][0].shares_prompt(path):
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def _batches(paths: Sequence[ScoredPath], most: int) -> Iterator[list[ScoredPath]]:
    """Paths, in order, with at most so many tokens together, or a single one."""
    batch: list[ScoredPath] = []
    total = 0
    for path in paths:
        own = len(path.rationale) + sum(map(len, path.answers))
        added = own if batch and batch[-1].shares_prompt(path) else own + len(path.prompt)
        if batch and total + added > most:
            yield batch
            batch, total, added = [], 0, own + len(path.prompt)
        batch.append(path)
        total += added
    if batch:
        yield batch
