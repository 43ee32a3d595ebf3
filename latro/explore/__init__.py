"""Self-Explore (arXiv 2404.10346): where rationales go wrong, found by sampling, and learned from.

explorer = Explorer.of(model, text, grader, max_tokens=64)
explored = explore(explorer, [(example, sample)], steps_of=lines)
explored[0].rates, explored[0].pit

problems, counts = rejection_samples(explorer, examples, reading_for("gsm8k"))

found = self_explore(model, tokenizer, examples, folder, configs(folder, {"learning_rate": 1e-5}))
found.model, found.stages["sft"].evaluation, found.counts
"""

from latro.explore.exploration import Attempt, Explored, explore
from latro.explore.explorer import Explorer
from latro.explore.pairing import WholePair, edit_distance, farthest, granular_pairs, whole_pairs
from latro.explore.pipeline import Search, SelfExplored, Stage, configs, self_explore
from latro.explore.rejection import Sorted, rejection_samples
from latro.explore.steps import Reading, Step, lines, reading_for, sentences, steps_in

__all__ = [
    "Attempt",
    "Explored",
    "Explorer",
    "Reading",
    "Search",
    "SelfExplored",
    "Sorted",
    "Stage",
    "Step",
    "WholePair",
    "configs",
    "edit_distance",
    "explore",
    "farthest",
    "granular_pairs",
    "lines",
    "reading_for",
    "rejection_samples",
    "self_explore",
    "sentences",
    "steps_in",
    "whole_pairs",
]
