"""The order of the data where what is sampled serves several updates.

A round is what is sampled at once. Its updates come one after the other, and then all of them again: A B A B.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler

from latro.config import LatroConfig


class Rounds(Sampler[int]):
    """The order of another sampler, in which each round stands `times` times.

    The last round of an epoch is filled up to whole updates with the epoch's first examples, so that an update never
    has both a rationale's first use and another one.
    """

    def __init__(self, order: Any, per_update: int, per_round: int, times: int) -> None:
        """per_update, per_round: examples, of all processes; a round has whole updates."""
        self.order, self.per_update, self.per_round, self.times = order, per_update, per_round, times

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_update) * self.per_update * self.times

    def __iter__(self) -> Iterator[int]:
        examples = list(self.order)
        examples += islice(cycle(list(examples)), -len(examples) % self.per_update)
        for first in range(0, len(examples), self.per_round):
            yield from examples[first : first + self.per_round] * self.times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


def rounds_of(order: Any, args: LatroConfig) -> Rounds:
    """Of the order in which transformers would go through the data."""
    if isinstance(order, RandomSampler):  # of which accelerate makes this, where it sees it: the same in all processes
        order = SeedableRandomSampler(order.data_source, data_seed=args.data_seed)
    together = args.train_batch_size * args.world_size
    return Rounds(
        order,
        together * args.gradient_accumulation_steps,
        together * max(args.steps_per_generation or 0, args.gradient_accumulation_steps),
        args.num_iterations,
    )
