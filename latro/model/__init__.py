"""Any transformers decoder over a prefix tree."""

from latro.model.tree_model import TreeModel, logprobs, tree_hidden
from latro.model.verify import verify_tree

__all__ = ["TreeModel", "logprobs", "tree_hidden", "verify_tree"]
