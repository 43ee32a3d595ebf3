"""Token rows that store each shared prefix once, and the tokens of such a row whose log-probs are wanted.

A row holds a forest of token lists in depth-first order: `x z_1 y z_2 y ... z_K y`, prompt after prompt. In that order
a token's descendants are contiguous, so one integer per token is the whole attention mask:

    query i sees key j   <=>   j <= i < reach[j]

and `previous[t]`, the token before t on its own path, replaces shifting, padding and ignored labels: the log-prob of
token t is read at hidden row previous[t].

Sizes: T tokens, M scored tokens, S segments, R rationales, P prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What a segment of scored tokens is: z after x, y after x and z, or y straight after x.
RATIONALE, ANSWER, BASELINE = 0, 1, 2

# Rows of an attention tile: one warpgroup's matrix instruction on Hopper has 64.
TILE = 64

# Queries of a key tile that one program takes at least, the most programs that share a tile, and how many programs run
# at once: a prompt is seen by all of its rationales, a rationale by itself, and no program should run on alone for
# long. Parts take memory: where there are programs enough, there are none.
LEAST_PART, MOST_PARTS, PROGRAMS = 512, 8, 256

Tokens = Sequence[int]
Record = TypeVar("Record", bound="_TensorRecord")


@dataclass(frozen=True, eq=False)
class _TensorRecord:
    """Tensors that move between devices together."""

    def to(self: Record, device: torch.device | str | int, non_blocking: bool = False) -> Record:
        device = torch.device(device)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = {name: value for name, value in values.items() if isinstance(value, Tensor | _TensorRecord)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in movable.items()})


@dataclass(frozen=True, eq=False)
class TreeTiles(_TensorRecord):
    """The attention work lists, of rows [begin, end).

    A tile is at most TILE consecutive tokens of one path, of queries or of keys, so a key tile before a query tile is
    seen by all of its queries or by none, key by key. The queries that see a key are contiguous: its descendants.
    """

    query: Tensor  # [Q, 2] int32: the tiles, in order
    offset: Tensor  # [Q + 1] int32: the queries of tile n see key[offset[n]:offset[n + 1]]
    key: Tensor  # [N, 2] int32: tiles of keys; in each query tile's stretch the full ones come first
    full: Tensor  # [Q] int32: of key[offset[n]:full[n]], TILE keys each, every query of tile n sees every key
    seen: Tensor  # [W, 5] int32: a key tile, one past the last query that sees all of it, a range of its queries
    parts: Tensor  # [L, 2] int32: seen[:L] are parts of tiles, in order: of one tile seen[parts[l, 0]:parts[l, 1]]


@dataclass(frozen=True, eq=False)
class PrefixTree(_TensorRecord):
    """A forest of token lists as one row of T tokens."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64: the tokens before this one on its path
    reach: Tensor  # [T] int64: one past the last token that may attend to this one
    previous: Tensor  # [T] int64: the token before this one on its path, -1 at a root
    node: Tensor  # [T] int64: the index in `nodes` that the token came from
    tiles: TreeTiles

    @staticmethod
    def pack(nodes: Sequence[Tokens], parents: Sequence[int]) -> PrefixTree:
        """Lay out `nodes` depth first. parents[n] is an earlier node, or -1 for a root, which must have a token."""
        check_list("PrefixTree.pack", "nodes", nodes)
        check_list("PrefixTree.pack", "parents", parents)
        with on_host():
            return pack_nodes("PrefixTree.pack", nodes, parents, [f"nodes[{n}]" for n in range(len(nodes))])[0]


@dataclass(frozen=True, eq=False)
class LossPlan:
    """The offsets and sizes of `ScoredTokens` for the host, which launches kernels. Never moved to a device."""

    segment_tokens: Tensor  # [S + 1] int64: segment s holds the scored tokens segment_tokens[s]:segment_tokens[s + 1]
    group_segments: Tensor  # [P + 1] int64: the segments of each prompt, likewise
    group_rationales: Tensor  # [P + 1] int64: the rationales of each prompt, likewise
    smallest_group: int  # fewest rationales of one prompt
    hidden_rows: int  # rows that `hidden` must have
    min_vocab: int  # the largest target, plus one


@dataclass(frozen=True, eq=False)
class ScoredTokens(_TensorRecord):
    """Which tokens are scored, from which hidden row, and what they belong to.

    Tokens are sorted by segment and segments by prompt. A rationale has one RATIONALE segment, which may be empty, and
    an ANSWER segment for each option; option 0 is the right answer. A BASELINE segment belongs to no single rationale
    and carries the first one of its prompt.
    """

    rows: Tensor  # [M] int64: the hidden row that predicts the token
    targets: Tensor  # [M] int64
    segment: Tensor  # [M] int64
    kind: Tensor  # [S] int64: RATIONALE, ANSWER or BASELINE
    rationale: Tensor  # [S] int64
    option: Tensor  # [S] int64: which of several answers
    prompt: Tensor  # [R] int64: the prompt of each rationale, ascending
    plan: LossPlan

    @staticmethod
    def from_padded(
        input_ids: Tensor, rationale_mask: Tensor, answer_mask: Tensor, num_generations: int
    ) -> ScoredTokens:
        """Score a padded batch [N * K, L], in which K = `num_generations` consecutive rows share a prompt.

        The masks mark the tokens of z and of y, padding may be on either side, and rows index the flattened [N * K * L]
        hidden states. Reads the masks on the host once: on CUDA tensors this synchronises.
        """
        _check_padded_shapes(input_ids, rationale_mask, answer_mask, num_generations)
        with torch.inference_mode(False), input_ids.device:
            return _score_padded(input_ids, rationale_mask.bool(), answer_mask.bool(), num_generations)


def _score_padded(input_ids: Tensor, in_rationale: Tensor, in_answer: Tensor, num_generations: int) -> ScoredTokens:
    _check_padded_values(input_ids, in_rationale, in_answer)
    batch, length = input_ids.shape
    row, column = (in_rationale | in_answer).nonzero(as_tuple=True)
    flat = row * length + column
    segment = 2 * row + in_answer[row, column].long()
    order = segment.argsort(stable=True)
    flat = flat[order]
    targets = input_ids.reshape(-1)[flat].long()

    device = input_ids.device
    rationales = torch.arange(batch, device=device)
    return ScoredTokens(
        rows=flat - 1,
        targets=targets,
        segment=segment[order],
        kind=torch.tensor([RATIONALE, ANSWER], device=device).repeat(batch),
        rationale=rationales.repeat_interleave(2),
        option=torch.zeros(2 * batch, dtype=torch.int64, device=device),
        prompt=rationales // num_generations,
        plan=LossPlan(
            segment_tokens=offsets_of(torch.bincount(segment, minlength=2 * batch).tolist()),
            group_segments=torch.arange(0, 2 * batch + 1, 2 * num_generations, device="cpu"),
            group_rationales=torch.arange(0, batch + 1, num_generations, device="cpu"),
            smallest_group=num_generations,
            hidden_rows=batch * length,
            min_vocab=int(targets.max()) + 1,
        ),
    )


def pack_nodes(
    operator: str, nodes: Sequence[Tokens], parents: Sequence[int], names: Sequence[str]
) -> tuple[PrefixTree, Tensor, Tensor]:
    """The tree, and where each node starts and how many tokens it has."""
    if len(nodes) != len(parents):
        raise ValueError(f"{operator}: parents must have one entry per node, {len(nodes)}, got {len(parents)}")
    if not len(nodes):
        raise ValueError(f"{operator}: nodes must not be empty")
    lists = [_token_list(operator, tokens, name) for tokens, name in zip(nodes, names, strict=True)]
    length = [len(tokens) for tokens in lists]
    for n, parent in enumerate(parents):
        if not hasattr(parent, "__index__") or not -1 <= parent < n:
            raise ValueError(f"{operator}: parents[{n}] must be -1 or an earlier node, got {parent}")
        if parent == -1 and not length[n]:
            raise ValueError(f"{operator}: {names[n]} is a root and must have at least one token, got none")

    size = list(length)  # tokens of the subtree
    for n in reversed(range(len(nodes))):
        if parents[n] >= 0:
            size[parents[n]] += size[n]
    start, position, last = [0] * len(nodes), [0] * len(nodes), [-1] * len(nodes)
    free = list(start)  # where the next child of a node goes
    free_root = 0
    for n, parent in enumerate(parents):
        if parent < 0:
            start[n], free_root = free_root, free_root + size[n]
        else:
            start[n], position[n], last[n] = free[parent], position[parent] + length[parent], last[parent]
            free[parent] += size[n]
        free[n] = start[n] + length[n]
        last[n] = free[n] - 1 if length[n] else last[n]

    order = sorted((n for n in range(len(nodes)) if length[n]), key=start.__getitem__)
    tokens = torch.frombuffer(bytearray().join(lists[n] for n in order), dtype=torch.int64)
    if int(tokens.min()) < 0:
        n = next(n for n in order if min(lists[n]) < 0)
        raise ValueError(f"{operator}: {names[n]} must hold token ids >= 0, got {min(lists[n])}")
    starts, lengths, sizes = torch.tensor(start), torch.tensor(length), torch.tensor(size)
    node = torch.tensor(order).repeat_interleave(lengths[order])
    row = torch.arange(len(tokens))
    reach = (starts + sizes)[node]
    previous = row - 1
    parent_last = [last[parents[n]] if parents[n] >= 0 else -1 for n in order]
    previous[starts[order]] = torch.tensor(parent_last)
    tree = PrefixTree(
        tokens=tokens,
        positions=row + (torch.tensor(position) - starts)[node],
        reach=reach,
        previous=previous,
        node=node,
        tiles=_tiles(reach, previous),
    )
    return tree, starts, lengths


def _tiles(reach: Tensor, previous: Tensor) -> TreeTiles:
    row = torch.arange(len(reach))
    run_start = (previous != row - 1) | (previous < 0)  # a run is a stretch of one path
    run = run_start.cumsum(0) - 1
    begin = row[(row - row[run_start][run]) % TILE == 0]
    end = torch.cat([begin[1:], begin.new_tensor([len(reach)])])
    # Along a path, reach does not grow: the first key of a tile is seen longest.
    longest, shortest = reach[begin], reach[end - 1]

    # Candidates: from the first tile of the query's root to its own.
    tile = torch.arange(len(begin))
    first = torch.searchsorted(begin, row[previous < 0])
    of_root = first[torch.searchsorted(first, tile, right=True) - 1]
    count = tile - of_root + 1
    query = tile.repeat_interleave(count)
    key = torch.arange(len(query)) - (count.cumsum(0) - count - of_root)[query]
    visible = longest[key] > begin[query]
    query, key = query[visible], key[visible]
    full = (key < query) & (shortest[key] > begin[query]) & (end[key] - begin[key] == TILE)
    key = key[torch.argsort(2 * query + ~full, stable=True)]
    offset = torch.cat([query.new_zeros(1), torch.bincount(query, minlength=len(begin)).cumsum(0)])
    seen, parts = _seen(begin, end, shortest, longest)
    return TreeTiles(
        query=torch.stack([begin, end], 1).int(),
        offset=offset.int(),
        key=torch.stack([begin[key], end[key]], 1).int(),
        full=(offset[:-1] + torch.bincount(query[full], minlength=len(begin))).int(),
        seen=seen.int(),
        parts=parts.int(),
    )


def _seen(begin: Tensor, end: Tensor, shortest: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
    """Key tiles with the queries that see them: those that many see in parts, so that no one has to wait for them."""
    queries = longest - begin
    size = (queries / MOST_PARTS).ceil().clamp(max(LEAST_PART, int(queries.sum()) // PROGRAMS))
    count = (queries / size).ceil().long()
    tile = torch.arange(len(begin)).repeat_interleave(count)
    part = torch.arange(len(tile)) - (count.cumsum(0) - count)[tile]
    low = begin[tile] + part * size[tile].long()
    high = torch.minimum(low + size[tile].long(), longest[tile])
    shared = count[tile] > 1
    order = torch.argsort(torch.where(shared, -len(tile) - longest.max(), low - high), stable=True)
    seen = torch.stack([begin[tile], end[tile], shortest[tile], low, high], 1)[order]
    last = count[count > 1].cumsum(0)
    return seen, torch.stack([last - count[count > 1], last], 1).repeat_interleave(count[count > 1], 0)


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], device="cpu")


def _token_list(operator: str, tokens: Tokens, name: str) -> array[int]:
    try:
        if isinstance(tokens, Tensor):
            tokens = tokens.tolist()
        # Of bytes, array would take eight for one number.
        return array("q", list(tokens) if isinstance(tokens, bytes | bytearray) else tokens)
    except (TypeError, OverflowError):
        raise TypeError(f"{operator}: {name} must be a list of token ids, got {tokens!r:.80}") from None


def check_list(operator: str, name: str, value: object) -> None:
    if not hasattr(value, "__len__") or isinstance(value, str | bytes):
        raise TypeError(f"{operator}: {name} must be a list, got {value!r:.80}")


def _require(rule: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not rule:
        raise error(f"ScoredTokens.from_padded: {message}")


def _check_padded_shapes(input_ids: Tensor, rationale_mask: Tensor, answer_mask: Tensor, num_generations: int) -> None:
    tensors = {"input_ids": input_ids, "rationale_mask": rationale_mask, "answer_mask": answer_mask}
    for name, tensor in tensors.items():
        _require(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}", TypeError)
    _require(input_ids.dim() == 2, f"input_ids must have shape [N * K, L], got {list(input_ids.shape)}")
    _require(
        input_ids.dtype in (torch.int32, torch.int64),
        f"input_ids must have dtype torch.int32 or torch.int64, got {input_ids.dtype}",
        TypeError,
    )
    for name in ("rationale_mask", "answer_mask"):
        shape, device = tensors[name].shape, tensors[name].device
        _require(
            shape == input_ids.shape,
            f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got {list(shape)}",
        )
        _require(device == input_ids.device, f"{name} must be on {input_ids.device} with input_ids, got {device}")
    _require(input_ids.numel() > 0, f"input_ids must not be empty, got {list(input_ids.shape)}")
    rows = input_ids.shape[0]
    _require(
        isinstance(num_generations, int) and not isinstance(num_generations, bool),
        f"num_generations must be a whole number, got {num_generations!r:.80}",
        TypeError,
    )
    _require(
        num_generations >= 1 and rows % num_generations == 0,
        f"num_generations must divide the {rows} rows of input_ids, got {num_generations}",
    )


def _check_padded_values(input_ids: Tensor, z: Tensor, y: Tensor) -> None:
    length = input_ids.shape[1]
    column = torch.arange(length)
    last_z = torch.where(z, column, -1).amax(1)
    first_y = torch.where(y, column, length).amin(1)
    rules = {
        "rationale_mask and answer_mask must not mark the same token": (z & y).any(1),
        "the masks must not mark the first column, which nothing predicts": z[:, 0] | y[:, 0],
        "answer_mask must mark at least one token of every row": first_y == length,
        "a row's rationale must end before its answer": last_z > first_y,
        "input_ids must be >= 0 where a mask is set": ((z | y) & (input_ids < 0)).any(1),
    }
    # One read back for every rule.
    for rule, wrong in zip(rules, torch.stack(list(rules.values())).tolist(), strict=True):
        _require(not any(wrong), f"{rule}, got row {wrong.index(True) if any(wrong) else None}")


@contextmanager
def on_host() -> Iterator[None]:
    """Pack on the CPU whatever the default device is, into tensors that can be trained with, also during a rollout."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def _register(cls: type, host: tuple[str, ...] = ()) -> None:
    """Make `cls` a pytree whose leaves are its tensors; `host` names fields that are plain Python."""
    names = [field.name for field in fields(cls) if field.name not in host]
    pytree.register_pytree_node(
        cls,
        lambda record: ([getattr(record, name) for name in names], tuple(getattr(record, name) for name in host)),
        lambda values, context: cls(**dict(zip(names, values, strict=True)), **dict(zip(host, context, strict=True))),
    )


_register(TreeTiles)
_register(PrefixTree)
_register(LossPlan, host=("smallest_group", "hidden_rows", "min_vocab"))
_register(ScoredTokens)
