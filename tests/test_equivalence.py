"""The whole, held against LaTRO as published: one packed forward gives the loss and gradients of five padded ones."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latro.model import TreeModel, tree_hidden
from latro_kernels import ScoredTokens, fused_self_reward_loss
from latro_kernels.testing import random_batch
from tests.oracle import oracle_loss

VOCAB = 50


def models(dtype=torch.float32):
    """A policy and a reference that differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).to(dtype)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, reference


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours, theirs, tolerance):
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize(
    ("beta", "answer_weight", "temperature"), [(0.05, 1.0, 1.0), (0.25, 0.0, 1.0), (0.1, 0.3, 0.7)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_tree_equals_the_published_procedure(seed, beta, answer_weight, temperature):
    model, reference = models()
    batch = random_batch(seed, VOCAB, group_sizes=(3, 2, 5))
    options = {"beta": beta, "answer_weight": answer_weight, "temperature": temperature}
    expected = oracle_loss(model, reference, batch.prompts, batch.rationales, batch.answers, **options)

    tree, scored = batch.pack()
    ref_logps = TreeModel(reference).logprobs(tree, scored, temperature=temperature)
    out = TreeModel(model)(tree, scored, ref_logps=ref_logps, **options)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, out.loss), gradients(model, expected), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_trainer_equals_the_packed_tree(side):
    model, reference = models()
    batch = random_batch(4, VOCAB, group_sizes=(3, 3))
    tree, packed = batch.pack()
    ref_logps = TreeModel(reference).logprobs(tree, packed)
    out = TreeModel(model)(tree, packed, ref_logps=ref_logps, entropy=True)

    input_ids, attention_mask, z_mask, y_mask = batch.padded(side)
    scored = ScoredTokens.from_padded(input_ids, z_mask, y_mask, num_generations=3)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.model(input_ids, attention_mask=attention_mask, position_ids=positions).last_hidden_state
    # Both score the same tokens in the same order, so the reference's log-probs serve both.
    again = fused_self_reward_loss(hidden, model.lm_head.weight, scored, ref_logps=ref_logps, entropy=True)
    for name, ours, theirs in zip(out._fields, again, out, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_same_gradients(gradients(model, again.loss), gradients(model, out.loss), 1e-5)


def test_end_tokens_equal_rationales_that_were_sampled_to_their_end():
    """log π(z, end | x) from the side leaf, while the answer is conditioned on z alone."""
    model, _ = models()
    batch = random_batch(5, VOCAB)
    tree, scored = batch.pack(ends=7)
    out = TreeModel(model)(tree, scored, beta=0)
    ended = type(batch)(batch.prompts, [[z + [7] for z in group] for group in batch.rationales], batch.answers)
    with_end = TreeModel(model)(*ended.pack(), beta=0)
    without = TreeModel(model)(*batch.pack(), beta=0)
    torch.testing.assert_close(out.rationale_logp, with_end.rationale_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.answer_logp, without.answer_logp, rtol=1e-5, atol=1e-5)


def test_prompts_in_one_row_do_not_see_each_other():
    model, _ = models()
    batch = random_batch(6, VOCAB)
    tree, _ = batch.pack()
    alone, _ = type(batch)(batch.prompts[1:2], batch.rationales[1:2], batch.answers[1:2]).pack()
    start = int((tree.previous == -1).nonzero()[1])
    together = tree_hidden(model, tree)[start : start + len(alone.tokens)]
    torch.testing.assert_close(together, tree_hidden(model, alone), rtol=1e-5, atol=1e-5)
