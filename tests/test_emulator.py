"""That the emulator does what a GPU does, and reports what a GPU would hang on."""

from pathlib import Path

import emulator
import pytest
import torch


@pytest.fixture(scope="module")
def ops():
    return emulator.library("latro_emulator_kernels", Path(__file__).with_name("emulator_kernels.cu"))


@pytest.fixture(params=["", "1", "2"])
def seed(request, monkeypatch):
    monkeypatch.setenv("LATRO_EMULATOR_SEED", request.param)
    return request.param


def run(ops, kernel, blocks=1, threads=64, shared_bytes=4096, cluster=1):
    out = torch.full((blocks, threads), torch.nan)
    ops.run(kernel, out, shared_bytes, cluster)
    return out


@pytest.mark.parametrize("threads", [1, 31, 33, 1024])
def test_a_barrier_waits_for_the_block(ops, threads, seed):
    out = run(ops, "reverse", blocks=3, threads=threads)
    assert torch.equal(out, torch.arange(threads - 1.0, -1, -1).expand(3, -1))


def test_a_forgotten_barrier_shows(ops, seed):
    assert run(ops, "reverse without a barrier").isnan().any()


def test_shared_memory_is_nan_for_each_block(ops):
    assert run(ops, "uninitialised", blocks=3).eq(1).all()


def test_lanes_exchange_values(ops, seed):
    assert run(ops, "shuffles", blocks=2, threads=96).eq(1).all()


def test_a_barrier_does_not_wait_for_threads_that_have_returned(ops, seed):
    out = run(ops, "half a block", threads=80)
    assert torch.equal(out[0, :40], torch.arange(39.0, -1, -1))
    assert out[0, 40:].isnan().all()


def test_named_barriers(ops, seed):
    out = run(ops, "named barriers", threads=128)
    assert torch.equal(out[0], torch.cat([torch.arange(63.0, -1, -1), torch.arange(64.0)]))


def test_blocks_of_a_cluster_run_at_once_and_share_memory(ops, seed):
    out = run(ops, "cluster", blocks=4, threads=32, cluster=2)
    assert torch.equal(out, torch.tensor([1.0, 100, 203, 302])[:, None].expand(4, 32))


def test_a_seed_changes_the_order_of_threads_and_nothing_else(ops, monkeypatch):
    orders = []
    for seed in ("", "1", "1", "2"):
        monkeypatch.setenv("LATRO_EMULATOR_SEED", seed)
        orders.append(run(ops, "turns"))
    in_order, first, again, second = orders
    assert torch.equal(in_order, torch.arange(64.0)[None])
    assert torch.equal(first, again)
    assert not torch.equal(first, in_order) and not torch.equal(first, second)
    assert torch.equal(first.sort().values, in_order)


def test_what_is_late_comes_when_every_thread_waits(ops, seed):
    assert run(ops, "late").eq(2).all()


FAULTS = [
    ("barrier in a branch", r"no thread can go on\n"
        r"  threads 32-63 of block \(0, 0, 0\) wait in __syncthreads, line \d+ of .*barrier_in_a_branch_kernel.*\n"
        r"  threads 0-31 of block \(0, 0, 0\) wait in sync_some, line \d+ of .*barrier_in_a_branch_kernel"),
    ("shuffle in a branch", r"no thread can go on\n"
        r"  threads 16-31, 48-63 of block \(0, 0, 0\) have returned\n"
        r"  threads 0-15, 32-47 of block \(0, 0, 0\) wait in __shfl_xor_sync, line \d+ of .*in_a_branch_kernel"),
    ("different shuffles", "lanes of a warp meet in __shfl_sync and in __shfl_xor_sync, thread 1 of block"),
    ("part of the mask", "__shfl_xor_sync: only the full mask is emulated"),
    ("trap", r"__trap, thread 3 of block \(0, 0, 0\)"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "message"), FAULTS, ids=[kernel for kernel, _ in FAULTS])
def test_a_kernel_that_would_hang_is_reported(ops, kernel, message):
    with pytest.raises(RuntimeError, match=message):
        run(ops, kernel)
    assert run(ops, "shuffles").eq(1).all()


def test_a_lane_that_does_not_exist_is_reported(ops):
    with pytest.raises(RuntimeError, match="__shfl_xor_sync: lane 16 of this warp does not exist"):
        run(ops, "missing lane", threads=16)


@pytest.mark.parametrize(
    "shape",
    [{"threads": 1025}, {"blocks": 0}, {"blocks": 3, "cluster": 2}, {"shared_bytes": 300_000}],
    ids=str,
)
def test_a_launch_that_no_gpu_takes_is_refused(ops, shape):
    with pytest.raises(RuntimeError, match="no GPU launches a grid of"):
        run(ops, "shuffles", **shape)
