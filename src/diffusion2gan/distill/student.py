"""The one-step student: the teacher's network with the teacher's weights, run once at the last timestep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher, sharing_weights

OUTPUT_LAYERS = ("conv_out", "proj_out")  # a UNet's and a transformer's last


class Student(nn.Module):
    """`student(noise, cond)` → latents [B, C, h, w] float32, differentiable in the weights of `trained`.

    x̂ = x0(z, network(z, T, c)) with T the teacher's last timestep; the teacher's own meaning of the output (ε, v or a
    flow's v) is kept, in float32, so that the exported network is an ordinary one. ε at T multiplies errors by 14.6,
    so the output layer and all after it stay in float32 under autocast too. With `lora_rank` the teacher's own weights
    are the base, shared with it and frozen, and only a low-rank addition to the layers whose names end in one of
    `lora_targets` is trained (Hu et al. 2022, section 4.1), born zero.
    """

    def __init__(
        self,
        teacher: Teacher,
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_targets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if lora_rank:
            self.network = with_lora(sharing_weights(teacher.network), lora_rank, lora_targets)
        else:
            self.network = copy.deepcopy(teacher.network).requires_grad_(True)
        keep_output_in_float32(self.network)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        lora = nn.ParameterDict(
            {n.replace(".", "/"): p for n, p in self.network.named_parameters() if p.requires_grad}
        )
        self._trained = (
            lora if lora_rank else self.network,
        )  # in tuples: not parts of this module
        self._teacher = (teacher,)

    @classmethod
    def from_recipe(cls, recipe: Recipe, teacher: Teacher) -> Student:
        """The recipe's; what of a LoRA is born random is born of the recipe's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            targets = recipe.lora_targets.split("+")
            return cls(teacher, recipe.gradient_checkpointing, recipe.lora_rank, targets).to(
                teacher.device
            )

    @property
    def trained(self) -> nn.Module:
        """What learns and is kept: the whole network, or the LoRA's weights alone."""
        return self._trained[0]

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        teacher = self._teacher[0]
        return teacher.denoise(noise, teacher.last_timestep, cond, self.network)

    def fused(self) -> dict[str, Tensor]:
        """The weights of an ordinary network: the trained one's, or the teacher's with the LoRA added."""
        if self.trained is self.network:
            return self.network.state_dict()
        weights = dict(self._teacher[0].network.state_dict())
        for name, layer in lora_layers(self.network).items():
            weights[f"{name}.weight"] = (
                weights[f"{name}.weight"] + layer.get_delta_weight("default").detach()
            )
        return weights

    def lora(self) -> dict[str, Tensor] | None:
        """A LoRA's weights by diffusers' names; None for a student of full weights."""
        if self.trained is self.network:
            return None
        from peft.utils import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.network))


def with_lora(network: Any, rank: int, targets: Sequence[str]) -> Any:
    """Adds a LoRA of `rank`, scaled by one. Raises UserError without peft, or at a target that no layer is called."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            "a LoRA student needs peft: pip install 'diffusion2gan[lora]', or set lora_rank=0"
        ) from error
    linear = [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = {name.rpartition(".")[2] for name in linear} - set("0123456789")
            raise UserError(
                f"lora_targets: no layer of the teacher is called {target!r}{nearest(target, known)}"
            )
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    return network


def lora_layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def keep_output_in_float32(network: Any) -> None:
    """Replaces the output layer by one that autocast does not touch, with the same parameters and names."""
    name = next(name for name in OUTPUT_LAYERS if hasattr(network, name))
    layer = getattr(network, name)
    setattr(
        network,
        name,
        Float32Conv2d.of(layer) if isinstance(layer, nn.Conv2d) else Float32Linear.of(layer),
    )


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast does not touch."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Float32Conv2d:
        """The same layer, with the same parameters under the same names."""
        same = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
        same.weight, same.bias = conv.weight, conv.bias
        return same

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Float32Linear(nn.Linear):
    """A linear layer that autocast does not touch."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Float32Linear:
        """The same layer, with the same parameters under the same names."""
        same = cls(linear.in_features, linear.out_features)
        same.weight, same.bias = linear.weight, linear.bias
        return same

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
