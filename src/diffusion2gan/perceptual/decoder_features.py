"""The distance on the features of the teacher's VAE decoder, for VAEs without a fitted network.

Latent Perceptual Loss (Berrada et al. 2024, arXiv 2411.04873). It needs no training and no data.
With φ_l the output of the decoder's middle block (l = 0) and of its first up blocks, and the mean
μ_lc and standard deviation σ_lc over the pixels of each channel of the target b:

    φ'_lc(x) = (φ_lc(x) − μ_lc) / σ_lc
    d_l(a, b) = mean_c Σ_hw ρ_lc (φ'_lc(a) − φ'_lc(b))² / Σ_hw ρ_lc
    d(a, b) = Σ_l ω_l d_l(a, b) / Σ_l ω_l

The mask ρ leaves out outliers, a few very large values in the decoder's features. The number of
blocks, the outliers' threshold, the floor of σ and the weights ω are ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.teacher.autoencoder import normalisation, num_latent_channels
from diffusion2gan.teacher.hooks import capture_outputs
from diffusion2gan.teacher.pipeline import Teacher, copy_sharing_weights

# Up blocks that are read after the middle block. The last one, at the image's resolution, never is.
NUM_UP_BLOCKS = 2
# Values of the target further from their channel's mean, in standard deviations, are outliers.
OUTLIER_SIGMAS = 3.0
# σ² is at least this share of the median channel's mean square: in an image of one colour σ is
# nearly 0.
VARIANCE_FLOOR = 1e-4
TINY = 1e-12
SUPPORTED_VAES = ("AutoencoderKL", "AutoencoderDC")


class DecoderFeatures(nn.Module):
    """`features(x [B, C, h, w])` → feature maps of a VAE's frozen decoder, of latents × scaling.

    For AutoencoderKL: the outputs of the middle block, [B, D, h, w], and of the first up blocks,
    [B, D_l, 2h, 2w] and [B, D_l, 4h, 4w]. AutoencoderDC has no middle block: its first block, at
    the latents' resolution, takes that position.

    The weights are the VAE's tensors, not copies; blocks after the last map are not run.
    `bfloat16`: run under autocast. Raises UserError for a VAE of another class.
    """

    def __init__(self, vae: Any, bfloat16: bool = False) -> None:
        super().__init__()
        class_name = type(vae).__name__
        if class_name not in SUPPORTED_VAES:
            raise UserError(
                f"perceptual = 'decoder' reads the decoder of {' or '.join(SUPPORTED_VAES)}, but "
                f"this VAE is a {class_name}. Use perceptual = 'teacher', or fit a network: "
                "diffusion2gan perceptual fit"
            )
        self.config = {"in_channels": num_latent_channels(vae)}
        self.smallest_side = 1
        self.autocast = bfloat16
        self.decoder: Any = copy_sharing_weights(vae.decoder)
        self.post_quant_conv: Any = None
        if getattr(vae, "post_quant_conv", None) is not None:
            self.post_quant_conv = copy_sharing_weights(vae.post_quant_conv)
        # In a tuple the VAE is not a submodule: it is used for its settings alone.
        self._vae = (vae,)
        if class_name == "AutoencoderKL":
            self.tapped_blocks = truncate_kl(self.decoder)
        else:
            self.tapped_blocks = truncate_dc(self.decoder)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One feature map per tapped block."""
        shift, factor = normalisation(self._vae[0], x)
        x = x / factor + shift
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast)
        with capture_outputs(self.tapped_blocks) as outputs, autocast:
            if self.post_quant_conv is not None:
                x = self.post_quant_conv(x)
            self.decoder(x)
        return [outputs[block] for block in self.tapped_blocks]


def truncate_kl(decoder: Any) -> list[nn.Module]:
    """Removes what follows the last block to read from AutoencoderKL's decoder; returns these."""
    num_up_blocks = min(NUM_UP_BLOCKS, len(decoder.up_blocks) - 1)
    decoder.up_blocks = decoder.up_blocks[:num_up_blocks]
    decoder.conv_norm_out = nn.Identity()
    decoder.conv_act = nn.Identity()
    decoder.conv_out = nn.Identity()
    return [decoder.mid_block, *decoder.up_blocks]


def truncate_dc(decoder: Any) -> list[nn.Module]:
    """As `truncate_kl`, for AutoencoderDC's decoder, which runs its blocks from last to first."""
    num_blocks = min(1 + NUM_UP_BLOCKS, max(1, len(decoder.up_blocks) - 1))
    decoder.up_blocks = decoder.up_blocks[-num_blocks:]
    decoder.norm_out = nn.Identity()
    decoder.conv_act = nn.Identity()
    decoder.conv_out = nn.Identity()
    return list(reversed(decoder.up_blocks))


def standardized_differences(features_a: list[Tensor], features_b: list[Tensor]) -> list[Tensor]:
    """Σ_hw ρ_lc (φ'_lc(a) − φ'_lc(b))² / Σ_hw ρ_lc, float32 [B, C_l] per layer l; b is the target.

    At most a ninth of a channel's values are beyond three standard deviations (Chebyshev), so that
    the mask is never empty.
    """
    differences = []
    for layer_a, layer_b in zip(features_a, features_b, strict=True):
        layer_a = layer_a.float()
        layer_b = layer_b.float()

        # Statistics of the target, per sample and channel, [B, C, 1, 1]
        mean = layer_b.mean((2, 3), keepdim=True)
        centered = layer_b - mean
        variance = centered.square().mean((2, 3), keepdim=True)
        # The median over channels: outliers in one channel do not raise the others' floor
        mean_square = layer_b.square().mean((2, 3), keepdim=True)
        floor = VARIANCE_FLOOR * mean_square.median(1, keepdim=True).values + TINY
        variance = torch.maximum(variance, floor)

        # Squared difference of the standardised features, without the target's outliers
        squares = (layer_a - layer_b).square() / variance
        mask = centered.square() <= OUTLIER_SIGMAS**2 * variance
        differences.append((squares * mask).sum((2, 3)) / mask.sum((2, 3)))
    return differences


def plain_distance(teacher: Teacher, **options: Any) -> LatentLPIPS:
    """The distance on the features of the teacher's decoder. `options`: of `DecoderFeatures`."""
    features, heads = build_network(teacher, **options)
    return LatentLPIPS(features, heads, compare=standardized_differences)


def ensembled_distance(teacher: Teacher, ensemble: dict[str, Any], **options: Any) -> ELatentLPIPS:
    """`plain_distance` under random transforms of the latents, as E-LatentLPIPS has them.

    `ensemble`: the options of ELatentLPIPS.
    """
    features, heads = build_network(teacher, **options)
    return ELatentLPIPS(features, heads, compare=standardized_differences, **ensemble)


@torch.no_grad()
def build_network(teacher: Teacher, **options: Any) -> tuple[VGG, list[Tensor]]:
    """(the decoder's features, one constant head per feature map: ω_l / (C_l Σω)).

    ω_l is one over the map's upsampling factor: 1, 1/2, 1/4. Raises UserError if the decoder's
    features of random latents are not finite, as in a precision that its values exceed.
    """
    features = DecoderFeatures(teacher.vae, **options)
    latents = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    maps = features(latents.to(teacher.device, next(features.parameters()).dtype))
    if not all(bool(feature_map.isfinite().all()) for feature_map in maps):
        dtype = torch.bfloat16 if features.autocast else maps[0].dtype
        raise UserError(
            f"perceptual = 'decoder': the features of {teacher.name}'s decoder are not finite in "
            f"{dtype} for random latents. Use precision = float32, or perceptual = 'teacher'."
        )

    width = teacher.latent_shape[2]
    omegas = [width / feature_map.shape[3] for feature_map in maps]
    heads = []
    for feature_map, omega in zip(maps, omegas, strict=True):
        num_channels = feature_map.shape[1]
        weight = omega / (num_channels * sum(omegas))
        heads.append(torch.full((num_channels,), weight, device=feature_map.device))
    # `DecoderFeatures` has everything that a distance uses of a `VGG`.
    return cast(VGG, features), heads
