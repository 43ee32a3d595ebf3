"""Where a rationale goes wrong: after each of its steps the model is asked to go on, and it is counted how often it is
right.

The prefixes x, x s_1, x s_1 s_2, … of all rationales are a tree, and each of its nodes is explored once: rationales of
a prompt that begin alike share what was drawn behind their common steps. All of them are sampled in one call of the
engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latro.data import Example
from latro.explore.explorer import Explorer, Progress
from latro.explore.steps import MOST_STEPS, Step, steps_in
from latro.rollout import Sample, sample_key

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Attempt:
    """A continuation, and whether it led to the right answer."""

    sample: Sample
    right: bool


@dataclass(frozen=True)
class Explored:
    """A completion, step by step."""

    example: Example
    sample: Sample
    right: bool  # whether its own answer is
    steps: tuple[Step, ...]
    attempts: tuple[tuple[Attempt, ...], ...]  # before the first step, and after each step but the answer

    @property
    def rates(self) -> list[float]:
        """The share of right continuations before the first step, and after each step; behind an answer, whether it is
        the right one."""
        found = [sum(attempt.right for attempt in of_prefix) / len(of_prefix) for of_prefix in self.attempts]
        return found + [float(self.right)] * (len(self.steps) + 1 - len(found))

    @property
    def pit(self) -> int | None:
        """The place, counted from 0, of the first step after which no continuation is right."""
        return next((n for n, rate in enumerate(self.rates[1:]) if rate == 0), None)

    def before(self, n: int) -> Prefix:
        """The tokens of the steps before the n-th."""
        return tuple(token for step in self.steps[:n] for token in step.tokens)


def explore(
    explorer: Explorer,
    completions: Sequence[tuple[Example, Sample]],
    steps_of: Callable[[str], list[str]],
    *,
    continuations: int = 4,
    most_steps: int = MOST_STEPS,
    progress: Progress = lambda ended: None,
) -> list[Explored]:
    """completions: of a prompt each, as the explorer or another model sampled them.
    steps_of: a rationale's steps, as `Reading.steps_of`.
    A continuation that is longer, with what stands before it, than a completion may be counts as wrong: as a whole it
    could not have been sampled.
    """
    for name, value in (("continuations", continuations), ("most_steps", most_steps)):
        if value < 1:
            raise ValueError(f"explore: {name} must be at least 1, got {value}")
    steps = [tuple(steps_in(explorer.text, sample, steps_of, most_steps)) for _, sample in completions]
    nodes: dict[tuple[str, Prefix], Example] = {}
    for (example, _), own in zip(completions, steps, strict=True):
        nodes.update(((example.id, prefix), example) for prefix in _prefixes(own))
    explored = _explore_nodes(explorer, nodes, continuations, progress)
    return [
        Explored(
            example,
            sample,
            explorer.is_right(example, sample.tokens),
            own,
            tuple(explored[example.id, prefix] for prefix in _prefixes(own)),
        )
        for (example, sample), own in zip(completions, steps, strict=True)
    ]


def _prefixes(steps: Sequence[Step]) -> list[Prefix]:
    """Before the first step, and after each but the answer."""
    prefixes: list[Prefix] = [()]
    for step in steps:
        if not step.is_answer:
            prefixes.append(prefixes[-1] + step.tokens)
    return prefixes


def _explore_nodes(
    explorer: Explorer, nodes: dict[tuple[str, Prefix], Example], continuations: int, progress: Progress
) -> dict[tuple[str, Prefix], tuple[Attempt, ...]]:
    prompts = [explorer.text.prompt(example.prompt) + list(prefix) for (_, prefix), example in nodes.items()]
    keys = [[sample_key(explorer.seed, "explore", *node, k) for k in range(continuations)] for node in nodes]
    found = {}
    for (node, example), samples in zip(nodes.items(), explorer.ask(prompts, keys, progress), strict=True):
        found[node] = tuple(Attempt(sample, _is_right(explorer, example, node[1], sample)) for sample in samples)
    return found


def _is_right(explorer: Explorer, example: Example, prefix: Prefix, sample: Sample) -> bool:
    drawn = len(prefix) + len(sample.tokens) + (sample.end is not None)
    return drawn <= explorer.max_tokens and explorer.is_right(example, [*prefix, *sample.tokens])
