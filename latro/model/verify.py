"""Does a model compute on a packed tree, and token by token, what it computes on each path alone?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.attention import TreeMask, decoder_of, layers_of
from latro.model.decoding import Decoder
from latro.model.tree_model import TreeModel, head_of, tree_hidden
from latro_kernels import PrefixTree, linear_logprobs


@torch.no_grad()
def verify_tree(model: PreTrainedModel | TreeModel, *, tolerance: float | None = None) -> None:
    """Run a handful of tokens packed and path by path, and raise with the first layer whose output differs.

    In the model's own dtype, on its own device, in eval mode; the model is left as it was. A difference is relative, in
    norm; `tolerance` is the square root of the dtype's epsilon by default, and no less than that of float32, in which
    models compute some things whatever their dtype. A mixture of experts in half precision may route a token otherwise,
    and need more. The tokens are too few to reach past a real model's sliding window. To be called before wrapping.
    """
    tree_model = model if isinstance(model, TreeModel) else TreeModel(model)
    model = tree_model.model
    head, options = head_of(model), tree_model.head_options
    compare = partial(_compare, "verify_tree", "for a packed tree", _tolerance(head, tolerance))
    tree = _sample_tree(model).to(head.weight.device)
    with evaluating(model):
        packed, logits = _outputs(
            model, input_ids=tree.tokens[None], attention_mask=TreeMask(tree), position_ids=tree.positions[None]
        )
        hidden = tree_hidden(model, tree)
        for path in _paths(tree):
            rows = torch.tensor(path, device=head.weight.device)
            alone, alone_logits = _outputs(model, input_ids=tree.tokens[rows][None])
            for (name, in_row), (_, expected) in zip(packed, alone, strict=True):
                compare(name, in_row.index_select(-2, rows), expected)
            compare("the model", logits[:, rows], alone_logits)
            given = linear_logprobs(
                hidden,
                head.weight,
                rows[:-1],
                tree.tokens[rows[1:]],
                bias=head.bias,
                softcap=options.softcap,
                logit_scale=options.logit_scale,
            )
            logps = alone_logits[0, :-1].to(given.dtype).log_softmax(-1)
            compare("the output head", given, logps.gather(-1, tree.tokens[rows[1:], None])[:, 0])


@torch.no_grad()
def verify_decoding(model: PreTrainedModel, *, tolerance: float | None = None) -> None:
    """Let continuations of two prompts grow by a few tokens, and raise if their logits are not those of whole forwards.

    As verify_tree does, and not under autocast.
    """
    head = head_of(model)
    compare = partial(_compare, "verify_decoding", "token by token", _tolerance(head, tolerance))
    device, tokens = head.weight.device, iter(_ordinary_tokens(model, 16))
    prompts = [[next(tokens) for _ in range(length)] for length in (4, 1)]
    paths = [prompts[0], prompts[0], prompts[1]]
    with evaluating(model), torch.autocast(device.type, enabled=False):
        decoder = Decoder(model)
        logits = decoder.start(prompts, [2, 1])
        for dropped in ([], [0], []):
            alone = [model(input_ids=torch.tensor([path], device=device), use_cache=False) for path in paths]
            compare(model.config.model_type, logits, torch.cat([output.logits[:, -1] for output in alone]))
            new = [next(tokens) for _ in paths]
            alive = decoder.drop(dropped)
            paths = [paths[row] + [new[row]] for row in alive]
            logits = decoder.step(torch.tensor([new[row] for row in alive], device=device))


def _tolerance(head: nn.Linear, given: float | None) -> float:
    if given is not None:
        return given
    return max(torch.finfo(dtype).eps for dtype in (head.weight.dtype, torch.float32)) ** 0.5


def _ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Which mean nothing special to the model."""
    config = decoder_of(model).config
    special = [getattr(config, name) for name in vars(config) if name.endswith("_token_id")]
    special += [token for several in special if isinstance(several, list) for token in several]
    ordinary = [token for token in range(min(head_of(model).out_features, 1024)) if token not in special]
    return [ordinary[(7 * t + 3) % len(ordinary)] for t in range(count)]


def _sample_tree(model: PreTrainedModel) -> PrefixTree:
    """Branches that fork once and twice, end early and are empty."""
    lengths, parents = [5, 6, 3, 1, 0, 4, 2], [-1, 0, 1, 0, 0, 4, 0]
    tokens = iter(_ordinary_tokens(model, sum(lengths)))
    return PrefixTree.pack([[next(tokens) for _ in range(length)] for length in lengths], parents)


def _paths(tree: PrefixTree) -> list[list[int]]:
    """The rows from root to leaf, for every leaf."""
    previous = tree.previous.tolist()
    paths = []
    for leaf in set(range(len(previous))) - set(previous):
        path = [leaf]
        while previous[path[-1]] >= 0:
            path.append(previous[path[-1]])
        paths.append(path[::-1])
    return paths


def _outputs(model: PreTrainedModel, **inputs: Any) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """What each layer put out, in order, and the logits."""
    outputs: list[tuple[str, Tensor]] = []

    def record(path: str, layer: nn.Module, args: Any, output: Any) -> None:
        name = f"{path} ({type(layer).__name__})"
        outputs.append((name, output if isinstance(output, Tensor) else output[0]))

    handles = [layer.register_forward_hook(partial(record, path)) for path, layer in layers_of(decoder_of(model))]
    try:
        return outputs, model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()


def _compare(caller: str, given_as: str, tolerance: float, name: str, given: Tensor, expected: Tensor) -> None:
    error = float((given - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise ValueError(
            f"{caller}: {name} must put out {given_as} what it puts out for each path alone, "
            f"got a relative difference of {error:.1e}, and {tolerance:.1e} is tolerated"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and then each module in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
