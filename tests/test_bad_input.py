"""Every mistake is told in the right words, before any work is done."""

import math
import re

import pytest
import torch

import latro_kernels
from latro_kernels import PrefixTree, ScoredTokens, SelfReward, checks, pack_rationales
from latro_kernels.testing import random_batch

V, D = 40, 16
TREE, SCORED = random_batch(0, V).pack()
T, M, R = len(TREE.tokens), len(SCORED.rows), len(SCORED.prompt)
_, SINGLE = pack_rationales([[1], [2]], [[[3], [4]], [[5]]], [[6], [7]])


def pack(nodes, parents):
    return lambda: PrefixTree.pack(nodes, parents)


def rationales(prompts=([1, 2],), groups=(([3], [4]),), answers=([5],), **options):
    return lambda: pack_rationales(list(prompts), [list(group) for group in groups], list(answers), **options)


def padded(input_ids=None, rationale_mask=None, answer_mask=None, num_generations=2):
    ids = torch.arange(8).view(2, 4) if input_ids is None else input_ids
    z = torch.tensor([[0, 1, 0, 0]] * 2) if rationale_mask is None else rationale_mask
    y = torch.tensor([[0, 0, 1, 0]] * 2) if answer_mask is None else answer_mask
    return lambda: ScoredTokens.from_padded(ids, z, y, num_generations)


def attention(q=(4, T, 8), k=(2, T, 8), v=None, tree=TREE, **options):
    def tensor(x):
        return torch.zeros(x) if isinstance(x, tuple) else x

    return lambda: latro_kernels.tree_attention(tensor(q), tensor(k), tensor(k if v is None else v), tree, **options)


def logprobs(hidden=(T, D), weight=(V, D), rows=SCORED.rows, targets=SCORED.targets, **options):
    def tensor(x):
        return torch.zeros(x) if isinstance(x, tuple) else x

    return lambda: latro_kernels.linear_logprobs(tensor(hidden), tensor(weight), rows, targets, **options)


def loss(hidden=(T, D), weight=(V, D), scored=SCORED, **options):
    options.setdefault("ref_logps", torch.zeros(len(SCORED.rows)))

    def tensor(x):
        return torch.zeros(x) if isinstance(x, tuple) else x

    return lambda: latro_kernels.fused_self_reward_loss(tensor(hidden), tensor(weight), scored, **options)


def reward(logps=(M,), scored=SCORED, objective=None, **options):
    logps = torch.zeros(logps) if isinstance(logps, tuple) else logps
    return lambda: latro_kernels.self_reward(logps, scored, objective, **options)


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


BAD = {
    # packing
    "no nodes": (pack([], []), ValueError, "PrefixTree.pack: nodes must not be empty"),
    "parents too short": (
        pack([[1], [2]], [-1]), ValueError, "PrefixTree.pack: parents must have one entry per node, 2, got 1"),
    "later parent": (
        pack([[1], [2]], [-1, 1]), ValueError, "PrefixTree.pack: parents[1] must be -1 or an earlier node, got 1"),
    "parent below -1": (
        pack([[1]], [-2]), ValueError, "PrefixTree.pack: parents[0] must be -1 or an earlier node, got -2"),
    "empty root": (
        pack([[1], []], [-1, -1]), ValueError,
        "PrefixTree.pack: nodes[1] is a root and must have at least one token, got none"),
    "negative token": (
        pack([[1], [3, -4]], [-1, 0]), ValueError, "PrefixTree.pack: nodes[1] must hold token ids >= 0, got -4"),
    "text for tokens": (
        pack(["abc"], [-1]), TypeError, "PrefixTree.pack: nodes[0] must be a list of token ids, got 'abc'"),
    "fractional token": (
        pack([[1.5]], [-1]), TypeError, "PrefixTree.pack: nodes[0] must be a list of token ids, got [1.5]"),
    "empty batch": (rationales([], [], []), ValueError, "pack_rationales: prompts must not be empty"),
    "empty prompt": (
        rationales(prompts=[[]]), ValueError,
        "pack_rationales: prompts[0] is a root and must have at least one token, got none"),
    "no rationales": (
        rationales(groups=[[]]), ValueError,
        "pack_rationales: rationales[0] must hold at least one rationale, got none"),
    "groups do not match prompts": (
        rationales(groups=[[[1]], [[2]]]), ValueError,
        "pack_rationales: rationales must have one entry per prompt, 1, got 2"),
    "answers do not match prompts": (
        rationales(answers=[[1], [2]]), ValueError,
        "pack_rationales: answers must have one entry per prompt, 1, got 2"),
    "empty answer": (
        rationales(answers=[[]]), ValueError, "pack_rationales: answers[0] must have at least one token, got none"),
    "empty option": (
        rationales(answers=[[[1], []]]), ValueError,
        "pack_rationales: answers[0][1] must have at least one token, got none"),
    "answers do not match rationales": (
        rationales(answers=[[[[5]]]]), ValueError,
        "pack_rationales: answers[0] must have one entry per rationale, 2, got 1"),
    "rationales with other numbers of options": (
        rationales(answers=[[[[5]], [[5], [6]]]]), ValueError,
        "pack_rationales: answers[0] must have as many options at each rationale, got [1, 2]"),
    "empty option of a rationale": (
        rationales(answers=[[[[5]], [[]]]]), ValueError,
        "pack_rationales: answers[0][1][0] must have at least one token, got none"),
    "baseline with an answer for each rationale": (
        rationales(answers=[[[[5]], [[6]]]], baseline=True), ValueError,
        "pack_rationales: baseline must have an answer for each prompt where answers[0] has one for each rationale, "
        "got True"),
    "baseline with other numbers of options": (
        rationales(answers=[[[[5]], [[6]]]], baseline=[[[5], [6]]]), ValueError,
        "pack_rationales: baseline[0] must have as many options as answers[0], 1, got 2"),
    "baseline for other prompts": (
        rationales(baseline=[[5], [6]]), ValueError,
        "pack_rationales: baseline must have one entry per prompt, 1, got 2"),
    "baseline that is no list": (
        rationales(baseline=[5]), TypeError,
        "pack_rationales: baseline[0] must be a list of token ids or of options, got 5"),
    "negative token in a rationale": (
        rationales(groups=[[[3], [-1]]]), ValueError,
        "pack_rationales: rationales[0][1] must hold token ids >= 0, got -1"),
    "text answer": (
        rationales(answers=["6"]), TypeError, "pack_rationales: answers[0][0] must be a list of token ids, got '6'"),
    "ends do not match prompts": (
        rationales(ends=[[1, 2], [3]]), ValueError, "pack_rationales: ends must have one entry per prompt, 1, got 2"),
    "ends do not match rationales": (
        rationales(ends=[[1]]), ValueError, "pack_rationales: ends[0] must have one entry per rationale, 2, got 1"),
    "nodes None": (lambda: PrefixTree.pack(None, [-1]), TypeError, "PrefixTree.pack: nodes must be a list, got None"),
    "node None": (pack([None], [-1]), TypeError, "PrefixTree.pack: nodes[0] must be a list of token ids, got None"),
    "parent None": (
        pack([[1]], [None]), ValueError, "PrefixTree.pack: parents[0] must be -1 or an earlier node, got None"),
    "prompts None": (
        lambda: pack_rationales(None, [[[1]]], [[2]]), TypeError, "pack_rationales: prompts must be a list, got None"),
    "a rationale for a group": (
        rationales(groups=[[3, 4]]), TypeError,
        "pack_rationales: rationales[0][0] must be a list of token ids, got 3"),
    "an answer that is a number": (
        rationales(answers=[5]), TypeError,
        "pack_rationales: answers[0] must be a list of token ids or of options, got 5"),
    "an option that is None": (
        rationales(answers=[[[5], None]]), TypeError,
        "pack_rationales: answers[0][1] must be a list of token ids, got None"),
    "ends for prompts": (rationales(ends=[8]), TypeError, "pack_rationales: ends[0] must be a list, got 8"),
    "answers as a tensor of another length": (
        lambda: pack_rationales([[1]], [[[2], [3]]], torch.ones(3, 2, dtype=torch.int64)), ValueError,
        "pack_rationales: answers must have one entry per prompt, 1, got 3"),
    # padded batches
    "padded ids not a matrix": (
        padded(torch.arange(8)), ValueError,
        "ScoredTokens.from_padded: input_ids must have shape [N * K, L], got [8]"),
    "padded mask shape": (
        padded(answer_mask=torch.zeros(2, 3)), ValueError,
        "ScoredTokens.from_padded: answer_mask must have the shape of input_ids, [2, 4], got [2, 3]"),
    "padded group size": (
        padded(num_generations=3), ValueError,
        "ScoredTokens.from_padded: num_generations must divide the 2 rows of input_ids, got 3"),
    "padded group size 0": (
        padded(num_generations=0), ValueError,
        "ScoredTokens.from_padded: num_generations must divide the 2 rows of input_ids, got 0"),
    "padded overlap": (
        padded(rationale_mask=torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0]])), ValueError,
        "ScoredTokens.from_padded: rationale_mask and answer_mask must not mark the same token, got row 1"),
    "padded first column": (
        padded(rationale_mask=torch.tensor([[1, 1, 0, 0]] * 2)), ValueError,
        "ScoredTokens.from_padded: the masks must not mark the first column, which nothing predicts, got row 0"),
    "padded without answer": (
        padded(answer_mask=torch.zeros(2, 4)), ValueError,
        "ScoredTokens.from_padded: answer_mask must mark at least one token of every row, got row 0"),
    "padded answer first": (
        padded(rationale_mask=torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]])), ValueError,
        "ScoredTokens.from_padded: a row's rationale must end before its answer, got row 1"),
    "padded negative token": (
        padded(torch.tensor([[1, 2, 3, -7], [1, 2, -100, 4]])), ValueError,
        "ScoredTokens.from_padded: input_ids must be >= 0 where a mask is set, got row 1"),
    "padded fractional tokens": (
        padded(torch.ones(2, 4)), TypeError,
        "ScoredTokens.from_padded: input_ids must have dtype torch.int32 or torch.int64, got torch.float32"),
    "padded list": (
        padded([[1, 2]]), TypeError, "ScoredTokens.from_padded: input_ids must be a tensor, got list"),
    "padded fractional group size": (
        padded(num_generations=2.0), TypeError,
        "ScoredTokens.from_padded: num_generations must be a whole number, got 2.0"),
    "padded empty": (
        padded(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, 4)), ValueError,
        "ScoredTokens.from_padded: input_ids must not be empty, got [0, 4]"),
    "padded mask device": (
        padded(answer_mask=meta(2, 4)), ValueError,
        "ScoredTokens.from_padded: answer_mask must be on cpu with input_ids, got meta"),
    # attention
    "q of another length": (
        attention(q=(4, T + 1, 8)), ValueError, f"tree_attention: q must have shape [H, {T}, E], got [4, {T + 1}, 8]"),
    "q with a batch dimension": (
        attention(q=(1, 4, T, 8)), ValueError, f"tree_attention: q must have shape [H, {T}, E], got [1, 4, {T}, 8]"),
    "k of another head size": (
        attention(k=(2, T, 16)), ValueError, f"tree_attention: k must have shape [Hkv, {T}, 8], got [2, {T}, 16]"),
    "v unlike k": (
        attention(v=(1, T, 8)), ValueError, f"tree_attention: v must have shape [2, {T}, 8], got [1, {T}, 8]"),
    "heads that do not divide": (
        attention(k=(3, T, 8)), ValueError, "tree_attention: the heads of k must divide the 4 heads of q, got 3"),
    "attention dtypes": (
        attention(k=torch.zeros(2, T, 8).half()), TypeError,
        "tree_attention: k must have the dtype of q, torch.float32, got torch.float16; "
        "cast one of them or run under torch.autocast"),
    "integer q": (
        attention(q=torch.zeros(4, T, 8, dtype=torch.int64)), TypeError,
        "tree_attention: q must have a floating dtype, got torch.int64"),
    "q is a list": (attention(q=[[0.0]]), TypeError, "tree_attention: q must be a tensor, got list"),
    "attention devices": (attention(k=meta(2, T, 8)), ValueError, "tree_attention: k must be on cpu with q, got meta"),
    "tree elsewhere": (
        attention(q=meta(4, T, 8), k=meta(2, T, 8)), ValueError,
        "tree_attention: tree must be on meta with q, got cpu"),
    "scored for tree": (
        attention(tree=SCORED), TypeError, "tree_attention: tree must be a PrefixTree, got ScoredTokens"),
    "window 0": (attention(window=0), ValueError, "tree_attention: window must be > 0, got 0"),
    "fractional window": (
        attention(window=1.5), TypeError, "tree_attention: window must be a whole number of tokens, got 1.5"),
    "no heads": (
        attention(q=(0, T, 8)), ValueError, f"tree_attention: q must have at least one head, got [0, {T}, 8]"),
    "head size 0": (
        attention(q=(4, T, 0), k=(2, T, 0)), ValueError,
        f"tree_attention: q must have a head size E > 0, got [4, {T}, 0]"),
    "softcap 0": (attention(softcap=0.0), ValueError, "tree_attention: softcap must be > 0, got 0.0"),
    "scale nan": (attention(scale=math.nan), ValueError, "tree_attention: scale must be finite, got nan"),
    "sinks shape": (
        attention(sinks=torch.zeros(2)), ValueError, "tree_attention: sinks must have shape [4], got [2]"),
    "unknown impl": (
        attention(impl="cuda"), ValueError,
        "tree_attention: impl must be one of 'auto', 'native', 'triton', 'reference', got 'cuda'"),
    "impl that is not here": (
        attention(q=meta(4, T, 8), k=meta(2, T, 8), tree=TREE.to("meta"), impl="triton"), RuntimeError,
        "tree_attention: impl='triton' cannot run on meta: tree_attention has no triton kernel for meta; use impl="),
    # log-probs
    "hidden shape": (
        logprobs(hidden=(1, T, D)), ValueError, f"linear_logprobs: hidden must have shape [T, D], got [1, {T}, {D}]"),
    "weight shape": (
        logprobs(weight=(V, D + 1)), ValueError,
        f"linear_logprobs: weight must have shape [V, {D}], got [{V}, {D + 1}]"),
    "weight dtype": (
        logprobs(weight=torch.zeros(V, D).double()), TypeError,
        "linear_logprobs: weight must have the dtype of hidden, torch.float32, got torch.float64; "
        "cast one of them or run under torch.autocast"),
    "row out of range": (
        logprobs(rows=torch.full((M,), T)), ValueError, f"linear_logprobs: rows must be in [0, T) = [0, {T}), got {T}"),
    "negative row": (
        logprobs(rows=torch.full((M,), -1)), ValueError, f"linear_logprobs: rows must be in [0, T) = [0, {T}), got -1"),
    "target out of range": (
        logprobs(targets=torch.full((M,), V)), ValueError,
        f"linear_logprobs: targets must be in [0, V) = [0, {V}), got {V}"),
    "targets shape": (
        logprobs(targets=torch.zeros(M - 1, dtype=torch.int64)), ValueError,
        f"linear_logprobs: targets must have shape [{M}], got [{M - 1}]"),
    "rows dtype": (
        logprobs(rows=SCORED.rows.int()), TypeError,
        "linear_logprobs: rows must have dtype torch.int64, got torch.int32"),
    "bias shape": (
        logprobs(bias=torch.zeros(D)), ValueError, f"linear_logprobs: bias must have shape [{V}], got [{D}]"),
    "temperature 0": (logprobs(temperature=0.0), ValueError, "linear_logprobs: temperature must be > 0, got 0.0"),
    "temperatures shape": (
        logprobs(temperature=torch.ones(M + 1)), ValueError,
        f"linear_logprobs: temperature must have shape [{M}], got [{M + 1}]"),
    "temperature not positive": (
        logprobs(temperature=-torch.ones(M)), ValueError, "linear_logprobs: temperature must be > 0, got -1.0"),
    "integer temperatures": (
        logprobs(temperature=torch.ones(M, dtype=torch.int64)), TypeError,
        "linear_logprobs: temperature must have a floating dtype, got torch.int64"),
    "bias is a list": (logprobs(bias=[0.0]), TypeError, "linear_logprobs: bias must be a tensor, got list"),
    "temperature text": (
        logprobs(temperature="1"), TypeError, "linear_logprobs: temperature must be a number, got '1'"),
    "negative softcap": (logprobs(softcap=-30.0), ValueError, "linear_logprobs: softcap must be > 0, got -30.0"),
    "infinite logit scale": (
        logprobs(logit_scale=math.inf), ValueError, "linear_logprobs: logit_scale must be finite, got inf"),
    # the loss
    "beta beside objective": (
        loss(beta=0.1, objective=SelfReward()), ValueError,
        "fused_self_reward_loss: beta is short for objective=SelfReward(beta=...) and cannot stand beside objective, "
        "got beta=0.1"),
    "answer_weight beside objective": (
        loss(answer_weight=0.0, objective=SelfReward()), ValueError,
        "fused_self_reward_loss: answer_weight is short for objective=SelfReward(answer_weight=...) and cannot stand "
        "beside objective, got answer_weight=0.0"),
    "objective is no function": (
        loss(objective="latro"), TypeError, "fused_self_reward_loss: objective must be callable, got str"),
    "objective without a loss": (
        loss(objective=lambda logps, scored, extras: logps), ValueError,
        f"fused_self_reward_loss: objective must return a loss of shape [], got [{M}]"),
    "extras nobody reads": (
        loss(extras={"old_logps": torch.zeros(M)}), ValueError,
        "fused_self_reward_loss: SelfReward reads no extras, got ['old_logps']"),
    "extras that are arguments": (
        loss(extras={"ref_logps": torch.zeros(M)}, objective=lambda *_: None), ValueError,
        "fused_self_reward_loss: extras must not hold 'ref_logps', which is an argument of its own"),
    "extras as a list": (
        loss(extras=[1], objective=lambda *_: None), TypeError,
        "fused_self_reward_loss: extras must be a mapping of names to tensors, got list"),
    "beta without reference": (
        loss(ref_logps=None), ValueError,
        "SelfReward: beta=0.05 needs ref_logps, got None; pass ref_logps or beta=0"),
    "a single rationale": (
        loss(hidden=(SINGLE.plan.hidden_rows, D), scored=SINGLE, ref_logps=torch.zeros(len(SINGLE.rows))), ValueError,
        "SelfReward: the leave-one-out advantage needs at least 2 rationales for every prompt, got a prompt with 1; "
        "sample more, or pass advantage"),
    "hidden of another tree": (
        loss(hidden=(T + 1, D)), ValueError,
        f"fused_self_reward_loss: hidden must have shape [{T}, D], got [{T + 1}, {D}]"),
    "tree for scored": (
        loss(scored=TREE), TypeError, "fused_self_reward_loss: scored must be ScoredTokens, got PrefixTree"),
    "scored elsewhere": (
        loss(hidden=meta(T, D), weight=meta(V, D)), ValueError,
        "fused_self_reward_loss: scored must be on meta with hidden, got cpu; use scored.to('meta')"),
    "vocabulary too small": (
        loss(weight=(SCORED.plan.min_vocab - 1, D)), ValueError,
        f"fused_self_reward_loss: weight must have a row for target {SCORED.plan.min_vocab - 1}, "
        f"got {SCORED.plan.min_vocab - 1} rows"),
    "ref_logps shape": (
        loss(ref_logps=torch.zeros(M + 1)), ValueError,
        f"fused_self_reward_loss: ref_logps must have shape [{M}], got [{M + 1}]"),
    "advantage shape": (
        loss(advantage=torch.zeros(R, 1)), ValueError,
        f"fused_self_reward_loss: advantage must have shape [{R}], got [{R}, 1]"),
    "integer advantage": (
        loss(advantage=torch.zeros(R, dtype=torch.int64)), TypeError,
        "fused_self_reward_loss: advantage must have a floating dtype, got torch.int64"),
    "denominator 0": (
        loss(denominator=0), ValueError, "fused_self_reward_loss: denominator must be > 0, got 0"),
    "denominator a tensor": (
        loss(denominator=torch.tensor(3)), TypeError,
        "fused_self_reward_loss: denominator must be a number, got tensor(3)"),
    "negative temperature": (
        loss(temperature=-1.0), ValueError, "fused_self_reward_loss: temperature must be > 0, got -1.0"),
    "fused in a backend without it": (
        loss(meta(T, D), meta(V, D), SCORED.to("meta"), ref_logps=meta(M), impl="triton"), RuntimeError,
        "fused_self_reward_loss: impl='triton' cannot run on meta: fused_self_reward_loss has no triton kernel for"),
    # the objective
    "negative beta": (lambda: SelfReward(beta=-0.1), ValueError, "SelfReward: beta must be >= 0, got -0.1"),
    "unknown kl": (
        lambda: SelfReward(kl="k4"), ValueError, "SelfReward: kl must be 'k1', 'k2' or 'k3', got 'k4'"),
    "unknown scale": (
        lambda: SelfReward(scale="std"), ValueError, "SelfReward: scale must be None, 'group' or 'batch', got 'std'"),
    "floor is no number": (lambda: SelfReward(floor="low"), TypeError, "SelfReward: floor must be a number, got 'low'"),
    "tree for scored in the objective": (
        reward(scored=TREE), TypeError, "self_reward: scored must be ScoredTokens, got PrefixTree"),
    "another objective in self_reward": (
        reward(objective=len), TypeError,
        "self_reward: objective must be a SelfReward, got <built-in function len>; "
        "fused_self_reward_loss takes any objective"),
    "a subclass in self_reward": (
        reward(objective=type("Mine", (SelfReward,), {})(beta=0.5)), TypeError,
        "self_reward: objective must be a SelfReward, got Mine(beta=0.5"),
    "ref_logps elsewhere": (
        reward(ref_logps=meta(M)), ValueError, "self_reward: ref_logps must be on cpu with logps, got meta"),
    "logps shape": (reward(logps=(M + 1,)), ValueError, f"self_reward: logps must have shape [{M}], got [{M + 1}]"),
    "logps dtype": (
        reward(logps=torch.zeros(M).half()), TypeError,
        "self_reward: logps must have dtype torch.float32 or torch.float64, got torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_the_right_words(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


NAN_CASES = {
    "hidden": (logprobs(hidden=torch.full((T, D), torch.nan)), f"linear_logprobs: hidden must be finite, got {T * D}"),
    "q": (attention(q=torch.full((4, T, 8), torch.inf)), f"tree_attention: q must be finite, got {4 * T * 8}"),
}


@pytest.mark.parametrize("case", NAN_CASES)
def test_values_are_checked_on_request(case, monkeypatch):
    call, message = NAN_CASES[case]
    call()
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
