"""An update of TRL's RLOOTrainer but for sampling, and of the one in examples/trl_rloo.py: every parameter's gradient.

ours: one packed forward of the reference and one of the policy.
trl: padded forwards for old log-probs, for the reference, for log π(y | x, z) as a reward function, and for the loss,
    each with TRL's chunked head.

All rationales are equally long, which favours padding: there is none. λ is 0, for TRL's loss has no term of the answer.
`pytest bench/` leaves this out, for it needs TRL: pytest bench/trainers.py --benchmark-only

Sizes: P tokens of the prompt, K rationales of R tokens, each with an answer of A tokens.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bench.bench_step import BETA, HALF_MODEL, MODEL, SMALL_MODEL
from bench.measure import Case
from latro.text import Text
from tests.float64 import Float64
from tests.oracle import leave_one_out, sequence_logp

CASES = {  # P, R, A, K
    "toy": (SMALL_MODEL, [(64, 16, 4, 4)]),
    "default": (HALF_MODEL, [(100, 64, 8, 4), (400, 32, 8, 8)]),
    "full": (MODEL, [(100, 200, 8, 16), (900, 128, 8, 16)]),
}


TRAINERS = {}


def ours(inputs):
    return step(our_trainer, inputs)


def trl(inputs):
    return step(trl_trainer, inputs)


def step(make, inputs):
    """The first call makes the trainer and no more, so that what it leaves in memory does not count."""
    if (make, inputs["folder"]) not in TRAINERS:
        TRAINERS[make, inputs["folder"]] = make(inputs["folder"], inputs["K"])
        return {}
    trainer, K = TRAINERS[make, inputs["folder"]], inputs["K"]
    trainer._generate = lambda texts: ([inputs["prompt"]] * K, inputs["rationales"], texts)
    trainer.model.train().zero_grad()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs([inputs["row"]] * K)).backward()
    return {"gradient": lambda: gradient(trainer.model)}


def our_trainer(folder, K):
    from examples.trl_rloo import LatroRLOOTrainer

    given = arguments(folder, K)
    text = Text(given["processing_class"], answer_template="{answer}", separator="", stop_strings=[])
    return LatroRLOOTrainer(text=text, answer_weight=0.0, **given)


def trl_trainer(folder, K):
    from trl import RLOOTrainer

    @torch.no_grad()
    def answer_logp(prompts, completion_ids, answer, **columns):
        tokens = trainer.processing_class
        parts = [torch.tensor(part) for part in (tokens(prompts).input_ids, completion_ids, tokens(answer).input_ids)]
        rows, kept = torch.cat(parts, dim=1), parts[2].shape[1]
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, rows, torch.ones_like(rows), kept)
        return logps.sum(1).tolist()

    trainer = RLOOTrainer(reward_funcs=answer_logp, **arguments(folder, K))
    return trainer


def arguments(folder, K):
    from datasets import Dataset
    from trl import RLOOConfig

    args = RLOOConfig(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=K,
        num_generations=K,
        beta=BETA,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    return {
        "model": folder,
        "args": args,
        "train_dataset": Dataset.from_list([{"prompt": "", "answer": ""}]),  # of which none is read
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def saved_model(config, folder):
    """With a tokenizer by which five digits are a token."""
    names = [f"{n:05d}" for n in range(config["vocab_size"])]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]{5}"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=names[0], eos_token=names[1]).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=False, initializer_range=0.05)).save_pretrained(folder)


def exact(inputs):
    """Rationale by rationale, in float64. The reference is what the policy still is."""
    model = AutoModelForCausalLM.from_pretrained(inputs["folder"]).double()
    x, y = [inputs["prompt"]], [inputs["answer"]]
    with Float64():
        with torch.no_grad():
            reward = torch.cat([sequence_logp(model, [x[0] + z], y) for z in inputs["rationales"]])
        for z, advantage in zip(inputs["rationales"], leave_one_out(reward, [inputs["K"]]), strict=True):
            (-advantage / inputs["K"] * sequence_logp(model, x, [z])).sum().backward()
    return {"gradient": gradient(model).float()}


def trainers_case(config, sizes, folder):
    P, R, A, K = sizes
    saved_model(config, folder)
    tokens = torch.randint(2, config["vocab_size"], (P + A + K * R,)).tolist()
    prompt, answer = tokens[:P], tokens[P : P + A]
    inputs = {
        "folder": folder,
        "K": K,
        "prompt": prompt,
        "answer": answer,
        "row": {name: "".join(f"{token:05d}" for token in of) for name, of in (("prompt", prompt), ("answer", answer))},
        "rationales": [tokens[P + A + k * R :][:R] for k in range(K)],
    }
    return Case(
        question="trainers",
        name=case_name(sizes),
        dtype=torch.float32,
        inputs=inputs,
        exact=exact(inputs),
        contestants={"ours": ours, "trl": trl},
        flops=flops(config, sizes),
        compiled=("ours", "trl"),
    )


def flops(config, sizes):
    """Each token once through the trunk, each token of a rationale once through the head; the reference's pass too."""
    P, R, A, K = sizes
    D, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads, E = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    trunk = layers * D * (2 * E * (heads + kv_heads) + 3 * config["intermediate_size"])
    pairs = P * (P + 1) // 2 + K * sum(range(P + 1, P + R + A + 1))
    return 8 * trunk * (P + K * (R + A)) + 8 * D * config["vocab_size"] * K * R + 16 * E * heads * layers * pairs


def case_name(sizes):
    return "P={} R={} A={} K={} float32".format(*sizes)


def pytest_generate_tests(metafunc):
    config = metafunc.config
    model, found = CASES["toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"]
    metafunc.parametrize("sizes", found, ids=map(case_name, found))
    metafunc.parametrize("config", [model], ids=[""])


def test_trainers(config, sizes, tmp_path, measured):
    pytest.importorskip("trl", reason="trl is not installed; pip install trl")
    measured(trainers_case(config, sizes, str(tmp_path)))
