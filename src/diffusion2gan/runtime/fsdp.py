"""Networks cut over the ranks by torch's `fully_shard` (FSDP2): each rank keeps a part of every tensor.

A network is gathered (`Group.unshard`) before a step's first forward pass, and stays whole until `Group.sum` has its
gradients. In between nothing is communicated: passes, R1's double one among them, may differ from rank to rank.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device) -> None:
    """Cuts the parameters of `module`, equal on all ranks, over them. Optimisers and averages are made after this."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # fully_shard takes the current one
    cutting = fully_shard(module, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    cutting.set_requires_gradient_sync(False)
    cutting.set_reshard_after_forward(False)
    cutting.set_reshard_after_backward(False)


def is_sharded(module: nn.Module | None) -> TypeGuard[FSDPModule]:
    return isinstance(module, FSDPModule)


def unshard(module: FSDPModule) -> None:
    """Makes its parameters whole on every rank; all ranks must ask. Where they are, nothing is done."""
    module.unshard()


def reshard(module: nn.Module) -> None:
    """Back to this rank's parts: its `parameters()` are those of the optimiser again. Of an uncut module: nothing."""
    if is_sharded(module):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; all ranks must ask. One that is not cut is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, there: Tensor) -> Tensor:
    """This rank's part of a whole `tensor`, where `there` is cut; without communication."""
    if not isinstance(there, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(there.device), there.device_mesh, there.placements, src_data_rank=None
    )


def load_full_state(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole weights."""
    there = module.state_dict()
    module.load_state_dict(
        {
            key: shard_like(value, there[key]) if key in there else value
            for key, value in weights.items()
        }
    )
