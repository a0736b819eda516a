"""The architectures of the pocket models: stock diffusers and transformers classes, but small."""

from __future__ import annotations

import json
import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion2gan.perceptual.vgg import VGG, num_dropped_pools
from diffusion2gan.pocket import scenes

MAX_LENGTH = 24  # tokens; the longest caption of the pocket world has 19 words
TEXT_WIDTH = 96
VGG_WIDTHS = (16, 32, 64, 96, 96)
START, END = "<|startoftext|>", "<|endoftext|>"


def vae() -> AutoencoderKL:
    """4× downsampling: 64×64 images ↔ 4×16×16 latents, 12 times fewer numbers."""
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
    """The denoiser of 4×16×16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def tokenizer() -> CLIPTokenizer:
    """One token per word of the pocket world; any other word is split into characters."""
    # Train byte-pair encoding on the words themselves
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe_trainer = BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=characters,
    )
    bpe.train_from_iterator(scenes.WORDS, bpe_trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]

    # Vocabulary: characters, characters at the end of a word, merges in order, special tokens
    final_characters = [f"{character}</w>" for character in characters]
    merged = ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys([*characters, *final_characters, *merged]))
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}

    missing = {f"{word}</w>" for word in scenes.WORDS} - set(vocab)
    if missing:
        raise AssertionError(f"words without a token: {missing}")
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=MAX_LENGTH,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def _text_config(vocab_size: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def text_encoder(vocab_size: int) -> CLIPTextModel:
    """The pipeline's text encoder, 96 numbers per token."""
    return CLIPTextModel(CLIPTextConfig(**_text_config(vocab_size)))


def clip(vocab_size: int) -> CLIPModel:
    """CLIP for evaluation: a ViT with 8×8 patches of 64×64 images; embeddings of 128 numbers."""
    vision_config = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(
        CLIPConfig(
            text_config=_text_config(vocab_size), vision_config=vision_config, projection_dim=128
        )
    )


def latent_vgg() -> VGG:
    """The feature network of the pocket LatentLPIPS."""
    return VGG(4, VGG_WIDTHS, num_dropped=num_dropped_pools(4))


def pixel_vgg() -> VGG:
    """The feature network of the pocket PixelLPIPS."""
    return VGG(3, VGG_WIDTHS, num_dropped=0)


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction and trailing timesteps.

    Trailing: the first step is at the last timestep.
    """
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


# The attributes that the probe and the feature networks predict, with their numbers of logits.
ATTRIBUTES = {
    "count": 3,
    "ground": len(scenes.GROUNDS),
    "shape": len(scenes.SHAPES),
    "colour": len(scenes.COLOURS),
    "pattern": len(scenes.PATTERNS),
    "shape_colour": len(scenes.SHAPES) * len(scenes.COLOURS),
    "shape_pattern": len(scenes.SHAPES) * len(scenes.PATTERNS),
}
# An image has exactly one class of these; of the others any number (multi-label).
SINGLE_CLASS = ("count", "ground")


def split_logits(logits: Tensor) -> dict[str, Tensor]:
    """[B, ΣATTRIBUTES, …] → one tensor per attribute."""
    chunks = logits.split(list(ATTRIBUTES.values()), dim=1)
    return dict(zip(ATTRIBUTES, chunks, strict=True))


class AttributeHead(nn.Module):
    """Feature map [B, C, h, w] → logits [B, ΣATTRIBUTES].

    The logits of count and ground (softmax over their classes) are means over the map. The others
    predict whether the image contains a shape, a colour, a pattern, or a combination shape×colour
    or shape×pattern, such as a *red ring*. They are log-sum-exps over the map: it is enough that an
    object is recognised at one position.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, sum(ATTRIBUTES.values()), 1),
        )

        # Most of the multi-label attributes are absent from an image: start with low logits.
        bias = self.body[2].bias
        assert isinstance(bias, Tensor)
        num_single_class = sum(ATTRIBUTES[name] for name in SINGLE_CLASS)
        nn.init.constant_(bias[num_single_class:], -6.0)

    def forward(self, features: Tensor) -> Tensor:
        pooled = []
        for name, logit_map in split_logits(self.body(features)).items():
            if name in SINGLE_CLASS:
                pooled.append(logit_map.mean((2, 3)))
            else:
                pooled.append(torch.logsumexp(logit_map, (2, 3)))
        return torch.cat(pooled, 1)


class Probe(nn.Module):
    """Classifies the attributes of images, for evaluation.

    `probe(images [B, 3, 64, 64] in [−1, 1])` → logits [B, ΣATTRIBUTES], see `split_logits`.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, 2, 1), nn.BatchNorm2d(w), nn.ReLU())  # 32×32
        self.body = nn.Sequential(
            _ResidualBlock(w, 2 * w, stride=2),  # 16×16
            _ResidualBlock(2 * w, 2 * w, stride=1),
            _ResidualBlock(2 * w, 4 * w, stride=2),  # 8×8
            _ResidualBlock(4 * w, 4 * w, stride=1),
        )
        self.head = AttributeHead(4 * w)

    def features(self, images: Tensor) -> Tensor:
        """The head's input, [B, 128, 8, 8]."""
        return torch.as_tensor(self.body(self.stem(images)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.features(images)))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip: nn.Module = nn.Identity()
        if channels != out_channels or stride != 1:
            self.skip = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def pipeline() -> StableDiffusionPipeline:
    """An untrained pocket pipeline, for tests and benchmarks."""
    clip_tokenizer = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(clip_tokenizer)),
        tokenizer=clip_tokenizer,
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
