"""The head's vocabulary, cut over two and four processes: results and gradients are those of the whole."""

import re
import time

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from latro_kernels import VocabularyShard, linear_logprobs
from latro_kernels.impl import status
from latro_kernels.testing import assert_error_about_eagers
from tests import parallel_head_job as job
from tests.parallel_head_job import D, V

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")

SECONDS = 300
CUT = ("weight grad", "bias grad")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the four processes has found."""
    folder = tmp_path_factory.mktemp("parallel_head")
    processes = mp.spawn(job.run, args=(folder,), nprocs=job.RANKS, join=False)
    end = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"still running after {SECONDS} s")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(job.RANKS)]


@pytest.fixture
def alone(tmp_path):
    """This process is a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield VocabularyShard(dist.group.WORLD, 0, V)
    dist.destroy_process_group()


def together(found, case):
    """What the ranks of a group have found, which are the same but for gradients of their own rows: those joined."""
    W = len(case.begins)
    for first in range(0, job.RANKS, W):
        group = [of_rank[case] for of_rank in found[first : first + W]]
        for name in group[0].keys() - set(CUT):
            assert all(torch.equal(own[name], group[0][name]) for own in group), name
    return {name: torch.cat([own[name] for own in group]) if name in CUT else group[0][name] for name in group[0]}


def require(impl):
    ready = status("linear_logprobs", impl, "cpu")
    if not ready.ready:
        pytest.skip(f"{impl}: {ready.reason}")


def assert_close(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((ours[name].double() - value).abs().max())
        assert difference <= tolerance * max(1, float(value.abs().max())), name


@pytest.mark.parametrize("case", job.EXACT, ids=str)
def test_in_float64_it_is_the_whole_definition(found, case):
    assert_close(together(found, case), case.results(), 1e-10)


@pytest.mark.parametrize("case", job.SINGLE_AND_HALF, ids=str)
def test_error_is_about_eagers(found, case):
    require(case.impl)
    ours = [together(found, of) for of in job.of_seeds(case)]
    exact = [of.results(impl="reference", dtype=torch.float64) for of in job.of_seeds(case)]
    eager = [of.results(impl="reference") for of in job.of_seeds(case)]
    for name in ours[0]:
        assert_error_about_eagers(
            actual=lambda seed, name=name: ours[seed][name],
            eager=lambda seed, name=name: eager[seed][name],
            exact=lambda seed, name=name: exact[seed][name],
            what=name,
            seeds=job.SEEDS,
        )


@pytest.mark.parametrize("case", job.TRITON, ids=str)
def test_triton(found, case):
    require("triton")
    tolerance = 1e-5 if case.dtype == torch.float32 else 1e-2
    assert_close(together(found, case), case.results(impl="reference", dtype=torch.float64), tolerance)


def test_data_ranks_with_other_groups(found):
    """Losses and gradients of the head, summed over data ranks, are those of the whole batch."""
    whole = [case.results() for case in job.DATA]
    for rank, own in enumerate(of_rank["data"] for of_rank in found):
        data, tensor = divmod(rank, 2)
        rows = slice(0, 51) if tensor == 0 else slice(51, V)
        for name in CUT:
            torch.testing.assert_close(own[name], sum(of[name] for of in whole)[rows], rtol=1e-10, atol=1e-10)
        for name in ("loss", "logps", "hidden grad"):
            torch.testing.assert_close(own[name], whole[data][name], rtol=1e-10, atol=1e-10)


def test_the_shard_of_a_dtensor_has_its_rows(found):
    assert [of_rank["dtensors"] for of_rank in found] == [[True, True]] * job.RANKS


def test_ranks_that_begin_at_one_row_are_refused_on_all(found):
    assert all("got begin (0, 26, 26, 78) and size (101, 101, 101, 101)" in of_rank["refused"] for of_rank in found)


# What takes one process


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.tensor([0, 3, 3, 6]), torch.tensor([5, 100, 0, 5])


BAD = {
    "not a shard": (lambda shard: {"shard": "all"}, TypeError, "shard must be a VocabularyShard, got str"),
    "rows of another": (
        lambda shard: {"weight": torch.zeros(V - 1, D), "shard": shard},
        ValueError,
        "weight must have the rows [begin, end) = [0, 101) of its shard, 101, got 100",
    ),
    "target": (
        lambda shard: {"targets": torch.tensor([5, V, 0, 5]), "shard": shard},
        ValueError,
        "targets must be in [0, V) = [0, 101), got 101",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(alone, name):
    make, error, text = BAD[name]
    hidden, weight, rows, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "rows": rows, "targets": targets, **make(alone)}
    with pytest.raises(error, match=re.escape(f"linear_logprobs: {text}")):
        linear_logprobs(**arguments)


def test_a_shard_must_begin_within_the_vocabulary(alone):
    for begin, size, error in ((3, V, ValueError), (V, V, ValueError), (0.0, V, TypeError)):
        with pytest.raises(error, match="VocabularyShard: "):
            VocabularyShard(alone.group, begin, size)


def test_dtensors_that_are_cut_otherwise(alone):
    mesh = init_device_mesh("cpu", (1,))
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match=r"VocabularyShard\.of: weight must be cut by Shard\(0\)"):
            VocabularyShard.of(distribute_tensor(torch.zeros(V, D), mesh, [placement]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_one_rank_alone(alone, impl):
    whole, ours = inputs(), inputs()
    for arguments, shard in ((whole, None), (ours, alone)):
        linear_logprobs(*arguments, impl=impl, shard=shard).sum().backward()
    for a, b in zip(ours[:2], whole[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_scoring_nothing(alone, impl):
    hidden, weight, rows, targets = inputs()
    out = linear_logprobs(hidden, weight, rows[:0], targets[:0], shard=alone, impl=impl)
    out.sum().backward()
    assert out.shape == (0,)
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_double_backward_is_refused(alone, impl):
    hidden, *others = inputs()
    loss = linear_logprobs(hidden, *others, shard=alone, impl=impl).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|once_differentiable"):
        grad.sum().backward()


# Dynamo looks at every attribute of a tensor, .grad included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_it_is_left_out_of_a_compiled_graph(alone):
    hidden, weight, rows, targets = inputs()

    def loss(hidden):
        return 2 * linear_logprobs(3 * hidden, weight, rows, targets, shard=alone).sum()

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="shard cannot be compiled"):
        torch.compile(loss, backend="eager", fullgraph=True)(hidden)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager")(hidden), loss(hidden))


def test_a_target_that_no_rank_has_gives_no_number(alone, monkeypatch):
    """As on a GPU, where values are not read."""
    monkeypatch.setattr("latro_kernels.checks._reads_values", lambda tensor: False)
    hidden, weight, rows, targets = inputs()
    out = linear_logprobs(hidden, weight, rows, targets + V * (targets == 100), shard=alone)
    assert out.isnan().tolist() == [False, True, False, False]
