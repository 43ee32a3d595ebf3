"""What a step descends, as a few lines over the log-probs of rationales and answers.

Each is a frozen dataclass, which the trainer takes by name and `fused_self_reward_loss` as `objective`.
"""

from latro.objectives.base import NEEDS, Objective, Sums
from latro.objectives.likelihood import Rft, SftAnswers, SftGolden
from latro.objectives.pairs import Dpo, RankedDpo, Spin, Trice
from latro.objectives.rewards import (
    AvgLogprob,
    Gain,
    Jepo,
    JepoMulti,
    Latro,
    MultipleChoice,
    PolicyGradient,
    Rloo,
    Rlpr,
    VeriFree,
)

OBJECTIVES: dict[str, type[Objective]] = {
    "latro": Latro,
    "jepo": Jepo,
    "jepo_multi": JepoMulti,
    "verifree": VeriFree,
    "avg_logprob": AvgLogprob,
    "rlpr": Rlpr,
    "gain": Gain,
    "rloo": Rloo,
    "multiple_choice": MultipleChoice,
    "star": Rft,
    "rft": Rft,
    "trice": Trice,
    "dpo": Dpo,
    "ranked_dpo": RankedDpo,
    "spin": Spin,
    "sft_answers": SftAnswers,
    "sft_golden": SftGolden,
}

__all__ = [
    "NEEDS",
    "OBJECTIVES",
    "AvgLogprob",
    "Dpo",
    "Gain",
    "Jepo",
    "JepoMulti",
    "Latro",
    "MultipleChoice",
    "Objective",
    "PolicyGradient",
    "RankedDpo",
    "Rft",
    "Rloo",
    "Rlpr",
    "SftAnswers",
    "SftGolden",
    "Spin",
    "Sums",
    "Trice",
    "VeriFree",
]
