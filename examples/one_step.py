"""One LaTRO step on a small random model: pack, score, learn, and see which rationale was preferred.

python examples/one_step.py
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latro.model import TreeModel
from latro_kernels import pack_rationales


def small_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def tokens(text: str) -> list[int]:
    return list(text.encode())


def main() -> None:
    torch.manual_seed(0)
    model = small_model()
    policy, reference = TreeModel(model), TreeModel(copy.deepcopy(model))

    rationales = ["1+1=2, 2*3=6. ", "1+1=3, so 9. ", ""]
    tree, scored = pack_rationales([tokens("(1+1)*3? ")], [[tokens(z) for z in rationales]], [tokens("6")])
    print(f"{len(tree.tokens)} tokens packed, {len(scored.rows)} of them scored, in one forward")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ref_logps = reference.logprobs(tree, scored)
    out = policy(tree, scored, ref_logps=ref_logps, beta=0.05)
    out.loss.backward()
    optimizer.step()

    print(f"{'rationale':>16}  log p(z|x)  log p(y|x,z)  advantage")
    for k in torch.argsort(out.advantage, descending=True).tolist():
        logps = f"{out.rationale_logp[k]:10.2f}  {out.answer_logp[k]:12.3f}"
        print(f"{rationales[k]!r:>16}  {logps}  {out.advantage[k]:+9.3f}")


if __name__ == "__main__":
    main()
