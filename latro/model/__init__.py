"""Any transformers decoder over a prefix tree."""

from latro.model.tree_model import TreeModel, tree_hidden
from latro.model.verify import verify_tree

__all__ = ["TreeModel", "tree_hidden", "verify_tree"]
