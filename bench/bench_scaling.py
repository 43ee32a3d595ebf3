"""How the cost of a step grows with K rationales, with P prompt tokens, and with the vocabulary V.

One more rationale costs its own tokens, whatever the length of the prompt, in everything but attention.
"""

from __future__ import annotations

import torch

from bench.bench_step import SMALL_MODEL, step_case

MODEL = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODEL |= {"head_dim": 64, "intermediate_size": 768}

R, A = 32, 8
BASE = (4, 128, 8000)  # K, P, V, of which one at a time is changed
CASES = [BASE, (2, 128, 8000), (8, 128, 8000), (4, 32, 8000), (4, 512, 8000), (4, 128, 2000), (4, 128, 24000)]
CASES += [(8, 512, 8000)]  # what four more rationales cost after a long prompt
TOY_CASES = [(2, 16, 100), (3, 16, 100), (2, 8, 100), (2, 16, 50)]


def pytest_generate_tests(metafunc):
    found = TOY_CASES if metafunc.config.getoption("toy") else CASES
    axes = [dict(zip("KPV", case, strict=True)) for case in found]
    metafunc.parametrize("axes", axes, ids=["K={K} P={P} V={V}".format(**one) for one in axes])


def test_scaling(axes, measured, pytestconfig):
    config = (SMALL_MODEL if pytestconfig.getoption("toy") else MODEL) | {"vocab_size": axes["V"]}
    case = step_case("scaling", config, (axes["P"], R, A, axes["K"]), torch.float32, axes)
    case.name = f"V={axes['V']} {case.name}"
    measured(case)
