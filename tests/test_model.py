"""Models of transformers over a tree: every family that it has, and what each must not do silently."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latro.model import TreeModel, tree_hidden, verify_tree
from latro.model.attention import TreeMask
from latro_kernels import PrefixTree, pack_rationales
from latro_kernels.testing import path_to
from tests.families import NOT_BUILT, REFUSED, SUPPORTED, VOCABULARY, tiny_config, tiny_model
from tests.float64 import Float64
from tests.oracle import oracle_loss

# As of transformers 5.23; another version may have fewer or more.
INSTALLED = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
supported = pytest.mark.parametrize("family", [family for family in SUPPORTED if family in INSTALLED])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def forest():
    """Two prompts; branches that fork again, end early and are empty; paths that are longer than the windows."""
    lengths, parents = [6, 5, 4, 1, 0, 6, 3, 4], [-1, 0, 1, 0, 0, 4, -1, 6]
    return PrefixTree.pack([tokens(length, n) for n, length in enumerate(lengths)], parents)


def paths(tree):
    """For every leaf, its path from the root, as rows."""
    leaves = sorted(set(range(len(tree.tokens))) - set(tree.previous.tolist()))
    return [path_to(tree, leaf) for leaf in leaves]


def hidden_at_head(model, input_ids):
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    model(input_ids=input_ids, use_cache=False)
    handle.remove()
    return seen[0]


# Lengths for which no padding is longer than the window: there transformers' eager attention is NaN in float64.
PROMPTS = [tokens(6, 10), tokens(7, 11)]
RATIONALES = [[tokens(4, 12), tokens(6, 13), tokens(2, 14)], [tokens(4, 15), []]]
ANSWERS = [tokens(3, 16), tokens(2, 17)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def packed_gradients(model, ref_logps, **options):
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    return gradients(model, TreeModel(model)(tree, scored, ref_logps=ref_logps, **options).loss)


def assert_close_gradients(given, expected, tolerance):
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        error = float((given[name] - gradient).abs().max() / largest)
        assert error <= tolerance, f"{name}: {error:.1e}"


# --- Every family ---


@supported
@torch.no_grad()
def test_packed_equals_separate(family):
    model, tree = tiny_model(family), forest()
    hidden = tree_hidden(model, tree)
    for path in paths(tree):
        expected = hidden_at_head(model, tree.tokens[path][None])[0]
        assert (hidden[path] - expected).abs().max() <= 1e-5 * expected.abs().max()


@supported
@torch.no_grad()
def test_log_probs_equal_those_of_the_model(family):
    model = tiny_model(family)
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    given = TreeModel(model).logprobs(tree, scored)
    expected = {}
    for path in paths(tree):
        logps = model(input_ids=tree.tokens[path][None], use_cache=False).logits[0, :-1].log_softmax(-1)
        target = tree.tokens[path[1:], None]
        expected |= zip(zip(path[:-1], target[:, 0].tolist(), strict=True), logps.gather(1, target)[:, 0], strict=True)
    scored_pairs = zip(scored.rows.tolist(), scored.targets.tolist(), strict=True)
    torch.testing.assert_close(given, torch.stack([expected[pair] for pair in scored_pairs]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("everywhere", [True, False], ids=["float64", "with the model's float32 casts"])
@supported
def test_gradients_equal_the_published_procedure(family, everywhere):
    model, reference = (tiny_model(family, seed=seed).double() for seed in (0, 1))
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    with Float64() if everywhere else nullcontext():
        ref_logps = TreeModel(reference).logprobs(tree, scored)
        given = packed_gradients(model, ref_logps, beta=0.05, answer_weight=0.7)
        loss = oracle_loss(model, reference, PROMPTS, RATIONALES, ANSWERS, beta=0.05, answer_weight=0.7)
        expected = gradients(model, loss)
    assert_close_gradients(given, expected, 1e-9 if everywhere else 2e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "phi"])
def test_gradients_of_tied_and_untied_heads(family, tied):
    model, reference = (tiny_model(family, seed=seed, tie_word_embeddings=tied).double() for seed in (0, 1))
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    with Float64():
        given = packed_gradients(model, TreeModel(reference).logprobs(tree, scored), beta=0.05)
        loss = oracle_loss(model, reference, PROMPTS, RATIONALES, ANSWERS, beta=0.05, answer_weight=1.0)
        expected = gradients(model, loss)
    assert_close_gradients(given, expected, 1e-9)


@pytest.mark.parametrize("family", [family for family in REFUSED if family in INSTALLED])
def test_refused_by_name(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    with pytest.raises(ValueError, match=rf"alone, but .*\b({REFUSED[family]})\b"):
        TreeModel(model)


def test_documented_outcomes():
    documented = Path(__file__).parents[1].joinpath("docs", "models.md").read_text().splitlines()
    outcomes = {line.split(" | ")[0].removeprefix("| "): line for line in documented if line.startswith("| ")}
    for family in SUPPORTED:
        assert "| works |" in outcomes[family]
    for family, layer in REFUSED.items():
        assert "| refused: " in outcomes[family]
        assert re.search(rf"\b({layer})\b", outcomes[family])
    for family, reason in NOT_BUILT.items():
        assert f"| not tried: {reason} |" in outcomes[family]


def test_every_family_is_accounted_for():
    assert sorted([*SUPPORTED, *REFUSED, *NOT_BUILT]) == sorted({*SUPPORTED, *REFUSED, *NOT_BUILT})
    new = INSTALLED - {*SUPPORTED, *REFUSED, *NOT_BUILT}
    if new:
        pytest.skip(f"not tried yet, run `python -m tests.families`: {', '.join(sorted(new))}")


# --- Training ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "qwen3_moe"])
def test_gradient_checkpointing(family, reentrant):
    model = tiny_model(family).train()
    expected = packed_gradients(model, None, beta=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    given = packed_gradients(model, None, beta=0.0)
    assert_close_gradients(given, expected, 1e-6)


def test_checkpointed_layers_are_run_again_over_the_tree_after_generation():
    model = tiny_model("llama").train()
    expected = packed_gradients(model, None, beta=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    loss = TreeModel(model)(tree, scored, beta=0.0).loss
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2)
    assert_close_gradients(gradients(model, loss), expected, 1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_generation_is_unchanged(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    prompts = torch.tensor([PROMPTS[0], [0, *PROMPTS[0][:-1]]])
    inputs = {"input_ids": prompts, "attention_mask": (prompts != 0).long()}
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**inputs, **options)
    packed_gradients(model, None, beta=0.0)
    after = model.generate(**inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert model.config._attn_implementation == implementation


def test_configuration_is_restored_after_an_error():
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tree_hidden(model, forest())
    assert model.config._attn_implementation == implementation


def test_generation_works_after_an_interrupted_call():
    """Nothing runs on an interrupt that could restore the configuration: the next call must."""
    model = tiny_model("llama")
    expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tree_hidden(model, forest())
    handle.remove()
    tree_hidden(model, forest())
    assert torch.equal(model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False), expected)


def test_generation_works_after_a_call_within_a_call():
    model = tiny_model("llama")
    expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False)
    depth = []

    def call_again(*_):
        if not depth:
            depth.append(1)
            tree_hidden(model, forest())

    handle = model.model.layers[1].register_forward_hook(call_again)
    tree_hidden(model, forest())
    handle.remove()
    assert depth
    assert torch.equal(model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False), expected)


# Dynamo looks at every attribute of a tensor, .grad included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_generates_afterwards():
    model = tiny_model("llama")
    expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False)
    hidden = tree_hidden(model, forest())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(tree_hidden(compiled, forest()), hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False), expected)


def test_a_head_that_accelerate_dispatches_is_refused():
    model = tiny_model("llama")
    model.lm_head._hf_hook = object()
    with pytest.raises(ValueError, match="a head that accelerate dispatches; load the model without device_map"):
        TreeModel(model)


def test_arguments_are_checked():
    model = tiny_model("llama")
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    with pytest.raises(TypeError, match="TreeModel: model must be a model of transformers, got Linear"):
        TreeModel(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="TreeModel: tree must be a PrefixTree, got ScoredTokens"):
        TreeModel(model)(scored, tree)
    with pytest.raises(ValueError, match=rf"TreeModel: tree.tokens must be in \[0, vocabulary\).*got {VOCABULARY}"):
        tree_hidden(model, PrefixTree.pack([[VOCABULARY]], [-1]))


def test_head_computes_its_product_again_after_an_error():
    model = tiny_model("llama")
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    expected = model(input_ids=tree.tokens[None]).logits
    with pytest.raises(ValueError, match="needs ref_logps"):
        TreeModel(model)(tree, scored, beta=0.1)
    assert torch.equal(model(input_ids=tree.tokens[None]).logits, expected)


def test_attention_dropout_is_refused_in_training():
    model, tree = tiny_model("llama", attention_dropout=0.1), forest()
    tree_hidden(model, tree)
    with pytest.raises(ValueError, match=r"LlamaAttention must not drop attention weights, got dropout 0\.1"):
        tree_hidden(model.train(), tree)


def test_frozen_head_gets_no_gradient():
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    packed_gradients(model, None, beta=0.0)
    assert model.lm_head.weight.grad is None


def test_log_probs_of_single_rationales_carry_no_gradient():
    tree, scored = pack_rationales(PROMPTS, [[z[0]] for z in RATIONALES], ANSWERS)
    logps = TreeModel(tiny_model("llama")).logprobs(tree, scored)
    assert not logps.requires_grad
    assert logps.isfinite().all()


# --- The mask ---


def test_no_mask_is_stored():
    model, masks = tiny_model("gemma2"), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    tree_hidden(model, forest())
    assert all(isinstance(mask, TreeMask) for mask in masks)
    assert [mask.window for mask in masks] == [7, None, 7]


def test_layer_that_is_not_given_the_mask_is_refused(monkeypatch):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, attention_mask, **rest: forward(hidden, **rest))
    with pytest.raises(ValueError, match="LlamaAttention must be given the tree as its attention_mask, got NoneType"):
        tree_hidden(model, forest())


def test_model_that_computes_with_its_mask_is_refused():
    class Dense(LlamaForCausalLM):
        def forward(self, attention_mask, **rest):
            return super().forward(attention_mask=attention_mask.bool(), **rest)

    with pytest.raises(AttributeError, match="the attention mask is a tree and has no bool"):
        tree_hidden(Dense(tiny_config("llama")), forest())


def test_part_of_the_mask_is_refused():
    mask = TreeMask(forest())
    assert mask[:, :, 0:, :] is mask
    with pytest.raises(IndexError, match="of which there is only the whole"):
        mask[:, :, -3:, :]


@pytest.mark.parametrize("name", ["position_bias", "block_indices", "a_new_argument"])
def test_unknown_attention_argument_is_refused(monkeypatch, name):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, **rest: forward(hidden, **rest, **{name: torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"LlamaAttention must compute plain attention, got {name}"):
        tree_hidden(model, forest())


def test_attention_that_is_not_causal_is_refused():
    model = tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(ValueError, match="attention of llama must be causal"):
        tree_hidden(model, forest())


@pytest.mark.parametrize(
    ("family", "longest", "rope"),
    [
        (
            "phi3",
            16,
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 16,
            },
        ),
        ("llama", 64, {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_rotary_embeddings_that_depend_on_length(family, longest, rope):
    changes = {"original_max_position_embeddings": longest} if family == "phi3" else {}
    model = tiny_model(family, rope_parameters={"rope_theta": 10000.0, **rope}, **changes)
    verify_tree(model, tolerance=1e-5)
    tree_hidden(model, PrefixTree.pack([[5] * longest], [-1]))
    message = f"with {rope['rope_type']} rotary embeddings a path must have at most {longest} tokens, got {longest + 1}"
    with pytest.raises(ValueError, match=message):
        tree_hidden(model, PrefixTree.pack([[5] * longest, [6]], [-1, 0]))


# --- The head ---


class _Adapted(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) + hidden.sum(-1, keepdim=True)


def test_adapter_on_the_head_is_refused():
    model = tiny_model("llama")
    model.lm_head = _Adapted(32, VOCABULARY)
    with pytest.raises(
        ValueError, match=r"must be a plain torch\.nn\.Linear, got .*\._Adapted; merge an adapter into it"
    ):
        TreeModel(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"the output head of LlamaModel must be a plain torch\.nn\.Linear"):
        TreeModel(tiny_model("llama").model)


def test_unknown_treatment_of_logits_is_refused():
    class Cubed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**3
            return output

    with pytest.raises(ValueError, match="Cubed must scale or softcap its logits, if anything"):
        TreeModel(Cubed(tiny_config("llama")))


@pytest.mark.parametrize(
    ("family", "softcap", "logit_scale"),
    [
        ("llama", None, 1.0),
        ("cohere", None, 0.25),
        ("granite", None, 0.25),
        ("hyperclovax", None, 4.0),
        ("gemma2", 3.0, 1.0),
        ("minicpm3", None, 1.0),  # scales its hidden states, before the head
    ],
)
def test_treatment_of_logits_is_observed(family, softcap, logit_scale):
    options = TreeModel(tiny_model(family)).head_options
    assert (options.softcap, options.logit_scale) == (softcap, logit_scale)


# --- Verification ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite_swa", "gpt2", "opt", "mistral"])
def test_verify_passes_in_every_dtype(family, dtype):
    verify_tree(tiny_model(family).to(dtype))


def test_verify_names_the_layer_at_fault(monkeypatch):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward

    def leak(hidden, **kwargs):
        return forward(hidden + 0.1 * hidden.mean(1, keepdim=True), **kwargs)

    monkeypatch.setattr(layer, "forward", leak)
    with pytest.raises(ValueError, match=r"verify_tree: layers.1 \(LlamaDecoderLayer\) must put out"):
        verify_tree(model)


def test_verify_finds_a_wrong_head():
    tree_model = TreeModel(tiny_model("gemma2"))
    object.__setattr__(tree_model.head_options, "softcap", 4.0)
    with pytest.raises(ValueError, match="verify_tree: the output head must put out"):
        verify_tree(tree_model)


def test_verify_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    packed_gradients(model, None, beta=0.0)
    modes = [module.training for module in model.modules()]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    verify_tree(model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


def test_hooks_are_installed_once():
    model = tiny_model("llama")
    TreeModel(model)
    count = sum(len(module._forward_pre_hooks) for module in model.modules())
    tree_hidden(TreeModel(model).model, forest())
    assert isinstance(model, PreTrainedModel)
    assert count == sum(len(module._forward_pre_hooks) for module in model.modules()) > 0
