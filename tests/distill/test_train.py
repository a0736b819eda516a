"""The training loop by regression alone: exact resuming, refusals, skipped steps, falling loss."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill.run_logs import read_log, repeatable_text
from torch import Tensor

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.distill import checkpoints, steps, train
from diffusion2gan.distill.checks import check_pairs
from diffusion2gan.distill.run import CHECKPOINT, Run, initial_weights, load_student, open_run
from diffusion2gan.distill.steps import learning_rate, step_seed
from diffusion2gan.distill.student import Student
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.export import export
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec, open_set
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.loading import load_teacher

BATCH = 2
STEPS = 10


@pytest.fixture(scope="module")
def pairs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    teacher = load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 7, 0, 2, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [f"a star {i}" for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The paper's regression loss with a random network; a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("latent_vgg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(4, (8, 8, 8, 8, 8), 2)
        heads = [torch.rand(8) for _ in range(5)]
    LatentLPIPS(vgg, heads).save_pretrained(folder)
    return Recipe(
        teacher=str(tiny_teacher),
        perceptual=str(folder),
        total_pairs=STEPS * BATCH,
        batch_size=BATCH,
        warmup=0.2,
        ema_decay=0.9,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
        adversarial_weight=0,
    )


@pytest.fixture(scope="module")
def finished_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    distill(recipe, pairs, out)
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    """Checkpoint and log are equal, bit for bit, but for the log's times and memory."""
    tensors, meta = checkpoint.load(found / CHECKPOINT)
    expected_tensors, expected_meta = checkpoint.load(expected / CHECKPOINT)
    assert meta == expected_meta
    assert repeatable_text(found) == repeatable_text(expected)
    assert tensors.keys() == expected_tensors.keys()
    for key, value in expected_tensors.items():
        assert torch.equal(tensors[key], value), key


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def interrupt_before_step(monkeypatch: pytest.MonkeyPatch, pairs_seen: int) -> None:
    """Ctrl-C just before the student's update at `pairs_seen`."""
    real = steps.student_step

    def student_step(run: Run, *args: Any) -> Any:
        if run.pairs_seen == pairs_seen:
            raise KeyboardInterrupt
        return real(run, *args)

    monkeypatch.setattr(steps, "student_step", student_step)


def test_initial_student_is_the_teacher_at_its_last_timestep(
    tiny_teacher: Path, sd_style_teacher: Path
) -> None:
    for folder in (tiny_teacher, sd_style_teacher):
        teacher = load_teacher(str(folder))
        noise = noise_from_seeds([1, 2], teacher.latent_shape)
        cond = teacher.encode(["a star", "two rings"])

        student = Student(teacher)
        latents = student(noise, cond)
        assert torch.equal(latents, teacher.denoise(noise, 999, cond))
        assert latents.requires_grad

        # Gradients reach the student's weights, and not the teacher's
        student_parameters = dict(student.named_parameters())
        teacher_parameters = dict(teacher.network.named_parameters())
        assert len(student_parameters) == len(teacher_parameters)
        assert all(parameter.requires_grad for parameter in student_parameters.values())
        latents.square().sum().backward()
        for parameter in teacher_parameters.values():
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_run_writes_checkpoint_log_and_samples(finished_run: Path, recipe: Recipe) -> None:
    # Log
    lines = read_log(finished_run)
    progress = [line["pairs_seen"] for line in lines]
    assert progress == list(range(BATCH, STEPS * BATCH + 1, BATCH))
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0

    # Checkpoint
    tensors, meta = checkpoint.load(finished_run / CHECKPOINT)
    assert meta["pairs_seen"] == STEPS * BATCH
    assert meta["num_updates"] == STEPS
    assert meta["health"]["steps"] == STEPS
    assert not any(key.startswith("discriminator") for key in tensors)
    student = checkpoint.unpack("student", tensors)
    ema = checkpoint.unpack("ema", tensors)
    assert any(not torch.equal(value, ema[key]) for key, value in student.items())

    # Samples
    assert [path.name for path in (finished_run / "samples").iterdir()] == ["000000020.png"]

    # Loaded again
    teacher, average, described = load_student(finished_run)
    assert described["pairs_seen"] == STEPS * BATCH
    assert described["recipe"] == recipe.model_dump() | {"device": "cpu"}
    assert average.keys() == teacher.network.state_dict().keys()


def test_run_is_a_function_of_its_seed(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    distill(recipe, pairs, tmp_path / "same")
    assert_same_run(tmp_path / "same", finished_run)

    other_seed = recipe.model_copy(update={"total_pairs": BATCH, "seed": 1})
    distill(other_seed, pairs, tmp_path / "other")
    assert read_log(tmp_path / "other")[0] != read_log(finished_run)[0]


def test_interrupted_run_resumes_bit_for_bit(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 5 * BATCH)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, pairs, out)
    assert checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"] == 5 * BATCH

    # As if it had gone on after its checkpoint, and died while it wrote a line
    with (out / "log.jsonl").open("a") as log:
        log.write('{"pairs_seen": 12, "loss": 9.0, "grad_norm": 9.0}\n{"pairs_se')
    other_intervals = recipe.model_copy(update={"checkpoint_every_s": 100.0, "sample_every": 7})
    distill(other_intervals, pairs, out)
    assert_same_run(out, finished_run)

    # A finished run has nothing left to do
    distill(recipe, pairs, out)
    assert_same_run(out, finished_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_a_step_saves_after_it_and_the_run_resumes_exactly(
    finished_run: Path,
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    out = tmp_path / "run"
    without_checkpoints = recipe.model_copy(update={"checkpoint_every_s": 1e6})
    real_learning_rate = steps.learning_rate
    real_write = checkpoints.write

    def learning_rate_with_signal(recipe: Recipe, pairs_seen: int) -> float:
        if pairs_seen == 4 * BATCH:
            os.kill(os.getpid(), number)
        return real_learning_rate(recipe, pairs_seen)

    def write_with_second_signal(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real_write(*args)

    # Ctrl-C ends it as an interruption, SIGTERM with exit code 0
    with monkeypatch.context() as patch:
        patch.setattr(steps, "learning_rate", learning_rate_with_signal)
        patch.setattr(checkpoints, "write", write_with_second_signal)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                distill(without_checkpoints, pairs, out)
        else:
            with pytest.raises(SystemExit) as end:
                distill(without_checkpoints, pairs, out)
            assert end.value.code == 0
    assert checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"] == 5 * BATCH

    distill(without_checkpoints, pairs, out)
    assert_same_run(out, finished_run)


def test_run_stopped_before_its_first_checkpoint_starts_again(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    without_checkpoints = recipe.model_copy(update={"checkpoint_every_s": 1e6})
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 2 * BATCH)
        with pytest.raises(KeyboardInterrupt):
            distill(without_checkpoints, pairs, out)
    assert not (out / CHECKPOINT).exists()
    assert (out / "log.jsonl").exists()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_student(out)

    distill(without_checkpoints, pairs, out)
    assert_same_run(out, finished_run)


def test_step_seeds_are_distinct_for_every_seed_and_step() -> None:
    """torch's CPU generator uses 32 bits of a seed: both numbers must be mixed into those."""
    seeds = []
    for seed in (0, 1, 2**31 - 1):
        seeds += [step_seed(seed, pairs_seen) for pairs_seen in range(0, 20_000, 32)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32

    first_numbers = set()
    for seed in seeds[:50]:
        generator = torch.Generator().manual_seed(seed)
        first_numbers.add(torch.rand((), generator=generator).item())
    assert len(first_numbers) == 50


def test_learning_rate_rises_linearly_then_follows_a_cosine() -> None:
    recipe = Recipe(total_pairs=1000, batch_size=10, warmup=0.1, learning_rate=2e-3)
    rates = [learning_rate(recipe, pairs_seen) for pairs_seen in range(0, 1000, 10)]

    assert rates[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)])
    for i, rate in enumerate(rates[10:]):
        cosine = (1 + math.cos(math.pi * i / 90)) / 2
        assert rate == pytest.approx(2e-3 * (0.05 + 0.95 * cosine))
    assert rates[-1] < 2e-3 * 0.06

    without_warmup = recipe.model_copy(update={"warmup": 0.0})
    assert learning_rate(without_warmup, 0) == 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate: 0\.0003 in the run, 0\.001 requested"),
        (
            {"loss": "mse", "seed": 4},
            "loss: 'e_latent_lpips' in the run, 'mse' requested; seed: 0 in the run, 4 requested",
        ),
        ({"total_pairs": 22}, "total_pairs: 20 in the run, 22 requested"),
    ],
)
def test_run_with_other_settings_is_refused_and_not_touched(
    finished_run: Path, recipe: Recipe, pairs: Path, change: dict[str, Any], message: str
) -> None:
    modified_at = (finished_run / CHECKPOINT).stat().st_mtime_ns
    with pytest.raises(UserError, match=message):
        distill(recipe.model_copy(update=change), pairs, finished_run)
    assert (finished_run / CHECKPOINT).stat().st_mtime_ns == modified_at


def test_run_from_before_the_choice_of_solvers_is_resumed(
    recipe: Recipe, pairs: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Its description of the pairs lacks the solver; another solver's pairs are refused."""
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    settings = json.loads((folder / "recipe.json").read_text())
    assert settings["pairs"].pop("solver") == "ddim"
    (folder / "recipe.json").write_text(json.dumps(settings))
    distill(recipe, pairs, folder)

    settings["pairs"]["solver"] = "dpm++"
    (folder / "recipe.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="other pairs"):
        distill(recipe, pairs, folder)


def test_pairs_of_another_teacher_or_resolution_are_refused(
    recipe: Recipe, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    settings: dict[str, Any] = {
        "teacher": teacher.name,
        "revision": teacher.revision,
        "prompts": "p",
        "count": 1,
        "seed": 0,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "latent_shape": teacher.latent_shape,
        "shard_size": 1,
    }

    other_teacher = PairsSpec(**{**settings, "revision": "0123", "teacher": "another"})
    with pytest.raises(UserError, match=r"'another' \(weights 0123\).*" + teacher.revision):
        check_pairs(other_teacher, teacher, tmp_path)
    other_size = PairsSpec(**{**settings, "latent_shape": (4, 8, 8)})
    with pytest.raises(UserError, match=r"\(4, 8, 8\), the teacher's have \(4, 16, 16\)"):
        check_pairs(other_size, teacher, tmp_path)

    # By the command, before it writes anything
    make_pairs(teacher, lambda indices: ["a"] * len(indices), other_teacher, tmp_path / "pairs")
    with pytest.raises(UserError, match="to make pairs of the recipe"):
        distill(recipe, tmp_path / "pairs", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_is_not_resumed_with_other_pairs(
    finished_run: Path, recipe: Recipe, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 2, 9, 1, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: ["a"] * len(indices), spec, tmp_path)
    with pytest.raises(UserError, match="other pairs"):
        distill(recipe, tmp_path, finished_run)


def test_loss_falls_on_seven_pairs(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    num_steps = 40
    changes = {
        "loss": "mse",
        "total_pairs": num_steps * 7,
        "batch_size": 7,
        "learning_rate": 2e-3,
        "ema_decay": 0.8,
        "checkpoint_every_s": 1e6,
    }
    distill(recipe.model_copy(update=changes), pairs, tmp_path)

    losses = [line["loss"] for line in read_log(tmp_path)]
    assert len(losses) == num_steps
    assert losses[-1] < 0.5 * losses[0]


def make_distance_infinite(monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
    """Calls of the distance with these numbers, counted from 1, return infinity."""
    real: Callable[..., Any] = train.build_distance
    num_calls = 0

    def build_distance(*args: Any) -> Any:
        distance = real(*args)

        def sometimes_infinite(*args: Any) -> Tensor:
            nonlocal num_calls
            num_calls += 1
            factor = float("inf") if num_calls in calls else 1.0
            return distance(*args) * factor

        return sometimes_infinite

    monkeypatch.setattr(train, "build_distance", build_distance)


def test_step_with_an_infinite_gradient_is_skipped_and_counted(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_distance_infinite(monkeypatch, range(3, 12))  # nine in a row are no failure
    distill(recipe.model_copy(update={"total_pairs": 14 * BATCH}), pairs, tmp_path)

    lines = read_log(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, *range(1, 10), 9, 9, 9]
    assert [line["loss"] is None for line in lines] == [3 <= i <= 11 for i in range(1, 15)]
    tensors, meta = checkpoint.load(tmp_path / CHECKPOINT)
    assert meta["num_updates"] == 5
    assert meta["health"]["skipped"] == 9
    assert meta["health"]["skipped_in_a_row"] == 0
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_ten_skipped_steps_in_a_row_are_a_failure_that_keeps_the_last_good_checkpoint(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = recipe.model_copy(update={"total_pairs": 14 * BATCH})
    distill(longer, pairs, tmp_path / "expected")

    with monkeypatch.context() as patch:
        make_distance_infinite(patch, range(3, 99))
        with pytest.raises(
            Failure,
            match=r"not finite in 10 steps in a row, up to 24 pairs .*intact; lower learning_rate",
        ):
            distill(longer, pairs, tmp_path / "run")
    tensors, meta = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert meta["pairs_seen"] == 2 * BATCH
    assert meta["health"]["skipped"] == 0
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())

    # From it the run can be resumed
    distill(longer, pairs, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "expected")


def test_run_may_start_from_the_student_of_another_run(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    other_run = tmp_path / "other"
    shutil.copytree(finished_run, other_run)
    changes = {"init_from": str(other_run), "total_pairs": BATCH, "seed": 3}
    later = recipe.model_copy(update=changes)

    # Weights and their average are the other student's
    run = Run(later, load_teacher(later.teacher))
    open_run(run, tmp_path / "run", open_set(pairs))
    expected = load_student(finished_run)[1]
    assert_same_weights(run.student.trained.state_dict(), expected)
    assert_same_weights(run.ema.shadow, expected)

    # Once it has a checkpoint, it no longer needs the other run
    distill(later, pairs, tmp_path / "run")
    shutil.rmtree(other_run)
    distill(later, pairs, tmp_path / "run")


def test_init_from_needs_a_run_with_the_same_teacher_and_lora(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, sd_style_teacher: Path
) -> None:
    without_run = recipe.model_copy(update={"init_from": str(tmp_path / "none")})
    with pytest.raises(UserError, match="contains no run"):
        distill(without_run, pairs, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()

    later = recipe.model_copy(update={"init_from": str(finished_run)})
    with pytest.raises(UserError, match=r"init_from = .* was distilled from weights"):
        initial_weights(later, load_teacher(str(sd_style_teacher)))

    lora = recipe.model_copy(update={"init_from": str(finished_run), "lora_rank": 2})
    with pytest.raises(UserError, match=r"init_from = .* has lora_rank = 0, this recipe 2"):
        initial_weights(lora, load_teacher(recipe.teacher))


def test_damaged_checkpoint_is_a_failure(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"total_pairs": BATCH})
    distill(short, pairs, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Failure, match="damaged"):
        distill(short, pairs, tmp_path)


def test_ema_weights_are_used_inside_the_block_and_restored_after_it(recipe: Recipe) -> None:
    run = Run(recipe, load_teacher(recipe.teacher))
    run.ema.shadow = {key: torch.zeros_like(value) for key, value in run.ema.shadow.items()}
    before = {key: value.clone() for key, value in run.student.network.state_dict().items()}
    noise = noise_from_seeds([0], (4, 16, 16))
    cond = run.teacher.encode(["a"])

    with torch.no_grad(), run.ema_weights():
        latents = run.student(noise, cond)

    # A network with zero weights predicts v = 0
    expected = run.teacher.alpha_bar(999) ** 0.5 * noise
    assert torch.allclose(latents, expected)
    assert_same_weights(run.student.network.state_dict(), before)


def test_dry_run_counts_steps_and_parameters(recipe: Recipe, pairs: Path) -> None:
    cost = dry_run(recipe, pairs)
    network = load_teacher(recipe.teacher).network
    assert cost["steps"] == STEPS
    assert cost["student_parameters"] == sum(p.numel() for p in network.parameters())


def test_weights_that_are_not_finite_end_the_run_without_a_checkpoint(
    recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    # A recipe from a file cannot have this learning rate
    changes = {"learning_rate": math.inf, "total_pairs": 4 * BATCH, "warmup": 0.0, "loss": "mse"}
    diverging = recipe.model_copy(update=changes | {"checkpoint_every_s": 1e6})
    with pytest.raises(Failure, match=r"after 8 pairs, .* contain NaN or infinity .*no checkpoint"):
        distill(diverging, pairs, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("place", ["student", "ema", "discriminator"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_checkpoint_is_not_replaced_by_one_that_is_not_finite(
    place: str, value: float, recipe: Recipe, tmp_path: Path
) -> None:
    with_discriminator = {"adversarial_weight": 0.5, "discriminator": "patch", "patch_width": 4}
    run = Run(recipe.model_copy(update=with_discriminator), load_teacher(recipe.teacher))
    run.save(tmp_path)
    run.wait_until_saved()
    before = (tmp_path / CHECKPOINT).read_bytes()

    assert run.discriminator is not None
    tensors = {
        "student": run.student.trained.state_dict(),
        "ema": run.ema.shadow,
        "discriminator": run.discriminator.state_dict(),
    }[place]
    key, tensor = list(tensors.items())[-1]
    tensor.view(-1)[-1] = value
    with pytest.raises(Failure, match=f"such as {place}/{key}.*of 0 pairs, is unchanged"):
        run.save(tmp_path)
    run.wait_until_saved()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def change_checkpoint(run: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors, meta = checkpoint.load(run / CHECKPOINT)
    change(tensors)
    checkpoint.save(run / CHECKPOINT, tensors, meta)


def ema_key(tensors: dict[str, Tensor]) -> str:
    return next(key for key in tensors if key.startswith("ema/") and key.endswith("weight"))


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors[ema_key(tensors)].view(-1)[3] = math.nan


def rename_key(tensors: dict[str, Tensor]) -> None:
    tensors["ema/another"] = tensors.pop(ema_key(tensors))


def add_key(tensors: dict[str, Tensor]) -> None:
    tensors["ema/another"] = torch.zeros(2)


def cut_tensor(tensors: dict[str, Tensor]) -> None:
    tensors[ema_key(tensors)] = tensors[ema_key(tensors)][:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "NaN or infinity"),
        (rename_key, "is missing"),
        (add_key, "another is not expected"),
        (cut_tensor, "has the shape"),
    ],
)
def test_checkpoint_with_other_or_not_finite_weights_is_not_used(
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    finished_run: Path,
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    change_checkpoint(tmp_path / "run", change)

    with pytest.raises(Failure, match=message):
        distill(recipe, pairs, tmp_path / "run")
    with pytest.raises(Failure, match=message):
        export(tmp_path / "run", tmp_path / "student")
    later = recipe.model_copy(update={"init_from": str(tmp_path / "run")})
    with pytest.raises(Failure, match=message):
        distill(later, pairs, tmp_path / "later")
    assert not (tmp_path / "student").exists()
    assert not list((tmp_path / "later").glob("*.safetensors"))


def test_export_refuses_weights_that_float16_cannot_hold(
    finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    change_checkpoint(tmp_path / "run", lambda tensors: tensors[ema_key(tensors)].fill_(1e5))
    export(tmp_path / "run", tmp_path / "single")
    with pytest.raises(Failure, match=r"the unet cannot be exported in torch\.float16"):
        export(tmp_path / "run", tmp_path / "half", torch.float16)
    assert [path.name for path in tmp_path.iterdir() if "half" in path.name] == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"null}", b'{"pairs_seen": "x"}', b'{"loss": 1}', b"\xff\xfe}", b"[" * 9999],
)
def test_damaged_line_of_the_log_is_dropped_with_a_warning(
    damage: bytes,
    finished_run: Path,
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))

    distill(recipe, pairs, tmp_path / "run")
    assert log.read_bytes() == b"".join([*lines[:2], *lines[3:]])
    printed = capsys.readouterr()
    assert "1 damaged lines (line 3)" in printed.out + printed.err


@pytest.mark.parametrize(
    ("key", "value"), [("pairs_seen", None), ("pairs_seen", "6"), ("num_updates", -1)]
)
def test_checkpoint_with_an_odd_header_is_damaged(
    key: str, value: object, finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    tensors, meta = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    checkpoint.save(tmp_path / "run" / CHECKPOINT, tensors, meta | {key: value})
    with pytest.raises(Failure, match=rf"is damaged \(its header has {key} = "):
        distill(recipe, pairs, tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "{}", '{"recipe": [], "pairs": {}}', "[" * 100_000])
def test_run_with_an_odd_description_is_refused(
    text: str, finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.json (does not describe a run|is not JSON)"):
        distill(recipe, pairs, tmp_path / "run")
    with pytest.raises(UserError, match=r"recipe\.json (does not describe a run|is not JSON)"):
        load_student(tmp_path / "run")
