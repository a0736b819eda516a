"""Two-alternative forced choices: the layout of BAPPS, the score, and the fit of the heads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import TransformSettings, apply_transform
from diffusion2gan.perceptual.calibrate import CalibrationSettings, calibrate
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.images import images_from_uint8
from diffusion2gan.perceptual.ranking import (
    JudgedDifferences,
    Ranker,
    calibrate_heads,
    flat_then_linear,
    two_afc,
)
from diffusion2gan.perceptual.triplets import open_triplets, read_triplet
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.pocket.triplets import SUBSETS, write_triplets
from diffusion2gan.runtime import cache, checkpoint
from diffusion2gan.teacher.autoencoder import encode, load_vae

COUNT = 6
ONE_EPOCH = CalibrationSettings(epochs=1)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests: restore what you change."""
    folder = tmp_path_factory.mktemp("triplets")
    write_triplets(folder, COUNT, seed=0)
    return folder


def network(folder: Path, channels: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(channels, (4, 4, 8, 8, 8), 2 if channels == 4 else 0)
        LatentLPIPS(vgg, [torch.ones(width) for width in (4, 4, 8, 8, 8)]).save_pretrained(folder)
    return folder


def test_two_afc_is_the_mean_agreement() -> None:
    d0, d1 = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([2.0, 1.0, 3.0, 5.0])
    judge = torch.tensor([0.25, 0.75, 0.9, 0.6])  # share who chose p1
    # The distance chooses p0: 0.75 agree; p1: 0.75; a tie: half; p0: 0.4
    assert two_afc(d0, d1, judge) == pytest.approx((0.75 + 0.75 + 0.5 + 0.4) / 4)


def test_ranker_has_the_inputs_and_layers_of_lpips() -> None:
    torch.manual_seed(0)
    ranker = Ranker(torch.rand(6))
    m0, m1 = torch.rand(2, 5, 6)
    d0, d1 = ((m.double() * ranker.heads.detach().double()).sum(1) for m in (m0, m1))
    x = torch.stack([d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)], 1)
    for index in (0, 2, 4):
        layer = ranker.body[index]
        x = x @ layer.weight.double().T + layer.bias.double()  # type: ignore[union-attr,operator]
        x = torch.where(x > 0, x, 0.2 * x) if index < 4 else x
    torch.testing.assert_close(ranker(m0, m1).double(), x[:, 0], rtol=1e-5, atol=1e-5)


def test_learning_rate_is_flat_then_linear_to_zero() -> None:
    rates = [flat_then_linear(p, 2.0) for p in (0.0, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([2.0, 2.0, 1.0, 0.0])


def synthetic_differences(count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Judgements follow channel 0 alone; the other two are larger and uninformative."""
    g = torch.Generator().manual_seed(0)
    d0, d1 = torch.rand(2, count, 3, generator=g)
    judge = (d1[:, 0] < d0[:, 0]).float()
    d0[:, 1:], d1[:, 1:] = 2 * d0[:, 1:], 2 * d1[:, 1:]
    return d0, d1, judge


def test_heads_learn_the_informative_channel_and_stay_non_negative(tmp_path: Path) -> None:
    d0, d1, judge = synthetic_differences()
    start = [torch.ones(1), torch.ones(2)]
    heads = calibrate_heads(
        JudgedDifferences(d0, d1, judge),
        start,
        folder=tmp_path,
        epochs=40,
        peak_lr=0.03,
        batch_size=40,
    )

    # The score is better, the other channels count less
    flat = torch.cat(heads)
    assert [len(head) for head in heads] == [1, 2] and bool((flat >= 0).all())
    assert two_afc(d0.sum(1), d1.sum(1), judge) < 0.75
    assert two_afc(d0 @ flat, d1 @ flat, judge) > 0.9
    assert flat[1] < 0.5 * flat[0] and flat[2] < 0.5 * flat[0]


def test_heads_are_clamped_at_zero() -> None:
    ranker = Ranker(torch.tensor([-1.0, 0.0, 2.0]))
    ranker.clamp()
    assert ranker.heads.tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_folder_of_triplets_calibrates_a_network(
    channels: int, triplets: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    vae = str(tiny_teacher) if channels == 4 else None
    source = network(tmp_path / "network", channels)
    result = calibrate(
        triplets,
        str(source),
        tmp_path / "out",
        vae,
        settings=CalibrationSettings(epochs=4, peak_lr=0.02),
    )
    assert sorted(result) == sorted(SUBSETS) and all(row["count"] == 1 for row in result.values())
    assert json.loads((tmp_path / "out" / "calibrate.json").read_text()) == result

    # New heads, the same network
    old, new = (LatentLPIPS.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert all(bool((head >= 0).all()) for head in new._frozen[1])
    assert not torch.equal(torch.cat(new._frozen[1]), torch.cat(old._frozen[1]))
    trunks = [d._frozen[0].state_dict().values() for d in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*trunks, strict=True))

    # Scores of all triplets are those of the distance
    scored = calibrate(
        triplets, str(source), tmp_path / "scored", vae, scored=triplets, settings=ONE_EPOCH
    )
    assert all(row["count"] == COUNT for row in scored.values())
    expected = score_one_by_one(triplets, old, vae, "blur")
    assert scored["blur"]["before"] == pytest.approx(expected)


def test_other_triplets_are_refused_in_an_existing_folder(triplets: Path, tmp_path: Path) -> None:
    source, copy, out = str(network(tmp_path / "network", 3)), tmp_path / "copy", tmp_path / "out"
    shutil.copytree(triplets, copy)
    first = calibrate(copy, source, out, scored=copy, settings=ONE_EPOCH)

    # The same triplets in another folder
    assert calibrate(triplets, source, out, scored=copy, settings=ONE_EPOCH) == first

    # Other triplets
    write_triplets(tmp_path / "others", COUNT, seed=1)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "calibrate.json",
        "work",
    }
    refusal = (
        r"out/work.* was made with triplets = '.*', but this command has '.*'\. "
        r"To continue it, use the same setting; to start anew, choose"
    )
    with pytest.raises(UserError, match=refusal):
        calibrate(tmp_path / "others", source, out, scored=copy, settings=ONE_EPOCH)

    # The same images, another judgement
    judgement = copy / "blur" / "judge" / "000000.npy"
    np.save(judgement, 1 - np.load(judgement))  # another judgement, a file of the same size
    for folder in (copy, triplets):  # changed in the training set, then in the scored set
        with pytest.raises(UserError, match=refusal):
            calibrate(folder, source, out, scored=copy, settings=ONE_EPOCH)


def test_missing_scored_triplets_are_refused_before_anything_is_written(
    triplets: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no folder of triplets: .*/mistyped"):
        calibrate(
            triplets,
            str(network(tmp_path / "network", 3)),
            tmp_path / "out",
            scored=tmp_path / "mistyped",
        )
    assert not (tmp_path / "out").exists()


def test_a_broken_link_as_reference_is_skipped_and_reported(
    triplets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(triplets, tmp_path / "copy"))
    ref = copy / "blur" / "ref" / "000003.png"
    ref.unlink()
    ref.symlink_to(tmp_path / "nowhere.png")
    monkeypatch.setattr(cache, "MAX_UNREADABLE", 0.05)
    calibrate(copy, str(network(tmp_path / "network", 3)), tmp_path / "out", settings=ONE_EPOCH)
    message = " ".join(capsys.readouterr().err.split())
    skipped = f"skipped 1 of {COUNT * len(SUBSETS)} triplets"
    assert f"{skipped}: blur/ref/000003.png (FileNotFoundError)" in message


def test_a_size_that_the_pools_cannot_halve_is_refused(
    triplets: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    for channels, vae, expected in ((3, None, "16"), (4, str(tiny_teacher), "a multiple of 4, 16")):
        source = network(tmp_path / str(channels), channels)
        with pytest.raises(UserError, match=f"--size 8: {expected} or more, is needed"):
            calibrate(
                triplets, str(source), tmp_path / "out", vae, settings=CalibrationSettings(size=8)
            )
    assert not (tmp_path / "out").exists()


def test_heads_are_calibrated_under_one_transform_per_triplet(
    triplets: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    source = network(tmp_path / "network", 4)
    transforms = TransformSettings(("geometric", "cutout"), share=0.7, resampling="bicubic")
    settings = CalibrationSettings(epochs=1, transforms=transforms)
    calibrate(triplets, str(source), tmp_path / "out", str(tiny_teacher), settings=settings)

    # The cached differences are those of the transformed latents
    cached, _ = checkpoint.load(tmp_path / "out" / "work" / "00000000.safetensors")
    opened = open_triplets(triplets)
    count = len(opened.refs)
    drawn = transforms.draw(count, torch.Generator().manual_seed(0), "cpu")
    distance = LatentLPIPS.from_pretrained(source)
    vae = load_vae(tiny_teacher)
    assert drawn.is_applied is not None and 0 < int(drawn.is_applied.sum()) < count
    for i in range(count):
        row = read_triplet(opened, i, 64)
        transform = drawn.select(slice(i, i + 1))
        inputs = []
        for name in ("p0", "ref"):
            latents = encode(vae, images_from_uint8(row[name][None]))
            inputs.append(apply_transform(latents, transform, "bicubic"))
        expected = torch.cat(distance.differences(*inputs), 1)
        torch.testing.assert_close(cached["d0"][i], expected[0], rtol=1e-3, atol=1e-5)

    with pytest.raises(UserError, match="transforms = "):
        calibrate(triplets, str(source), tmp_path / "out", str(tiny_teacher), settings=ONE_EPOCH)


def score_one_by_one(triplets: Path, distance: LatentLPIPS, vae: str | None, subset: str) -> float:
    """The 2AFC score of `distance` itself, triplet by triplet."""
    agreement = []
    opened = open_triplets(triplets)
    for i, number in enumerate(opened.subset):
        if opened.subsets[number] != subset:
            continue
        rows = read_triplet(opened, i, 64)
        inputs = {}
        for name in ("ref", "p0", "p1"):
            inputs[name] = rows[name][None].float() / 127.5 - 1
            if vae is not None:
                inputs[name] = encode(load_vae(vae), inputs[name])

        ref = inputs["ref"]
        chooses_p1 = bool(distance(inputs["p1"], ref) < distance(inputs["p0"], ref))
        judge = float(rows["judge"])
        agreement.append(judge if chooses_p1 else 1 - judge)
    return math.fsum(agreement) / len(agreement)


def test_a_latent_network_without_its_vae_is_refused(triplets: Path, tmp_path: Path) -> None:
    source = network(tmp_path / "network", 4)
    with pytest.raises(
        UserError, match=r"reads 4 channels, but the inputs are images \(no --vae\) with 3 channels"
    ):
        calibrate(triplets, str(source), tmp_path / "out")


def test_missing_folders_subsets_and_files_are_refused(triplets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of triplets"):
        open_triplets(tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no triplets"):
        open_triplets(tmp_path)

    for folder, name in (("judge", "000001.npy"), ("p1", "000002.png")):
        path, aside = triplets / "noise" / folder / name, tmp_path / "aside"
        path.rename(aside)
        try:
            with pytest.raises(UserError, match=rf"has no {folder}: .*{name} is missing"):
                open_triplets(triplets)
        finally:
            aside.rename(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([1.5]), "is 1.5; it must be the share"),
        (np.array([np.nan]), "is nan"),
        (np.zeros(2), "is not one plain number"),
        (np.array([print], dtype=object), "pickles are not read"),
        (b"no array", "is not one plain number"),
    ],
)
def test_invalid_judgements_are_refused(
    value: np.ndarray | bytes, message: str, triplets: Path
) -> None:
    opened = open_triplets(triplets)

    path = triplets / opened.subsets[0] / "judge" / f"{opened.refs[0].stem}.npy"
    before = path.read_bytes()
    try:
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            np.save(path, value, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            read_triplet(opened, 0, 16)
    finally:
        path.write_bytes(before)
