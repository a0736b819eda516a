"""LatentLPIPS and E-LatentLPIPS (Kang et al. 2024, section 3.2), and LPIPS on decoded pixels: distances of latents.

`distance(a, b) → [B]`: zero for equal latents, never negative, gradients to `a`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import (
    BatchRows,
    Strengths,
    apply_transform,
    draw_transform,
    parse_families,
)
from diffusion2gan.perceptual.checks import (
    check_finite,
    check_precision,
    check_shapes,
    warn_unscaled,
)
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.perceptual.weights import load_network, save_network
from diffusion2gan.teacher.autoencoder import decode, load_vae, num_latent_channels

EPS = 1e-8


def unit(features: Tensor, eps: float = EPS, eps_inside: bool = True) -> Tensor:
    """Each pixel's feature vector divided by its length, in float32: f/√(Σf² + eps), or f/(√Σf² + eps)."""
    features = features.float()
    squares = features.square().sum(1, keepdim=True)
    return features * (squares + eps).rsqrt() if eps_inside else features / (squares.sqrt() + eps)


def channel_differences(
    features_a: list[Tensor], features_b: list[Tensor], eps: float = EPS, eps_inside: bool = True
) -> list[Tensor]:
    """mean_hw (f̂_lc(a) − f̂_lc(b))², [B, C_l] for each layer l: all of the distance but its heads."""
    return [
        (unit(a, eps, eps_inside) - unit(b, eps, eps_inside)).square().mean((2, 3))
        for a, b in zip(features_a, features_b, strict=True)
    ]


def weigh(differences: list[Tensor], heads: list[Tensor]) -> Tensor:
    """[B]: Σ_l Σ_c w_lc · differences_lc (Zhang et al. 2018, eq. 1). `heads[l]` is w_l ≥ 0, [C_l]."""
    layers = [(d * head.float()).sum(1) for d, head in zip(differences, heads, strict=True)]
    return torch.stack(layers).sum(0)


class LatentLPIPS(nn.Module):
    """`LatentLPIPS(vgg, heads)(a, b)` → [B]; `a`, `b` [B, C, h, w] latents × scaling_factor.

    Frozen and in eval mode by construction: `train()` and `requires_grad_()` from outside change nothing.
    `b` is the target: its features are computed without graph, unless `target_grad`. The network computes in the
    precision the module is cast to (`.bfloat16()`); heads, normalisation and distance in float32. `eps` and
    `eps_inside` are `unit`'s.

    Raises UserError at latents of different shapes, of another VAE's channels, not finite, or a float16 network on a
    CPU. Says once if latents look unscaled. Numbers are looked at only on a CPU (`checks`).
    """

    network = "latent_vgg"

    def __init__(
        self,
        vgg: VGG,
        heads: list[Tensor],
        *,
        eps: float = EPS,
        eps_inside: bool = True,
        target_grad: bool = False,
    ) -> None:
        super().__init__()
        # hidden from parameters() and train() of whatever holds this module
        self._frozen = (
            vgg.eval().requires_grad_(False),
            [head.detach().clamp_min(0).float() for head in heads],
        )
        self.eps, self.eps_inside, self.target_grad = eps, eps_inside, target_grad
        self.channels, self.smallest_side = int(vgg.config["in_channels"]), vgg.smallest_side
        self._told = False

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        vgg, heads = self._frozen
        self._frozen = (vgg._apply(fn), [head.to(fn(head).device) for head in heads])
        return super()._apply(fn, recurse)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor:
        """[B]. This distance is deterministic: `generator` and `rows` are accepted and ignored."""
        self._check(a, b)
        return self._between(a.float(), b.float())

    def features(self, x: Tensor) -> list[Tensor]:
        """The five maps the distance compares."""
        vgg = self._frozen[0]
        return vgg(x.to(next(vgg.parameters()).dtype))

    def differences(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """`channel_differences` of two latents: what `perceptual calibrate` fits its heads to."""
        with torch.set_grad_enabled(self.target_grad and torch.is_grad_enabled()):
            target = self.features(b)
        return channel_differences(self.features(a), target, self.eps, self.eps_inside)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        return weigh(self.differences(a, b), self._frozen[1])

    def _check(self, a: Tensor, b: Tensor) -> None:
        check_shapes(a, b, self.channels, self.smallest_side)
        check_precision(next(self._frozen[0].parameters()).dtype, a.device)
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(a, b)
            self._told = self._told or warn_unscaled(b)

    @classmethod
    def from_pretrained(cls, source: str | Path = "pocket", **options: Any) -> Self:
        """From `pocket` or a folder that `save_pretrained`, `perceptual fit`, `calibrate` or `import` wrote."""
        vgg, heads, formula = load_network(source, cls.network)
        return cls(vgg, heads, **formula | options)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, note: str = ""
    ) -> None:
        """Writes config.json, model.safetensors and README.md (a card, with `note`): a folder fit for a model hub."""
        save_network(
            Path(folder),
            *self._frozen,
            {"eps": self.eps, "eps_inside": self.eps_inside},
            dtype,
            note,
        )


class ELatentLPIPS(LatentLPIPS):
    """The ensembled distance: E_T[d(F(T a), F(T b))], a fresh T per sample and call, the same on both sides.

    `transforms`: families joined by "+" (`geometric+cutout` is the paper's final choice); `num_draws`: Ts averaged
    per call; `strengths` (`Strengths`): how far each family goes; further options are LatentLPIPS's. For monitoring,
    fix T: `distance(a, b, generator)` with a generator seeded anew before each call gives each place of the batch the
    same T every time; a CPU one on every machine. Without a generator T is drawn on the latents' own device. With
    `rows` (`BatchRows`), `a` and `b` are these rows of a larger batch and get the Ts that they would get in it.
    """

    def __init__(
        self,
        vgg: VGG,
        heads: list[Tensor],
        transforms: str = "geometric+cutout",
        num_draws: int = 1,
        strengths: Strengths | None = None,
        **options: Any,
    ) -> None:
        super().__init__(vgg, heads, **options)
        if num_draws < 1:
            raise UserError(f"num_draws = {num_draws}: at least one transform is drawn")
        self.families, self.num_draws, self.strengths = (
            parse_families(transforms),
            num_draws,
            strengths,
        )

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor:
        self._check(a, b)
        draws = [
            self._between(*self._transformed(a, b, generator, rows)) for _ in range(self.num_draws)
        ]
        return torch.stack(draws).mean(0)

    def _transformed(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None,
        rows: BatchRows | None,
    ) -> tuple[Tensor, Tensor]:
        """(T a, T b) in float32, under autocast too."""
        if rows is None:
            rows = BatchRows(slice(None), len(a))
        with torch.autocast(a.device.type, enabled=False):
            transform = draw_transform(
                rows.batch_size, self.families, generator, self.strengths, a.device
            ).rows(rows.rows)
            return apply_transform(a, transform), apply_transform(b, transform)


class PixelLPIPS(LatentLPIPS):
    """LPIPS on the decoded pictures of two latents: `PixelLPIPS(vgg, heads, vae)(a, b)` → [B], gradients through `vae`.

    `vgg` reads pictures in [−1, 1]: three channels, no pool dropped. `vae` is a diffusers AutoencoderKL: frozen and
    hidden like the network, moved and cast with it. Decoded pictures are not clamped, so that gradients reach `a`
    everywhere.
    """

    network = "pixel_vgg"

    def __init__(self, vgg: VGG, heads: list[Tensor], vae: nn.Module, **options: Any) -> None:
        super().__init__(vgg, heads, **options)
        if self.channels != 3:
            raise UserError(
                f"PixelLPIPS compares pictures; this network reads {self.channels} channels: of latents"
            )
        self._decoder = (vae.eval().requires_grad_(False),)
        self.channels, self.smallest_side = num_latent_channels(vae), 1

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._decoder = (self._decoder[0]._apply(fn),)
        return super()._apply(fn, recurse)

    def features(self, x: Tensor) -> list[Tensor]:
        return super().features(decode(self._decoder[0], x))

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "pocket", vae: Any = None, **options: Any
    ) -> Self:
        """`vae`: an AutoencoderKL, the folder of one or of a pipeline, or `pocket`, the default for its own network.

        Raises UserError where another network comes without a VAE.
        """
        if vae is None:
            if str(source) != "pocket":
                raise UserError(
                    f"PixelLPIPS of {source} decodes latents and needs their VAE: from_pretrained(…, vae=…)"
                )
            vae = "pocket"
        return super().from_pretrained(
            source, vae=vae if isinstance(vae, nn.Module) else load_vae(vae), **options
        )
