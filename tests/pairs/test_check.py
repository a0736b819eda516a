"""Progress of a set, and the problems that its verification finds."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import ONE_EACH, RESOLUTION

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs import store
from diffusion2gan.pairs.check import digests, info, spans, verify, verify_deep
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import Pairs, PairsSpec, read_shard, shard_path
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

SPEC = PairsSpec("t", "r", "p", 40, 3, 5, 3.0, (4, 2, 3), 4, keep_noise=True)


def write(folder: Path, shard: int, spec: PairsSpec = SPEC, as_shard: int | None = None) -> None:
    """A shard whose latents are its pairs' noise, reversed."""
    indices = spec.shard_indices(shard)
    seeds = [pair_seed(spec.seed, i) for i in indices]
    noise = noise_from_seeds(seeds, spec.latent_shape)
    store.write_shard(
        folder,
        shard if as_shard is None else as_shard,
        spec,
        Pairs(list(indices), seeds, [f"p{i}" for i in indices], -noise),
        noise if spec.keep_noise else None,
    )


def test_progress_speed_and_time_left_are_read_from_the_disk(tmp_path: Path) -> None:
    store.start_set(tmp_path, SPEC)
    assert info(tmp_path, 0.0)["pace"] == "unknown yet"
    for number, shard in enumerate((0, 1, 4, 5, 6)):  # a shard of four every 10 s
        write(tmp_path, shard)
        os.utime(shard_path(tmp_path, shard), (1000 + 10 * number,) * 2)
    found = info(tmp_path, 1045.0)
    assert found["made"] == "20 of 40 pairs, 5 of 10 shards" and found["missing"] == "2-3, 7-9"
    assert found["pace"] == "0.40 pairs/s" and found["ETA"] == "0:50"
    assert info(tmp_path, 5000.0)["pace"].startswith("none: the newest shard is 1:06:00 old")
    assert info(tmp_path, 900.0)["pace"].startswith("unknown: ")  # a clock that was set back
    for shard in (2, 3, 7, 8, 9):
        write(tmp_path, shard)
    assert set(info(tmp_path, 0.0)) == {"made", "size"}


def test_spans_join_consecutive_shards() -> None:
    assert spans([]) == "" and spans([3]) == "3" and spans([0, 3, 4, 5, 9]) == "0, 3-5, 9"
    assert spans(list(range(0, 20, 2)), most=2) == "0, 2 and 8 more spans"


def test_pairs_that_share_a_noise_or_latents_are_reported(tmp_path: Path) -> None:
    """The classic fault: every pair drawn from one seed."""
    spec = dataclasses.replace(SPEC, count=8)
    store.start_set(tmp_path, spec)
    write(tmp_path, 0, spec)
    write(tmp_path, 1, spec)
    assert verify(tmp_path) == []
    seeds = [pair_seed(3, i) for i in range(4, 8)]
    same = noise_from_seeds([seeds[0]] * 4, spec.latent_shape)
    store.write_shard(
        tmp_path,
        1,
        spec,
        Pairs([4, 5, 6, 7], seeds, list("abcd"), noise_from_seeds(seeds, (4, 2, 3))),
        same,
    )
    found = verify(tmp_path)
    assert any("stored noise that does not match its seed" in line for line in found)
    assert any("3 noises also belong to another pair" in line for line in found)
    twice = noise_from_seeds([pair_seed(3, 0)] * 4, spec.latent_shape)
    store.write_shard(
        tmp_path,
        1,
        spec,
        Pairs([4, 5, 6, 7], seeds, list("abcd"), -twice),
        noise_from_seeds(seeds, spec.latent_shape),
    )
    assert [line for line in verify(tmp_path) if "4 latents also belong to another pair" in line]


def test_a_duplicated_shard_is_reported(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, count=8, keep_noise=False)
    store.start_set(tmp_path, spec)
    write(tmp_path, 0, spec)
    shutil.copy(shard_path(tmp_path, 0), shard_path(tmp_path, 1))
    found = "\n".join(verify(tmp_path))
    assert "its pairs are not 4…7" in found and "4 seeds also" in found and "4 noises also" in found


def test_digests_depend_on_the_contents_of_each_row() -> None:
    a = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert (digests(a) == digests(a.clone())).all() and len(
        set(digests(torch.cat([a, a])).tolist())
    ) == 3


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher))


def test_deep_verification_finds_wrong_latents_and_prompts(
    teacher: Teacher, tmp_path: Path
) -> None:
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 10, 2, 2, 3.0, teacher.latent_shape, 4
    )
    make_pairs(teacher, lambda indices: [f"a star {i}" for i in indices], spec, tmp_path)
    assert verify_deep(tmp_path, teacher, 10) == []
    pairs = read_shard(tmp_path, 1)
    swapped = dataclasses.replace(
        pairs, latents=pairs.latents[[1, 0, 2, 3]]
    )  # finite, unique, and wrong
    store.write_shard(tmp_path, 1, spec, swapped)
    assert verify(tmp_path) == []
    found = verify_deep(tmp_path, teacher, 10)
    assert len(found) == 2 and "pair 4 is not what" in found[0] and "pair 5 is not what" in found[1]
    assert verify_deep(tmp_path, teacher, 3, seed=1) == verify_deep(tmp_path, teacher, 3, seed=1)
    prompt = dataclasses.replace(pairs, prompts=["another", *pairs.prompts[1:]])
    store.write_shard(tmp_path, 1, spec, prompt)
    assert ["pair 4" in line for line in verify_deep(tmp_path, teacher, 10)] == [True]


@pytest.mark.parametrize("name", ONE_EACH)
def test_deep_verification_accepts_guided_pairs_of_every_family(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The unconditional branch differs: SDXL's pipeline, for one, uses zeros for no prompt."""
    teacher = load_teacher(str(family_folder(name)), resolution=RESOLUTION[name])
    spec = PairsSpec(teacher.name, teacher.revision, "words", 2, 0, 2, 5.0, teacher.latent_shape, 2)
    make_pairs(teacher, lambda indices: ["a star", "a red ring"], spec, tmp_path)
    assert verify_deep(tmp_path, teacher, 2) == []


def test_deep_verification_refuses_another_teacher(teacher: Teacher, tmp_path: Path) -> None:
    store.start_set(tmp_path, SPEC)
    with pytest.raises(UserError, match=r"was made by teacher 't' \(weights r\), but --teacher is"):
        verify_deep(tmp_path, teacher, 1)
