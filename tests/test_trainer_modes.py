"""The gradient of an update, whole and by LoRA, in all the ways in which people train: as in float32, in one go."""

import pytest
import torch

pytest.importorskip("peft", reason="the package peft is not installed")

import peft

from tests.test_trainer import TOKENIZER, Scripted, trainer_of
from tests.tiny import tiny_llama

SAID = [["so 3 The answer is", "The answer is", "a\nb The answer is"], ["x The answer is"] * 2 + ["y The answer is"]]
PROMPTS = 4

# By how much of its norm the gradient may differ: by rounding alone, or by bfloat16's.
EXACT, ROUNDED = 1e-5, 3e-2
MODES = {
    "in micro-batches": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": PROMPTS}, EXACT),
    "checkpointed": ({"gradient_checkpointing": True}, EXACT),
    "under autocast": ({"bf16": True}, ROUNDED),
    "checkpointed under autocast, in micro-batches": (
        {
            "bf16": True,
            "gradient_checkpointing": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        ROUNDED,
    ),
}


def model_of(lora, dtype=torch.float32):
    model = tiny_llama(TOKENIZER).to(dtype)
    if not lora:
        return model
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)


def gradient_of(folder, model, **options):
    """All of it, before the optimizer's step."""
    options = {"per_device_train_batch_size": PROMPTS, "max_grad_norm": 0.0, "truncation_penalty": 0.0, **options}
    trainer = trainer_of(folder, Scripted(SAID), model, beta=0.3, **options)
    seen = []

    def keep(*args, **kwargs):
        trained = [parameter for parameter in trainer.tree_model.parameters() if parameter.requires_grad]
        seen.append(torch.cat([parameter.grad.float().flatten() for parameter in trained]))

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    (found,) = seen
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "LoRA"])
def plain(request, tmp_path_factory):
    return request.param, gradient_of(tmp_path_factory.mktemp("plain"), model_of(request.param))


def assert_close(found, expected, tolerance):
    assert float((found - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize("mode", MODES)
def test_a_mode(mode, plain, tmp_path):
    lora, expected = plain
    options, tolerance = MODES[mode]
    assert_close(gradient_of(tmp_path, model_of(lora), **options), expected, tolerance)


def test_all_in_bfloat16(plain, tmp_path):
    lora, expected = plain
    assert_close(gradient_of(tmp_path, model_of(lora, torch.bfloat16)), expected, ROUNDED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of themselves
def test_compiled(plain, tmp_path):
    lora, expected = plain
    torch.compiler.reset()
    assert_close(gradient_of(tmp_path, model_of(lora), torch_compile=True), expected, EXACT)
