"""The settings of a training run: typed, immutable, validated when created."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from diffusion2gan.errors import UserError, nearest

LossName = Literal["mse", "pseudo_huber", "latent_lpips", "e_latent_lpips", "pixel_lpips"]
ResamplingName = Literal["bilinear", "bicubic", "oversampled"]
OptimizerName = Literal["adamw", "adamw8bit"]
DiscriminatorName = Literal["diffusion", "random", "patch"]
SHIPPED = Path(__file__).parent / "recipes"

# Settings of version 0.1 that have new names
RENAMED = {
    "pairs_seen": "total_pairs",
    "accumulate": "gradient_accumulation_steps",
    "start": "init_from",
    "adversarial_from": "gan_start_pairs",
}


class Recipe(BaseModel):
    """All settings of `diffusion2gan distill`.

    The length of a run and positions in it are counted in pairs seen, times in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Teacher
    teacher: str = Field(
        "pocket",
        description="The teacher: `pocket`, the folder of a diffusers pipeline, or a .safetensors "
        "file.",
    )
    teacher_config: str | None = Field(
        None,
        description="For a teacher in one file: the folder of its pipeline, with its configuration "
        "files and tokenizers.",
    )
    teacher_lora: str | None = Field(
        None,
        description="LoRAs merged into the teacher: PATH[@SCALE], separated by commas.",
    )
    vae: str | None = Field(None, description="The folder of another VAE for the same latents.")
    resolution: int | None = Field(
        None,
        ge=1,
        description="Side of the images in pixels; the teacher's default if not set.",
    )

    # Student
    lora_rank: int = Field(
        0,
        ge=0,
        description="Trains a LoRA of this rank on the frozen teacher; 0 trains all weights.",
    )
    lora_targets: str = Field(
        "to_q+to_k+to_v+to_out.0",
        description="The layers that a LoRA is added to: the ends of their names, joined by +.",
    )
    init_from: str = Field(
        "teacher",
        description="Initial weights of the student: `teacher`, or the folder of another run.",
    )

    # Regression loss
    perceptual: str = Field(
        "pocket",
        description="The network of an LPIPS loss: `pocket`, a folder made by `perceptual fit`, "
        "`teacher` for the teacher's features, or `decoder` for those of its VAE's decoder. "
        "`auto`: the folder networks/TEACHER if there is one, otherwise `decoder`.",
    )
    loss: LossName = Field(
        "e_latent_lpips",
        description="The regression loss between the student's and the teacher's latents.",
    )
    pseudo_huber_c: float = Field(
        0.03,
        gt=0,
        description="c of pseudo_huber, per element of the latents (iCT: 0.00054·√dims).",
    )
    transforms: str = Field(
        "geometric+cutout",
        description="Random transforms of e_latent_lpips: blit, geometric, color, cutout, joined "
        "by +.",
    )
    num_draws: int = Field(
        1,
        ge=1,
        description="Transforms of e_latent_lpips averaged per pair and step.",
    )
    resampling: ResamplingName = Field(
        "bilinear",
        description="How the transforms of e_latent_lpips resample: bilinear blurs most; "
        "oversampled passes through twice the resolution, bicubic blurs least.",
    )
    transform_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the samples that get a transform of e_latent_lpips, drawn for each; "
        "the others get none.",
    )

    # Length and batch
    total_pairs: int = Field(
        60_000,
        ge=1,
        description="Length of the run, in pairs; every epoch counts again.",
    )
    batch_size: int = Field(32, ge=1, description="Pairs per update, over all ranks.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches per update: more micro-batches need less memory; the update is "
        "the same.",
    )

    # Optimiser
    learning_rate: float = Field(
        3e-4,
        gt=0,
        le=1000,
        description="Peak learning rate of the student's AdamW; linear warm-up, then a cosine to a "
        "twentieth.",
    )
    warmup: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="Share of the run in which the learning rate rises.",
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw8bit stores the averages of both optimisers in 8 bits (needs the extra "
        "adam8bit).",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the student's AdamW.")
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="Gradients of the student and of the discriminator are clipped to this norm.",
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Decay per update of the student's average (EMA), which is what is exported.",
    )

    # Discriminator and GAN loss
    adversarial_weight: float = Field(
        0.5,
        ge=0,
        description="λ: weight of the GAN loss beside the regression loss; 0 trains without a "
        "discriminator.",
    )
    discriminator: DiscriminatorName = Field(
        "diffusion",
        description="`diffusion` starts from the teacher's network and weights, `random` from its "
        "network with random weights; `patch` is a small convolutional network.",
    )
    discriminator_learning_rate: float = Field(
        1e-4,
        gt=0,
        le=1000,
        description="Peak learning rate of the discriminator's Adam; the student's schedule.",
    )
    gan_start_pairs: int = Field(
        0,
        ge=0,
        description="Pairs of regression alone before the discriminator is trained; these steps "
        "are much cheaper.",
    )
    discriminator_warmup: int = Field(
        2_000,
        ge=0,
        description="Pairs that the discriminator is trained on before the GAN loss reaches the "
        "student.",
    )
    discriminator_timestep: int = Field(
        0,
        ge=0,
        description="Timestep given to the discriminator's network; its latents are clean, so 0.",
    )
    noise_input: bool = Field(True, description="The discriminator reads the noise.")
    multi_scale_input: bool = Field(
        True,
        description="The discriminator reads the latents at every resolution of its encoder (UNets "
        "only).",
    )
    multi_scale_output: bool = Field(
        True,
        description="The discriminator has heads at every scale, instead of one on its last "
        "features.",
    )
    spectral_norm: bool = Field(
        False,
        description="Spectral norm in the discriminator's heads; in every layer of `patch`.",
    )
    patch_width: int = Field(64, ge=1, description="Channels of the first layer of `patch`.")
    r1_weight: float = Field(
        1e-7,
        ge=0,
        description="γ of the R1 penalty γ/2·‖∇ΣD‖², taken at one real sample. Σ is the sum of all "
        "logits, so with more of them the same γ is a stronger penalty.",
    )
    r1_method: Literal["exact", "finite_differences"] = Field(
        "exact",
        description="`exact` differentiates twice, which needs far more memory than the rest of "
        "the step; `finite_differences` estimates the penalty along one random direction.",
    )
    r1_every: int = Field(
        16,
        ge=1,
        description="Steps of the discriminator between R1 penalties, which are multiplied by it.",
    )
    mix_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of the discriminator's fakes that are replaced by other pairs' real "
        "latents.",
    )

    # Memory, device and ranks
    prompt_embeds: Literal["encoded", "kept"] = Field(
        "encoded",
        description="`encoded` runs the text encoders on each batch; `kept` runs them once, and "
        "keeps the embeddings on disk beside the pairs.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recomputes activations in the backward pass: less memory, slower.",
    )
    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:1, …, or auto: that of the run to resume, otherwise cuda if "
        "there is a GPU, otherwise cpu.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: autocast, on cuda only; weights stay in float32. auto: bfloat16 if "
        "the device is a GPU that has it.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all random numbers of the run.")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="With several ranks: `ddp` has all weights on every rank; `fsdp` shards them, "
        "to save memory.",
    )

    # Checkpoints and samples
    checkpoint_every_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=True,
        description="Seconds between checkpoints.",
    )
    keep_checkpoints: int = Field(
        1,
        ge=1,
        description="Number of checkpoints kept: the newest and those before it.",
    )
    keep_best: bool = Field(
        False,
        description="Also keeps the checkpoint with the lowest running average of `loss`.",
    )
    sample_every: int = Field(10_000, ge=1, description="Pairs between sample sheets.")

    @field_validator("teacher", "teacher_config", "vae", "init_from", "perceptual")
    @classmethod
    def expand_home(cls, value: str | None) -> str | None:
        """A path that begins with `~` is one in the home folder; no shell expands it here."""
        if value is None or not value.startswith("~"):
            return value
        return str(Path(value).expanduser())

    @model_validator(mode="before")
    @classmethod
    def _refuse_bools_as_numbers(cls, values: Any) -> Any:
        """`true` is not 1: pydantic would take it for a number."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(
                    f"{name} = {str(value).lower()}: this setting is not true or false"
                )
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        # Batch
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided into gradient_accumulation_steps "
                f"= {self.gradient_accumulation_steps} micro-batches; set batch_size to a multiple "
                "of it"
            )
        if self.adversarial_weight > 0 and self.mix_share > 0 and self.batch_size == 1:
            raise ValueError(
                f"mix_share {self.mix_share} takes fakes from other pairs of the batch, but "
                "batch_size is 1; raise batch_size or set mix_share=0"
            )
        if self.perceptual in ("teacher", "decoder") and self.loss == "pixel_lpips":
            raise ValueError(
                f"perceptual = {self.perceptual!r} are features of latents, but pixel_lpips "
                "compares images; set perceptual to a network of images, or another loss"
            )

        # Device
        is_gpu = self.device.startswith("cuda") or self.device == "auto"
        if self.precision == "bfloat16" and not is_gpu:
            raise ValueError(
                f"precision {self.precision!r} is for cuda, but device is {self.device!r}; set "
                "precision=float32 or device=cuda"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether training evaluates the teacher's network: for a LoRA, or for its features."""
        if self.lora_rank > 0:
            return True
        return self.perceptual == "teacher" and self.loss in ("latent_lpips", "e_latent_lpips")

    @property
    def needs_vae(self) -> bool:
        """Whether training evaluates the VAE's decoder: for its images, or for its features."""
        if self.loss == "pixel_lpips":
            return True
        return self.perceptual == "decoder" and self.loss in ("latent_lpips", "e_latent_lpips")

    def changed(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The settings that differ: name → (value in this recipe, value in the other one)."""
        differences = {}
        for key in Recipe.model_fields:
            value, other_value = getattr(self, key), getattr(other, key)
            if value != other_value:
                differences[key] = (value, other_value)
        return differences


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A shipped recipe or a .toml file, changed by `key=value` settings.

    Raises UserError if the name, the file, a setting (the message names the nearest) or a value is
    not valid.
    """
    # Read the file
    path = SHIPPED / f"{name}.toml"
    if not _is_file(path):
        path = Path(name)
    if not _is_file(path):
        raise UserError(
            f"no recipe {name!r}: neither a file nor a shipped recipe"
            f"{nearest(name, shipped_recipes())}"
        )
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error

    # Apply the settings of the command line
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r}: write it as key=value")
        check_names([key.strip()], f"--set {setting}")
        values[key.strip()] = value.strip()

    return parse_recipe(values, str(path))


def _is_file(path: Path) -> bool:
    """False also for a name that no file can have, such as one that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """A recipe from its settings. Raises UserError, naming `source`, if one is not valid."""
    check_names(values, source)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        messages = []
        for details in error.errors():
            if details["loc"]:
                messages.append(f"{details['loc'][0]} = {details['input']!r}: {details['msg']}")
            else:
                messages.append(details["msg"].removeprefix("Value error, "))
        raise UserError(f"{source}: {'; '.join(messages)}") from error


def check_names(names: Iterable[str], source: str) -> None:
    """Raises UserError, naming `source`, at an unknown setting, or one by its former name."""
    for name in names:
        if name in RENAMED:
            raise UserError(
                f"{source}: the setting {name!r} is now called {RENAMED[name]!r}; use the new name"
            )
        if name not in Recipe.model_fields:
            raise UserError(
                f"{source}: unknown setting {name!r}{nearest(name, Recipe.model_fields)}"
            )


@dataclass(frozen=True)
class RecipeSummary:
    """The information about a recipe that `diffusion2gan recipe list` prints."""

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
