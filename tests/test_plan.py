"""What `latro plan` counts, held against torch's counter, what autograd saves, and the peaks that were measured."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen3Config

from bench import bench_scaling, bench_step
from latro.launch import with_adapter
from latro.model import TreeModel
from latro.plan import command
from latro.plan.layout import Layout, Update, estimate, estimates, memory, pieces_of_prompt
from latro.plan.machine import GPUS, USABLE, Machine
from latro.plan.memory import (
    HALF,
    MIXED,
    SINGLE,
    Head,
    activations,
    backward_peak,
    cast_weights,
    saved_by_layer,
    waiting,
)
from latro.plan.options import add_arguments
from latro.plan.shape import named_shape, shape_of, shape_of_config
from latro.plan.work import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    PROCEDURES,
    Batch,
    Pass,
    Span,
    attention_flops,
    flops,
    head_flops,
    linear_flops,
    ours,
)
from latro_kernels import pack_rationales
from latro_kernels.impl import status
from latro_kernels.tree_attention.reference import visible
from tests.families import CHANGES, SIZES

ROOT = Path(__file__).parents[1]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "olmo2", "gpt2", "mixtral", "qwen3_moe"]
ADAPTED = ["llama", "qwen3", "phi3", "gemma2"]
WINDOW = 7
NATIVE = status("tree_attention", "native", "cpu")


def tiny(family, layers=2, **changes):
    config = CONFIG_MAPPING[family](
        **SIZES | CHANGES.get(family, {}) | {"num_hidden_layers": layers, "n_layer": layers} | changes
    )
    config._experts_implementation = "eager"  # others take no float64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def packed():
    """Prompts, rationales and answers of unequal lengths; and their spans."""
    lengths = [(5, [3, 4], 2), (9, [6, 2, 3], 3)]
    spans = []
    for P, rationales, A in lengths:
        spans += [Span(0, P), *(Span(P, P + R + A) for R in rationales)]
    tokens = iter(range(3, 67))
    prompts = [[next(tokens) for _ in range(P)] for P, _, _ in lengths]
    answers = [[next(tokens) for _ in range(A)] for _, _, A in lengths]
    rationales = [[[next(tokens) for _ in range(R)] for R in group] for _, group, _ in lengths]
    return *pack_rationales(prompts, rationales, answers), tuple(spans)


def counted(model, learns):
    """FLOPs of products with weights, and of those in attention, in the definition: in float64 no kernel runs."""
    tree, scored, _ = packed()
    with FlopCounterMode(display=False) as counter:
        if learns:
            model(tree, scored, beta=0.0).loss.backward()
        else:
            model.logprobs(tree, scored)
    found = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    assert set(found) <= {"aten.mm", "aten.addmm"}
    return sum(found.values()), attention


@pytest.mark.parametrize(
    ("family", "adapted"), [(family, False) for family in FAMILIES] + [(family, True) for family in ADAPTED]
)
def test_flops_are_those_of_a_counter(family, adapted):
    model = tiny(family).double()
    shape = shape_of(model)
    if adapted:
        model, shape = with_adapter(model, 3).get_base_model().double(), shape.with_adapter(3)
    model = TreeModel(model)
    tree, scored, _ = packed()
    T, M = len(tree.tokens), len(scored.rows)
    for learns, checkpoint in ((False, False), (True, False), (True, True)):
        if checkpoint:
            model.train()
            model.gradient_checkpointing_enable()
        products = FORWARD_PRODUCTS + learns * BACKWARD_PRODUCTS + checkpoint * FORWARD_PRODUCTS
        expected = (
            linear_flops(shape, T, learns=learns, checkpoint=checkpoint) + head_flops(shape, M, learns=learns),
            len(shape.layers) * attention_flops(shape, T * T, products),
        )
        assert counted(model, learns) == expected, (learns, checkpoint)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_pairs_are_those_that_see_each_other(window):
    tree, _, spans = packed()
    work = Pass("policy", spans, 0)
    assert work.tokens == len(tree.tokens)
    assert work.pairs(window) == int(visible(tree, window).sum())


def test_ours_is_what_pack_rationales_makes():
    P, R, A, K = 5, 4, 3, 2
    tree, scored = pack_rationales([list(range(P))], [[list(range(k, k + R)) for k in range(K)]], [list(range(A))])
    _, work = ours(Batch(P, R, A, K))
    assert work.tokens == len(tree.tokens)
    assert work.pairs() == int(visible(tree, None).sum())
    assert work.head_rows == len(scored.rows.unique())


def test_windows_of_layers_count():
    shape = shape_of(tiny("gemma2"))
    assert [layer.window for layer in shape.layers] == [WINDOW, None]
    work = Pass("policy", packed()[2], 1)
    pairs = sum(attention_flops(shape, work.pairs(layer.window), FORWARD_PRODUCTS) for layer in shape.layers)
    assert flops(shape, work)["attention"] == pairs


# Published, but for what is tied.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "phi-3.5-mini": 3_821_079_552,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_models_have_their_published_size(name, count):
    assert named_shape(name).base == count


@pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}; what is counted is what kernels keep")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast", "lora"])
def test_activations_are_what_autograd_saves(family, way):
    saved = [saved_by_autograd(family, way, layers) for layers in (1, 2)]
    shape, precision = shape_of_way(family, way)
    layer = shape.layers[1]
    expected = len(packed()[0].tokens) * saved_by_layer(shape, layer, precision)
    assert saved[1] - saved[0] == expected + cast_weights(shape, layer, precision)


def shape_of_way(family, way):
    shape = shape_of(tiny(family, attention_bias=False, mlp_bias=False))
    if way == "lora":
        return shape.with_adapter(3), HALF
    return shape, {"float32": SINGLE, "bfloat16": HALF, "autocast": MIXED}[way]


def saved_by_autograd(family, way, layers):
    """Bytes of all tensors that the backward pass will read, parameters aside."""
    model = tiny(family, layers, attention_bias=False, mlp_bias=False)
    if way in ("bfloat16", "lora"):
        model = model.bfloat16()
    if way == "lora":
        model = with_adapter(model, 3).get_base_model()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tree, scored, _ = packed()
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=way in ("autocast", "lora")):
        TreeModel(model)(tree, scored, beta=0.0)
    return sum(size for size, _ in found.values())


def test_checkpointing_saves_the_input_of_each_layer():
    shape = shape_of(tiny("llama", layers=6))
    saved = saved_by_layer(shape, shape.layers[0], SINGLE)
    whole, checkpointed = (activations(shape, SINGLE, 10, checkpoint=checkpoint) for checkpoint in (False, True))
    assert whole - checkpointed == 10 * (5 * saved - 6 * shape.D * 4)


@pytest.fixture(scope="module")
def llama_8b():
    return named_shape("llama-3.1-8b")


# Peaks that were measured. bench/measure.py counts what a step adds to a process whose weights are loaded.

FIRST_STEP = 20_000_000  # code, tables and threads that a first step brings, chosen after seeing the measurements
TOLERANCE = 0.15
BUDGET = 1 << 30
CHUNKED = "padded rewrite, chunked"


def measured_peaks():
    for file in sorted((ROOT / "bench" / "results").glob("*/*.json")):
        for case in json.loads(file.read_text()).get("cases", ()):
            if case["question"] in ("step", "scaling"):
                for contestant, row in case["contestants"].items():
                    yield pytest.param(case, contestant, row, id=f"{case['case']}-{contestant}")


def chunked_logits(shape, work, precision):
    """Logits made again of some rows at a time; of each a gradient of the weight, summed with the others'."""
    of_input = work.head_rows * shape.D * precision.products
    logits = 4 * min(bench_step.CHUNK, work.head_rows) * shape.V
    gradients = 3 if work.head_rows > bench_step.CHUNK else 1
    return Head(of_input, ((2 * of_input + 3 * logits, gradients - 2), (2 * of_input, gradients)))


def counted_peak(case, contestant):
    numbers = {name: int(number) for name, number in re.findall(r"\b([PRAKV])=(\d+)", case["case"])}
    sizes = tuple(numbers[name] for name in "PRAK")
    if case["question"] == "scaling":
        config = bench_scaling.MODEL | {"vocab_size": numbers["V"]}
    else:
        config = next(config for config, every in bench_step.CASES.values() if sizes in every)
    shape = shape_of_config(Qwen3Config(**config, tie_word_embeddings=False))
    precision = {"float32": SINGLE, "bfloat16": HALF}[case["dtype"]]
    batch = Batch(*sizes)
    if contestant == "published":
        batch = replace(batch, num_generations=int(re.search(r"published by (\d+)", case["case"])[1]))
    procedure = {"published": "the authors'", CHUNKED: "padded rewrite"}.get(contestant, contestant)
    passes = waiting(procedure, shape, batch, precision, BUDGET)
    if contestant == CHUNKED:
        passes = [(work, chunked_logits(shape, work, precision)) for work, _ in passes]
    is_first = batch.num_generations == numbers["K"]
    return FIRST_STEP + backward_peak(shape, precision, passes, gradient=precision.weights, is_first=is_first)


@pytest.mark.parametrize(("case", "contestant", "row"), measured_peaks())
def test_peak_is_within_15_percent_of_the_measured_one(case, contestant, row):
    assert counted_peak(case, contestant) == pytest.approx(row["peak_bytes"], rel=TOLERANCE)


def test_gradients_come_as_activations_go(llama_8b):
    gradients, head = 4 * llama_8b.trained, 4 * llama_8b.D * llama_8b.V
    short, longer = Batch(8, 4, 2, 2), Batch(64, 32, 8, 4)  # activations of which are less, and more, than the head

    def peak(procedure, batch, is_first):
        passes = waiting(procedure, llama_8b, batch, SINGLE, BUDGET)
        return backward_peak(llama_8b, SINGLE, passes, gradient=4, is_first=is_first)

    def of_ours(batch):
        _, work = ours(batch)
        saved = activations(llama_8b, SINGLE, work.tokens, checkpoint=False)
        return saved, 4 * work.tokens * llama_8b.D, 4 * work.head_rows * llama_8b.V

    saved, flowing, exponentials = of_ours(longer)
    assert saved > head
    assert peak("ours", longer, True) == pytest.approx(gradients + flowing, rel=1e-6)  # but for the last norm's
    assert peak("ours", longer, False) == saved + exponentials + flowing + gradients + head
    # Those of one pass wait for the other's, beside those of earlier micro-batches; then the head's make a sum.
    assert 2 * (gradients + head) < peak("the authors'", short, False) < 2 * (gradients + head) + head
    assert gradients + 2 * head < peak("the authors'", short, True) < gradients + 3 * head


# Layouts, and the command


def update(shape, **changes):
    return Update(**{"shape": shape, "batch": Batch(256, 200, 20, 16), "prompts": 512} | changes)


def h100s(count):
    return Machine(GPUS["h100"], count)


def test_what_fits_is_the_most_that_fits(llama_8b):
    machine, layout, given = h100s(64), Layout(sharded=True), update(llama_8b)
    found = estimate(given, machine, layout)
    room = machine.gpu.memory * USABLE
    sizes = (1, 2, 4, 8)
    assert found.micro_batch == max(
        size for size in sizes if sum(memory(given, machine, layout, size).values()) <= room
    )
    assert found.micro_batch < max(sizes)
    assert sum(found.memory.values()) <= room


def test_states_are_those_of_adamw_in_float32(llama_8b):
    whole = memory(update(llama_8b), h100s(8), Layout(sharded=False), 1)
    assert whole["weights"] == whole["gradients"] == 4 * llama_8b.base
    assert whole["AdamW"] == 8 * llama_8b.base
    assert whole["reference"] == 4 * llama_8b.base
    shares = memory(update(llama_8b), h100s(64), Layout(sharded=True, tensor=2), 1)
    assert shares["AdamW"] == 8 * llama_8b.base // 32 // 2
    assert shares["reference"] == 4 * llama_8b.base // 32 // 2
    adapted = llama_8b.with_adapter(16)
    held = memory(update(adapted, reference="adapter off"), h100s(8), Layout(sharded=False), 1)
    assert held["weights"] == 2 * llama_8b.base + 4 * adapted.adapter
    assert "reference" not in held


def test_whole_70b_fits_where_it_is_spread_widely():
    shape = named_shape("llama-3.1-70b")
    assert not any(one.micro_batch for one in estimates(update(shape), h100s(8)))
    given = update(shape, rollout_gpus=64)
    wide = estimates(given, h100s(64))
    assert wide[0].micro_batch
    assert wide[0].layout.sharded
    assert wide[0].layout.is_ours(given)


def test_each_resource_can_bind(llama_8b):
    slow_network = Machine(GPUS["h100"], 64, network=1e9)
    layout = Layout(sharded=True, checkpoint=True)
    assert estimate(update(llama_8b), h100s(64), layout).bound == "products"
    assert estimate(update(llama_8b), slow_network, layout).bound == "links"


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_flops_of_a_procedure_are_token_passes(llama_8b, procedure):
    """Times of products with weights follow the tokens: 1 forward, 3 with the backward pass."""
    batch = Batch(256, 200, 20, 16)
    P, R, A, K = batch.sizes
    passes = {
        "the authors'": K * (5 * (P + R) + 4 * (P + R + A)),
        "padded rewrite": 4 * K * (P + R + A),
        "ours": 4 * (P + K * (R + A)),
    }
    seconds = pieces_of_prompt(procedure, update(llama_8b), h100s(8), Layout(sharded=False))["linear"]
    of_token = 2 * sum(linear.size for layer in llama_8b.layers for linear in layer.linears)
    assert seconds == pytest.approx(passes[procedure] * of_token / (989e12 * 0.8))


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_command_shows_all_there_is_to_know(capsys):
    command.plan(options("--model", "llama-3.1-8b", "--gpus", "64", "--prompts", "512"))
    shown = capsys.readouterr().out
    for part in ("8.03 billion", "64 x H100", "FSDP2, checkpointing", "does not fit", "AdamW", "rationales a second"):
        assert part in shown
    ratio = re.search(r"without sampling, times ours +(\S+) +(\S+) +1.0", shown)
    assert float(ratio[1]) > 4
    assert 1.5 < float(ratio[2]) < 2.5
    peaks = re.search(r"GB of a prompt's backward pass +(\S+) +(\S+) +(\S+)", shown)
    assert float(peaks[1]) > 2 * float(peaks[3])
    memory_table = shown[shown.index("GB of a GPU") : shown.index("seconds of an update")]
    sizes = [float(line.split()[-1]) for line in memory_table.splitlines()[2:] if line]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.1 * len(sizes))


def test_command_reads_a_folder(tmp_path, capsys):
    tiny("gemma2").config.save_pretrained(tmp_path)
    command.plan(options("--model", str(tmp_path), "--gpus", "2", "--prompts", "2"))
    assert "products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "llama-9"],
            r"--model must be a folder with a config.json or one of llama.*got 'llama-9'",
        ),
        (["--gpu", "tpu"], "--gpu must be one of h200, .*got 'tpu'"),
        (["--gpus", "12"], "--gpus must fill machines of --gpus_per_machine 8, got 12"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--network", "0"], "--network must be above 0"),
        (["--num_generations", "1"], "--num_generations must be at least 2, got 1"),
        (["--rationale", "0"], "--rationale must be at least 1, got 0"),
        (["--prompts", "0"], "--prompts must be at least 1, got 0"),
        (["--rollout_batch_size", "0"], "--rollout_batch_size must be at least 1, got 0"),
        (["--memory_budget", "-1"], "--memory_budget must be at least 0, got -1"),
        (["--lora", "0"], "--lora must be a rank of at least 1, got 0"),
        (["--reference", "lost"], "--reference must be one of kept, .*got 'lost'"),
        (["--reference", "adapter off"], "needs --lora"),
    ],
)
def test_command_refuses(words, message):
    with pytest.raises(ValueError, match=message):
        command.plan(options("--model", "qwen3-0.6b", *words))


def test_experts_take_no_adapter():
    with pytest.raises(ValueError, match="--lora must be left out"):
        shape_of(tiny("mixtral")).with_adapter(4)


def test_latent_attention_is_refused():
    with pytest.raises(ValueError, match="deepseek_v3 must keep keys and values of each head"):
        shape_of(tiny("deepseek_v3"))
