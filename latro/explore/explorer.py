"""A model that is asked to go on, and by what it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from latro.data import Example
from latro.grading import Grader
from latro.rollout import Engine, LocalEngine, Sample, Sampling
from latro.text import Text, end_tokens

Progress = Callable[[int], object]  # called with the number of samples that ended since the last call


@dataclass(frozen=True)
class Explorer:
    """What draws completions, and by which rule they are right."""

    engine: Engine
    text: Text
    grader: Grader
    ends: frozenset[int]  # tokens that end a completion
    max_tokens: int  # of a completion
    temperature: float = 0.7
    seed: int = 0

    @staticmethod
    def of(
        model: PreTrainedModel,
        text: Text,
        grader: Grader,
        max_tokens: int,
        *,
        temperature: float = 0.7,
        seed: int = 0,
        engine: Engine | None = None,
    ) -> Explorer:
        """engine: in sync with the model; by default the model itself."""
        ends = end_tokens(text.tokenizer, model.generation_config)
        return Explorer(engine or LocalEngine(model), text, grader, ends, max_tokens, temperature, seed)

    def ask(
        self, prompts: Sequence[list[int]], keys: Sequence[Sequence[int]], progress: Progress
    ) -> list[list[Sample]]:
        """Up to the end of the answer, for stop strings end a rationale alone."""
        sampling = Sampling(self.max_tokens, self.temperature, ends=self.ends)
        return self.engine.generate(prompts, keys, sampling, progress)

    def is_right(self, example: Example, tokens: Sequence[int]) -> bool:
        said = self.grader.extract(self.text.decode(tokens), example.options)
        return self.grader.is_right(said, example.answer)
