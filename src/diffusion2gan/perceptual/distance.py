"""Perceptual distances of latents: LatentLPIPS, E-LatentLPIPS and LPIPS on the decoded images.

LatentLPIPS and E-LatentLPIPS are from Kang et al. 2024, section 3.2. With F_l the feature maps of a
network on latents, f̂_l = F_l / ‖F_l‖ normalised over channels, and heads w_l ≥ 0:

    d(x0, x1)   = Σ_l mean_hw Σ_c w_lc (f̂_lc(x0) − f̂_lc(x1))²    (Zhang et al. 2018, eq. 1)
    d_E(x0, x1) = E_T[d(T x0, T x1)]                              (E-LatentLPIPS)

Every distance is called `distance(a, b, generator=None, rows=None)` → [B]: zero for equal latents,
never negative, with gradients to `a`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import (
    BatchRows,
    Strengths,
    TransformSettings,
    apply_transform,
    parse_families,
)
from diffusion2gan.perceptual.checks import (
    check_finite,
    check_precision,
    check_shapes,
    warn_if_unscaled,
)
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.perceptual.weights import load_network, save_network
from diffusion2gan.recipe import ResamplingName
from diffusion2gan.teacher.autoencoder import decode, load_vae, num_latent_channels

EPS = 1e-8

# (feature maps of a, feature maps of the target b) → differences [B, C_l] per layer
Compare = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def normalize_features(features: Tensor, eps: float = EPS, eps_inside: bool = True) -> Tensor:
    """f̂: each pixel's feature vector divided by its length over channels, float32 [B, C, h, w].

    f/√(Σ_c f² + eps) with `eps_inside`, else f/(√(Σ_c f²) + eps). The gradient at f = 0 is that of
    the formula, f/√eps or f/eps.
    """
    features = features.float()
    sum_of_squares = features.square().sum(1, keepdim=True)
    if eps_inside:
        return features * (sum_of_squares + eps).rsqrt()

    # √ has an infinite slope at zero, and infinity × 0 would make the gradient NaN: a zero is kept
    # out of the root.
    is_zero = sum_of_squares == 0
    length = sum_of_squares.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
    return features / (length + eps)


def channel_differences(
    features_a: list[Tensor], features_b: list[Tensor], eps: float = EPS, eps_inside: bool = True
) -> list[Tensor]:
    """mean_hw (f̂_lc(a) − f̂_lc(b))², [B, C_l] per layer l: the distance before its heads."""
    differences = []
    for layer_a, layer_b in zip(features_a, features_b, strict=True):
        normalized_a = normalize_features(layer_a, eps, eps_inside)
        normalized_b = normalize_features(layer_b, eps, eps_inside)
        differences.append((normalized_a - normalized_b).square().mean((2, 3)))
    return differences


def apply_heads(differences: list[Tensor], heads: list[Tensor]) -> Tensor:
    """Σ_l Σ_c w_lc · differences_lc, [B] (Zhang et al. 2018, eq. 1).

    `differences[l]` is [B, C_l]; `heads[l]` is w_l ≥ 0, [C_l].
    """
    layers = []
    for difference, head in zip(differences, heads, strict=True):
        layers.append((difference * head.float()).sum(1))
    return torch.stack(layers).sum(0)


class LatentLPIPS(nn.Module):
    """LPIPS on latents: `LatentLPIPS(vgg, heads)(a, b)` → [B].

    `a` and `b` are [B, C, h, w], the VAE's latents × scaling_factor. `b` is the target: its
    features are computed without a graph unless `target_grad`. `eps` and `eps_inside` are those of
    `normalize_features`. `l1_weight` · mean |a − b| is added, without transforms; 1 is the default
    of the authors' elatentlpips package, 0 is the paper's distance. `compare` replaces
    `channel_differences`, and with it eps.

    The network is always frozen and in eval mode: calls of `train()` and `requires_grad_()` on this
    module, or on one that contains it, have no effect. The network runs in the precision that the
    module is cast to (`.bfloat16()`); heads, normalisation and distance are float32.

    Raises UserError for latents of different shapes, of another number of channels, with values
    that are not finite, or for a float16 network on a CPU. Warns once if latents look unscaled.
    Values are checked on a CPU only (`checks`).
    """

    # The name of the network inside the package that `from_pretrained("pocket")` loads.
    network = "latent_vgg"

    def __init__(
        self,
        vgg: VGG,
        heads: list[Tensor],
        *,
        eps: float = EPS,
        eps_inside: bool = True,
        l1_weight: float = 0.0,
        compare: Compare | None = None,
        target_grad: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(l1_weight) and l1_weight >= 0):
            raise UserError(f"l1_weight = {l1_weight}: it must be a finite number, 0 or more")
        self.eps = eps
        self.eps_inside = eps_inside
        self.l1_weight = l1_weight
        self.compare = compare
        self.target_grad = target_grad
        self.channels = int(vgg.config["in_channels"])
        self.smallest_side = vgg.smallest_side

        # A tuple hides the network from `parameters()` and `train()` of this and outer modules.
        vgg = vgg.eval().requires_grad_(False)
        heads = [head.detach().clamp_min(0).float() for head in heads]
        self._frozen = (vgg, heads)
        # A network with a scaling layer reads images, of any contrast.
        self._has_warned = "input_scale" in vgg.config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to()` and casts reach the hidden network through this method. Heads change their device
        # but stay float32.
        vgg, heads = self._frozen
        moved_heads = [head.to(fn(head).device) for head in heads]
        self._frozen = (vgg._apply(fn), moved_heads)
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
        return self._add_l1(self._distance(a.float(), b.float()), a, b)

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps that the distance compares: one [B, C_l, h_l, w_l] per layer."""
        vgg = self._frozen[0]
        return vgg(x.to(next(vgg.parameters()).dtype))

    def differences(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """`channel_differences` of two latents, which `perceptual calibrate` fits heads to."""
        with torch.set_grad_enabled(self.target_grad and torch.is_grad_enabled()):
            features_b = self.features(b)
        features_a = self.features(a)
        if self.compare is not None:
            return self.compare(features_a, features_b)
        return channel_differences(features_a, features_b, self.eps, self.eps_inside)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        heads = self._frozen[1]
        return apply_heads(self.differences(a, b), heads)

    def _add_l1(self, distance: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`distance` [B] plus l1_weight · mean |a − b|."""
        if self.l1_weight == 0:
            return distance
        if not self.target_grad:
            b = b.detach()
        return distance + self.l1_weight * (a.float() - b.float()).abs().mean((1, 2, 3))

    def _check(self, a: Tensor, b: Tensor) -> None:
        check_shapes(a, b, self.channels, self.smallest_side)
        check_precision(next(self._frozen[0].parameters()).dtype, a.device)
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(a, b)
            if not self._has_warned:
                self._has_warned = warn_if_unscaled(b)

    @classmethod
    def from_pretrained(cls, source: str | Path = "pocket", **options: Any) -> Self:
        """Loads a network: `pocket`, the one inside the package, or a folder.

        A folder is one that `save_pretrained`, `perceptual fit`, `calibrate` or `import` wrote.
        `options` are those of the constructor.
        """
        vgg, heads, formula = load_network(source, cls.network)
        return cls(vgg, heads, **formula | options)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, note: str = ""
    ) -> None:
        """Writes config.json, model.safetensors and README.md (a model card that includes `note`).

        The folder can be uploaded to a model hub as it is.
        """
        vgg, heads = self._frozen
        formula = {"eps": self.eps, "eps_inside": self.eps_inside}
        save_network(Path(folder), vgg, heads, formula, dtype, note)


class ELatentLPIPS(LatentLPIPS):
    """The ensembled distance E_T[d(T a, T b)] (Kang et al. 2024, section 3.2).

    Each call draws a new transform T per sample, the same for both sides.

    `transforms`: families joined by "+"; `geometric+cutout` is the paper's final choice.
    `num_draws`: how many transforms are averaged per call. `strengths`: their magnitudes.
    `resampling`: `bilinear`, `bicubic` or `oversampled`, see `augment.resample`. `transform_share`:
    the share of the samples that get a transform, the others get none. Other options are those of
    LatentLPIPS.

    For monitoring, fix the transforms: `distance(a, b, generator)` with a newly seeded generator
    per call gives each row of the batch the same T every time, with a CPU generator on every
    machine. Without a generator T is drawn on the latents' device. With `rows` (`BatchRows`), `a`
    and `b` are these rows of a larger batch and get the transforms that they would get in it.
    """

    def __init__(
        self,
        vgg: VGG,
        heads: list[Tensor],
        transforms: str = "geometric+cutout",
        num_draws: int = 1,
        strengths: Strengths | None = None,
        resampling: ResamplingName = "bilinear",
        transform_share: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(vgg, heads, **options)
        if num_draws < 1:
            raise UserError(f"num_draws = {num_draws}: it must be at least 1")
        self.num_draws = num_draws
        self.transforms = TransformSettings(
            parse_families(transforms), strengths or Strengths(), transform_share, resampling
        )

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor:
        """[B], the mean over `num_draws` transforms."""
        self._check(a, b)
        draws = []
        for _ in range(self.num_draws):
            transformed_a, transformed_b = self._transform(a, b, generator, rows)
            draws.append(self._distance(transformed_a, transformed_b))
        return self._add_l1(torch.stack(draws).mean(0), a, b)

    def _transform(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None,
        rows: BatchRows | None,
    ) -> tuple[Tensor, Tensor]:
        """(T a, T b) for a newly drawn T, in float32, under autocast too."""
        if rows is None:
            rows = BatchRows(slice(None), len(a))
        with torch.autocast(a.device.type, enabled=False):
            full_batch = self.transforms.draw(rows.batch_size, generator, a.device)
            transform = full_batch.select(rows.rows)
            resampling = self.transforms.resampling
            transformed_a = apply_transform(a, transform, resampling)
            transformed_b = apply_transform(b, transform, resampling)
            return transformed_a, transformed_b


class PixelLPIPS(LatentLPIPS):
    """LPIPS on the decoded images of two latents: `PixelLPIPS(vgg, heads, vae)(a, b)` → [B].

    `vgg` takes images in [−1, 1]: three channels, no pool dropped. `vae` is a diffusers
    AutoencoderKL; it is frozen, hidden, moved and cast like the network, and gradients pass through
    it. Decoded images are not clamped, so that gradients reach `a` everywhere.
    """

    network = "pixel_vgg"

    def __init__(self, vgg: VGG, heads: list[Tensor], vae: nn.Module, **options: Any) -> None:
        super().__init__(vgg, heads, **options)
        if self.channels != 3:
            raise UserError(
                f"PixelLPIPS compares images, but this network reads {self.channels} channels: "
                "it is a network for latents"
            )
        self._decoder = (vae.eval().requires_grad_(False),)

        # The inputs are latents with the VAE's number of channels, of any size.
        self.channels = num_latent_channels(vae)
        self.smallest_side = 1
        self._has_warned = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._decoder = (self._decoder[0]._apply(fn),)
        return super()._apply(fn, recurse)

    def features(self, x: Tensor) -> list[Tensor]:
        """The network's feature maps of the decoded image: one [B, C_l, h_l, w_l] per layer."""
        return super().features(decode(self._decoder[0], x))

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "pocket", vae: Any = None, **options: Any
    ) -> Self:
        """As `LatentLPIPS.from_pretrained`, with the VAE of the latents.

        `vae`: an AutoencoderKL, the folder of one or of a pipeline, or `pocket`, which is the
        default for the pocket network. Raises UserError if another network comes without a VAE.
        """
        if vae is None:
            if str(source) != "pocket":
                raise UserError(
                    f"PixelLPIPS of {source} decodes latents and needs their VAE: "
                    "from_pretrained(…, vae=…)"
                )
            vae = "pocket"
        if not isinstance(vae, nn.Module):
            vae = load_vae(vae)
        return super().from_pretrained(source, vae=vae, **options)
