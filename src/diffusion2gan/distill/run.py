"""A run: student and discriminator, their optimisers, the EMA; on disk, a folder to resume from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.adversarial.discriminator import Discriminator, build_discriminator
from diffusion2gan.distill import checkpoints
from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.health import Health
from diffusion2gan.distill.optimizer import discriminator_optimizer, student_optimizer
from diffusion2gan.distill.student import Student
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe, parse_recipe
from diffusion2gan.runtime import checkpoint, fsdp, sharded_checkpoint
from diffusion2gan.runtime.background import Background
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.ema import EMA
from diffusion2gan.runtime.files import atomic_write, read_json, write_json
from diffusion2gan.runtime.progress import console
from diffusion2gan.runtime.transfer import HostCopies
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

# Settings that do not change any update: they may differ whenever a run is resumed.
FREE_SETTINGS = {"checkpoint_every_s", "keep_best", "keep_checkpoints", "sample_every"}

# Settings that change updates by rounding alone: they may differ if named with --allow-change.
ROUNDING_SETTINGS = {
    "device",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "precision",
    "strategy",
}


# What of a checkpoint must be finite, and have exactly the keys of the run: not the optimisers,
# whose states begin with the first step.
WEIGHTS = ("student", "ema", "discriminator")


class Run:
    """The state of a run that is carried from step to step.

    Without an adversarial weight there is no discriminator. With strategy=fsdp on several ranks the
    discriminator and the student are sharded over the ranks, with their optimisers and the average;
    a LoRA student is not.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, group: Group | None = None) -> None:
        assert "auto" not in (recipe.precision, recipe.perceptual), "see resolve_recipe"
        self.recipe = recipe
        self.teacher = teacher
        self.group = group or Group(Ranks())
        self.is_sharded = recipe.strategy == "fsdp" and self.group.ranks.world_size > 1
        self.pairs_seen = 0
        self.health = Health()

        # Student
        self.student = Student.from_recipe(recipe, teacher).train()
        if self.is_sharded and recipe.lora_rank == 0:
            fsdp.shard(self.student.trained, teacher.device)
        self.optimizer = student_optimizer(recipe, self.student.trained)
        self.ema = EMA(self.student.trained, recipe.ema_decay)

        # Discriminator
        self.discriminator: Discriminator | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if recipe.adversarial_weight > 0:
            self.discriminator = build_discriminator(recipe, teacher).train()
            if self.is_sharded:
                fsdp.shard(self.discriminator, teacher.device)
            self.discriminator_optimizer = discriminator_optimizer(recipe, self.discriminator)

        # Checkpoints are written in a thread while training continues. Writing a sharded one needs
        # communication between the ranks, over a process group that nothing else uses.
        self._background = Background()
        self._copies = HostCopies()
        self._background_group = self.group.new_gloo_group() if self.is_sharded else None

    def set_initial_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the student, and its average, from these weights instead of the teacher's."""
        checkpoint.check_weights(
            Path(self.recipe.init_from), self.student.trained.state_dict(), weights
        )
        fsdp.load_full_state(self.student.trained, weights)
        self.ema = EMA(self.student.trained, self.recipe.ema_decay)

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 if the recipe sets it.

        The student's output layer, distances and losses stay in float32 in any case.
        """
        enabled = self.recipe.precision == "bfloat16"
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Gives the student its averaged weights inside the block; restores its weights after."""
        trained = self.student.trained
        weights = {key: value.detach().clone() for key, value in trained.state_dict().items()}
        trained.load_state_dict(self.ema.shadow)
        try:
            yield
        finally:
            trained.load_state_dict(weights)

    def save(self, folder: Path) -> None:
        """Starts writing a checkpoint in the background, atomically.

        `wait_until_saved` waits for it. All ranks must call this. The first rank writes; a sharded
        state is written by all ranks, each its shards. Raises Failure, on all ranks, if a weight or
        the average is not finite; nothing is written then.
        """
        tensors = self._state()
        self._check_finite(folder, tensors)
        if not (self.group.ranks.is_main or self.is_sharded):
            return

        meta = {
            "pairs_seen": self.pairs_seen,
            "num_updates": self.ema.num_updates,
            "health": self.health.state(),
        }
        if self._background_group is not None:
            self._save_shards(folder, tensors, meta)
            return

        # A copy, because training continues while it is written. It must not replace the one before
        # until that is written.
        self.wait_until_saved()
        copies = self._copies.start(tensors)

        def write() -> None:
            self._copies.wait()
            checkpoints.write(folder, copies, meta, self.recipe)

        self._background.start(write)

    def _check_finite(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Raises Failure if the weights or the average in `tensors` are not finite."""
        weights = {key: value for key, value in tensors.items() if key.split("/")[0] in WEIGHTS}
        keys = checkpoint.find_non_finite(weights)

        # Shards may differ; all other weights are the same on every rank
        num_bad = len(keys)
        if self.is_sharded:
            counts = self.group.all_gather(torch.tensor([num_bad], device=self.teacher.device))
            num_bad = int(torch.cat(counts).max())
        if num_bad == 0:
            return

        self.wait_until_saved()  # the checkpoint before may still be on its way to the disk
        state = "There is no checkpoint before"
        if (folder / CHECKPOINT).exists():
            pairs_before = checkpoints.read_meta(folder / CHECKPOINT)["pairs_seen"]
            state = f"The checkpoint before, of {pairs_before} pairs, is unchanged"
        example = f" (such as {keys[0]})" if keys else ""
        raise Failure(
            f"after {self.pairs_seen} pairs, {num_bad} of the {len(weights)} weights and averages "
            f"of the run contain NaN or infinity{example}, so no checkpoint was written. {state}; "
            "lower learning_rate or discriminator_learning_rate in a new run."
        )

    def _state(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        tensors = checkpoint.pack("student", self.student.trained)
        tensors.update(checkpoint.pack_optimizer("adam", self.optimizer))
        tensors.update(checkpoint.pack("ema", self.ema))
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            tensors.update(checkpoint.pack("discriminator", self.discriminator))
            optimizer = self.discriminator_optimizer
            tensors.update(checkpoint.pack_optimizer("discriminator_adam", optimizer))
        return tensors

    def _save_shards(self, folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Every rank writes its shards; rank 0 then writes the file that names them."""
        assert self._background_group is not None
        shards_folder = checkpoints.unfinished_shards(folder, self.pairs_seen)
        write_shards = sharded_checkpoint.prepare_write(
            shards_folder, tensors, self._background_group
        )
        numels = {key: value.numel() for key, value in tensors.items()}

        def write() -> None:
            digests = write_shards()
            if self.group.ranks.is_main:
                files = sharded_checkpoint.check_written(shards_folder, numels)
                checkpoints.write_sharded(folder, files, digests, meta, self.recipe)

        self._background.start(write)

    def wait_until_saved(self) -> None:
        """Waits until the last checkpoint is written; raises the error if writing failed."""
        self._background.wait()

    def load(self, folder: Path) -> None:
        """Restores the state of the newest checkpoint in `folder`."""
        tensors, meta = checkpoint.load(folder / CHECKPOINT)
        checkpoint.check_counts(folder / CHECKPOINT, meta, "pairs_seen", "num_updates")
        expected = self._state()
        checkpoint.check_weights(
            folder / CHECKPOINT,
            {key: value for key, value in expected.items() if key.split("/")[0] in WEIGHTS},
            {key: value for key, value in tensors.items() if key.split("/")[0] in WEIGHTS},
        )

        # Student
        fsdp.load_full_state(self.student.trained, checkpoint.unpack("student", tensors))
        checkpoint.unpack_optimizer("adam", self.optimizer, tensors)
        self.ema.load_state_dict(checkpoint.unpack("ema", tensors), meta["num_updates"])

        # Discriminator
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            fsdp.load_full_state(self.discriminator, checkpoint.unpack("discriminator", tensors))
            checkpoint.unpack_optimizer("discriminator_adam", self.discriminator_optimizer, tensors)

        # Progress
        self.pairs_seen = meta["pairs_seen"]
        if "health" in meta:  # missing in runs from before it was saved
            self.health = Health.from_state(meta["health"])


def open_run(run: Run, out: Path, spec: PairsSpec, allow_change: Sequence[str] = ()) -> None:
    """Starts a run folder, or resumes the run in it. All ranks must call this.

    `allow_change`: settings, of ROUNDING_SETTINGS, that may differ from those of the run in `out`.
    Raises UserError if the folder contains a run with other settings or pairs, or if the ranks find
    it at different progress.
    """
    for key in allow_change:
        if key not in ROUNDING_SETTINGS:
            raise UserError(
                f"--allow-change {key}: only {', '.join(sorted(ROUNDING_SETTINGS))} may change in "
                "a run; start a new run to change other settings."
            )

    # Contents of the folder
    checkpoints.check_missing_files(out)
    recipe_file = out / "recipe.json"
    checkpoint_file = out / CHECKPOINT
    pairs_seen = 0
    if checkpoint_file.exists():
        pairs_seen = checkpoints.read_meta(checkpoint_file)["pairs_seen"]
    run.group.check_same(out, pairs_seen, "pairs")

    # Initial weights: once the run has a checkpoint, it no longer needs them
    if run.recipe.init_from != "teacher" and not checkpoint_file.exists():
        run.set_initial_weights(initial_weights(run.recipe, run.teacher))

    # Settings: written by a new run, compared when it is resumed
    pairs_description = asdict(spec)
    pairs_description["latent_shape"] = list(spec.latent_shape)
    if recipe_file.exists():
        check_settings(run.recipe, pairs_description, out, allow_change)
    elif run.group.ranks.is_main:
        write_json(recipe_file, {"recipe": run.recipe.model_dump(), "pairs": pairs_description})

    # State
    if checkpoint_file.exists():
        run.load(out)
    if run.group.ranks.is_main:
        if run.pairs_seen > 0:
            # The run may have been killed between writing a checkpoint and linking its other names
            checkpoints.keep(out, run.recipe)
        truncate_log(out, run.pairs_seen)


def check_settings(
    recipe: Recipe, pairs_description: dict[str, Any], out: Path, allow_change: Sequence[str]
) -> None:
    """Raises UserError if the run in `out` has other settings than `recipe`, or other pairs."""
    existing = read_description(out)
    existing_recipe = parse_recipe(existing["recipe"], str(out / "recipe.json"))
    allowed = FREE_SETTINGS | set(allow_change)

    # Differences
    differences = []
    allowable = []
    for key, (requested, in_run) in recipe.changed(existing_recipe).items():
        if key in allowed:
            continue
        differences.append(f"{key}: {in_run!r} in the run, {requested!r} requested")
        if key in ROUNDING_SETTINGS:
            allowable.append(f"--allow-change {key}")
    existing_pairs = PairsSpec.parse(existing["pairs"], out / "recipe.json")
    if existing_pairs != PairsSpec.parse(pairs_description, out / "recipe.json"):
        differences.append("other pairs")
    if not differences:
        return

    message = (
        f"{out} contains a run with different settings ({'; '.join(differences)}). To resume it, "
        "use its settings; to start a new run, choose another --out"
    )
    if allowable:
        message += (
            f". Changes that alter the run by rounding alone can be allowed: {', '.join(allowable)}"
        )
    raise UserError(f"{message}.")


def truncate_log(out: Path, pairs_seen: int) -> None:
    """Removes the lines of steps after the checkpoint, which are about to be repeated."""
    path = out / "log.jsonl"
    if not path.exists():
        return

    kept = []
    damaged = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        line_pairs_seen = _log_position(line)
        if line_pairs_seen is not None and line_pairs_seen <= pairs_seen:
            kept.append(line + b"\n")
        # A killed process may have left its last line incomplete
        elif line_pairs_seen is None and number < len(lines):
            damaged.append(str(number))
    if damaged:
        console.print(
            f"warning: {path} has {len(damaged)} damaged lines (line {', '.join(damaged[:3])}); "
            "they are dropped. The run itself does not depend on the log.",
            soft_wrap=True,
        )
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _log_position(line: bytes) -> int | None:
    """`pairs_seen` of a line of log.jsonl; None if it is damaged."""
    try:
        entry = json.loads(line)
        position = entry["pairs_seen"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return position if isinstance(position, int) else None


def initial_weights(recipe: Recipe, teacher: Teacher) -> dict[str, Tensor]:
    """The averaged weights of the student of the run `recipe.init_from`.

    Raises UserError if that run has another teacher, or other LoRA settings.
    """
    run_teacher, weights, described = load_student(Path(recipe.init_from))
    run_recipe = parse_recipe(described["recipe"], recipe.init_from)

    # Same teacher
    if run_teacher.revision != teacher.revision:
        raise UserError(
            f"init_from = {recipe.init_from!r} was distilled from weights {run_teacher.revision}, "
            f"but this recipe's teacher {teacher.name!r} has {teacher.revision}. Name a run of the "
            "same teacher, or set init_from=teacher."
        )

    # Same LoRA settings
    if recipe.lora_rank > 0 or run_recipe.lora_rank > 0:
        for key in ("lora_rank", "lora_targets"):
            in_run = getattr(run_recipe, key)
            requested = getattr(recipe, key)
            if in_run != requested:
                raise UserError(
                    f"init_from = {recipe.init_from!r} has {key} = {in_run!r}, this recipe "
                    f"{requested!r}; set them equal, or set init_from=teacher."
                )
    return weights


def read_description(folder: Path) -> dict[str, Any]:
    """A run's recipe.json: `recipe` and `pairs`. Raises UserError if these are no settings."""
    path = folder / "recipe.json"
    described = read_json(path)
    if not (
        isinstance(described, dict)
        and isinstance(described.get("recipe"), dict)
        and isinstance(described.setdefault("pairs", {}), dict)
    ):
        raise UserError(
            f"{path} does not describe a run: it needs the settings `recipe` and `pairs`. Restore "
            "the original file."
        )
    return described


def load_recipe_teacher(recipe: Recipe, device: str | torch.device = "cpu") -> Teacher:
    """The recipe's teacher, with its LoRAs, VAE and resolution."""
    return load_teacher(
        recipe.teacher,
        device,
        recipe.resolution,
        config=recipe.teacher_config,
        loras=recipe.teacher_lora,
        vae=recipe.vae,
    )


def load_student(run: Path) -> tuple[Teacher, dict[str, Tensor], dict[str, Any]]:
    """Loads a run's student: its teacher, the averaged weights, and the run's description.

    `run` is a run's folder, or one of the checkpoints in it. The description has the keys `recipe`,
    `pairs` and `pairs_seen`. Raises UserError if there is no run, or if its teacher has changed.
    """
    folder, file = checkpoints.find(run)
    described = read_description(folder)
    tensors, meta = checkpoint.load(file)
    average = checkpoint.unpack("ema", tensors)
    checkpoint.check_finite(average, f"{file} is of a diverged run or damaged; use another one.")

    # Settings that did not exist when the run was made get their defaults
    recipe = parse_recipe(described["recipe"], str(folder / "recipe.json"))
    checkpoint.check_counts(file, meta, "pairs_seen")
    teacher = load_recipe_teacher(recipe)
    revision = described["pairs"].get("revision")
    if teacher.revision != revision:
        raise UserError(
            f"the run in {folder} was distilled from weights {revision}, but its teacher "
            f"{recipe.teacher!r} now has weights {teacher.revision}; restore the old weights."
        )

    described["recipe"] = recipe.model_dump()
    described["pairs_seen"] = meta["pairs_seen"]
    return teacher, average, described
