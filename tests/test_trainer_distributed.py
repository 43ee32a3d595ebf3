"""The trainer in two processes does what it does in one: plainly, and with its parameters sharded by accelerate.

accelerate deals batches out in turn: two processes with batches of two train on what one has in a batch of four.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from latro import cli
from latro.checkpoint import newest
from latro.config import LatroConfig
from latro.model import TreeModel, tree_hidden
from latro.sharding import check_fsdp
from latro.trainer import LatroTrainer
from latro_kernels import pack_rationales
from tests import distributed_job

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = ROOT / "examples" / "accelerate"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--mixed_precision", "no"]
FSDP2 = [*ACCELERATE, "--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), "--main_process_port", "0"]
SECONDS = 300

TWO = {"per_device_train_batch_size": 2}
FOUR = {"per_device_train_batch_size": 4}
# Under AdamW, and where gradients are clipped, weights do not show a gradient's scale. Only some are clipped at 100.
SGD = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 100}
ACCUMULATED = {**SGD, "gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def launch(launcher, folder, runs):
    """Have distributed_job.py make the runs. -> its exit status, what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", *launcher, str(ROOT / "tests" / "distributed_job.py"), str(folder)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            printed, _ = job.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            job.terminate()  # the launcher then ends its processes, which are in sessions of their own
            pytest.fail(f"still running after {SECONDS} s:\n{job.communicate()[0]}")
    return job.returncode, printed


def launched(launcher, folder, runs):
    status, printed = launch(launcher, folder, runs)
    assert status == 0, printed
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs in this process."""
    folder = tmp_path_factory.mktemp("alone")
    distributed_job.run(folder / "injected", {**FOUR, **SGD})
    distributed_job.run(folder / "accumulated", {**FOUR, **ACCUMULATED})
    distributed_job.run(folder / "sampled", FOUR, injected=False)
    return folder


@pytest.fixture(scope="module")
def two_and_end(tmp_path_factory):
    """Runs in two processes, each with the whole model; their folder, and what launch gives. The last run must fail."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        "injected": {"options": {**TWO, **SGD}},
        "accumulated": {"options": {**TWO, **ACCUMULATED}},
        "sampled": {"options": TWO, "injected": False},
        "spoilt": {"options": {**TWO, **SAVING, "max_steps": 3}, "spoilt_from": 1},
    }
    return folder, *launch(TORCHRUN, folder, runs)


@pytest.fixture(scope="module")
def two(two_and_end):
    folder, _, printed = two_and_end
    assert (folder / "spoilt").is_dir(), printed
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Runs in two processes, each with a part of the model."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = {
        "accumulated": {"options": {**TWO, **ACCUMULATED}},
        "sampled": {"options": {**TWO, **SAVING}, "injected": False},
        "resumed": {"options": TWO, "injected": False, "resume": str(folder / "sampled" / "checkpoint-1")},
    }
    return launched(FSDP2, folder, runs)


def weights(folder, file="model.safetensors"):
    return load_file(folder / "model" / file)


def handed_on(folder):
    """What another engine would be given."""
    return load_file(folder / "handed-on.safetensors")


def assert_same_weights(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


def seen(folder, processes=2):
    return [json.loads((folder / f"process-{n}.json").read_text()) for n in range(processes)]


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["injected", "accumulated", "sampled"])
def test_two_processes_train_as_one(alone, two, name):
    before = distributed_job.tiny_llama(distributed_job.TOKENIZER).state_dict()
    expected = weights(alone / name)
    assert all(tensor.dtype == torch.float64 for tensor in expected.values())
    assert_same_weights(weights(two / name), expected, 1e-10)
    assert min(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-3


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_processes_share_what_one_samples(alone, kind, request):
    """Also the model's own samples are the same, wherever they are drawn."""
    folder = request.getfixturevalue(kind)
    for name in ("accumulated", "sampled"):
        first, second = (process["sampled"] for process in seen(folder / name))
        ((of_one,)) = (process["sampled"] for process in seen(alone / name, 1))
        assert len(of_one) == 2
        for own, other, together in zip(first, second, of_one, strict=True):
            assert len(own) == len(other) == len(together) / 2
            assert {**own, **other} == together


def test_groups_of_the_injected_runs_are_of_unequal_size(two):
    for process in seen(two / "injected"):
        assert len({len(samples) for update in process["sampled"] for samples in update.values()}) > 1


@pytest.mark.parametrize("name", ["injected", "accumulated", "sampled"])
def test_metrics_of_two_processes_are_those_of_one(alone, two, name):
    def updates(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    found, expected = updates(two / name), updates(alone / name)
    assert [line["step"] for line in found] == [1, 2]  # of one process
    for line, other in zip(found, expected, strict=True):
        assert line.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)  # transformers adds it up in float32
        assert_close(line, other)
    assert {"reward", "kl", "answer_logp", "advantage_std", "num_tokens", "grad_norm"} <= expected[0].keys()


def test_rationales_are_written_by_one_process(two):
    lines = [json.loads(line) for line in (two / "injected" / "rationales.jsonl").read_text().splitlines()]
    of_first = seen(two / "injected")[0]["sampled"]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step, update in enumerate(of_first) for prompt in update
    ]


@pytest.mark.parametrize("name", ["sampled", "accumulated"])
@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_evaluation_by_two_processes_is_that_by_one(alone, kind, name, request):
    """Also where another engine samples, and no process has a whole copy of a sharded model."""
    (expected,) = seen(alone / name, 1)
    assert [len(evaluation["examples"]) for evaluation in expected["evaluations"]] == [5, 1]
    for process in seen(request.getfixturevalue(kind) / name):
        assert_close(process["evaluations"], expected["evaluations"])


def test_no_number_in_one_process_stops_both(two_and_end):
    folder, status, printed = two_and_end
    assert status != 0
    assert "loss must be finite, got nan at update 1" in printed
    run = folder / "spoilt"
    assert json.loads((run / "stopped-at-1.json").read_text())["loss"] == "nan"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]
    assert newest(run).name == "checkpoint-1"
    assert not list(run.glob("process-*.json"))


# Sharded


@pytest.mark.parametrize("name", ["accumulated", "sampled"])
def test_a_sharded_model_is_trained_as_a_whole_one(alone, sharded, name):
    assert_same_weights(weights(sharded / name), weights(alone / name), 1e-10)
    assert_same_weights(handed_on(sharded / name), weights(sharded / name), 0)
    for process in seen(sharded / name):
        saved = AutoModelForCausalLM.from_pretrained(sharded / name / "model").state_dict()
        assert process["sharded"] == process["sharded_reference"] == [f"model.{name}" for name in saved]


def test_a_sharded_run_resumes(sharded):
    assert sorted(path.name for path in (sharded / "sampled").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_same_weights(weights(sharded / "resumed"), weights(sharded / "sampled"), 0)
    for process, uninterrupted in zip(seen(sharded / "resumed"), seen(sharded / "sampled"), strict=True):
        assert process["sampled"] == uninterrupted["sampled"][1:]


def test_a_sharded_runs_model_and_checkpoints_load(sharded):
    for folder in (sharded / "sampled" / "model", sharded / "sampled" / "checkpoint-2"):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values())
        assert_same_weights(model.state_dict(), weights(sharded / "sampled"), 0)


@pytest.mark.slow
def test_what_else_a_sharded_model_may_be(tmp_path):
    """Adapted, checkpointed, compiled, of a tied head."""
    pytest.importorskip("peft")
    adapter = {"injected": False, "adapter": True}
    runs = {
        "adapter": {"options": {**TWO, **SAVING}, **adapter},
        "resumed": {"options": TWO, **adapter, "resume": str(tmp_path / "adapter" / "checkpoint-1")},
        "plain": {"options": TWO, "double": False},
        "checkpointing": {"options": {**TWO, "gradient_checkpointing": True}, "double": False},
        "compiled": {
            "options": {**TWO, "torch_compile": True, "torch_compile_backend": "eager"},
            "double": False,
        },
        "tied": {"options": {**TWO, **SAVING}, "tied": True},
        "tied_resumed": {"options": TWO, "tied": True, "resume": str(tmp_path / "tied" / "checkpoint-1")},
    }
    launched(FSDP2, tmp_path, runs)
    distributed_job.run(tmp_path / "alone", FOUR, **adapter)
    of_alone = weights(tmp_path / "alone", "adapter_model.safetensors")
    assert of_alone
    for name in ("adapter", "resumed"):
        assert_same_weights(weights(tmp_path / name, "adapter_model.safetensors"), of_alone, 1e-10)
        assert_same_weights(handed_on(tmp_path / name), handed_on(tmp_path / "alone"), 1e-10)
    distributed_job.run(tmp_path / "alone-tied", FOUR, tied=True)
    for name in ("tied", "tied_resumed"):
        assert_same_weights(weights(tmp_path / name), weights(tmp_path / "alone-tied"), 1e-10)
    plain, checkpointing = weights(tmp_path / "plain"), weights(tmp_path / "checkpointing")
    assert all(torch.equal(plain[name], checkpointing[name]) for name in plain)
    assert_same_weights(weights(tmp_path / "compiled"), plain, 1e-5)


@pytest.mark.slow
def test_a_sharded_model_in_bfloat16(tmp_path):
    """Its weights are handed on in float32, also after an evaluation, and no log-prob is rounded to bfloat16."""
    runs = {
        name: {"options": {**TWO, "bf16": True}, "injected": name == "injected", "double": False}
        for name in ("injected", "sampled")
    }
    launched([*FSDP2, "--mixed_precision", "bf16"], tmp_path, runs)
    for name in runs:
        assert {tensor.dtype for tensor in handed_on(tmp_path / name).values()} == {torch.float32}
        process, _ = seen(tmp_path / name)
        found = [record["greedy"]["answer_logp"] for record in process["evaluations"][0]["examples"]]
        assert not any((32 * logp).is_integer() for logp in found)


def zero3():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [*ACCELERATE, "--config_file", str(CONFIGURATIONS / "zero3.yaml"), "--main_process_port", port]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed would share one GPU out among the processes")
def test_zero3(tmp_path):
    pytest.importorskip("deepspeed")
    on_cpu = {"use_cpu": False, "ddp_backend": "gloo"}  # otherwise accelerate leaves DeepSpeed out
    sampled = {"injected": False, "double": False}
    adapter = {**sampled, "adapter": True}
    runs = {
        "sampled": {"options": {**TWO, **SAVING, **on_cpu}, **sampled},
        "resumed": {"options": {**TWO, **on_cpu}, **sampled, "resume": str(tmp_path / "sampled" / "checkpoint-1")},
        "adapter": {"options": {**TWO, **on_cpu}, **adapter},
        "accumulated": {"options": {**TWO, **ACCUMULATED, **on_cpu}, "double": False},
    }
    launched(zero3(), tmp_path, runs)
    alone = tmp_path / "alone"
    distributed_job.run(alone / "sampled", FOUR, **sampled)
    distributed_job.run(alone / "adapter", FOUR, **adapter)
    distributed_job.run(alone / "accumulated", {**FOUR, **ACCUMULATED}, double=False)
    for name, file, tolerance in (
        ("sampled", "model.safetensors", 1e-4),
        ("adapter", "adapter_model.safetensors", 1e-5),
        ("accumulated", "model.safetensors", 1e-6),
    ):
        assert_same_weights(weights(tmp_path / name, file), weights(alone / name, file), tolerance)
    assert_same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "sampled"), 0)
    assert_same_weights(handed_on(tmp_path / "adapter"), handed_on(alone / "adapter"), 1e-5)
    names = [f"model.{name}" for name in weights(alone / "accumulated")]
    for name in ("sampled", "accumulated"):
        for process in seen(tmp_path / name):
            assert sorted(process["sharded"]) == sorted(process["sharded_reference"]) == sorted(names)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed would share one GPU out among the processes")
def test_the_command_under_zero3(tmp_path):
    """It loads a model that transformers would share out, of which the trainer then had nothing."""
    pytest.importorskip("deepspeed")
    distributed_job.tiny_llama(distributed_job.TOKENIZER).save_pretrained(tmp_path / "base")
    distributed_job.TOKENIZER.save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(8)))

    def command(output, **options):
        options |= {
            "model": tmp_path / "base", "dataset": rows, "output_dir": output, "max_steps": 2, "learning_rate": 1e-3,
            "num_generations": 2, "max_completion_length": 6, "disable_tqdm": "true", "save_strategy": "no",
        }  # fmt: skip
        return ["train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    runs = {"run": {"command": command(tmp_path / "two", per_device_train_batch_size=2, ddp_backend="gloo")}}
    launched(zero3(), tmp_path, runs)
    assert cli.main(command(tmp_path / "one", per_device_train_batch_size=4, use_cpu="true")) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert_same_weights(found, expected, 1e-4)


def test_hooks_see_the_heads_gradient():
    """Those of ZeRO-3 return another tensor from the head, by which they learn that a gradient comes."""
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.view_as(output)

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient)
            return gradient

    model = distributed_job.tiny_llama(distributed_job.TOKENIZER)
    model.lm_head.register_forward_hook(lambda head, given, output: Noted.apply(output))
    tree, scored = pack_rationales([[5, 6, 7]], [[[8], [9, 10]]], [[11]])
    TreeModel(model)(tree, scored, beta=0.0).loss.backward()
    assert seen == [1]
    tree_hidden(model, tree).sum().backward()
    assert len(seen) == 2


def test_fsdp_of_another_version_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="fsdp_version must be 2, got 1"):
        check_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_a_model_that_zero3_has_shared_out_is_refused(tmp_path):
    model = distributed_job.tiny_llama(distributed_job.TOKENIZER)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="model must be whole, got one that ZeRO-3 shared out as it was loaded"):
        LatroTrainer(model, LatroConfig(str(tmp_path)), [], processing_class=distributed_job.TOKENIZER)


# The configurations that are shipped


def launch_arguments(name):
    """What `accelerate launch` makes of a configuration. It sets options that it does not know without a word."""
    path = str(CONFIGURATIONS / f"{name}.yaml")
    parser = launch_command_parser()
    known = vars(parser.parse_args(["train.py"])).keys()
    config = load_config_from_file(path)
    assert {*(config.fsdp_config or {}), *(config.deepspeed_config or {})} <= known
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", path, "train.py"]))
    return config, arguments


def test_the_fsdp2_configuration():
    config, arguments = launch_arguments("fsdp2")
    assert config.distributed_type == DistributedType.FSDP
    assert arguments.use_fsdp
    with patch_environment(**prepare_multi_gpu_env(arguments)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward
    assert not plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(distributed_job.tiny_llama(distributed_job.TOKENIZER))
    assert "LlamaDecoderLayer" in str(plugin.auto_wrap_policy.keywords["transformer_layer_cls"])


def test_the_zero3_configuration():
    """As far as accelerate reads it without DeepSpeed."""
    config, arguments = launch_arguments("zero3")
    assert config.distributed_type == DistributedType.DEEPSPEED
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    stage = plugin.deepspeed_config["zero_optimization"]
    assert stage["stage"] == 3
    assert stage["stage3_gather_16bit_weights_on_model_save"]
    assert not plugin.zero3_init_flag
