"""What of bench/tune.py needs no GPU: the candidates, the choice, and the table."""

import json
from functools import partial

import pytest
import torch

from bench import tune
from latro_kernels import _gpu

TABLE = json.loads(_gpu.TABLE.read_text())
ROWS = [(kernel, row) for kernel, rows in TABLE.items() for row in rows]
ARCHS = (80, 86, 89, 90, 100, 120)


def test_the_table_is_as_the_tuner_writes_it():
    assert tune.as_text(TABLE) == _gpu.TABLE.read_text()


def test_every_row_can_be_tuned():
    assert set(TABLE) == set(tune.PASSES)
    for _, row in ROWS:
        candidates = tune.neighbours(tune.constants_of(row))
        assert candidates[0] == tune.constants_of(row)
        assert all(candidate.keys() == candidates[0].keys() for candidate in candidates)
        assert 1 < len(candidates) < 100
        assert row["bytes"] in tune.DTYPES
    assert {row["size"] for kernel, row in ROWS if kernel.startswith("tree_attention.")} == set(tune.HEADS)


def test_neighbours_are_a_step_away():
    constants = {"BLOCK_M": 64, "num_warps": 16, "num_stages": 1, "product": "vendor"}
    found = tune.neighbours(constants)
    assert found[0] == constants
    changes = [{name: value for name, value in other.items() if value != constants[name]} for other in found[1:]]
    alone = [{"BLOCK_M": 32}, {"BLOCK_M": 128}, {"num_warps": 8}, {"num_stages": 2}, {"product": "fused"}]
    together = [{**block, "num_warps": 8} for block in alone[:2]] + [
        {**other, "product": "fused"} for other in alone[:4]
    ]
    assert sorted(map(str, changes)) == sorted(map(str, alone + together))


# The interpreter computes what a kernel then masks.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "kernel",
    [
        "tree_attention.forward",
        "tree_attention.grad_keys",
        "linear_logprobs.logits",
        "linear_logprobs.add_rows",
        "linear_logprobs.cuda",
        "linear_logprobs.settle",
    ],
)
def test_cases_run_at_toy_size(kernel, monkeypatch):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(tune, "DEVICE", "cpu")
    for name, toy in (
        ("TREES", [(3, 5, 2)]),
        ("HEADS", {64: (2, 1)}),
        ("HEAD", (6, 16, 40)),
    ):
        monkeypatch.setattr(tune, name, toy)
    cases = list(tune.PASSES[kernel](64, torch.float32))
    assert cases
    for case in cases:
        case.run()
        expected = case.results()
        assert tune.fault_of(case, expected, 1e-5) is None
        assert "wrong" in tune.fault_of(case, [expected[0] + 1, *expected[1:]], 1e-5)
        assert "wrong" in tune.fault_of(case, [*expected[:-1], expected[-1] * torch.nan], 1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_taken_are_those_that_kernels_find(arch):
    for kernel, rows in TABLE.items():
        taken = tune.rows_taken(rows, arch)
        assert taken
        for row in taken:
            assert _gpu._tile_sizes(kernel, row["size"], row["bytes"], arch) == tune.constants_of(row)
        for row in rows:
            if any(other["bytes"] == row["bytes"] and other["size"] >= row["size"] for other in taken):
                assert _gpu._tile_sizes(kernel, row["size"], row["bytes"], arch) in map(tune.constants_of, taken)


def test_the_fastest_over_all_cases_is_chosen():
    assert tune.choose([[1.0, 4.0], [0.8, 4.4], [1.1, 2.0]]) == 2
    assert tune.choose([[1.0, 4.0], [2.0, 1.9]]) == 1


def test_a_gain_within_the_noise_changes_nothing():
    assert tune.choose([[1.0], [0.995]]) == 0
    assert tune.choose([[1.0], [1.2]]) == 0


def test_a_row_replaces_that_of_the_same_architecture():
    rows = [{"arch": 80, "bytes": 2, "size": 64, "BLOCK_M": 64, "why": "a"}]
    newer = rows[0] | {"BLOCK_M": 32, "why": "b"}
    assert tune.with_row(rows, newer) == [newer]
    hopper = newer | {"arch": 90}
    assert tune.with_row(rows, hopper) == [rows[0], hopper]
    assert tune.with_row([hopper], rows[0]) == [rows[0], hopper]


def test_only_the_tuned_kernel_gets_other_constants():
    first, second, *_ = TABLE
    row, other = TABLE[first][0], TABLE[second][0]
    element = torch.empty(0, dtype=tune.DTYPES[row["bytes"]])
    before = [_gpu.tile_sizes(kernel, of["size"], element) for kernel, of in ((first, row), (second, other))]
    with tune.tiles(first, {"BLOCK_M": 7}):
        assert _gpu.tile_sizes(first, row["size"], element) == {"BLOCK_M": 7}
        assert _gpu.tile_sizes(second, other["size"], element) == before[1]
    assert _gpu.tile_sizes(first, row["size"], element) == before[0]


class ToyCase:
    """Of a kernel that is twice as fast with 8 warps, does not fit with some constants, and is wrong with others."""

    name = "toy shapes"

    def results(self):
        blocks = _gpu.tile_sizes("toy.kernel", 64, torch.empty(0))
        if (blocks["BLOCK_M"], blocks["num_warps"]) == (128, 4):
            raise RuntimeError("out of resources: shared memory")
        return [torch.tensor(2.0 if blocks["BLOCK_M"] == 32 else 1.0)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """That of a toy case, which is not there. Returns the table."""
    pytest.importorskip("triton")
    table = tmp_path / "tiles.json"
    row = {"arch": 80, "bytes": 4, "size": 64, "BLOCK_M": 64, "num_warps": 4, "why": "a guess"}
    table.write_text(json.dumps({"toy.kernel": [row, row | {"size": 128}]}))
    monkeypatch.setattr(_gpu, "TABLE", table)
    monkeypatch.setattr(_gpu, "capability", lambda device: 90)
    monkeypatch.setattr(tune, "PASSES", {"toy.kernel": lambda size, dtype: [ToyCase(), ToyCase()]})
    monkeypatch.setattr(tune, "milliseconds", lambda kernel, candidates, case: [4 / c["num_warps"] for c in candidates])
    for name, value in (("is_available", True), ("synchronize", None), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, partial(lambda value: value, value))
    _gpu._tile_sizes.cache_clear()
    yield table
    _gpu._tile_sizes.cache_clear()


def test_tuning_writes_the_winner_and_says_why(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--size", "128"])
    assert tune.main() == 0
    rows = json.loads(gpu.read_text())["toy.kernel"]
    assert [(row["arch"], row["size"], row["num_warps"]) for row in rows] == [
        (80, 64, 4),
        (80, 128, 4),
        (90, 64, 4),  # not tuned, but before 128 it has to be found
        (90, 128, 8),
    ]
    assert all((row["BLOCK_M"], row["why"]) == (64, "a guess") for row in rows[:3])
    assert "0.500 ms at toy shapes (before: 1.000)" in rows[3]["why"]
    assert "a GPU, Triton 3." in rows[3]["why"]
    passed_over = capsys.readouterr().out
    assert "passed over BLOCK_M=128 num_warps=4: RuntimeError: out of resources: shared memory" in passed_over
    assert "passed over BLOCK_M=32 num_warps=4: wrong: its results differ by 1.0e+00" in passed_over


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--size", "256"], ["--bytes", "2"]])
def test_tuning_leaves_the_table_alone(gpu, monkeypatch, arguments):
    before = gpu.read_text()
    monkeypatch.setattr("sys.argv", ["tune", *arguments])
    assert tune.main() == 0
    assert gpu.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
