"""`compare`: pictures made once and kept, noises shared, systems and numbers by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.cli import app
from diffusion2gan.compare import compare as job
from diffusion2gan.compare.pictures import make_pictures, parse_systems, system_of
from diffusion2gan.compare.report import data_uri
from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.system import System

PROMPTS = [f"a {colour} ring" for colour in ("red", "blue", "green", "cyan", "pink", "grey")] * 3


@pytest.fixture(scope="module")
def systems() -> dict[str, System]:
    return parse_systems(["student=pocket-student", "teacher=pocket-teacher@1"])


def test_steps_stand_behind_the_path() -> None:
    system = system_of("pocket-teacher@3")
    assert system.num_inference_steps == 3 and system.note == "3 steps"
    with pytest.raises(UserError, match="is a one-step student"):
        system_of("pocket-student@3")


def test_every_picture_is_of_its_own_noise_and_prompt(
    systems: dict[str, System], tmp_path: Path
) -> None:
    pictures = make_pictures(systems, PROMPTS, 255, tmp_path)
    for name, system in systems.items():
        assert len(pictures[name]) == len(PROMPTS)
        for i in (0, 15, 16, 17):  # both sides of a batch's end
            alone = system.generate(
                [PROMPTS[i]], noise_from_seeds([pair_seed(255, i)], system.latent_shape)
            )[0]
            assert np.abs(np.asarray(pictures[name][i]).astype(int) - alone).max() <= 1


def test_finished_pictures_are_kept_and_not_made_again(
    systems: dict[str, System], tmp_path: Path
) -> None:
    first = make_pictures(systems, PROMPTS, 3, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    files[0].unlink()  # as if the run had stopped there
    times = {path: os.stat(path).st_mtime_ns for path in files[1:]}
    again = make_pictures(systems, PROMPTS, 3, tmp_path)
    assert {path: os.stat(path).st_mtime_ns for path in files[1:]} == times and files[0].exists()
    assert all(
        np.array_equal(a, b)
        for name in first
        for a, b in zip(first[name], again[name], strict=True)
    )
    other = make_pictures(systems, PROMPTS[::-1], 3, tmp_path)  # other prompts, other places
    assert not np.array_equal(other["student"][0], first["student"][0])


def test_the_report_holds_the_numbers_given(systems: dict[str, System], tmp_path: Path) -> None:
    few, more = ({"protocol_settings": {"count": n}, "protocol_sha256": str(n)} for n in (9, 10))
    measured = {
        "student": {"frechet_distance": 2.5, "intervals": {"frechet_distance": [2.0, 3.0]}, **few}
    }
    job.compare(systems, PROMPTS[:2], tmp_path, seed=1, metrics=measured)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 2.5 (2 to 3) | – |" in text and "noise: the same for every system in a row" in text
    other = {**measured, "teacher": {"frechet_distance": 1.0, **more}}
    with pytest.raises(UserError, match="count is 9 for student and 10 for teacher"):
        job.compare(systems, PROMPTS[:2], tmp_path, seed=1, metrics=other)


def test_metrics_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"clip_score": 0.3}))
    assert job.read_metrics({"a": str(tmp_path / "m.json")}, ["a", "b"]) == {
        "a": {"clip_score": 0.3}
    }


def test_mistakes_are_told_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name the folder of the report"):
        job.compare({}, PROMPTS, tmp_path / "file", seed=1)
    for held in ([1], {"systems": {"teacher": {"frechet_distance": 1.0}}}):
        (tmp_path / "m.json").write_text(json.dumps(held))
        with pytest.raises(UserError, match="holds no metrics of one system"):
            job.read_metrics({"a": str(tmp_path / "m.json")}, ["a"])
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {device} cannot be used here"):
            system_of("pocket-student", device)


def test_a_folder_of_pictures_is_a_column_by_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--system NAME=PICTURES` beside a student; a folder with too few, a damaged or an empty one is refused."""
    folder = tmp_path / "gigagan"
    folder.mkdir()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    made = np.random.default_rng(0).integers(0, 255, (len(PROMPTS), 48, 40, 3), np.uint8)
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(folder / f"gigagan_{i}.png")

    def run() -> None:
        arguments = [
            "compare",
            "--system",
            "student=pocket-student",
            "--system",
            f"gigagan={folder}",
        ]
        app(
            [
                *arguments,
                "--prompts",
                str(tmp_path / "prompts.txt"),
                "--out",
                str(tmp_path / "report"),
            ]
        )

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.index(data_uri(Image.fromarray(made[0]))) < page.index(
        data_uri(Image.fromarray(made[17]))
    )
    assert "gigagan: 18 png pictures as they are" in (tmp_path / "report" / "report.md").read_text(
        encoding="utf-8"
    )
    (folder / "gigagan_17.png").rename(folder / "gigagan_18.png")
    with pytest.raises(
        UserError, match=r"no picture of caption 17; .* has 18 pictures, and 18 are asked for"
    ):
        run()
    (folder / "gigagan_18.png").rename(folder / "gigagan_17.png")
    (folder / "gigagan_3.png").write_bytes((folder / "gigagan_3.png").read_bytes()[:300])
    with pytest.raises(UserError, match=r"gigagan_3\.png cannot be read as a picture"):
        run()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="gigagan holds no pictures"):
        run()


def test_a_published_system_is_a_column(sd_style_teacher: Path) -> None:
    (system,) = parse_systems([f"sd=sd15={sd_style_teacher}@2"]).values()
    assert isinstance(system, System)
    assert (system.num_inference_steps, system.guidance_scale) == (2, 3.0)
    with pytest.raises(
        UserError, match="no published system 'sd16' is known here; did you mean 'sd15'"
    ):
        parse_systems([f"sd=sd16={sd_style_teacher}"])
