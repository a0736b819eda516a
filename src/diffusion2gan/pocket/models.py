"""The pocket models' sizes: each a stock diffusers or transformers class, only small."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion2gan.perceptual.vgg import VGG, num_dropped_pools
from diffusion2gan.pocket import scenes

MAX_LENGTH = 24  # tokens; the world's longest caption has 19 words
START, END = "<|startoftext|>", "<|endoftext|>"


def vae() -> AutoencoderKL:
    """4×: 64×64 pictures ↔ 4×16×16 latents, 12 times fewer numbers."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=96,
        attention_head_dim=4,
    )


def tokenizer() -> CLIPTokenizer:
    """The world's words, one token each; any other word falls into letters."""
    words = [f"{word}</w>" for word in scenes.WORDS]
    trainer = BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=list(string.ascii_lowercase + string.digits + string.punctuation),
    )
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.train_from_iterator(scenes.WORDS, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = list(
        dict.fromkeys(
            [*characters, *(f"{c}</w>" for c in characters), *("".join(m) for m in merges)]
        )
    )
    vocab = {piece: i for i, piece in enumerate([*pieces, START, END])}
    missing = set(words) - set(vocab)
    if missing:
        raise AssertionError(f"words without a token of their own: {missing}")
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=MAX_LENGTH,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def _text_config(vocab_size: int, width: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": width,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**_text_config(vocab_size, 96)))


def clip(vocab_size: int) -> CLIPModel:
    """ViT with 8×8 patches on 64×64 pictures; 128-number embeddings."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 128,
    }
    text = _text_config(vocab_size, 96)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def latent_vgg() -> VGG:
    widths = (16, 32, 64, 96, 96)
    return VGG(4, widths, num_dropped=num_dropped_pools(4))


def pixel_vgg() -> VGG:
    return VGG(3, (16, 32, 64, 96, 96), num_dropped=0)


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule; v-prediction, trailing steps (the first step is the last timestep)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


PARTS = {
    "count": 3,
    "ground": len(scenes.GROUNDS),
    "shape": len(scenes.SHAPES),
    "colour": len(scenes.COLOURS),
    "pattern": len(scenes.PATTERNS),
    "shape_colour": len(scenes.SHAPES) * len(scenes.COLOURS),
    "shape_pattern": len(scenes.SHAPES) * len(scenes.PATTERNS),
}
PER_PICTURE = ("count", "ground")


def split(logits: Tensor) -> dict[str, Tensor]:
    """[B, ΣPARTS] → one tensor a part."""
    return dict(zip(PARTS, logits.split(list(PARTS.values()), dim=1), strict=True))


class AttributeHead(nn.Module):
    """Feature map [B, C, h, w] → logits [B, ΣPARTS].

    count and ground (softmax over their classes) are means over the map. The others (a picture has them or not: a
    shape, a colour, a pattern, and the bindings shape×colour and shape×pattern, such as a *red ring*) are log-sum-exps
    over the map: an object is somewhere, and what it is can be told from there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, sum(PARTS.values()), 1),
        )
        last = self.body[2]
        assert isinstance(last.bias, Tensor)
        nn.init.constant_(
            last.bias[sum(PARTS[part] for part in PER_PICTURE) :], -6.0
        )  # most are absent

    def forward(self, features: Tensor) -> Tensor:
        maps = split(self.body(features))
        pooled = [
            m.mean((2, 3)) if part in PER_PICTURE else torch.logsumexp(m, (2, 3))
            for part, m in maps.items()
        ]
        return torch.cat(pooled, 1)


class Probe(nn.Module):
    """Reads a picture's attributes: `probe(images [B, 3, 64, 64] in [−1, 1])` → logits [B, ΣPARTS]; see `split`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, 2, 1), nn.BatchNorm2d(w), nn.ReLU())  # 32×32
        self.body = nn.Sequential(
            _Residual(w, 2 * w, 2),
            _Residual(2 * w, 2 * w, 1),
            _Residual(2 * w, 4 * w, 2),
            _Residual(4 * w, 4 * w, 1),
        )  # 8×8
        self.head = AttributeHead(4 * w)

    def features(self, images: Tensor) -> Tensor:
        """[B, 128, 8, 8]: what the head reads."""
        return torch.as_tensor(self.body(self.stem(images)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.features(images)))


class _Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = channels == out_channels and stride == 1
        self.skip = (
            nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def pipeline(folder: Path | None = None) -> StableDiffusionPipeline:
    """An untrained pocket pipeline (tests, and the start of training)."""
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
