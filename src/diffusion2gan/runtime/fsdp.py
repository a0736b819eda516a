"""Networks sharded over the ranks by torch's `fully_shard` (FSDP2).

Each rank has a shard of every tensor.

A network is unsharded (`Group.unshard`) before the first forward pass of a step, and resharded by
`Group.sum`, once its gradients exist. In between there is no communication, so the passes of the
ranks may differ: R1's double backward pass runs on one rank only.
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
    """Shards the parameters of `module`, which are the same on all ranks.

    To be called before its optimiser and EMA are created.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # fully_shard uses the current device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharded = fully_shard(module, mesh=mesh)
    sharded.set_requires_gradient_sync(False)
    sharded.set_reshard_after_forward(False)
    sharded.set_reshard_after_backward(False)


def is_sharded(module: nn.Module | None) -> TypeGuard[FSDPModule]:
    return isinstance(module, FSDPModule)


def unshard(module: FSDPModule) -> None:
    """Gathers the full parameters on every rank, unless they are already gathered.

    All ranks must call it.
    """
    module.unshard()


def reshard(module: nn.Module) -> None:
    """Frees the full parameters: `parameters()` are the optimiser's shards again.

    Does nothing to a module that is not sharded.
    """
    if is_sharded(module):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; all ranks must call it. Returns any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged. No communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """This rank's shard of a full `tensor`, sharded as `target` is; without communication.

    Returns `tensor` unchanged if `target` is not sharded.
    """
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def load_full_state(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` of full weights into a module that may be sharded."""
    current = module.state_dict()
    state = {}
    for key, value in weights.items():
        state[key] = shard_like(value, current[key]) if key in current else value
    module.load_state_dict(state)
