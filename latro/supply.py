"""What an objective needs (`latro.objectives.NEEDS`), given: groups of rationales with their grades, pairs and options.

Training examples that cannot give it are refused before any work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from latro.batch import Group
from latro.data import Example
from latro.grading import Grader
from latro.objectives import Objective
from latro.rollout import Sample
from latro.text import Rationale, Text

GRADED = frozenset({"correct", "right and wrong", "chains"})


class Supply:
    """Makes groups of what was sampled.

    Markov chains (TRICE) begin with the first right sample, and are this process's: there is one for each example and
    each of its samples.
    """

    def __init__(self, text: Text, objective: Objective, grader: Grader) -> None:
        self.text = text
        self.objective = objective
        self.grader = grader
        self.needs = objective.needs
        self.grades = bool(self.needs & GRADED)
        self.states: dict[str, list[Sample | None]] = {}  # of the chains of each example
        self.given = False  # whether the examples have pairs of their own

    @property
    def samples(self) -> bool:
        """Whether groups are made of what the model samples."""
        return self.objective.samples and not self.given

    def check(self, examples: Sequence[Example], max_tokens: int) -> None:
        """Raise unless every example has what the objective needs of it."""
        name = type(self.objective).__name__
        self.given = any(example.pair is not None for example in examples)
        if self.given:
            for example in examples:
                self._check_pair(example, max_tokens)
            return
        for example in examples:
            where = f"train_dataset: example {example.id}"
            if "golden" in self.needs:
                if example.rationale is None:
                    raise ValueError(f"{where}: objective {name} needs a golden rationale, got none")
                group = Group.of(self.text, example, [self._golden(example)])
                length = len(group.rationales[0].tokens)
                if length > max_tokens:
                    raise ValueError(
                        f"{where}: its golden rationale must have at most max_completion_length tokens, {max_tokens}, "
                        f"got {length}"
                    )
            if "options" in self.needs:
                if len(set(example.options)) < 2 or example.answer not in example.options:
                    raise ValueError(
                        f"{where}: objective {name} needs options, at least 2 and the answer among them, "
                        f"got {list(example.options)}"
                    )
                self._add_options(Group.of(self.text, example, [Sample()]))

    def _check_pair(self, example: Example, max_tokens: int) -> None:
        name, where, pair = type(self.objective).__name__, f"train_dataset: example {example.id}", example.pair
        if "right and wrong" not in self.needs:
            raise ValueError(f"{where}: objective {name} takes no given pair; dpo does")
        if pair is None:
            raise ValueError(f"{where}: must have a pair, as others have, got none")
        if not pair.chosen or not pair.rejected or pair.chosen == pair.rejected:
            raise ValueError(
                f"{where}: its pair must be of two different ways to go on, of at least one token each, "
                f"got {list(pair.chosen)} and {list(pair.rejected)}"
            )
        length = len(pair.before) + max(len(pair.chosen), len(pair.rejected))
        if length > max_tokens:
            raise ValueError(
                f"{where}: its pair must have at most max_completion_length tokens, {max_tokens}, got {length}"
            )

    def group(self, example: Example, sampled: Sequence[Sample]) -> Group:
        if self.given:
            return self._of_pair(example)
        samples = list(sampled)
        if "golden" in self.needs:
            samples.append(self._golden(example))
        elif not self.objective.samples:
            samples = [Sample(ended_by="end")]
        correct = [self._is_right(example, sample) for sample in samples] if self.grades else []
        pairs = []
        if "right and wrong" in self.needs:
            pairs = list(zip(_where(correct, True), _where(correct, False), strict=False))
        if "golden and own" in self.needs:
            pairs = [(len(samples) - 1, k) for k in range(len(samples) - 1)]
        if "chains" in self.needs:
            pairs = self._step(example, samples, correct)
        return self.remake(example, samples, correct, pairs)

    def remake(
        self, example: Example, samples: list[Sample], correct: list[bool], pairs: Sequence[tuple[int, int]]
    ) -> Group:
        """The group of what is already known."""
        if self.given:
            return self._of_pair(example)
        group = Group.of(self.text, example, samples)
        if "baseline" in self.needs:
            group = replace(group, baseline=self.text.answer(self.text.rationale([]), example.answer))
        if "options" in self.needs:
            group = self._add_options(group)
        return replace(group, correct=correct, pairs=[(one, other) for one, other in pairs])

    def saved(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            id: [None if state is None else asdict(state) for state in states] for id, states in self.states.items()
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.states = {
            id: [None if state is None else Sample(**state) for state in states] for id, states in saved.items()
        }

    def _of_pair(self, example: Example) -> Group:
        """A row has an answer behind every rationale. What of a pair is to be one stands in it already, so this is a
        token alone, which has no weight."""
        assert example.pair is not None
        ways = [list(example.pair.chosen), list(example.pair.rejected)]
        return Group(
            example,
            self.text.prompt(example.prompt) + list(example.pair.before),
            [Sample(tokens, ended_by="end") for tokens in ways],
            [Rationale(tokens, self.text.decode(tokens), "") for tokens in ways],
            answers=[list(example.pair.chosen[-1:])] * 2,
            pairs=[(0, 1)],
        )

    def _golden(self, example: Example) -> Sample:
        assert example.rationale is not None
        tokens = self.text.tokenizer(example.rationale, add_special_tokens=False)["input_ids"]
        return Sample(list(tokens), ended_by="end")

    def _add_options(self, group: Group) -> Group:
        others = [option for option in dict.fromkeys(group.example.options) if option != group.example.answer]
        wrong = [[self.text.answer(rationale, option) for option in others] for rationale in group.rationales]
        return replace(group, wrong=wrong)

    def _is_right(self, example: Example, sample: Sample) -> bool:
        said = self.grader.extract(self.text.decode(sample.tokens), example.options)
        return self.grader.is_right(said, example.answer)

    def _step(self, example: Example, samples: list[Sample], correct: list[bool]) -> list[tuple[int, int]]:
        """One step of the example's chains: (state, proposal). States that stay become samples of the group."""
        proposals = len(samples)
        states = self.states.setdefault(example.id, [])
        states += [None] * (proposals - len(states))
        pairs = []
        for k in range(proposals):
            kept = states[k]
            if correct[k]:
                # Log-probs of an older policy are nothing to compare with.
                states[k] = replace(samples[k], logps=[])
                pairs.append((k, k))
            elif kept is not None:
                pairs.append((len(samples), k))
                samples.append(kept)
                correct.append(True)
        return pairs


def _where(values: Sequence[bool], wanted: bool) -> list[int]:
    return [k for k, value in enumerate(values) if value == wanted]
