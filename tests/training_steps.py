"""A training step of the families that people train most: whole or by LoRA, eager or with compiled layers.

`python -m tests.training_steps` prints the first table of docs/models.md, in about half an hour.
"""

from __future__ import annotations

import copy
import sys
import warnings

import peft
import torch
from torch import nn
from torch._dynamo.utils import counters

from latro.model import TreeModel
from latro.model.attention import decoder_of, layers_of
from latro_kernels import pack_rationales
from tests.families import VOCABULARY, tiny_model
from tests.float64 import Float64
from tests.oracle import oracle_loss

FAMILIES = """
    cohere cohere2 deepseek_v3 exaone4 gemma gemma2 gemma3_text glm4 gpt2 gpt_neox gpt_oss granite hunyuan_v1_dense
    llama ministral mistral mixtral nemotron olmo olmo2 olmo3 opt phi phi3 qwen2 qwen3 qwen3_moe smollm3 stablelm
    starcoder2
""".split()  # noqa: SIM905

TOLERANCE = 1e-10


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


PROMPTS = [tokens(6, 10), tokens(7, 11)]
RATIONALES = [[tokens(4, 12), tokens(6, 13), tokens(2, 14)], [tokens(4, 15), []]]
ANSWERS = [tokens(3, 16), tokens(2, 17)]


def training_step(family: str, *, lora: bool, compiled: bool) -> float:
    """Packed, beside the published procedure with a copy of the model. -> the largest difference of gradients, as a
    share of the largest gradient; a step is taken by them."""
    model, reference = (tiny_model(family, seed=seed).double() for seed in (0, 1))
    if lora:
        torch.manual_seed(2)
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, adapter).get_base_model()
    torch.compiler.reset()
    counters.clear()
    with Float64():
        expected = gradients(copy.deepcopy(model), lambda policy: published(policy, reference))
        if compiled:
            for _, layer in layers_of(decoder_of(model)):
                layer.compile()
        given = gradients(model, lambda policy: packed(policy, reference))
    assert bool(counters["stats"]["unique_graphs"]) == compiled
    largest = max(gradient.abs().max() for gradient in expected.values())
    take_step(model)
    return max(float((given[name] - gradient).abs().max() / largest) for name, gradient in expected.items())


def packed(policy, reference):
    tree, scored = pack_rationales(PROMPTS, RATIONALES, ANSWERS)
    ref_logps = TreeModel(reference).logprobs(tree, scored)
    return TreeModel(policy)(tree, scored, ref_logps=ref_logps, beta=0.05, answer_weight=0.7).loss


def published(policy, reference):
    return oracle_loss(policy, reference, PROMPTS, RATIONALES, ANSWERS, beta=0.05, answer_weight=0.7)


def gradients(model: nn.Module, loss_of) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def take_step(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    torch.optim.AdamW(trained, lr=1e-3).step()
    assert any(not torch.equal(*pair) for pair in zip(before, trained, strict=True))


def outcome(family: str, **how: bool) -> str:
    try:
        error = training_step(family, **how)
    except Exception as failure:
        return f"no: {type(failure).__name__}, {str(failure).splitlines()[0][:80]}"
    return "yes" if error <= TOLERANCE else f"no: gradients differ by {error:.1e}"


def table() -> str:
    lines = ["| family | whole | LoRA | whole, compiled | LoRA, compiled |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        print(family, file=sys.stderr)
        found = [outcome(family, lora=lora, compiled=compiled) for compiled in (False, True) for lora in (False, True)]
        lines.append(f"| {family} | {' | '.join(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(table())
