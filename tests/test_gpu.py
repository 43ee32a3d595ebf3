"""What only a GPU shows: no synchronisation, the same bits twice, real sizes, compiled graphs, memory, the trainer."""

import copy
import functools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.measure import memory_budget
from latro.config import LatroConfig
from latro.demo import task
from latro.demo.run import load_base
from latro.model import TreeModel, verify_tree
from latro.trainer import LatroTrainer
from latro_kernels import (
    PrefixTree,
    SelfReward,
    _gpu,
    fused_self_reward_loss,
    linear_logprobs,
    pack_rationales,
    self_reward,
    tree_attention,
)
from latro_kernels.impl import status
from latro_kernels.linear_logprobs.strips import WORKSPACE
from latro_kernels.testing import assert_error_about_eagers, peaked_head, random_batch, random_forest
from tests.oracle import oracle_loss

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RESULTS = {"tree_attention": ("out", "dq", "dk", "dv")}
RESULTS |= dict.fromkeys(("linear_logprobs", "fused_self_reward_loss"), ("logps", "dX", "dW"))
HEAD_IMPLS = ("native", "native fused", "triton")  # fused: the logits by native's own product, Hopper's
HEADS = [(operator, impl) for operator in ("linear_logprobs", "fused_self_reward_loss") for impl in HEAD_IMPLS]
OPERATORS = [("tree_attention", "triton"), *HEADS]
V, D, ROWS = 32000, 256, 96  # of a head whose hidden rows repeat
LARGE_V = 128256  # Llama 3's vocabulary

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What torch says once in a process.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
every_operator = pytest.mark.parametrize(("operator", "impl"), OPERATORS, indirect=["impl"])
every_head = pytest.mark.parametrize(("operator", "impl"), HEADS, indirect=["impl"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture
def impl(request, operator, monkeypatch):
    """A backend that is ready here."""
    backend, _, product = request.param.partition(" ")
    ready, reason, _ = status(operator, backend, DEVICE)
    if not ready:
        pytest.skip(f"{backend}: {reason}")
    if product:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the fused product is Hopper's")
        looked_up = _gpu._tile_sizes
        table = {"linear_logprobs.cuda": {"product": product}}
        monkeypatch.setattr(_gpu, "_tile_sizes", lambda kernel, *of: table.get(kernel) or looked_up(kernel, *of))
    return backend


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@functools.lru_cache(maxsize=8)
def on_host(seed, V=V):
    """A batch of two prompts with four rationales each, and what the operators are given, in float64."""
    batch = random_batch(seed, V, (4, 4), prompt_length=300, rationale_length=220, answer_length=20)
    tree, scored = batch.pack()
    T, M = len(tree.tokens), len(scored.rows)
    block, weight, rows, targets = peaked_head(ROWS, D, V, 8 * ROWS, 0.9, seed)
    aim = torch.zeros(ROWS, dtype=torch.int64)
    aim[rows] = targets
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    hidden = block.repeat(-(-T // ROWS), 1)[:T]
    scored = replace(scored, targets=aim[scored.rows % ROWS], plan=replace(scored.plan, min_vocab=V))
    attention = {"q": normal(8, T, 128), "k": normal(2, T, 128), "v": normal(2, T, 128), "direction": normal(8, T, 128)}
    head = {"hidden": hidden, "weight": weight, "ref_logps": -normal(M).abs(), "coefficients": normal(M) / M}
    return tree, scored, attention | head


def problem(operator, impl, seed=0, dtype=torch.float32, device=DEVICE, exact=False, vocabulary=V):
    """A function of leaves that gives a result and a loss, and the leaves; of the same numbers in float64 if exact."""
    tree, scored, numbers = on_host(seed, vocabulary)
    tree, scored = tree.to(device), scored.to(device)
    given = {name: value.to(dtype).to(device) for name, value in numbers.items()}
    given = {name: value.double() for name, value in given.items()} if exact else given

    def attend(q, k, v):
        out = tree_attention(q, k, v, tree, impl=impl)
        return out, (out * given["direction"]).sum()

    def score(hidden, weight):
        logps = linear_logprobs(hidden, weight, scored.rows, scored.targets, impl=impl)
        return logps, (logps * given["coefficients"]).sum()

    def lose(hidden, weight):
        out = fused_self_reward_loss(hidden, weight, scored, ref_logps=given["ref_logps"], impl=impl)
        return out.logps, out.loss

    names = ("q", "k", "v") if operator == "tree_attention" else ("hidden", "weight")
    function = {"tree_attention": attend, "linear_logprobs": score, "fused_self_reward_loss": lose}[operator]
    return function, [given[name].requires_grad_() for name in names]


def results(operator, impl, **options):
    return result_and_gradients(*problem(operator, impl, **options))


def result_and_gradients(function, leaves):
    result, loss = function(*leaves)
    return [result.detach(), *torch.autograd.grad(loss, leaves)]


@every_dtype
@pytest.mark.parametrize(
    ("operator", "impl", "result"),
    [(operator, impl, result) for operator, impl in OPERATORS for result in RESULTS[operator]],
    indirect=["impl"],
)
def test_error_is_about_eagers_at_real_sizes(operator, impl, result, dtype):
    n = RESULTS[operator].index(result)
    assert_error_about_eagers(
        actual=lambda seed: results(operator, impl, seed=seed, dtype=dtype)[n],
        eager=lambda seed: results(operator, "reference", seed=seed, dtype=dtype)[n],
        exact=lambda seed: results(operator, "reference", seed=seed, dtype=dtype, exact=True)[n],
        what=f"{operator} {result} of {impl} in {dtype}",
    )


@every_dtype
@every_operator
def test_no_operator_synchronises(operator, impl, dtype):
    function, leaves = problem(operator, impl, dtype=dtype)

    def forward_and_backward():
        with torch.no_grad():
            function(*leaves)
        (2 * function(*leaves)[1]).backward()

    forward_and_backward()  # compiles
    with no_synchronisation():
        forward_and_backward()


@every_dtype
@every_operator
def test_the_same_bits_twice(operator, impl, dtype):
    first, second = (results(operator, impl, dtype=dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_dtype
@every_operator
def test_a_cuda_graph_replays_forward_and_backward(operator, impl, dtype):
    """Of other numbers than those it was captured with."""
    function, leaves = problem(operator, impl, dtype=dtype)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        result_and_gradients(function, leaves)  # compiles, and fills the libraries' workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = result_and_gradients(function, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    expected = result_and_gradients(function, leaves)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@every_operator
def test_tensors_need_not_be_on_the_current_device(operator, impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one CUDA device")
    expected = results(operator, impl, device="cuda:0")
    for ours, value in zip(results(operator, impl, device="cuda:1"), expected, strict=True):
        assert ours.device.index == 1
        torch.testing.assert_close(ours.to("cuda:0"), value)


@every_operator
def test_compiles_without_a_graph_break(operator, impl):
    function, leaves = problem(operator, impl)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert_same(compiled(*leaves), function(*leaves), leaves, 1e-4)


def test_a_layer_and_the_loss_compile_as_one_graph():
    tree, scored, numbers = on_host(0)
    tree, scored = tree.to(DEVICE), scored.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    given = [numbers["hidden"], torch.randn(D, 3 * D, generator=generator) / D**0.5, numbers["weight"]]
    leaves = [value.float().to(DEVICE).requires_grad_() for value in given]

    def step(hidden, projection, weight):
        q, k, v = (x.unflatten(1, (4, D // 4)).transpose(0, 1) for x in (hidden @ projection).chunk(3, dim=1))
        mixed = hidden + tree_attention(q, k[:2], v[:2], tree).transpose(0, 1).reshape(hidden.shape)
        out = fused_self_reward_loss(mixed, weight, scored, beta=0)
        return out.logps, out.loss

    torch.compiler.reset()
    assert_same(torch.compile(step, fullgraph=True)(*leaves), step(*leaves), leaves, 1e-3)


def assert_same(ours, theirs, leaves, tolerance):
    """Results, and gradients of the losses, by their relative difference."""
    pairs = [(ours[0].detach(), theirs[0].detach())]
    pairs += zip(torch.autograd.grad(ours[1], leaves), torch.autograd.grad(theirs[1], leaves), strict=True)
    for value, expected in pairs:
        assert (value - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@every_operator
def test_small_ragged_problems(operator, impl, dtype):
    """Every option and odd sizes, in little time: what a memory checker can run."""
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-4}[dtype]
    for seed in range(2):
        ours = ragged_results(operator, impl, seed, dtype)
        exact = ragged_results(operator, "reference", seed, dtype, exact=True)
        for value, expected in zip(ours, exact, strict=True):
            assert (value.double() - expected).norm() <= tolerance * expected.norm()


def ragged_results(operator, impl, seed, dtype, exact=False):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*sizes):
        value = torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)
        return (value.double() if exact else value).to(DEVICE).requires_grad_()

    if operator == "tree_attention":
        tree = PrefixTree.pack(*random_forest(seed, nodes=40, longest=30)).to(DEVICE)
        T, heads, E = len(tree.tokens), (6, 2), (24, 80)[seed]
        leaves = [leaf(heads[0], T, E), leaf(heads[1], T, E), leaf(heads[1], T, E), leaf(heads[0])]
        options = ({"softcap": 2.0, "window": 33}, {})[seed]
        result = tree_attention(*leaves[:3], tree, sinks=leaves[3], impl=impl, **options)
    else:
        _, scored = random_batch(seed, 123, (3, 2, 4), 70, 50, 9).pack()
        leaves = [leaf(scored.plan.hidden_rows, 40), leaf(203, 40), leaf(203)]
        with torch.no_grad():
            leaves[1] *= 0.2
        options = ({"softcap": 3.0, "temperature": 0.7}, {"logit_scale": 0.5})[seed] | {"bias": leaves[2], "impl": impl}
        scored = scored.to(DEVICE)
        if operator == "linear_logprobs":
            result = linear_logprobs(*leaves[:2], scored.rows, scored.targets, **options)
        else:
            out = fused_self_reward_loss(*leaves[:2], scored, beta=0, **options)
            return [out.logps, *torch.autograd.grad(out.loss, leaves)]
    direction = torch.linspace(-1, 1, result.numel(), dtype=torch.float64, device=DEVICE).view(result.shape)
    return [result.detach(), *torch.autograd.grad((result * direction.to(result.dtype)).sum(), leaves)]


NATIVE = status("self_reward", "native", "cuda")


@pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, "group", "batch"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_native_self_reward_equals_the_definition(kl, scale, dtype):
    _, scored = random_batch(0, 40, (3, 2, 70), 7, 300, 5).pack(ends=39, baseline=True)
    scored = scored.to(DEVICE)
    logps = -torch.linspace(0, 3, len(scored.rows), dtype=dtype, device=DEVICE)
    given = {"objective": SelfReward(beta=0.3, answer_weight=0.4, kl=kl, floor=-9.0, scale=scale)}
    given["ref_logps"] = logps.roll(1)
    logps.requires_grad_()
    ours = self_reward(logps, scored, **given, impl="native")
    theirs = self_reward(logps, scored, **given, impl="reference")
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for name in theirs._fields:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(terms.loss, logps)[0] for terms in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
    with no_synchronisation():
        self_reward(logps, scored, **given, impl="native").loss.backward()


@pytest.mark.parametrize(("operator", "impl"), HEADS[len(HEAD_IMPLS) :], indirect=["impl"])
def test_memory_of_the_loss_stays_within_the_budget(operator, impl):
    """Sixteen thousand tokens, of which whole logits in bfloat16 would be a GiB, with a budget of 64 MiB."""
    vocabulary, hidden_size, budget = 32768, 256, 64 * 2**20
    prompts, rationales = [[1]] * 16, [[[2] * 120] * 8] * 16
    tree, scored = pack_rationales(prompts, rationales, [[3] * 8] * 16)
    scored = scored.to(DEVICE)
    hidden = torch.randn(len(tree.tokens), hidden_size, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=DEVICE) / 16).bfloat16().requires_grad_()

    def step():
        loss = fused_self_reward_loss(hidden, weight, scored, beta=0, impl=impl).loss
        torch.autograd.grad(loss, [hidden, weight])

    with memory_budget(budget):
        step()  # the libraries' own workspaces stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - held
    gradients = 8 * (hidden.numel() + weight.numel())  # in float32, rounded, and scaled
    assert len(scored.rows) * vocabulary * hidden.element_size() >= 2**30
    assert peak <= budget + WORKSPACE + gradients + 64 * 2**20


@every_head
def test_autocast_to_float16_under_a_gradient_scaler(operator, impl):
    """Of a large vocabulary. Gradients in float16 would vanish before the scaler acts, and overflow after it."""
    function, leaves = problem(operator, impl, vocabulary=LARGE_V)
    _, *exact = results(operator, "reference", exact=True, vocabulary=LARGE_V)
    scaler = torch.amp.GradScaler(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        _, loss = function(*leaves)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(leaves))
    for leaf, truth in zip(leaves, exact, strict=True):
        assert (leaf.grad - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.parametrize(("operator", "impl"), HEADS[: len(HEAD_IMPLS)], indirect=["impl"])
def test_more_exponentials_than_32_bits_count(operator, impl):
    """All of them kept. Only tokens at both ends have a part in the loss, so that the truth needs no more memory."""
    T, D, few = 17000, 64, 64
    kept = 2 * T * LARGE_V
    assert kept > 2 * 2**31
    if torch.cuda.get_device_properties(DEVICE).total_memory < 4 * kept:
        pytest.skip(f"needs {4 * kept / 2**30:.0f} GiB of GPU memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, device=DEVICE) for n in (T, LARGE_V))
    leaves = [hidden.bfloat16().requires_grad_(), (weight / D**0.5).bfloat16().requires_grad_()]
    targets = torch.randint(LARGE_V, (T,), generator=generator, device=DEVICE)
    tokens = torch.arange(T, device=DEVICE)
    ends = torch.cat([tokens[:few], tokens[-few:]])
    with memory_budget(2 * kept):
        logps = linear_logprobs(*leaves, tokens, targets, impl=impl)
        grad_hidden, grad_weight = torch.autograd.grad(logps[ends].sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = linear_logprobs(*exact, ends, targets[ends], impl="reference")
    truth_hidden, truth_weight = torch.autograd.grad(truth.sum(), exact)
    torch.testing.assert_close(logps[ends].double(), truth, rtol=1e-5, atol=1e-4)
    assert not grad_hidden[few:-few].any()
    for grad, of_truth in ((grad_hidden, truth_hidden), (grad_weight, truth_weight)):
        assert (grad - of_truth).norm() <= 2e-2 * of_truth.norm()


def qwen3(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=600,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).to(dtype).to(DEVICE).eval()


@every_dtype
def test_a_packed_model_equals_each_path_alone(dtype):
    verify_tree(qwen3(dtype))


def test_a_packed_step_equals_the_published_procedure():
    model, reference = qwen3(), qwen3(seed=1)
    batch = random_batch(0, 600, (4, 3), prompt_length=90, rationale_length=70, answer_length=6)
    with torch.device(DEVICE):
        expected = oracle_loss(
            model, reference, batch.prompts, batch.rationales, batch.answers, beta=0.05, answer_weight=1.0
        )
    tree, scored = (part.to(DEVICE) for part in batch.pack())
    out = TreeModel(model)(tree, scored, ref_logps=TreeModel(reference).logprobs(tree, scored), beta=0.05)
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (out.loss, expected))
    for (name, _), grad, truth in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (grad - truth).norm() <= 1e-3 * truth.norm(), name


@every_dtype
def test_a_step_of_a_model_does_not_synchronise(dtype):
    policy = TreeModel(qwen3(dtype))
    reference = TreeModel(copy.deepcopy(policy.model))
    batch = random_batch(0, 600, (4, 3), prompt_length=90, rationale_length=70, answer_length=6)
    tree, scored = (part.to(DEVICE) for part in batch.pack())

    def step():
        policy(tree, scored, ref_logps=reference.logprobs(tree, scored)).loss.backward()

    step()
    with no_synchronisation():
        step()


@pytest.mark.filterwarnings("default")  # other people's code runs here
def test_the_trainer_updates_a_model_in_bfloat16(tmp_path):
    model, tokenizer = load_base(None)
    before = copy.deepcopy(model).to(DEVICE)
    config = LatroConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=2 * (2 * task.STEPS + 1),
        learning_rate=1e-3,
        answer_template=task.ANSWER_TEMPLATE,
        stop_strings=[task.MARKER],
        separator="",
        logging_steps=1,
        save_strategy="no",
        bf16=True,
        disable_tqdm=True,
    )
    trainer = LatroTrainer(model, config, task.problems(0, 16), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert parameter.is_cuda, name
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, old), name
