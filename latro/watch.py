"""What goes wrong in likelihood training, seen early: rationales worth less than none, and numbers that are none.

log π(y | x, z) punishes a confident wrong rationale more than an empty one, which hedges. Where full rationales score
below empty ones on average, training removes them, while the reward still creeps up.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from latro.batch import Group
from latro.score import answer_logps, path_of
from latro.text import Text

logger = logging.getLogger(__name__)

# Of the margin between full and empty rationales: runs that began at -0.55 or less lost their rationales, those that
# began near 0 did not (a 158k-parameter model on arithmetic programs).
DANGER = -0.5
SHRUNK = 0.25  # of its first length: a rationale that is on its way out
SPAN = 10  # updates that a length is averaged over

REMEDY = (
    "set mask_stop to true or answer_weight to 0, and reward_floor to about -2.5, or first teach the model to reason "
    "by fine-tuning it on rationales of its own that led to the answer"
)


def rationale_margin(model: nn.Module, text: Text, groups: Sequence[Group], *, in_step: bool = False) -> float:
    """Mean log π(y | x, z) over the longer half of each prompt's rationales, less that of the empty rationale.

    in_step: as answer_logps has it.
    """
    none = text.rationale([])
    paths, counts = [], []
    for group in groups:
        longest_first = sorted(group.rationales, key=lambda rationale: -len(rationale.tokens))
        longer = longest_first[: max(1, len(longest_first) // 2)]
        paths += [path_of(text, group.prompt, rationale, [group.example.answer]) for rationale in (none, *longer)]
        counts.append(len(longer))
    logps = iter(logp for (logp,) in answer_logps(model, paths, in_step=in_step))
    margins = [-next(logps) + sum(next(logps) for _ in range(count)) / count for count in counts]
    return sum(margins) / len(margins)


class Watch:
    """Says once of each danger that it is there, and what to do."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=SPAN)
        self._said = False

    def margin(self, margin: float) -> None:
        if margin < DANGER:
            logger.warning(
                "answers are %.2f nats less likely behind the model's longer rationales than behind none: training may "
                "remove the rationales; %s",
                -margin,
                REMEDY,
            )

    def length(self, length: float) -> None:
        if len(self._first) < SPAN:
            self._first.append(length)
        self._last.append(length)
        first, last = sum(self._first) / len(self._first), sum(self._last) / len(self._last)
        if last < SHRUNK * first and not self._said:
            self._said = True
            logger.warning(
                "rationales shrank from %.1f tokens to %.1f: the model is learning not to reason; stop, and %s",
                first,
                last,
                REMEDY,
            )


class NotFiniteError(FloatingPointError):
    """Training met a loss or a gradient that is no number."""


def refuse(what: str, value: float, step: int, folder: Path, groups: Sequence[Group], found: dict[str, Tensor]) -> None:
    """Save what the update was made of, and stop."""
    path = folder / f"stopped-at-{step}.json"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "step": step,
        what: str(value),
        "groups": [
            {
                "id": group.example.id,
                "prompt": group.prompt,
                "answers": group.answers,
                "rationales": [rationale.tokens for rationale in group.rationales],
            }
            for group in groups
        ],
        **{name: str(tensor.tolist()) for name, tensor in found.items()},
    }
    path.write_text(json.dumps(record, indent=1))
    raise NotFiniteError(
        f"{what} must be finite, got {value} at update {step}; the batch is in {path}, the weights are as before it; "
        "lower learning_rate or max_grad_norm, or set reward_clip_range"
    )
