"""Where parameters are sharded: what beside the model that trains is sharded too, and what is done with its shards."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from latro.model import TreeModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_whole(model: nn.Module) -> None:
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            "LatroTrainer: model must be whole, got one that ZeRO-3 shared out as it was loaded; "
            "load it before its LatroConfig is made"
        )


def check_fsdp(accelerator: Accelerator) -> None:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "LatroTrainer: fsdp_version must be 2, got 1, whose weights cannot be gathered one by one; "
            "see examples/accelerate/fsdp2.yaml"
        )


def keep_output_dtype(accelerator: Accelerator) -> None:
    """Before FSDP2 shards: accelerate would have it round losses and log-probs to the dtype of the products."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def placed(reference: TreeModel, accelerator: Accelerator) -> TreeModel:
    """Where the parameters of the model that trains are sharded, sharded as they are: then every process must call
    it as often. Else whole, on this process's device."""
    if accelerator.is_fsdp2:
        fsdp2_prepare_model(accelerator, reference)
        # No backward pass follows, for which its head would stay gathered.
        reference.set_reshard_after_forward(True)  # type: ignore[operator]
        return reference
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return _by_zero3(reference, accelerator)
    return reference.to(accelerator.device)


def _by_zero3(reference: TreeModel, accelerator: Accelerator) -> TreeModel:
    import deepspeed

    stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it insists on one
        "zero_optimization": {"stage": 3, "offload_param": stage.get("offload_param", {"device": "none"})},
        "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
        "fp16": {"enabled": accelerator.mixed_precision == "fp16"},
    }
    engine, *_ = deepspeed.initialize(model=reference, config=config)
    return engine.module


def whole_copy(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """On this process's device, its parameters in the dtype that shards are gathered in."""
    whole = copy.deepcopy(model)
    for weight in whole.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(DTYPES.get(accelerator.mixed_precision, weight.dtype))
    return nn.Module.to(whole, accelerator.device)


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs must be. Shards may wait elsewhere."""
    weight = next(model.parameters())
    is_shard = hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")
    return PartialState().device if is_shard else weight.device


def reshard(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows, for which FSDP2 keeps some parameters gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
