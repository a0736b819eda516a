"""The one-step student: the teacher's network and weights, evaluated once at the last timestep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.precision import full_float32
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher, copy_sharing_weights

OUTPUT_LAYERS = ("conv_out", "proj_out")  # the last layer of a UNet, and of a transformer


class Student(nn.Module):
    """`student(noise, cond)` → latents [B, C, h, w] float32, differentiable in `trained`.

    x̂ = x0(z, network(z, T, c)) with T the teacher's last timestep. The network's output keeps the
    teacher's meaning (ε, v or a flow's v), so that the exported network is an ordinary one. It is
    computed in float32: ε at T multiplies errors by 14.6, so the output layer and everything after
    it stay in float32 under autocast too, without TF32 on a GPU (`full_float32`).

    With `lora_rank`, the teacher's weights are shared and frozen, and only a low-rank addition to
    the layers whose names end in one of `lora_targets` is trained (Hu et al. 2022, section 4.1). It
    is initialised to zero.
    """

    network: Any
    trained: nn.Module  # what is trained and saved: the network, or the LoRA's weights alone

    def __init__(
        self,
        teacher: Teacher,
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_targets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.teacher = teacher

        # Network
        if lora_rank > 0:
            network = copy_sharing_weights(teacher.network)
            self.network = add_lora(network, lora_rank, lora_targets)
        else:
            self.network = copy.deepcopy(teacher.network).requires_grad_(True)
        keep_output_in_float32(self.network)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()

        # `trained` has the same parameters as `network`. Written to __dict__, it is not registered
        # as a submodule, so that parameters() and state_dict() list them only once.
        self.__dict__["trained"] = self.network if lora_rank == 0 else lora_parameters(self.network)

    @classmethod
    def from_recipe(cls, recipe: Recipe, teacher: Teacher) -> Student:
        """The recipe's student; a LoRA's random weights depend on the recipe's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            targets = recipe.lora_targets.split("+")
            student = cls(teacher, recipe.gradient_checkpointing, recipe.lora_rank, targets)
        return student.to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        return self.teacher.denoise(noise, self.teacher.last_timestep, cond, self.network)

    def fused(self) -> dict[str, Tensor]:
        """The weights of an ordinary network: those trained, or the teacher's plus the LoRA."""
        if self.trained is self.network:
            weights: dict[str, Tensor] = self.network.state_dict()
            return weights

        weights = dict(self.teacher.network.state_dict())
        for name, layer in lora_layers(self.network).items():
            delta = layer.get_delta_weight("default").detach()
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
        return weights

    def lora(self) -> dict[str, Tensor] | None:
        """A LoRA's weights by diffusers' names; None for a student of full weights."""
        if self.trained is self.network:
            return None
        from peft.utils import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.network))


def add_lora(network: Any, rank: int, targets: Sequence[str]) -> Any:
    """Adds a LoRA of `rank` with scale 1 to the layers whose names end in one of `targets`.

    Raises UserError if peft is not installed, or if no layer has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            "a LoRA student needs peft: pip install 'diffusion2gan[lora]', or set lora_rank=0"
        ) from error

    # Every target must match a layer
    names = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            names.append(name)

    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last_words = {name.rpartition(".")[2] for name in names}
            known = last_words - set("0123456789")
            raise UserError(
                f"lora_targets: the teacher has no layer named {target!r}{nearest(target, known)}"
            )

    # Scale 1: alpha equals the rank
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    return network


def lora_parameters(network: nn.Module) -> nn.ParameterDict:
    """The network's trainable parameters, by name, with / instead of dots."""
    parameters = nn.ParameterDict()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameters[name.replace(".", "/")] = parameter
    return parameters


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that a LoRA was added to, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def keep_output_in_float32(network: Any) -> None:
    """Replaces the output layer by one that autocast does not affect; parameters and names stay."""
    name = next(name for name in OUTPUT_LAYERS if hasattr(network, name))
    layer = getattr(network, name)
    replacement: nn.Module
    if isinstance(layer, nn.Conv2d):
        replacement = Float32Conv2d.from_layer(layer)
    else:
        replacement = Float32Linear.from_layer(layer)
    setattr(network, name, replacement)


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too, and without TF32."""

    @classmethod
    def from_layer(cls, layer: nn.Conv2d) -> Float32Conv2d:
        """The same layer, sharing its parameters."""
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
        )
        new.weight = layer.weight
        new.bias = layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        with full_float32(x.device.type):
            return super().forward(x.float())


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 under autocast too, and without TF32."""

    @classmethod
    def from_layer(cls, layer: nn.Linear) -> Float32Linear:
        """The same layer, sharing its parameters."""
        new = cls(layer.in_features, layer.out_features)
        new.weight = layer.weight
        new.bias = layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        with full_float32(x.device.type):
            return super().forward(x.float())
