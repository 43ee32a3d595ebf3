"""Kernels for training language models on the likelihood of the right answer."""

from latro_kernels.linear_logprobs.api import linear_logprobs
from latro_kernels.linear_logprobs.parallel import VocabularyShard
from latro_kernels.memory import get_memory_budget, set_memory_budget
from latro_kernels.packing import pack_rationales
from latro_kernels.self_reward.api import SelfRewardLoss, fused_self_reward_loss, self_reward
from latro_kernels.self_reward.objective import Objective, SelfReward, SelfRewardTerms
from latro_kernels.tree import ANSWER, BASELINE, RATIONALE, PrefixTree, ScoredTokens
from latro_kernels.tree_attention.api import tree_attention

__version__ = "0.1.0"

__all__ = [
    "ANSWER",
    "BASELINE",
    "RATIONALE",
    "Objective",
    "PrefixTree",
    "ScoredTokens",
    "SelfReward",
    "SelfRewardLoss",
    "SelfRewardTerms",
    "VocabularyShard",
    "fused_self_reward_loss",
    "get_memory_budget",
    "linear_logprobs",
    "pack_rationales",
    "self_reward",
    "set_memory_budget",
    "tree_attention",
]
