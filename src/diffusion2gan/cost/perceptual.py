"""The compute of `diffusion2gan perceptual distil`, counted before it starts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion2gan.cost.plan import ASSUMED, GPUS
from diffusion2gan.pairs.store import open_set
from diffusion2gan.perceptual.distance import PixelLPIPS
from diffusion2gan.perceptual.distil import NUM_PERTURBATIONS, DistilSettings
from diffusion2gan.perceptual.vgg import VGG, num_dropped_pools
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.autoencoder import load_vae, spatial_factor

# Compute of a pass with gradients, in forward passes: with respect to the input alone, to the
# weights too, and to the weights through the gradient with respect to the input (twice as much).
INPUT_GRADIENT = 2
TRAINING = 3
TRAINING_THROUGH_GRADIENT = 6


def plan_distil(
    pairs: Location, vae: str, source: str, settings: DistilSettings
) -> dict[str, float | int | str]:
    """Tera floating-point operations, disk, and hours on each GPU of `plan`.

    Counted, not measured: a multiply-add is two operations, and the GPU is assumed to reach
    `ASSUMED.utilisation` of its bfloat16 peak.
    """
    spec = open_set(pairs)
    target = PixelLPIPS.from_pretrained(source, vae=load_vae(vae))
    count = min(settings.count, spec.count)
    return plan_from_networks(target, spec.latent_shape, count, settings)


def plan_from_networks(
    target: PixelLPIPS, latent_shape: tuple[int, int, int], count: int, settings: DistilSettings
) -> dict[str, float | int | str]:
    """`plan_distil` for `count` latents of this shape."""
    vae = target._decoder[0]
    factor = spatial_factor(vae)
    channels, height, width = latent_shape
    vgg = VGG(channels, settings.network_widths, num_dropped_pools(factor))

    # One forward pass of each network
    decode = count_flops(Decoder(vae), (1, *latent_shape))
    compare = count_flops(target._frozen[0], (1, 3, factor * height, factor * width))
    learn = count_flops(vgg, (1, *latent_shape))

    # Targets: each latent once, and its perturbations, with their gradient if it is wanted
    num_perturbed = count * NUM_PERTURBATIONS
    image = decode + compare
    passes = 1 + INPUT_GRADIENT if settings.gradient_weight > 0 else 1
    targets = image * (count + passes * num_perturbed)

    # Training: the same latents in each epoch
    passes = TRAINING_THROUGH_GRADIENT if settings.gradient_weight > 0 else TRAINING
    training = settings.epochs * passes * learn * (count + num_perturbed)

    # Disk: float16 latents, perturbations and gradients
    tensors = 1 + NUM_PERTURBATIONS * (2 if settings.gradient_weight > 0 else 1)
    report: dict[str, float | int | str] = {
        "latents": count,
        "perturbations": num_perturbed,
        "decode_tflop": round(decode / 1e12, 4),
        "compare_tflop": round(compare / 1e12, 4),
        "network_tflop": round(learn / 1e12, 4),
        "targets_pflop": round(targets / 1e15, 2),
        "training_pflop": round(training / 1e15, 2),
        "disk_gib": round(count * tensors * channels * height * width * 2 / 2**30, 2),
    }
    for name, gpu in GPUS.items():
        seconds = (targets + training) / (gpu.tflops * 1e12 * ASSUMED.utilisation)
        report[f"hours_{name}"] = round(seconds / 3600, 2)
    report["assumed"] = f"{ASSUMED.utilisation:.0%} of the bfloat16 peak; not measured on a GPU"
    return report


class Decoder(nn.Module):
    """A VAE's decoder as a module of latents alone."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return torch.as_tensor(self.vae.decode(latents, return_dict=False)[0])


def count_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Operations of a forward pass, on a device without numbers; the network itself stays."""
    on_meta = copy.deepcopy(network).float().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops())
