"""`perceptual fit`: class folders to a network, on latents and pixels; interrupted and run again, the same bits."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.test_ranks import done, torchrun
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.calibrate import calibrate
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.fit import FitSettings, fit
from diffusion2gan.perceptual.images import held_out_mask, open_labelled_images, read_image
from diffusion2gan.runtime import cache as module_cache
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime import trainer as module_fit
from diffusion2gan.runtime.cache import Cache, Unreadable, make_cache
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.trainer import shuffled
from diffusion2gan.teacher.autoencoder import encode, load_vae

WIDTHS = (4, 4, 8, 8, 8)
COLOURS = {"blue": (40, 60, 220), "red": (220, 50, 40)}


def write_pictures(folder: Path, each: int = 20, size: int = 20) -> Path:
    """Two classes that any network tells apart: reddish and bluish noise."""
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            picture = np.clip(
                np.array(colour) + noise.normal(0, 25, (size, size, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: copy it."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set")


def run(images: Path, out: Path, vae: str | None = None, **options: float) -> dict[str, object]:
    settings = {"size": 16, "epochs": 6, "batch_size": 8} | options
    return fit(images, out, vae, FitSettings(WIDTHS, **settings))  # type: ignore[arg-type]


def test_it_learns_and_says_what_it_measured(pictures: Path, tmp_path: Path) -> None:
    result = run(pictures, tmp_path / "pixels", epochs=10, peak_lr=0.01)
    assert (result["trained_on"], result["held_out"], result["classes"]) == (36, 4, 2) and result[
        "top1"
    ] == 1.0
    assert json.loads((tmp_path / "pixels" / "fit.json").read_text()) == result
    distance = LatentLPIPS.from_pretrained(tmp_path / "pixels")
    assert distance.channels == 3 and distance._frozen[0].num_dropped == 0
    assert all(torch.equal(head, torch.ones_like(head)) for head in distance._frozen[1])
    assert "top-1 100.0% on 4 held-out images" in (tmp_path / "pixels" / "README.md").read_text()


def test_latents_are_cached_once_and_a_cut_run_ends_with_the_same_bits(
    pictures: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = str(tiny_teacher)
    run(pictures, tmp_path / "whole", vae, epochs=2)
    rows = LatentLPIPS.from_pretrained(tmp_path / "whole")
    assert rows.channels == 4 and rows._frozen[0].num_dropped == 2
    cached = module_cache.checkpoint.load(tmp_path / "whole" / "work" / "00000000.safetensors")[0]
    first = read_image(pictures / "blue" / "000.png", "first", 16).permute(1, 2, 0).numpy()
    expected = encode(
        load_vae(vae), torch.from_numpy(first[None] / 127.5 - 1).permute(0, 3, 1, 2).float()
    )
    torch.testing.assert_close(cached["input"][:1].float(), expected, rtol=1e-2, atol=1e-2)
    assert cached["label"].tolist() == [0] * 20 + [1] * 20

    monkeypatch.setattr(module_fit, "CHECKPOINT_EVERY_S", 0.0)
    steps = iter(range(100))
    real = module_fit.nn.utils.clip_grad_norm_

    def cut(*args: object, **kwargs: object) -> object:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module_fit.nn.utils, "clip_grad_norm_", cut)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, tmp_path / "cut", vae, epochs=2)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    before = (tmp_path / "cut" / "work" / "00000000.safetensors").stat().st_mtime_ns
    run(pictures, tmp_path / "cut", vae, epochs=2)
    assert (tmp_path / "cut" / "work" / "00000000.safetensors").stat().st_mtime_ns == before
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")
    )
    assert ours == theirs


def test_few_unreadable_pictures_are_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "set", each=60)
    (folder / "red" / "007.png").write_bytes(b"no picture")
    result = run(folder, tmp_path / "out", epochs=1)
    assert result["unreadable"] == ["red/007.png (UnidentifiedImageError)"]
    assert "skipped 1 of 120 images: red/007.png" in " ".join(capsys.readouterr().err.split())
    assert (int(result["trained_on"]), int(result["held_out"])) == (107, 12)  # type: ignore[call-overload]
    whole = (folder / "red" / "008.png").read_bytes()
    (folder / "red" / "008.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError,
        match=r"2 of 120 images cannot be read, more than 1%: red/007.png .*, red/008.png",
    ):
        run(folder, tmp_path / "other", epochs=1)
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_a_link_to_nowhere_is_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "set", each=60)
    (folder / "blue" / "060.png").symlink_to(tmp_path / "nowhere.png")
    result = run(folder, tmp_path / "out", epochs=1)
    assert result["unreadable"] == ["blue/060.png (FileNotFoundError)"]
    assert "skipped 1 of 121 images: blue/060.png" in " ".join(capsys.readouterr().err.split())


def test_folders_that_are_no_classes(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of images"):
        open_labelled_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has 0 classes"):
        open_labelled_images(tmp_path)
    copy = Path(shutil.copytree(pictures, tmp_path / "copy"))
    (copy / "lonely").mkdir()
    shutil.copy(copy / "red" / "000.png", copy / "lonely" / "000.png")
    with pytest.raises(UserError, match=r"class 'lonely' .* has 1 readable image; two are needed"):
        open_labelled_images(copy)
    with pytest.raises(UserError, match="--size 18: a multiple of 4, 16 or more, is needed"):
        run(pictures, tmp_path / "x", "pocket", size=18)
    with pytest.raises(UserError, match="--batch-size 1: batch norm needs at least 2 images"):
        run(pictures, tmp_path / "x", batch_size=1)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="five are needed"):
        fit(pictures, tmp_path / "x", None, FitSettings((8, 8)))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "dataset_info.json").write_text("{}")
    if module_has("datasets"):
        pytest.skip("`datasets` is installed")
    with pytest.raises(UserError, match="install `datasets` to read it"):
        open_labelled_images(tmp_path / "hf")


def test_several_processes_are_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match=r"at least 2 images on each of the 2 ranks, .*; give a multiple of 2, 4 or more",
    ):
        run(pictures, tmp_path / "out", batch_size=7)
    told = r"trains in one process, but this is one of 2 \(WORLD_SIZE\). Start it without torchrun"
    with pytest.raises(UserError, match=f"perceptual calibrate {told}"):
        calibrate(pictures, "pocket", tmp_path / "out", "pocket")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_train_one_network(pictures: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM between two of its saves and started again: the same network, and one that has learned."""
    script = tmp_path / "saves_each_step.py"
    script.write_text(
        "from diffusion2gan import cli\nfrom diffusion2gan.runtime import trainer\n"
        "trainer.CHECKPOINT_EVERY_S = 0.0\ncli.main()\n"
    )
    words = [
        script,
        "perceptual",
        "fit",
        "--images",
        pictures,
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
    done(torchrun(2, *words, tmp_path / "whole"))
    result = json.loads((tmp_path / "whole" / "fit.json").read_text())
    assert (result["trained_on"], result["held_out"], result["top1"]) == (36, 4, 1.0)
    process, state = (
        torchrun(2, *words, tmp_path / "cut"),
        tmp_path / "cut" / "work" / "fit.safetensors",
    )
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert 0 < checkpoint.meta(state)["pictures_seen"] < 40 * 36, told
    done(torchrun(2, *words, tmp_path / "cut"))
    for name in ("model.safetensors", "fit.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_out_is_written_by_one_process(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with (
        exclusive_lock(out / "model.safetensors"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        run(pictures, out)
    assert not any(out.iterdir())
    monkeypatch.chdir(out)
    run(pictures, Path("."))
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "fit.json",
        "model.safetensors",
        "work",
    }


class InTurn(Group):
    """A rank of two, whose wait for the other is the other's work."""

    def __init__(self, rank: int, other: Callable[[], object]) -> None:
        super().__init__(Ranks(rank, 2))
        self.other = other

    def all_gather_string(self, what: str, said: str) -> list[str]:
        if what.startswith("made"):
            self.other()
        return [said, said]


def test_ranks_share_a_cache_and_have_the_same(tmp_path: Path) -> None:
    reads: dict[int, list[int]] = {0: [], 1: []}

    def made(folder: Path, group: Group) -> Cache:
        def read(i: int) -> dict[str, torch.Tensor]:
            reads[group.ranks.rank].append(i)
            if i == 150:
                raise Unreadable("150.png")
            return {"x": torch.tensor(float(i))}

        return make_cache(
            folder, {}, 200, read, lambda rows: rows, "pictures", chunk=64, batch=16, group=group
        )

    alone = made(tmp_path / "alone", Group(Ranks()))
    assert reads[0] == list(range(200)) and alone.unreadable == ["150.png"] and len(alone) == 199
    reads[0].clear()
    shared = made(
        tmp_path / "shared", InTurn(0, lambda: made(tmp_path / "shared", InTurn(1, lambda: None)))
    )
    assert reads == {0: [*range(64), *range(128, 192)], 1: [*range(64, 128), *range(192, 200)]}
    assert (
        torch.equal(shared.load_all("x"), alone.load_all("x"))
        and shared.unreadable == alone.unreadable
    )
    with pytest.raises(
        UserError, match=r"of rank 0 does not exist on rank 1\. All ranks must use the same --out"
    ):
        made(tmp_path / "of another machine", InTurn(1, lambda: None))


def test_a_stop_in_the_last_chunk_is_not_forgotten(tmp_path: Path) -> None:
    def read(i: int) -> dict[str, torch.Tensor]:
        if i == 5:
            signal.raise_signal(signal.SIGTERM)
        return {"x": torch.tensor(i)}

    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, {}, 10, read, lambda rows: rows, "numbers")
    made = make_cache(tmp_path, {}, 10, lambda i: {}, lambda rows: rows, "numbers")  # it was kept
    assert made.load_all("x").tolist() == list(range(10))


def test_a_device_that_is_not_here_is_refused(pictures: Path, tmp_path: Path) -> None:
    for name in ("cuda:99", "gpu"):
        told = f"device '{name}' is not available .*; give --device cpu or another"
        with pytest.raises(UserError, match=told):
            fit(pictures, tmp_path / "out", None, FitSettings(WIDTHS, size=16), device=name)
        with pytest.raises(UserError, match=told):
            calibrate(pictures, "pocket", tmp_path / "out", "pocket", device=name)
    assert not (tmp_path / "out").exists()


class FakeDataset:
    """As much of `datasets.Dataset` as is used; its pictures are `paths`, without a class's names."""

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
    ("labels", "told"),
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
def test_labels_of_a_dataset_that_are_none(
    labels: list[object], told: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(pictures.rglob("*.png"))[18:22]
    (tmp_path / "dataset_info.json").write_text("{}")
    found = FakeDataset(paths, [0, 0, 1, 1])
    fake_datasets(monkeypatch, found)
    opened = open_labelled_images(tmp_path)
    assert (opened.classes, opened.labels, opened.source(3)) == (["0", "1"], [0, 0, 1, 1], paths[3])
    found.labels = labels
    with pytest.raises(UserError, match=told):
        open_labelled_images(tmp_path)


def test_splits_of_a_dataset(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FakeDataset(sorted(pictures.rglob("*.png"))[18:22], [0, 0, 1, 1])
    (tmp_path / "dataset_dict.json").write_text("{}")
    fake_datasets(monkeypatch, {"train": found, "test": None})
    assert open_labelled_images(tmp_path).labels == [0, 0, 1, 1]
    fake_datasets(monkeypatch, {"validation": found, "test": found})
    with pytest.raises(
        UserError, match=r"no split 'train', but test, validation; give the folder of .*/test"
    ):
        open_labelled_images(tmp_path)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """A package `datasets` that loads `found`, whatever the folder."""
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_from_disk, module.Image = lambda folder: found, lambda decode: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def module_has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_other_settings_do_not_take_what_is_there(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match="was made with size = 16, but this command has 32"):
        run(pictures, tmp_path / "out", epochs=1, size=32)
    with pytest.raises(
        UserError, match=r"out/work was made with epochs = 1, but this command has 2\. .* delete"
    ):
        run(pictures, tmp_path / "out", epochs=2)


def test_other_pictures_are_trained_on_once_the_named_folder_is_deleted(
    pictures: Path, tmp_path: Path
) -> None:
    out, others = tmp_path / "out", Path(shutil.copytree(pictures, tmp_path / "others"))
    run(pictures, out, epochs=1)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "fit.json",
        "work",
    }
    for path in sorted((others / "red").iterdir())[10:]:
        path.unlink()
    with pytest.raises(UserError, match=r"out/work was made with images = '.*delete that folder"):
        run(others, out, epochs=1)
    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "work")
    assert run(others, out, epochs=1)["trained_on"] == 27
    assert (out / "model.safetensors").read_bytes() != before


def test_a_picture_is_resized_and_cut_at_its_centre(tmp_path: Path) -> None:
    grey = Image.new("L", (40, 20))
    grey.paste(255, (15, 0, 25, 20))  # a white bar in the middle
    grey.save(tmp_path / "bar.png")
    found = read_image(tmp_path / "bar.png", "bar", 10)
    assert found.shape == (3, 10, 10) and found.dtype == torch.uint8
    assert bool((found[:, :, 4:6] > 240).all()) and bool((found[:, :, [0, 9]] < 15).all())
    with pytest.raises(Unreadable, match="gone"):
        read_image(tmp_path / "gone.png", "gone", 10)


def test_the_held_out_are_a_tenth_of_each_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] * 7)
    mask = held_out_mask(labels, 3)
    assert [int(mask[labels == k].sum()) for k in range(3)] == [4, 1, 1]
    assert torch.equal(mask, held_out_mask(labels, 3)) and not torch.equal(
        mask, held_out_mask(labels, 4)
    )


def test_each_epoch_takes_every_row_once() -> None:
    places = shuffled(range(30), 10, 1)
    assert [sorted(places[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert places[:10] != places[10:20] and places[:10] != shuffled(range(10), 10, 2)
    assert shuffled(range(7, 23), 10, 1) == places[7:23]  # whatever the batch


def test_the_cache_in_chunks_is_the_same(tmp_path: Path) -> None:
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
        assert (
            torch.equal(cache.load_all("x"), expected)
            and len(cache) == 199
            and cache.unreadable == ["150"]
        )
        assert torch.equal(cache.load_rows("x", [198, 0, 6, 7, 150]), expected[[198, 0, 6, 7, 150]])
