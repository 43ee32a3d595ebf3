"""Rejection sampling: a model's own completions, sorted into right and wrong ones (RFT, arXiv 2308.01825)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from latro.data import Example
from latro.explore.explorer import Explorer, Progress
from latro.explore.steps import Reading
from latro.rollout import Sample, sample_key
from latro.text import Text

KEPT = "kept"
UNSOUND = "right, but with a false step"
DUPLICATE = "right, but as one before"
SURPLUS = "right, but more than are kept"
WRONG = "wrong"
WRONG_DUPLICATE = "wrong, as one before"


@dataclass(frozen=True)
class Sorted:
    """The completions of a prompt that were kept, and those that were wrong, each once."""

    example: Example
    right: tuple[Sample, ...]
    wrong: tuple[Sample, ...]

    def examples(self, text: Text) -> list[Example]:
        """Each right completion as an example with a golden rationale, to be imitated by `sft_golden`."""
        return [
            replace(self.example, id=f"{self.example.id}/{k}", rationale=text.rationale(sample.tokens).text)
            for k, sample in enumerate(self.right)
        ]


def rejection_samples(
    explorer: Explorer,
    examples: Sequence[Example],
    reading: Reading,
    *,
    samples: int = 100,
    kept: int = 8,
    progress: Progress = lambda ended: None,
) -> tuple[list[Sorted], Counter[str]]:
    """Sample each prompt's completions. Kept are those of the right answer in which no step is found false, that differ
    by `reading.essence`, the first so many of them. -> prompt by prompt, and what became of how many samples."""
    for name, value in (("samples", samples), ("kept", kept)):
        if value < 1:
            raise ValueError(f"rejection_samples: {name} must be at least 1, got {value}")
    prompts = [explorer.text.prompt(example.prompt) for example in examples]
    keys = [[sample_key(explorer.seed, "reject", example.id, k) for k in range(samples)] for example in examples]
    counts = Counter(dict.fromkeys((KEPT, UNSOUND, DUPLICATE, SURPLUS, WRONG, WRONG_DUPLICATE), 0))
    drawn = explorer.ask(prompts, keys, progress)
    found = [_sorted(explorer, *of_one, reading, kept, counts) for of_one in zip(examples, drawn, strict=True)]
    return found, counts


def _sorted(
    explorer: Explorer, example: Example, samples: Sequence[Sample], reading: Reading, kept: int, counts: Counter[str]
) -> Sorted:
    right: dict[Hashable, Sample] = {}
    wrong: dict[str, Sample] = {}
    for sample in samples:
        rationale = explorer.text.rationale(sample.tokens).text
        if not explorer.is_right(example, sample.tokens):
            said = explorer.text.decode(sample.tokens)
            counts[WRONG_DUPLICATE if said in wrong else WRONG] += 1
            wrong.setdefault(said, sample)
        elif not reading.is_sound(example, rationale):
            counts[UNSOUND] += 1
        elif (essence := reading.essence(rationale)) in right:
            counts[DUPLICATE] += 1
        elif len(right) == kept:
            counts[SURPLUS] += 1
        else:
            counts[KEPT] += 1
            right[essence] = sample
    return Sorted(example, tuple(right.values()), tuple(wrong.values()))
