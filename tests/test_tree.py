import pickle
import random
import time

import pytest
import torch
from torch.utils import _pytree as pytree

from latro_kernels import ANSWER, BASELINE, RATIONALE, PrefixTree, ScoredTokens, pack_rationales
from latro_kernels.testing import path_to, random_batch, random_forest
from latro_kernels.tree import TILE


def visible(tree: PrefixTree) -> torch.Tensor:
    row = torch.arange(len(tree.tokens))
    return (row <= row[:, None]) & (row[:, None] < tree.reach)


def path_of(nodes, parents, n):
    return (path_of(nodes, parents, parents[n]) if parents[n] >= 0 else []) + nodes[n]


@pytest.mark.parametrize("first_seed", range(0, 3000, 300))
def test_reach_equals_ancestor_search(first_seed):
    for seed in range(first_seed, first_seed + 300):
        nodes, parents = random_forest(seed, nodes=1 + seed % 17)
        tree = PrefixTree.pack(nodes, parents)
        expected = torch.zeros(len(tree.tokens), len(tree.tokens), dtype=torch.bool)
        for t in range(len(tree.tokens)):
            expected[t, path_to(tree, t)] = True
        assert torch.equal(visible(tree), expected), f"seed {seed}: {nodes}, {parents}"


@pytest.mark.parametrize("seed", range(50))
def test_every_path_reads_as_its_nodes(seed):
    nodes, parents = random_forest(seed)
    tree = PrefixTree.pack(nodes, parents)
    assert len(tree.tokens) == sum(map(len, nodes))
    for n, tokens in enumerate(nodes):
        own = (tree.node == n).nonzero().flatten()
        assert tree.tokens[own].tolist() == tokens
        if tokens:
            path = path_to(tree, int(own[-1]))
            assert tree.tokens[path].tolist() == path_of(nodes, parents, n)
            assert tree.positions[path].tolist() == list(range(len(path)))


def test_a_deep_chain_of_single_tokens():
    tree = PrefixTree.pack([[n] for n in range(2000)], list(range(-1, 1999)))
    assert tree.tokens.tolist() == list(range(2000))
    assert tree.reach.tolist() == [2000] * 2000
    assert tree.previous.tolist() == list(range(-1, 1999))


@pytest.mark.parametrize("longest", [3, 40, 200])
@pytest.mark.parametrize("seed", range(20))
def test_tiles_hold_every_visible_pair_and_nothing_else(seed, longest):
    nodes, parents = random_forest(seed, nodes=15, longest=longest)
    tree = PrefixTree.pack(nodes, parents)
    mask, tiles = visible(tree), tree.tiles
    listed = torch.zeros_like(mask)
    assert tiles.query.flatten()[1:-1:2].tolist() == tiles.query.flatten()[2::2].tolist(), "query tiles must abut"
    for n, (a, b) in enumerate(tiles.query.tolist()):
        assert 0 < b - a <= TILE
        for entry in range(tiles.offset[n], tiles.offset[n + 1]):
            keys = slice(*tiles.key[entry].tolist())
            block = mask[a:b, keys]
            assert block.any()
            assert not listed[a:b, keys].any()
            assert (entry < tiles.full[n]) == bool(block.all() and block.shape[1] == TILE)
            listed[a:b, keys] = True
    assert not (mask & ~listed).any()
    assert tiles.query[0, 0] == 0 and tiles.query[-1, 1] == len(tree.tokens)


@pytest.mark.parametrize("longest", [3, 40, 400])
@pytest.mark.parametrize("seed", range(10))
def test_every_query_that_sees_a_key_tile_is_in_one_part_of_it(seed, longest):
    tree = PrefixTree.pack(*random_forest(seed, nodes=15, longest=longest))
    mask, tiles = visible(tree), tree.tiles
    listed = torch.zeros_like(mask)
    shared = {}
    for part, (a, b, full, low, high) in enumerate(tiles.seen.tolist()):
        assert low < high
        assert mask[low:high, a:b].any(1).all()
        assert mask[b:full, a:b].all() and not mask[full:, a:b].all(1).any()
        assert not listed[low:high, a:b].any()
        listed[low:high, a:b] = True
        shared.setdefault((a, b), []).append(part)
    assert not (mask & ~listed).any()
    split = {tuple(parts) for parts in shared.values() if len(parts) > 1}
    assert [part for parts in sorted(split) for part in parts] == list(range(len(tiles.parts)))
    for part, (first, last) in enumerate(tiles.parts.tolist()):
        assert part in range(first, last) and tuple(range(first, last)) in split
    lengths = (tiles.seen[len(tiles.parts) :, 4] - tiles.seen[len(tiles.parts) :, 3]).tolist()
    assert lengths == sorted(lengths, reverse=True), "the longest work starts first"
    if longest == 400:
        assert split


@pytest.mark.parametrize("baseline", [False, True, "its own"])
@pytest.mark.parametrize("end", [None, 49, "some"])
@pytest.mark.parametrize("seed", range(10))
def test_packed_segments_are_the_paths(seed, end, baseline):
    batch = random_batch(seed, vocab=40)
    rng = random.Random(seed)
    ends = end
    if end == "some":
        ends = [[rng.choice([None, 48, 49]) for _ in group] for group in batch.rationales]
    options = [[answer, [*answer, 7], [3]] for answer in batch.answers]
    alone = [[[9, *answer], [9], [2, 3]] for answer in batch.answers] if baseline == "its own" else options
    asked = alone if baseline == "its own" else baseline
    tree, scored = pack_rationales(batch.prompts, batch.rationales, options, ends=ends, baseline=asked)

    expected = []
    r = 0
    for n, prompt in enumerate(batch.prompts):
        first = r
        for k, rationale in enumerate(batch.rationales[n]):
            tail = ends[n][k] if end == "some" else end
            expected.append((RATIONALE, r, 0, prompt, rationale + ([] if tail is None else [tail])))
            expected += [(ANSWER, r, o, prompt + rationale, y) for o, y in enumerate(options[n])]
            r += 1
        if baseline:
            expected += [(BASELINE, first, o, prompt, y) for o, y in enumerate(alone[n])]

    assert len(expected) == len(scored.kind)
    assert scored.segment.tolist() == sorted(scored.segment.tolist())
    for s, (kind, rationale, option, context, tokens) in enumerate(expected):
        assert (scored.kind[s], scored.rationale[s], scored.option[s]) == (kind, rationale, option)
        own = slice(*scored.plan.segment_tokens[s : s + 2].tolist())
        assert scored.segment[own].tolist() == [s] * len(tokens)
        assert scored.targets[own].tolist() == tokens
        for i, row in enumerate(scored.rows[own].tolist()):
            assert tree.tokens[path_to(tree, row)].tolist() == context + tokens[:i]

    sizes = [len(group) for group in batch.rationales]
    assert scored.prompt.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]
    assert scored.plan.group_rationales.diff().tolist() == sizes
    assert scored.plan.group_segments.diff().tolist() == [size * 4 + 3 * bool(baseline) for size in sizes]
    assert scored.plan.smallest_group == min(sizes)
    assert scored.plan.hidden_rows == len(tree.tokens)
    assert scored.plan.min_vocab == int(scored.targets.max()) + 1


def test_an_answer_for_each_rationale():
    options = [[[4], [5, 6]], [[7], [8]]]
    tree, scored = pack_rationales([[1], [9]], [[[2], []], [[3]]], [options, [[[4]]]])
    assert tree.tokens.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 3, 4]
    assert scored.targets.tolist() == [2, 4, 5, 6, 7, 8, 3, 4]
    assert scored.option.tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    for segment, context in ((1, [1, 2]), (2, [1, 2]), (4, [1]), (5, [1]), (7, [9, 3])):
        row = int(scored.rows[scored.segment == segment][0])
        assert tree.tokens[path_to(tree, row)].tolist() == context


def test_ends_are_scored_but_not_seen_by_the_answer():
    tree, scored = pack_rationales([[1]], [[[2, 3]]], [[4]], ends=9)
    assert scored.targets.tolist() == [2, 3, 9, 4]
    assert tree.tokens.tolist() == [1, 2, 3, 9, 4]
    assert scored.rows.tolist() == [0, 1, 2, 2]
    assert visible(tree)[4].tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_from_padded_scores_the_same_tokens(side, mask_dtype):
    batch = random_batch(3, vocab=40, group_sizes=(3, 3, 3))
    _, packed = batch.pack()
    input_ids, _, z_mask, y_mask = batch.padded(side)
    scored = ScoredTokens.from_padded(input_ids, z_mask.to(mask_dtype), y_mask.to(mask_dtype), 3)
    for name in ("targets", "segment", "kind", "rationale", "option", "prompt"):
        assert torch.equal(getattr(scored, name), getattr(packed, name)), name
    for name in ("segment_tokens", "group_segments", "group_rationales", "smallest_group", "min_vocab"):
        assert str(getattr(scored.plan, name)) == str(getattr(packed.plan, name)), name
    assert torch.equal(input_ids.flatten()[scored.rows + 1], scored.targets)
    assert scored.plan.hidden_rows == input_ids.numel()


def test_packing_does_not_loop_over_tokens():
    """Ten times the tokens in the same nodes must cost far less than ten times as much."""

    def seconds(length):
        batch = random_batch(0, 1000, group_sizes=[16] * 64, prompt_length=4, rationale_length=length)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            batch.pack()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(400) < 5 * seconds(40)


def test_records_are_frozen_pytrees_that_move_and_pickle():
    tree, scored = random_batch(0, vocab=40).pack(baseline=True)
    for record in (tree, scored):
        leaves, spec = pytree.tree_flatten(record)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(record)
        assert str(again) == str(record)
        assert str(pickle.loads(pickle.dumps(record))) == str(record)
        moved = record.to("meta")
        assert all(leaf.is_meta for leaf in pytree.tree_leaves(moved) if id(leaf) not in host_leaves(moved))
        with pytest.raises(AttributeError):
            record.tokens = None
    assert scored.to("meta").plan is scored.plan, "the plan stays on the host"


def host_leaves(record):
    return {id(leaf) for leaf in pytree.tree_leaves(getattr(record, "plan", ()))}


@pytest.mark.parametrize("kind", [torch.tensor, tuple, bytes, bytearray], ids=lambda kind: kind.__name__)
def test_token_lists_may_be_of_any_kind(kind):
    lists = [[1, 2, 3, 4, 5, 6, 7, 8], [3], [4, 5]]
    from_lists = PrefixTree.pack(lists, [-1, 0, 0])
    assert str(PrefixTree.pack([kind(tokens) for tokens in lists], [-1, 0, 0])) == str(from_lists)


def test_packing_during_a_rollout_with_another_default_device():
    """In inference mode, with tensors made on a GPU by default: the tree is on the host and can be trained with."""
    batch = random_batch(0, 40, group_sizes=(3, 3))
    input_ids, _, z_mask, y_mask = batch.padded("left")
    expected = batch.pack(), ScoredTokens.from_padded(input_ids, z_mask, y_mask, 3)
    with torch.inference_mode(), torch.device("meta"):
        packed = batch.pack(), ScoredTokens.from_padded(input_ids.clone(), z_mask, y_mask, 3)
    assert str(packed) == str(expected)
    assert not any(leaf.is_inference() for leaf in pytree.tree_leaves(packed))


def test_only_the_device_of_a_record_can_be_changed():
    tree, _ = random_batch(0, 40).pack()
    with pytest.raises(TypeError):
        tree.to(torch.float16)
