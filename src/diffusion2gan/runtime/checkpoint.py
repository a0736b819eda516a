"""A training state on disk: one safetensors file (tensors) whose header carries the rest as JSON. No pickle.

The tensors may lie beside it, in the parts that several ranks wrote (`parts`); the file then names them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime import fsdp, sharded_checkpoint
from diffusion2gan.runtime.files import atomic_write


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes `tensors` and `meta` (JSON) whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()},
            temporary,
            {"meta": json.dumps(meta)},
        )


def meta(path: Path) -> dict[str, Any]:
    """What `save` was given beside the tensors, without reading those; errors as `load`'s."""
    return _read(path, tensors=False)[1]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse of `save`. Raises UserError where there is no such file, Failure where it or a part is damaged."""
    tensors, said = _read(path, tensors=True)
    if "parts" in said:
        tensors = sharded_checkpoint.read(
            path.parent / said["parts"]["folder"], said["parts"]["files"]
        )
    return tensors, said


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {key: file.get_tensor(key) for key in file.keys() if tensors}, said  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (SafetensorError, ValueError) as error:
        raise Failure(
            f"checkpoint {path} is damaged ({error}); delete it to start this stage again."
        ) from error


def pack(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in module.state_dict().items()}


def unpack(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in tensors.items()
        if key.startswith(f"{name}/")
    }


def pack_optimizer(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's tensors, by the parameter's place: `name/12/exp_avg`. Settings are the recipe's to restore."""
    packed: dict[str, Tensor] = {}
    for place, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(
                value, dict
            ):  # bitsandbytes' own; some share memory, which safetensors does not take
                packed |= {
                    f"{name}/{place}/{inner}": tensor.clone() for inner, tensor in value.items()
                }
            else:
                packed[f"{name}/{place}/{key}"] = torch.as_tensor(value)
    return packed


def unpack_optimizer(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in unpack(name, tensors).items():
        place, field = key.split("/")
        if value.dtype == torch.int64:
            state.setdefault(int(place), {})[field] = int(value)
            continue
        same = value.shape == parameters[int(place)].shape and value.ndim > 0
        state.setdefault(int(place), {})[field] = (
            fsdp.shard_like(value, parameters[int(place)]) if same else value
        )
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


class EMA:
    """Exponential moving average of a module's parameters: `shadow ← decay·shadow + (1−decay)·parameter`.

    While few steps have been seen the decay is min(decay, (1+n)/(10+n)), so that the start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.shadow = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, weight)
            else:
                self.shadow[key].copy_(value)
