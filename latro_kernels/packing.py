"""A batch as one row: prompts, their rationales and answers in a tree, and the tokens of it that are scored.

    x z_1 y z_2 y ... z_K y, prompt after prompt

tree.py says what a tree is and what scored tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from latro_kernels.tree import (
    ANSWER,
    BASELINE,
    RATIONALE,
    LossPlan,
    PrefixTree,
    ScoredTokens,
    Tokens,
    check_list,
    offsets_of,
    on_host,
    pack_nodes,
)


def pack_rationales(
    prompts: Sequence[Tokens],
    rationales: Sequence[Sequence[Tokens]],
    answers: Sequence[Tokens] | Sequence[Sequence[Tokens]] | Sequence[Sequence[Sequence[Tokens]]],
    *,
    ends: int | Sequence[Sequence[int | None]] | None = None,
    baseline: bool | Sequence[Tokens] | Sequence[Sequence[Tokens]] = False,
) -> tuple[PrefixTree, ScoredTokens]:
    """Pack x, its rationales z_k and after each of them y, for N prompts.

    prompts: N token lists. rationales: for each prompt, K_n token lists, any of which may be empty.
    answers: for each prompt one token list, or a list of them (options, the right one first), or for each of its
        rationales such a list, where the tokens between a rationale and its answer are not the same everywhere.
    ends: the token that ended a rationale, for all of them or one each (None where it was cut off). It is scored with
        the rationale, on a side leaf that the answer does not see.
    baseline: also score y straight after x; or for each prompt a token list, or a list of them, where that has other
        tokens than behind its rationales.
    """
    _check_groups(prompts, rationales, answers, ends, baseline)
    with on_host():
        return _pack_groups(prompts, rationales, answers, ends, baseline)


def _pack_groups(
    prompts: Sequence[Tokens],
    rationales: Sequence[Sequence[Tokens]],
    answers: Sequence[Any],
    ends: int | Sequence[Sequence[int | None]] | None,
    baseline: bool | Sequence[Any],
) -> tuple[PrefixTree, ScoredTokens]:
    packing = _Packing()
    for n, prompt in enumerate(prompts):
        options = _options(answers[n], len(rationales[n]), n)
        root = packing.node(prompt, -1, f"prompts[{n}]")
        first = len(packing.prompt)
        for k, rationale in enumerate(rationales[n]):
            r = len(packing.prompt)
            packing.prompt.append(n)
            node = packing.node(rationale, root, f"rationales[{n}][{k}]")
            end = ends[n][k] if isinstance(ends, Sequence) else ends
            if end is not None:
                packing.node([end], node, f"ends of rationales[{n}][{k}]")
            # An end leaf is laid out straight after its rationale, so one token more is all it takes to score it.
            packing.segment(RATIONALE, r, 0, node, extra=end is not None)
            for o, (name, answer) in enumerate(options[k]):
                packing.segment(ANSWER, r, o, packing.node(answer, node, name))
        if baseline is not False:
            for o, (name, answer) in enumerate(_baseline(baseline, answers[n], options[0], n)):
                packing.segment(BASELINE, first, o, packing.node(answer, root, name))
    return packing.finish()


class _Packing:
    """The nodes and segments of a row while it is put together."""

    def __init__(self) -> None:
        self.nodes: list[Tokens] = []
        self.parents: list[int] = []
        self.names: list[str] = []
        self.segments: list[tuple[int, int, int, int, int]] = []  # kind, rationale, option, node, extra tokens
        self.prompt: list[int] = []

    def node(self, tokens: Tokens, parent: int, name: str) -> int:
        self.nodes.append(tokens)
        self.parents.append(parent)
        self.names.append(name)
        return len(self.nodes) - 1

    def segment(self, kind: int, rationale: int, option: int, node: int, extra: int = 0) -> None:
        self.segments.append((kind, rationale, option, node, extra))

    def finish(self) -> tuple[PrefixTree, ScoredTokens]:
        tree, starts, lengths = pack_nodes("pack_rationales", self.nodes, self.parents, self.names)
        kind, rationale, option, node, extra = (torch.tensor(column) for column in zip(*self.segments, strict=True))
        count = lengths[node] + extra
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        segment = torch.arange(len(kind)).repeat_interleave(count)
        token = torch.arange(len(segment)) + (starts[node] - offsets[:-1])[segment]
        prompt = torch.tensor(self.prompt)
        group = torch.bincount(prompt)
        scored = ScoredTokens(
            rows=tree.previous[token],
            targets=tree.tokens[token],
            segment=segment,
            kind=kind,
            rationale=rationale,
            option=option,
            prompt=prompt,
            plan=LossPlan(
                segment_tokens=offsets,
                group_segments=offsets_of(torch.bincount(prompt[rationale]).tolist()),
                group_rationales=offsets_of(group.tolist()),
                smallest_group=int(group.min()),
                hidden_rows=len(tree.tokens),
                min_vocab=int(tree.tokens[token].max()) + 1,
            ),
        )
        return tree, scored


def _options(answer: Any, rationales: int, n: int) -> list[list[tuple[str, Tokens]]]:
    """The named options of a prompt's answer, behind each of its rationales."""
    if not _is_per_rationale(answer):
        return [_named_options(answer, f"answers[{n}]")] * rationales
    if len(answer) != rationales:
        raise ValueError(
            f"pack_rationales: answers[{n}] must have one entry per rationale, {rationales}, got {len(answer)}"
        )
    options = [_named_options(of_rationale, f"answers[{n}][{k}]") for k, of_rationale in enumerate(answer)]
    counts = [len(of_rationale) for of_rationale in options]
    if len(set(counts)) > 1:
        raise ValueError(f"pack_rationales: answers[{n}] must have as many options at each rationale, got {counts}")
    return options


def _baseline(
    baseline: bool | Sequence[Any], answer: Any, options: list[tuple[str, Tokens]], n: int
) -> list[tuple[str, Tokens]]:
    """The named options that are scored straight after a prompt."""
    if not isinstance(baseline, bool):
        own = _named_options(baseline[n], f"baseline[{n}]")
        if len(own) != len(options):
            raise ValueError(
                f"pack_rationales: baseline[{n}] must have as many options as answers[{n}], {len(options)}, "
                f"got {len(own)}"
            )
        return own
    if _is_per_rationale(answer):
        raise ValueError(
            f"pack_rationales: baseline must have an answer for each prompt where answers[{n}] has one for each "
            "rationale, got True"
        )
    return options


def _is_per_rationale(answer: Any) -> bool:
    """Whether it is a list of lists of lists, of which the innermost are tokens."""
    depth = 0
    while not isinstance(answer, str | bytes) and hasattr(answer, "__len__") and getattr(answer, "ndim", 1) > 0:
        if not len(answer):
            break
        answer, depth = answer[0], depth + 1
    return depth > 2


def _named_options(answer: Any, name: str) -> list[tuple[str, Tokens]]:
    """The options, or the only one, which may be given as a single token list."""
    if len(answer) > 0 and hasattr(answer[0], "__index__") and getattr(answer[0], "ndim", 0) == 0:
        return [(name, cast(Tokens, answer))]
    named = [(f"{name}[{o}]", option) for o, option in enumerate(cast(Sequence[Tokens], answer))]
    if not named:
        raise ValueError(f"pack_rationales: {name} must have at least one token, got none")
    for of_option, option in named:
        if hasattr(option, "__len__") and not len(option):
            raise ValueError(f"pack_rationales: {of_option} must have at least one token, got none")
    return named


def _check_groups(
    prompts: Sequence[Tokens],
    rationales: Sequence[Sequence[Tokens]],
    answers: Sequence[Any],
    ends: int | Sequence[Sequence[int | None]] | None,
    baseline: bool | Sequence[Any],
) -> None:
    operator = "pack_rationales"
    lists: dict[str, Sequence[object]] = {"prompts": prompts, "rationales": rationales, "answers": answers}
    if not isinstance(baseline, bool):
        lists["baseline"] = baseline
    if ends is not None and not hasattr(ends, "__index__"):
        lists["ends"] = cast(Sequence[object], ends)
    for name, per_prompt in lists.items():
        check_list(operator, name, per_prompt)
        if len(per_prompt) != len(prompts):
            raise ValueError(
                f"{operator}: {name} must have one entry per prompt, {len(prompts)}, got {len(per_prompt)}"
            )
    if not len(prompts):
        raise ValueError(f"{operator}: prompts must not be empty")
    for n, group in enumerate(rationales):
        check_list(operator, f"rationales[{n}]", group)
        if not len(group):
            raise ValueError(f"{operator}: rationales[{n}] must hold at least one rationale, got none")
        for name in lists.keys() & {"answers", "baseline"}:
            if not hasattr(lists[name][n], "__len__"):
                raise TypeError(
                    f"{operator}: {name}[{n}] must be a list of token ids or of options, got {lists[name][n]!r:.80}"
                )
        if "ends" in lists:
            check_list(operator, f"ends[{n}]", lists["ends"][n])
            of_group = cast(Sequence[Sequence[int | None]], ends)[n]
            if len(of_group) != len(group):
                raise ValueError(
                    f"{operator}: ends[{n}] must have one entry per rationale, {len(group)}, got {len(of_group)}"
                )
