"""LatentLPIPS and E-LatentLPIPS (Kang et al. 2024, section 3.2): perceptual distances between latents.

`distance(a, b) → [B]`: zero for equal latents, never negative, gradients to `a`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import Strengths, apply_transform, draw_transform, parse_families
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import read_json, write_json

EPS = 1e-8


def unit(features: Tensor) -> Tensor:
    """Each pixel's feature vector divided by its length, in float32."""
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + EPS).rsqrt()


def feature_distance(features_a: list[Tensor], features_b: list[Tensor], heads: list[Tensor]) -> Tensor:
    """[B]: Σ_l mean_hw Σ_c w_lc (f̂_lc(a) − f̂_lc(b))² (Zhang et al. 2018, eq. 1). `heads[l]` is w_l ≥ 0, [C_l]."""
    total = torch.zeros(len(features_a[0]), device=features_a[0].device)
    for a, b, head in zip(features_a, features_b, heads, strict=True):
        squares = (unit(a) - unit(b)).square()
        total = total + (squares * head[:, None, None]).sum(1).mean((1, 2))
    return total


class LatentLPIPS(nn.Module):
    """`LatentLPIPS(vgg, heads)(a, b)` → [B]; `a`, `b` [B, C, h, w] latents × scaling_factor.

    Frozen and in eval mode by construction: `train()` and `requires_grad_()` from outside change nothing.
    `b` is the target: its features are computed without graph.
    """

    def __init__(self, vgg: VGG, heads: list[Tensor]) -> None:
        super().__init__()
        # hidden from parameters() and train() of whatever holds this module
        self._frozen = (vgg.eval().requires_grad_(False), [head.detach().clamp_min(0) for head in heads])

    def _apply(self, fn: Any, recurse: bool = True) -> LatentLPIPS:
        vgg, heads = self._frozen
        self._frozen = (vgg._apply(fn), [fn(head) for head in heads])
        return super()._apply(fn, recurse)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        _check(a, b, self._frozen[0])
        return self._between(a.float(), b.float())

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        vgg, heads = self._frozen
        dtype = heads[0].dtype
        with torch.no_grad():
            target = vgg(b.to(dtype))
        return feature_distance(vgg(a.to(dtype)), target, heads)

    @classmethod
    def from_pretrained(cls, source: str | Path = "pocket", **options: Any) -> Any:
        """From `pocket` or a folder with config.json and model.safetensors."""
        folder = shipped.folder("latent_vgg") if source == "pocket" else Path(source)
        config = read_json(folder / "config.json")
        tensors, _ = checkpoint.load(folder / "model.safetensors")
        vgg = VGG(config["in_channels"], tuple(config["widths"]), config["num_dropped"])
        vgg.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in checkpoint.unpack("vgg", tensors).items()}
        )
        heads = [tensors[f"heads/{level}"].float() for level in range(len(config["widths"]))]
        return cls(vgg, heads, **options)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        vgg, heads = self._frozen
        tensors = checkpoint.pack("vgg", vgg) | {f"heads/{level}": head for level, head in enumerate(heads)}
        checkpoint.save(
            Path(folder) / "model.safetensors",
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, {},
        )  # fmt: skip
        write_json(Path(folder) / "config.json", vgg.config)


class ELatentLPIPS(LatentLPIPS):
    """The ensembled distance: E_T[d(F(T a), F(T b))], a fresh T per sample and call, the same on both sides.

    `transforms`: families joined by "+" (`geometric+cutout` is the paper's final choice); `num_draws`: Ts averaged
    per call. `generator`: a CPU torch.Generator that decides T; give the same state for the same T (a fixed T for
    monitoring). Without one, torch's own is used. `part` = (rows, size of the batch): `a` and `b` are these rows of a
    batch and get the Ts that they would get in it.
    """

    def __init__(
        self, vgg: VGG, heads: list[Tensor], transforms: str = "geometric+cutout", num_draws: int = 1,
        strengths: Strengths | None = None,
    ) -> None:  # fmt: skip
        super().__init__(vgg, heads)
        self.families, self.num_draws, self.strengths = parse_families(transforms), num_draws, strengths

    def forward(
        self, a: Tensor, b: Tensor, generator: torch.Generator | None = None, part: tuple[slice, int] | None = None
    ) -> Tensor:
        _check(a, b, self._frozen[0])
        rows, batch = part or (slice(None), len(a))
        generator = generator or torch.default_generator
        total = torch.zeros(len(a), device=a.device)
        for _ in range(self.num_draws):
            transform = draw_transform(batch, self.families, generator, self.strengths, a.device).rows(rows)
            total = total + self._between(apply_transform(a, transform), apply_transform(b, transform))
        return total / self.num_draws


def _check(a: Tensor, b: Tensor, vgg: VGG) -> None:
    if a.shape != b.shape:
        raise UserError(f"the two latents differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4 or a.shape[1] != vgg.config["in_channels"]:
        raise UserError(
            f"latents of shape {tuple(a.shape)}: this network reads [B, {vgg.config['in_channels']}, h, w]; use the "
            "network of the same VAE"
        )
