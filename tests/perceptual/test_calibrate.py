"""Two-alternative forced choices: reading BAPPS's layout, the score, and heads that learn whom to trust."""

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
from diffusion2gan.perceptual.calibrate import CalibrationSettings, calibrate
from diffusion2gan.perceptual.distance import LatentLPIPS
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
from diffusion2gan.runtime import cache

COUNT = 6
ONE_EPOCH = CalibrationSettings(epochs=1)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed, but by tests that undo it."""
    folder = tmp_path_factory.mktemp("triplets")
    write_triplets(folder, COUNT, seed=0)
    return folder


def network(folder: Path, channels: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(channels, (4, 4, 8, 8, 8), 2 if channels == 4 else 0)
        LatentLPIPS(vgg, [torch.ones(width) for width in (4, 4, 8, 8, 8)]).save_pretrained(folder)
    return folder


def test_two_afc_by_hand() -> None:
    d0, d1 = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([2.0, 1.0, 3.0, 5.0])
    judge = torch.tensor([0.25, 0.75, 0.9, 0.6])  # share who chose p1
    # says p0: .75 agree; says p1: .75; a tie: half; says p0: .4
    assert two_afc(d0, d1, judge) == pytest.approx((0.75 + 0.75 + 0.5 + 0.4) / 4)


def test_the_small_network_reads_what_lpips_reads() -> None:
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


def test_the_rate_is_flat_then_falls() -> None:
    rates = [flat_then_linear(p, 2.0) for p in (0.0, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([2.0, 2.0, 1.0, 0.0])


def made_up(count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """People follow channel 0 alone; the other two say nothing, loudly."""
    g = torch.Generator().manual_seed(0)
    d0, d1 = torch.rand(2, count, 3, generator=g)
    judge = (d1[:, 0] < d0[:, 0]).float()
    d0[:, 1:], d1[:, 1:] = 2 * d0[:, 1:], 2 * d1[:, 1:]
    return d0, d1, judge


def test_heads_learn_whom_to_trust_and_stay_positive(tmp_path: Path) -> None:
    d0, d1, judge = made_up()
    start = [torch.ones(1), torch.ones(2)]
    heads = calibrate_heads(
        JudgedDifferences(d0, d1, judge),
        start,
        folder=tmp_path,
        epochs=40,
        peak_lr=0.03,
        batch_size=40,
    )
    flat = torch.cat(heads)
    assert [len(head) for head in heads] == [1, 2] and bool((flat >= 0).all())
    assert two_afc(d0.sum(1), d1.sum(1), judge) < 0.75
    assert two_afc(d0 @ flat, d1 @ flat, judge) > 0.9
    assert flat[1] < 0.5 * flat[0] and flat[2] < 0.5 * flat[0]


def test_the_clamp_is_at_zero() -> None:
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
    old, new = (LatentLPIPS.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert all(bool((head >= 0).all()) for head in new._frozen[1])
    assert not torch.equal(torch.cat(new._frozen[1]), torch.cat(old._frozen[1]))
    trunks = [d._frozen[0].state_dict().values() for d in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*trunks, strict=True))
    scored = calibrate(
        triplets, str(source), tmp_path / "scored", vae, scored=triplets, settings=ONE_EPOCH
    )
    assert all(row["count"] == COUNT for row in scored.values())
    expected = by_hand(triplets, old, vae, "blur")
    assert scored["blur"]["before"] == pytest.approx(expected)


def test_other_triplets_do_not_take_what_is_there(triplets: Path, tmp_path: Path) -> None:
    source, copy, out = str(network(tmp_path / "network", 3)), tmp_path / "copy", tmp_path / "out"
    shutil.copytree(triplets, copy)
    first = calibrate(copy, source, out, scored=copy, settings=ONE_EPOCH)
    assert (
        calibrate(triplets, source, out, scored=copy, settings=ONE_EPOCH) == first
    )  # the same ones, elsewhere
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
        r".* delete that folder"
    )
    with pytest.raises(UserError, match=refusal):
        calibrate(tmp_path / "others", source, out, scored=copy, settings=ONE_EPOCH)
    judgement = copy / "blur" / "judge" / "000000.npy"
    np.save(judgement, 1 - np.load(judgement))  # corrected, of the same size
    for folder in (copy, triplets):  # those trained on, those scored on
        with pytest.raises(UserError, match=refusal):
            calibrate(folder, source, out, scored=copy, settings=ONE_EPOCH)


def test_triplets_to_score_on_are_looked_for_first(triplets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of triplets: .*/mistyped"):
        calibrate(
            triplets,
            str(network(tmp_path / "network", 3)),
            tmp_path / "out",
            scored=tmp_path / "mistyped",
        )
    assert not (tmp_path / "out").exists()


def test_a_ref_that_is_a_link_to_nowhere_is_skipped(
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
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"skipped 1 of {COUNT * len(SUBSETS)} triplets: blur/ref/000003.png (FileNotFoundError)"
        in told
    )


def test_patches_that_are_too_small(triplets: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    for channels, vae, told in ((3, None, "16"), (4, str(tiny_teacher), "a multiple of 4, 16")):
        source = network(tmp_path / str(channels), channels)
        with pytest.raises(UserError, match=f"--size 8: {told} or more, is needed"):
            calibrate(
                triplets, str(source), tmp_path / "out", vae, settings=CalibrationSettings(size=8)
            )
    assert not (tmp_path / "out").exists()


def by_hand(triplets: Path, distance: LatentLPIPS, vae: str | None, subset: str) -> float:
    """The 2AFC score of the distance itself, triplet by triplet."""
    from diffusion2gan.teacher.autoencoder import encode, load_vae

    agreed, opened = [], open_triplets(triplets)
    for i, number in enumerate(opened.subset):
        if opened.subsets[number] != subset:
            continue
        rows = read_triplet(opened, i, 64)
        ref, p0, p1 = (rows[name][None].float() / 127.5 - 1 for name in ("ref", "p0", "p1"))
        if vae is not None:
            ref, p0, p1 = (encode(load_vae(vae), images) for images in (ref, p0, p1))
        says_p1 = bool(distance(p1, ref) < distance(p0, ref))
        agreed.append(float(rows["judge"]) if says_p1 else 1 - float(rows["judge"]))
    return math.fsum(agreed) / len(agreed)


def test_a_latent_network_without_its_vae(triplets: Path, tmp_path: Path) -> None:
    source = network(tmp_path / "network", 4)
    with pytest.raises(
        UserError, match=r"reads 4 channels, but the inputs are images \(no --vae\) with 3 channels"
    ):
        calibrate(triplets, str(source), tmp_path / "out")


def test_layouts_that_are_none(triplets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of triplets"):
        open_triplets(tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no triplets"):
        open_triplets(tmp_path)
    for part, name in (("judge", "000001.npy"), ("p1", "000002.png")):
        path, aside = triplets / "noise" / part / name, tmp_path / "aside"
        path.rename(aside)
        try:
            with pytest.raises(UserError, match=rf"has no {part}: .*{name} is missing"):
                open_triplets(triplets)
        finally:
            aside.rename(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.array([1.5]), "is 1.5; it must be the share"),
        (np.array([np.nan]), "is nan"),
        (np.zeros(2), "is not one plain number"),
        (np.array([print], dtype=object), "pickles are not read"),
        (b"no array", "is not one plain number"),
    ],
)
def test_judgements_that_are_none(value: np.ndarray | bytes, told: str, triplets: Path) -> None:
    opened = open_triplets(triplets)
    path = triplets / opened.subsets[0] / "judge" / f"{opened.refs[0].stem}.npy"
    before = path.read_bytes()
    try:
        path.write_bytes(value) if isinstance(value, bytes) else np.save(
            path, value, allow_pickle=True
        )
        with pytest.raises(UserError, match=told):
            read_triplet(opened, 0, 16)
    finally:
        path.write_bytes(before)
