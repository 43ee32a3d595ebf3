"""TreeModel under DDP and FSDP2: two ranks with different prompts get the mean of their gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from latro.model import TreeModel
from latro_kernels import pack_rationales
from tests.families import tiny_model

RANKS = 2
PROMPTS = [[5, 9, 13, 4], [8, 3]]
RATIONALES = [[[7, 6, 21], [30], []], [[11, 12], [40, 41, 42, 43]]]
ANSWERS = [[17, 18], [19]]

# What is sharded as a unit of its own; the rest is TreeModel's. A tied head is the embedding, and stays with it.
UNITS = {
    "nothing": lambda model: [],
    "layers": lambda model: list(model.model.layers),
    "layers and head": lambda model: [*model.model.layers, model.lm_head],
    "embedding, layers and head": lambda model: [model.model.embed_tokens, *model.model.layers, model.lm_head],
}
CASES = [
    ("llama", False, "nothing"),
    ("llama", False, "layers and head"),
    ("llama", False, "embedding, layers and head"),
    ("llama", True, "layers"),
    ("gemma2", False, "layers and head"),
    ("granite", False, "layers and head"),
]


def batch(rank):
    return pack_rationales([PROMPTS[rank]], [RATIONALES[rank]], [ANSWERS[rank]])


def loss(tree_model, rank, ref_logps):
    tree, scored = batch(rank)
    return tree_model(tree, scored, ref_logps=ref_logps, beta=0.1, answer_weight=0.5).loss


def full(parameter):
    grad = parameter.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def check(rank, wrapped, model, expected):
    """One step of the wrapped copy against the mean of both ranks' gradients of the plain model."""
    reference = torch.linspace(-3, 0, len(batch(rank)[1].rows), dtype=torch.float64)
    loss(wrapped, rank, reference).backward()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full(parameter), expected[name], rtol=0, atol=1e-6 * float(largest), msg=name)


def mean_gradients(model):
    tree_model = TreeModel(model)
    for rank in range(RANKS):
        reference = torch.linspace(-3, 0, len(batch(rank)[1].rows), dtype=torch.float64)
        (loss(tree_model, rank, reference) / RANKS).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def run(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for family, tied, units in CASES:
        plain = tiny_model(family, tie_word_embeddings=tied).double().train()
        expected = mean_gradients(plain)
        logprobs = TreeModel(plain).logprobs(*batch(rank))

        model = copy.deepcopy(plain)
        check(rank, DistributedDataParallel(TreeModel(model)), model, expected)

        for checkpointing in (False, True):
            model = copy.deepcopy(plain)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            tree_model = TreeModel(model)
            for unit in UNITS[units](model):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            fully_shard(tree_model, mesh=mesh)
            torch.testing.assert_close(tree_model.logprobs(*batch(rank)), logprobs)
            check(rank, tree_model, model, expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_get_the_mean_gradient():
    if not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port = store.port
    del store
    mp.spawn(run, args=(port,), nprocs=RANKS)
