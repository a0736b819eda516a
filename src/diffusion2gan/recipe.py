"""Every setting of a training run: typed, frozen, checked at birth, printed, saved."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffusion2gan.errors import UserError, nearest

LossName = Literal["mse", "pseudo_huber", "latent_lpips", "e_latent_lpips", "pixel_lpips"]
OptimizerName = Literal["adamw", "adamw8bit"]
DiscriminatorName = Literal["diffusion", "random", "patch"]
SHIPPED = Path(__file__).parent / "recipes"
RENAMED = {  # settings of version 0.1 and what they are called now
    "pairs_seen": "total_pairs",
    "accumulate": "gradient_accumulation_steps",
    "start": "init_from",
    "adversarial_from": "gan_start_pairs",
}


class Recipe(BaseModel):
    """What `distill` does. Units: pictures are counted in pairs seen, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field(
        "pocket", description="`pocket`, the folder of a diffusers pipeline, or a .safetensors"
    )
    teacher_config: str | None = Field(
        None, description="a single-file teacher's pipeline folder: configs, tokenizers"
    )
    teacher_lora: str | None = Field(
        None, description="LoRAs merged into the teacher: PATH[@SCALE], commas between"
    )
    vae: str | None = Field(None, description="another VAE for the same latents: its folder")
    resolution: int | None = Field(
        None, ge=1, description="the pictures' side in pixels; the teacher's own if not set"
    )
    lora_rank: int = Field(
        0, ge=0, description="trains a LoRA of this rank on the frozen teacher; 0: all weights"
    )
    lora_targets: str = Field(
        "to_q+to_k+to_v+to_out.0",
        description="layers that a LoRA adds to, by the end of their names",
    )
    init_from: str = Field(
        "teacher", description="the student's weights at birth: the teacher's, or a run's"
    )
    perceptual: str = Field(
        "pocket",
        description="the perceptual distance's network: `pocket`, a folder, or `teacher`, its own features",
    )
    loss: LossName = Field(
        "e_latent_lpips", description="the regression loss between student and teacher latents"
    )
    pseudo_huber_c: float = Field(
        0.03, gt=0, description="pseudo_huber's c, per latent number (iCT: 0.00054·√dims)"
    )
    transforms: str = Field(
        "geometric+cutout", description="e_latent_lpips's families of random transforms"
    )
    num_draws: int = Field(1, ge=1, description="transforms averaged per pair and step")
    total_pairs: int = Field(60_000, ge=1, description="when to stop")
    batch_size: int = Field(32, ge=1, description="pairs an update")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="parts a batch is worked in; memory falls, the update stays the same"
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="AdamW's peak; linear warm-up, cosine to a twentieth"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the run that warms up")
    optimizer: OptimizerName = Field(
        "adamw", description="or its averages in 8 bits (the extra adam8bit), both players"
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    adversarial_weight: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="λ: the GAN loss beside the regression; 0 builds no D",
    )
    discriminator: DiscriminatorName = Field(
        "diffusion",
        description="grown from the teacher; the same from random weights; plain convolutions",
    )
    discriminator_learning_rate: float = Field(
        1e-4, gt=0, description="Adam's peak; the student's schedule"
    )
    gan_start_pairs: int = Field(
        0, ge=0, description="pairs of regression alone before D begins: cheaper by far"
    )
    discriminator_warmup: int = Field(
        2_000, ge=0, description="pairs that D learns from before the student feels it"
    )
    discriminator_timestep: int = Field(
        0, ge=0, description="where a diffusion D believes to be; latents are clean"
    )
    noise_input: bool = Field(True, description="D reads the noise")
    multi_scale_input: bool = Field(True, description="D reads the latents on every grid")
    multi_scale_output: bool = Field(
        True, description="D answers at every decoder scale, three times each"
    )
    spectral_norm: bool = Field(False, description="of D's heads; of every layer of a patch D")
    patch_width: int = Field(64, ge=1, description="channels of a patch D's first layer")
    r1_weight: float = Field(
        1e-7,
        ge=0,
        allow_inf_nan=False,
        description="γ of γ/2·‖∇ΣD‖², one real sample; Σ grows with the logits",
    )
    r1_every: int = Field(
        16, ge=1, description="D's steps between penalties, each multiplied by this"
    )
    mix_share: float = Field(
        0.25, ge=0, lt=1, description="share of D's fakes that are other pairs' real latents"
    )
    prompt_embeds: Literal["encoded", "kept"] = Field(
        "encoded",
        description="each batch's prompts by the text encoders, or all once, kept beside the pairs",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, slower"
    )
    device: str = Field("cpu", description="cpu, cuda, cuda:1, …")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast, on cuda alone"
    )
    seed: int = Field(0, ge=0, lt=2**31)
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="every rank holds all of both players; or, to save memory, its part of all weights",
    )
    checkpoint_every_s: float = Field(60.0, gt=0)
    keep_checkpoints: int = Field(1, ge=1, description="the newest, and so many less one before it")
    keep_best: bool = Field(
        False, description="the checkpoint of the lowest running average of `loss` too"
    )
    sample_every: int = Field(10_000, ge=1, description="pairs seen between sample sheets")

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be worked in gradient_accumulation_steps = {self.gradient_accumulation_steps} parts"
            )
        if self.adversarial_weight > 0 and self.mix_share > 0 and self.batch_size == 1:
            raise ValueError(
                f"mix_share {self.mix_share} takes fakes from other pairs of the batch, but batch_size is 1; raise "
                "batch_size or set mix_share=0"
            )
        if self.perceptual == "teacher" and self.loss == "pixel_lpips":
            raise ValueError(
                "perceptual = 'teacher' are features of latents; for pixel_lpips name a pixel network"
            )
        if self.precision != "float32" and not self.device.startswith("cuda"):
            raise ValueError(
                f"precision {self.precision!r} is for cuda, device is {self.device!r}; set one of them"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's network works while the student trains."""
        perceptual = (
            self.loss in ("latent_lpips", "e_latent_lpips") and self.perceptual == "teacher"
        )
        return self.lora_rank > 0 or perceptual

    def changed(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Settings that differ: name → (ours, theirs)."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A shipped recipe's name or a .toml file, with `key=value` settings laid over it.

    Raises UserError at an unknown name, file, setting (the nearest is named) or value.
    """
    path = SHIPPED / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = [recipe.stem for recipe in SHIPPED.glob("*.toml")]
        raise UserError(f"no recipe {name!r}: neither a file nor shipped{nearest(name, shipped)}")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r}: write it as key=value")
        values[key.strip()] = value.strip()
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    for key in values:
        if key in RENAMED:
            raise UserError(
                f"{where}: the setting {key!r} is now called {RENAMED[key]!r}; rename it there"
            )
        if key not in Recipe.model_fields:
            raise UserError(f"{where}: unknown setting {key!r}{nearest(key, Recipe.model_fields)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        told = "; ".join(
            f"{e['loc'][0]} = {e['input']!r}: {e['msg']}"
            if e["loc"]
            else e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        )
        raise UserError(f"{where}: {told}") from error


@dataclass(frozen=True)
class RecipeSummary:
    """What `diffusion2gan recipe list` prints about a recipe."""

    description: str
    teacher: str
    hardware: str


def shipped_recipes() -> list[str]:
    """The names of the recipes in the package, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def summarize_recipe(name: str) -> RecipeSummary:
    """Summarizes a shipped recipe.

    The first comment line of its file is the description; `# Hardware:` starts another.
    """
    text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
    lines = text.splitlines()

    hardware = "not stated"
    for line in lines:
        if line.startswith("# Hardware: "):
            hardware = line.removeprefix("# Hardware: ").rstrip(".")

    return RecipeSummary(
        description=lines[0].removeprefix("# "),
        teacher=str(tomllib.loads(text)["teacher"]),
        hardware=hardware,
    )
