"""A run: both players, their optimisers, the average; on disk a folder that says what it is and where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.adversarial.discriminator import build_discriminator
from diffusion2gan.distill import checkpoints
from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.health import Health
from diffusion2gan.distill.optimizer import discriminator_optimizer, student_optimizer
from diffusion2gan.distill.student import Student
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe, parse_recipe
from diffusion2gan.runtime import checkpoint, fsdp, sharded_checkpoint
from diffusion2gan.runtime.background import Background
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.ema import EMA
from diffusion2gan.runtime.files import atomic_write, read_json, write_json
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

# Settings that may change between stopping and going on: they do not alter a single update.
FREE_ON_RESUME = {"checkpoint_every_s", "keep_best", "keep_checkpoints", "sample_every"}
# Settings that change an update by rounding alone: allowed where they are named with --allow-change.
HARMLESS = {
    "gradient_accumulation_steps",
    "device",
    "gradient_checkpointing",
    "precision",
    "strategy",
}


class Run:
    """Everything a run carries from step to step. Without an adversarial weight there is no discriminator.

    With strategy=fsdp both players, their optimisers and the average are cut over the ranks, but no LoRA.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, group: Group | None = None) -> None:
        self.recipe, self.teacher, self.group = recipe, teacher, group or Group(Ranks())
        self.student = Student.from_recipe(recipe, teacher).train()
        self.cut = recipe.strategy == "fsdp" and self.group.ranks.world_size > 1
        if self.cut and recipe.lora_rank == 0:
            fsdp.shard(self.student.trained, teacher.device)
        self.optimizer = student_optimizer(recipe, self.student.trained)
        self.ema = EMA(self.student.trained, recipe.ema_decay)
        self.discriminator = (
            build_discriminator(recipe, teacher).train() if recipe.adversarial_weight > 0 else None
        )
        if self.cut and self.discriminator is not None:
            fsdp.shard(self.discriminator, teacher.device)
        self.discriminator_optimizer = (
            None
            if self.discriminator is None
            else discriminator_optimizer(recipe, self.discriminator)
        )
        self.health = Health()
        self.pairs_seen = 0
        self._saving, self._beside = Background(), self.group.new_gloo_group() if self.cut else None

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Gives the student other weights than the teacher's; its average starts there too."""
        fsdp.load_full_state(self.student.trained, weights)
        self.ema = EMA(self.student.trained, self.recipe.ema_decay)

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 where the recipe asks for it; the student's output layer, distances and losses stay in float32."""
        return torch.autocast(
            self.teacher.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint, whole or not at all, while the caller goes on; `saved` waits for it.

        All ranks must call. The first writes; what is cut, each rank writes its part of.
        """
        if not (self.group.ranks.is_main or self.cut):
            return
        tensors = checkpoint.pack("student", self.student.trained) | checkpoint.pack_optimizer(
            "adam", self.optimizer
        )
        tensors |= checkpoint.pack("ema", self.ema)
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            tensors |= checkpoint.pack("discriminator", self.discriminator)
            tensors |= checkpoint.pack_optimizer("discriminator_adam", self.discriminator_optimizer)
        meta = {
            "pairs_seen": self.pairs_seen,
            "num_updates": self.ema.num_updates,
            "health": self.health.state(),
        }
        if self._beside is None:
            copied = {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
            self._saving.start(lambda: checkpoints.write(folder, copied, meta, self.recipe))
            return
        unfinished = checkpoints.unfinished(folder, self.pairs_seen)
        write = sharded_checkpoint.prepare_write(unfinished, tensors, self._beside)
        numels = {key: value.numel() for key, value in tensors.items()}

        def write_parts() -> None:
            write()
            if self.group.ranks.is_main:
                checkpoints.write_parts(
                    folder, sharded_checkpoint.check_written(unfinished, numels), meta, self.recipe
                )

        self._saving.start(write_parts)

    def saved(self) -> None:
        """Waits until the last checkpoint is written; raises what went wrong with it."""
        self._saving.wait()

    def load(self, folder: Path) -> None:
        tensors, meta = checkpoint.load(folder / CHECKPOINT)
        fsdp.load_full_state(self.student.trained, checkpoint.unpack("student", tensors))
        checkpoint.unpack_optimizer("adam", self.optimizer, tensors)
        self.ema.load_state_dict(checkpoint.unpack("ema", tensors), meta["num_updates"])
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            fsdp.load_full_state(self.discriminator, checkpoint.unpack("discriminator", tensors))
            checkpoint.unpack_optimizer("discriminator_adam", self.discriminator_optimizer, tensors)
        self.pairs_seen = meta["pairs_seen"]
        if "health" in meta:  # runs of before it was kept have none
            self.health = Health.from_state(meta["health"])

    def with_ema(self, call: Callable[[], Tensor]) -> Tensor:
        """`call()` while the student carries its averaged weights."""
        trained = self.student.trained
        weights = {key: value.detach().clone() for key, value in trained.state_dict().items()}
        trained.load_state_dict(self.ema.shadow)
        try:
            return call()
        finally:
            trained.load_state_dict(weights)


def open_run(run: Run, out: Path, spec: PairsSpec, allow_change: Sequence[str] = ()) -> None:
    """Starts a run folder, or resumes the one there. Raises UserError where it holds another recipe's run.

    So also where the ranks find it at different places; all must call.

    `allow_change`: settings, of the harmless ones, that may differ from the run's.
    """
    if wrong := [key for key in allow_change if key not in HARMLESS]:
        raise UserError(
            f"--allow-change {wrong[0]}: only {', '.join(sorted(HARMLESS))} may change in a run"
        )
    path = out / "recipe.json"
    checkpoints.check_lost(out)
    file = out / CHECKPOINT
    run.group.check_same(out, checkpoint.meta(file)["pairs_seen"] if file.exists() else 0, "pairs")
    if run.recipe.init_from != "teacher" and not file.exists():
        run.begin(initial_weights(run.recipe, run.teacher))
    described = {
        "recipe": run.recipe.model_dump(),
        "pairs": asdict(spec) | {"latent_shape": list(spec.latent_shape)},
    }
    if path.exists():
        there = read_json(path)
        changed = run.recipe.changed(parse_recipe(there["recipe"], str(path)))
        free = FREE_ON_RESUME | set(allow_change)
        differ = [
            f"{k}: {b!r} there, {a!r} asked" for k, (a, b) in changed.items() if k not in free
        ]
        if there["pairs"] != described["pairs"]:
            differ.append("other pairs")
        if differ:
            harmless = ", ".join(
                f"--allow-change {key}" for key in changed if key in HARMLESS - free
            )
            raise UserError(
                f"{out} holds a run of another recipe ({'; '.join(differ)}). Repeat its settings to resume it, or "
                f"choose another --out{f', or allow it: {harmless}' if harmless else ''}."
            )
    elif run.group.ranks.is_main:
        write_json(path, described)
    if file.exists():
        run.load(out)
    if run.group.ranks.is_main:
        if run.pairs_seen:
            checkpoints.keep(
                out, run.recipe
            )  # a kill may have come between the file and its other names
        _cut_log(out, run.pairs_seen)


def _cut_log(out: Path, pairs_seen: int) -> None:
    """Drops lines of steps after the checkpoint: they are made again."""
    path = out / "log.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["pairs_seen"] <= pairs_seen]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def initial_weights(recipe: Recipe, teacher: Teacher) -> dict[str, Tensor]:
    """The averaged weights of `recipe.init_from`'s student. Raises UserError where that run's are of another kind."""
    own, weights, described = load_student(Path(recipe.init_from))
    theirs = parse_recipe(described["recipe"], recipe.init_from)
    if own.revision != teacher.revision:
        raise UserError(
            f"init_from = {recipe.init_from!r} was distilled from weights {own.revision}, but this recipe's teacher "
            f"{teacher.name!r} has {teacher.revision}. Name a run of the same teacher, or init_from=teacher."
        )
    for key in ("lora_rank", "lora_targets") if recipe.lora_rank or theirs.lora_rank else ():
        if getattr(theirs, key) != getattr(recipe, key):
            raise UserError(
                f"init_from = {recipe.init_from!r} has {key} = {getattr(theirs, key)!r}, this recipe {getattr(recipe, key)!r}; "
                "set them equal, or init_from=teacher."
            )
    return weights


def load_recipe_teacher(recipe: Recipe, device: str | torch.device = "cpu") -> Teacher:
    """The recipe's teacher, with all that the recipe says of it."""
    return load_teacher(
        recipe.teacher,
        device,
        recipe.resolution,
        config=recipe.teacher_config,
        loras=recipe.teacher_lora,
        vae=recipe.vae,
    )


def load_student(run: Path) -> tuple[Teacher, dict[str, Tensor], dict[str, Any]]:
    """The teacher, the student's averaged weights and the run's description, of a run's folder or one checkpoint in it.

    Raises UserError where there is no run.
    """
    run_folder, file = checkpoints.find(run)
    described = read_json(run_folder / "recipe.json")
    tensors, meta = checkpoint.load(file)
    recipe = parse_recipe(
        described["recipe"], str(run_folder)
    )  # settings newer than the run have their defaults
    teacher = load_recipe_teacher(recipe)
    if teacher.revision != described["pairs"]["revision"]:
        raise UserError(
            f"the run in {run_folder} was distilled from weights {described['pairs']['revision']}, but its teacher "
            f"{described['recipe']['teacher']!r} now has weights {teacher.revision}; put the old ones back."
        )
    described |= {"recipe": recipe.model_dump(), "pairs_seen": meta["pairs_seen"]}
    return teacher, checkpoint.unpack("ema", tensors), described
