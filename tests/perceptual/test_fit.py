"""`perceptual fit`: networks on latents and pixels, resumed bit for bit; reading of image sets."""

from __future__ import annotations

import errno
import importlib.machinery
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.rank_processes import torchrun, wait_for_success
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import TransformSettings
from diffusion2gan.perceptual.calibrate import calibrate
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.fit import FitSettings, fit
from diffusion2gan.perceptual.images import held_out_mask, open_labelled_images, read_image
from diffusion2gan.runtime import checkpoint, trainer
from diffusion2gan.runtime.cache import Cache, Unreadable, make_cache
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.trainer import shuffled
from diffusion2gan.teacher.autoencoder import encode, load_vae

WIDTHS = (4, 4, 8, 8, 8)
COLOURS = {"blue": (40, 60, 220), "red": (220, 50, 40)}


def write_images(folder: Path, num_per_class: int = 20, size: int = 20) -> Path:
    """Two classes that any network can distinguish: reddish and bluish noise."""
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(num_per_class):
            pixels = np.array(colour) + noise.normal(0, 25, (size, size, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests: change a copy only."""
    return write_images(tmp_path_factory.mktemp("images") / "set")


def run(images: Path, out: Path, vae: str | None = None, **options: float) -> dict[str, object]:
    settings = {"size": 16, "epochs": 6, "batch_size": 8} | options
    return fit(images, out, vae, FitSettings(WIDTHS, **settings))  # type: ignore[arg-type]


def test_fit_learns_and_reports_its_top1(images: Path, tmp_path: Path) -> None:
    result = run(images, tmp_path / "pixels", epochs=10, peak_lr=0.01)
    assert (result["trained_on"], result["held_out"], result["classes"]) == (36, 4, 2)
    assert result["top1"] == 1.0
    assert json.loads((tmp_path / "pixels" / "fit.json").read_text()) == result
    distance = LatentLPIPS.from_pretrained(tmp_path / "pixels")
    assert distance.channels == 3 and distance._frozen[0].num_dropped == 0
    assert all(torch.equal(head, torch.ones_like(head)) for head in distance._frozen[1])
    assert "top-1 100.0% on 4 held-out images" in (tmp_path / "pixels" / "README.md").read_text()


def test_latents_are_cached_once_and_an_interrupted_run_gives_the_same_bits(
    images: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = str(tiny_teacher)
    run(images, tmp_path / "uninterrupted", vae, epochs=2)
    distance = LatentLPIPS.from_pretrained(tmp_path / "uninterrupted")
    assert distance.channels == 4 and distance._frozen[0].num_dropped == 2

    # The cached latents are those of the VAE
    work = tmp_path / "uninterrupted" / "work"
    cached = checkpoint.load(work / "00000000.safetensors")[0]
    first = read_image(images / "blue" / "000.png", "first", 16).permute(1, 2, 0).numpy()
    expected = encode(
        load_vae(vae), torch.from_numpy(first[None] / 127.5 - 1).permute(0, 3, 1, 2).float()
    )
    torch.testing.assert_close(cached["input"][:1].float(), expected, rtol=1e-2, atol=1e-2)
    assert cached["label"].tolist() == [0] * 20 + [1] * 20

    # Interrupt a run in its fifth step
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY_S", 0.0)
    steps = iter(range(100))
    original = trainer.nn.utils.clip_grad_norm_

    def interrupt_fifth_step(*args: object, **kwargs: object) -> object:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", interrupt_fifth_step)
    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run(images, out, vae, epochs=2)
    assert not (out / "model.safetensors").exists()

    # Resume it: the cache is kept, the network is the same
    cache_file = out / "work" / "00000000.safetensors"
    before = cache_file.stat().st_mtime_ns
    run(images, out, vae, epochs=2)
    assert cache_file.stat().st_mtime_ns == before
    resumed = (out / "model.safetensors").read_bytes()
    assert resumed == (tmp_path / "uninterrupted" / "model.safetensors").read_bytes()


def test_networks_are_fitted_under_transforms_and_resume_only_with_the_same(
    images: Path, tmp_path: Path
) -> None:
    transforms = TransformSettings(("geometric", "cutout"), share=0.7, resampling="bicubic")
    plain = FitSettings(WIDTHS, size=16, epochs=1, batch_size=8)
    under_transforms = replace(plain, transforms=transforms)
    result = fit(images, tmp_path / "transformed", None, under_transforms)
    assert result is not None
    expected = {"families": "geometric+cutout", "share": 0.7, "resampling": "bicubic"}
    assert result["transforms"] == expected
    fit(images, tmp_path / "plain", None, plain)
    weights = [tmp_path / name / "model.safetensors" for name in ("transformed", "plain")]
    assert weights[0].read_bytes() != weights[1].read_bytes()

    with pytest.raises(UserError, match=r"transforms = \{'families'.*this command has None"):
        fit(images, tmp_path / "transformed", None, plain)


def test_few_unreadable_images_are_skipped_and_reported_and_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "set", num_per_class=60)
    (folder / "red" / "007.png").write_bytes(b"not an image")
    result = run(folder, tmp_path / "out", epochs=1)
    assert result["unreadable"] == ["red/007.png (UnidentifiedImageError)"]
    assert "skipped 1 of 120 images: red/007.png" in " ".join(capsys.readouterr().err.split())
    assert (int(result["trained_on"]), int(result["held_out"])) == (107, 12)  # type: ignore[call-overload]

    # A second one of 120 is too many
    content = (folder / "red" / "008.png").read_bytes()
    (folder / "red" / "008.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError,
        match=r"2 of 120 images cannot be read, more than 1%: red/007.png .*, red/008.png",
    ):
        run(folder, tmp_path / "other", epochs=1)
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_a_broken_link_is_skipped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "set", num_per_class=60)
    (folder / "blue" / "060.png").symlink_to(tmp_path / "nowhere.png")
    result = run(folder, tmp_path / "out", epochs=1)
    assert result["unreadable"] == ["blue/060.png (FileNotFoundError)"]
    assert "skipped 1 of 121 images: blue/060.png" in " ".join(capsys.readouterr().err.split())


def test_unusable_image_folders_and_settings_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of images"):
        open_labelled_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has 0 classes"):
        open_labelled_images(tmp_path)

    # A class with one image
    copy = Path(shutil.copytree(images, tmp_path / "copy"))
    (copy / "lonely").mkdir()
    shutil.copy(copy / "red" / "000.png", copy / "lonely" / "000.png")
    with pytest.raises(UserError, match=r"class 'lonely' .* has 1 readable image; two are needed"):
        open_labelled_images(copy)

    # Settings
    with pytest.raises(UserError, match="--size 18: a multiple of 4, 16 or more, is needed"):
        run(images, tmp_path / "x", "pocket", size=18)
    with pytest.raises(UserError, match="--batch-size 1: batch norm needs at least 2 images"):
        run(images, tmp_path / "x", batch_size=1)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="five are needed"):
        fit(images, tmp_path / "x", None, FitSettings((8, 8)))

    # A dataset without the package
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "dataset_info.json").write_text("{}")
    if module_has("datasets"):
        pytest.skip("`datasets` is installed")
    with pytest.raises(UserError, match="install `datasets` to read it"):
        open_labelled_images(tmp_path / "hf")


def test_batches_the_ranks_cannot_share_and_several_processes_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match=r"at least 2 images on each of the 2 ranks, .*; give a multiple of 2, 4 or more",
    ):
        run(images, tmp_path / "out", batch_size=7)
    message = (
        r"trains in one process, but this is one of 2 \(WORLD_SIZE\). Start it without torchrun"
    )
    with pytest.raises(UserError, match=f"perceptual calibrate {message}"):
        calibrate(images, "pocket", tmp_path / "out", "pocket")
    assert not (tmp_path / "out").exists()


# `fit.py STEP ARGUMENTS…`: the command line with a checkpoint after every step. In step STEP,
# counted from 0, the main rank sends torchrun a SIGTERM and waits until torchrun has passed it on.
STOPPABLE_FIT = """
import os, signal, sys, time
from diffusion2gan import cli
from diffusion2gan.runtime import trainer
from diffusion2gan.runtime.stop import StepControl

step_to_stop = sys.argv.pop(1)
num_steps = 0
original = StepControl.request

def request(self):
    global num_steps
    if str(num_steps) == step_to_stop and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
        while self._stopped() is None:
            time.sleep(0.01)
    num_steps += 1
    return original(self)

StepControl.request = request
trainer.CHECKPOINT_EVERY_S = 0.0
cli.main()
"""


@pytest.mark.slow
def test_two_ranks_train_one_network_and_resume_after_sigterm(images: Path, tmp_path: Path) -> None:
    """The resumed network has the same bits as that of an uninterrupted run, and has learned."""
    script = tmp_path / "fit.py"
    script.write_text(STOPPABLE_FIT)
    arguments = [
        "perceptual",
        "fit",
        "--images",
        images,
        "--vae",
        "pocket",
        "--size",
        "16",
        "--widths",
        "4,4,8,8,8",
        "--batch-size",
        "8",
        "--epochs",
        "40",
        "--out",
    ]
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"

    wait_for_success(torchrun(2, script, "never", *arguments, uninterrupted))
    result = json.loads((uninterrupted / "fit.json").read_text())
    assert (result["trained_on"], result["held_out"], result["top1"]) == (36, 4, 1.0)

    # The script sends torchrun a SIGTERM in its sixth step of 180
    process = torchrun(2, script, 5, *arguments, interrupted)
    _, err = process.communicate(timeout=300)
    state = interrupted / "work" / "fit.safetensors"
    assert checkpoint.meta(state)["pictures_seen"] == 6 * 8, err
    assert not (interrupted / "model.safetensors").exists()

    wait_for_success(torchrun(2, script, "never", *arguments, interrupted))
    for name in ("model.safetensors", "fit.json"):
        assert (interrupted / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_two_processes_do_not_write_the_same_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with (
        exclusive_lock(out / "model.safetensors"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        run(images, out)
    assert not any(out.iterdir())

    # The lock is released: now it is written, even as the working directory
    monkeypatch.chdir(out)
    run(images, Path("."))
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "fit.json",
        "model.safetensors",
        "work",
    }


class SequentialGroup(Group):
    """One of two ranks in one process: when it would wait for the other, it runs the other."""

    def __init__(self, rank: int, run_other: Callable[[], object]) -> None:
        super().__init__(Ranks(rank, 2))
        self.run_other = run_other

    def all_gather_string(self, what: str, text: str) -> list[str]:
        if what.startswith("made"):
            self.run_other()
        return [text, text]


def test_ranks_share_the_work_of_a_cache_and_get_the_same_rows(tmp_path: Path) -> None:
    reads: dict[int, list[int]] = {0: [], 1: []}

    def cache_numbers(folder: Path, group: Group) -> Cache:
        def read(i: int) -> dict[str, torch.Tensor]:
            reads[group.ranks.rank].append(i)
            if i == 150:
                raise Unreadable("150.png")
            return {"x": torch.tensor(float(i))}

        return make_cache(
            folder, {}, 200, read, lambda rows: rows, "numbers", chunk=64, batch=16, group=group
        )

    alone = cache_numbers(tmp_path / "alone", Group(Ranks()))
    assert reads[0] == list(range(200)) and alone.unreadable == ["150.png"] and len(alone) == 199
    reads[0].clear()

    def run_rank_1() -> None:
        cache_numbers(tmp_path / "shared", SequentialGroup(1, lambda: None))

    shared = cache_numbers(tmp_path / "shared", SequentialGroup(0, run_rank_1))
    assert reads == {0: [*range(64), *range(128, 192)], 1: [*range(64, 128), *range(192, 200)]}
    assert torch.equal(shared.load_all("x"), alone.load_all("x"))
    assert shared.unreadable == alone.unreadable

    with pytest.raises(
        UserError, match=r"of rank 0 does not exist on rank 1\. All ranks must use the same --out"
    ):
        cache_numbers(tmp_path / "on another machine", SequentialGroup(1, lambda: None))


def test_a_stop_signal_in_the_last_chunk_stops_after_saving_it(tmp_path: Path) -> None:
    def read(i: int) -> dict[str, torch.Tensor]:
        if i == 5:
            signal.raise_signal(signal.SIGTERM)
        return {"x": torch.tensor(i)}

    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, {}, 10, read, lambda rows: rows, "numbers")
    # The chunk was saved: `read` is not called again
    saved = make_cache(tmp_path, {}, 10, lambda i: {}, lambda rows: rows, "numbers")
    assert saved.load_all("x").tolist() == list(range(10))


def test_an_unavailable_device_is_refused(images: Path, tmp_path: Path) -> None:
    for name in ("cuda:99", "gpu"):
        message = f"device '{name}' is not available .*; give --device cpu or another"
        with pytest.raises(UserError, match=message):
            fit(images, tmp_path / "out", None, FitSettings(WIDTHS, size=16), device=name)
        with pytest.raises(UserError, match=message):
            calibrate(images, "pocket", tmp_path / "out", "pocket", device=name)
    assert not (tmp_path / "out").exists()


class FakeDataset:
    """The part of `datasets.Dataset` that is used; its labels have no class names."""

    def __init__(self, paths: list[Path], labels: list[object]) -> None:
        self.rows = [{"image": {"bytes": None, "path": str(path)}} for path in paths]
        self.features, self.labels, self._fingerprint = (
            {"image": None, "label": None},
            labels,
            "fake",
        )

    def cast_column(self, name: str, feature: object) -> FakeDataset:
        return self

    def __getitem__(self, key: int | str) -> object:
        return self.labels if key == "label" else self.rows[key]  # type: ignore[index]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 1, -1, 1],
            "row 2 of the dataset in .* has label -1, which means no class. Keep the labelled rows",
        ),
        (
            ["cat", "dog"] * 2,
            "row 0 of the dataset in .* has label 'cat', which is not a class number; number the",
        ),
        ([0, 1, None, 1], "row 2 of the dataset in .* has label None, which is not a class number"),
    ],
)
def test_dataset_labels_that_are_not_class_numbers_are_refused(
    labels: list[object],
    message: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = sorted(images.rglob("*.png"))[18:22]
    (tmp_path / "dataset_info.json").write_text("{}")
    found = FakeDataset(paths, [0, 0, 1, 1])
    fake_datasets(monkeypatch, found)
    opened = open_labelled_images(tmp_path)
    assert (opened.classes, opened.labels, opened.source(3)) == (["0", "1"], [0, 0, 1, 1], paths[3])
    found.labels = labels
    with pytest.raises(UserError, match=message):
        open_labelled_images(tmp_path)


def test_the_train_split_of_a_dataset_is_used_and_required(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FakeDataset(sorted(images.rglob("*.png"))[18:22], [0, 0, 1, 1])
    (tmp_path / "dataset_dict.json").write_text("{}")
    fake_datasets(monkeypatch, {"train": found, "test": None})
    assert open_labelled_images(tmp_path).labels == [0, 0, 1, 1]
    fake_datasets(monkeypatch, {"validation": found, "test": found})
    with pytest.raises(
        UserError, match=r"no split 'train', but test, validation; give the folder of .*/test"
    ):
        open_labelled_images(tmp_path)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """Installs a package `datasets` that loads `found` from any folder."""
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_from_disk, module.Image = lambda folder: found, lambda decode: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def module_has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_other_settings_are_refused_in_an_existing_folder(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match="was made with size = 16, but this command has 32"):
        run(images, tmp_path / "out", epochs=1, size=32)
    with pytest.raises(
        UserError, match=r"out/work was made with epochs = 1, but this command has 2\. .* move"
    ):
        run(images, tmp_path / "out", epochs=2)


def test_other_images_are_refused_until_the_reported_folder_is_moved_away(
    images: Path, tmp_path: Path
) -> None:
    out, others = tmp_path / "out", Path(shutil.copytree(images, tmp_path / "others"))
    run(images, out, epochs=1)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "fit.json",
        "work",
    }

    for path in sorted((others / "red").iterdir())[10:]:
        path.unlink()
    with pytest.raises(
        UserError, match=r"out/work was made with images = '.*move that folder away"
    ):
        run(others, out, epochs=1)

    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "work")
    assert run(others, out, epochs=1)["trained_on"] == 27
    assert (out / "model.safetensors").read_bytes() != before


def test_an_image_is_resized_and_cropped_at_its_centre(tmp_path: Path) -> None:
    grey = Image.new("L", (40, 20))
    grey.paste(255, (15, 0, 25, 20))  # a white bar in the middle
    grey.save(tmp_path / "bar.png")
    found = read_image(tmp_path / "bar.png", "bar", 10)
    assert found.shape == (3, 10, 10) and found.dtype == torch.uint8
    assert bool((found[:, :, 4:6] > 240).all()) and bool((found[:, :, [0, 9]] < 15).all())
    with pytest.raises(Unreadable, match="gone"):
        read_image(tmp_path / "gone.png", "gone", 10)


def test_a_tenth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] * 7)
    mask = held_out_mask(labels, 3)
    assert [int(mask[labels == k].sum()) for k in range(3)] == [4, 1, 1]
    assert torch.equal(mask, held_out_mask(labels, 3)) and not torch.equal(
        mask, held_out_mask(labels, 4)
    )


def test_each_epoch_is_a_permutation_of_the_rows() -> None:
    rows = shuffled(range(30), 10, 1)
    assert [sorted(rows[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert rows[:10] != rows[10:20] and rows[:10] != shuffled(range(10), 10, 2)
    assert shuffled(range(7, 23), 10, 1) == rows[7:23]  # for any batch


def test_a_cache_does_not_depend_on_its_chunk_size(tmp_path: Path) -> None:
    def read(i: int) -> dict[str, torch.Tensor]:
        if i == 150:
            raise Unreadable(str(i))
        return {"x": torch.tensor([float(i)])}

    def double(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": 2 * rows["x"]}

    caches = [
        make_cache(tmp_path / str(chunk), {}, 200, read, double, "numbers", chunk=chunk, batch=3)
        for chunk in (7, 1000)
    ]
    expected = torch.tensor([2.0 * i for i in range(200) if i != 150])[:, None]
    for cache in caches:
        assert torch.equal(cache.load_all("x"), expected)
        assert len(cache) == 199 and cache.unreadable == ["150"]
        assert torch.equal(cache.load_rows("x", [198, 0, 6, 7, 150]), expected[[198, 0, 6, 7, 150]])


def test_class_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be left out in silence. Tests may run as root, who can read everything."""
    for name in ("cats", "dogs", "dogs/puppies", "hens"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    opened = open_labelled_images(tmp_path)
    assert opened.classes == ["cats", "dogs", "hens"] and len(opened.labels) == 8

    scandir = os.scandir

    def refusing_scandir(path: object) -> object:
        if Path(str(path)).name == "puppies":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refusing_scandir)
    with pytest.raises(UserError, match=r"puppies cannot be read \(Permission denied\).*'dogs'"):
        open_labelled_images(tmp_path)
