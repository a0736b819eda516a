"""Making pairs: they do not depend on the batch size or on interruptions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs import make
from diffusion2gan.pairs.check import verify, verify_deep
from diffusion2gan.pairs.exchange import merge
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    open_set,
    read_shard,
    shard_path,
    start_set,
    write_shard,
)
from diffusion2gan.prompts import prompts_digest, read_prompts
from diffusion2gan.runtime.files import read_json
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.schedule import SOLVERS, default_num_steps

WORDS = ["red", "blue", "ring", "star", "two"]


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher))


def spec_of(teacher: Teacher, **changes: object) -> PairsSpec:
    spec = PairsSpec(teacher.name, teacher.revision, "words", 9, 2, 2, 3.0, teacher.latent_shape, 4)
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def prompts_of(indices: Sequence[int]) -> list[str]:
    return [f"a {WORDS[i % 5]} star" for i in indices]


def read_all(folder: Path, spec: PairsSpec) -> Pairs:
    return Pairs.concat([read_shard(folder, shard) for shard in range(spec.num_shards)])


@pytest.fixture(scope="module")
def made(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_pairs(teacher, prompts_of, spec_of(teacher), folder, batch_size=3)
    return folder


def test_latents_are_the_teachers_solution_for_the_pairs_seed_and_prompt(
    teacher: Teacher, made: Path
) -> None:
    spec = spec_of(teacher)
    pairs = read_all(made, spec)
    assert (
        pairs.index == list(range(9))
        and pairs.prompts == prompts_of(range(9))
        and verify(made) == []
    )
    assert pairs.seed == [pair_seed(2, i) for i in range(9)]
    for i in (0, 3, 8):
        noise = torch.randn(
            spec.latent_shape, generator=torch.Generator().manual_seed(pairs.seed[i])
        )[None]
        alone = solve_ode(
            teacher, noise, teacher.encode([pairs.prompts[i]]), teacher.encode([""]), 2, 3.0
        )[0]
        torch.testing.assert_close(pairs.latents[i], alone, rtol=1e-3, atol=1e-4)  # float16 on disk


@pytest.mark.parametrize("batch_size", [1, 8])
def test_pairs_do_not_depend_on_the_batch_size(
    teacher: Teacher, made: Path, tmp_path: Path, batch_size: int
) -> None:
    spec = spec_of(teacher, keep_noise=True)
    make_pairs(teacher, prompts_of, spec, tmp_path, batch_size)
    found, expected = read_all(tmp_path, spec), read_all(made, spec_of(teacher))
    assert (found.seed, found.prompts) == (expected.seed, expected.prompts)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-3, atol=1e-4)


def test_a_complete_set_is_not_made_again(teacher: Teacher, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert sorted(path.name for path in before) == [
        "pairs-00000.parquet",
        "pairs-00001.parquet",
        "pairs-00002.parquet",
        "pairs.json",
    ]

    def never(indices: Sequence[int]) -> list[str]:
        raise AssertionError(f"{indices} are there already")

    make_pairs(teacher, never, spec_of(teacher), made)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_only_missing_shards_are_made_after_an_interruption(
    teacher: Teacher, made: Path, tmp_path: Path
) -> None:
    spec = spec_of(teacher)

    def interrupted(indices: Sequence[int]) -> list[str]:
        if 7 in indices:
            raise KeyboardInterrupt
        return prompts_of(indices)

    with pytest.raises(KeyboardInterrupt):
        make_pairs(teacher, interrupted, spec, tmp_path, batch_size=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs-00000.parquet", "pairs.json"]
    first = shard_path(tmp_path, 0).stat().st_mtime_ns
    requested: list[int] = []

    def noted(indices: Sequence[int]) -> list[str]:
        requested.extend(indices)
        return prompts_of(indices)

    make_pairs(teacher, noted, spec, tmp_path, batch_size=3)
    assert requested == list(range(4, 9)) and shard_path(tmp_path, 0).stat().st_mtime_ns == first
    shard_path(tmp_path, 0).unlink()  # a shard that was lost
    requested.clear()
    make_pairs(teacher, noted, spec, tmp_path, batch_size=3)
    assert requested == list(range(4))
    found, expected = read_all(tmp_path, spec), read_all(made, spec)
    assert (found.index, found.seed, found.prompts) == (
        expected.index,
        expected.seed,
        expected.prompts,
    )
    assert torch.equal(found.latents, expected.latents)


def test_continuing_a_set_with_another_guidance_scale_is_refused(
    teacher: Teacher, made: Path
) -> None:
    with pytest.raises(UserError, match=r"guidance_scale: 3\.0 in the folder, 1\.0 requested"):
        make_pairs(teacher, prompts_of, spec_of(teacher, guidance_scale=1.0), made)


def test_stored_noise_is_generated_from_the_seed(teacher: Teacher, tmp_path: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    spec = spec_of(teacher, keep_noise=True, count=2)
    make_pairs(teacher, prompts_of, spec, tmp_path)
    for row in pq.read_table(shard_path(tmp_path, 0)).to_pylist():
        expected = noise_from_seeds([row["seed"]], spec.latent_shape).half().numpy()
        assert np.frombuffer(row["noise"], np.float16).tobytes() == expected.tobytes()


def test_prompts_are_read_one_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("  a cat \nein Hündchen\r\na “dog”", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "ein Hündchen", "a “dog”"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a\n\nb\n  \n", r"2 blank lines \(line 2, 4\)"),
        (b"a\n\xff\xfe", r"is not UTF-8 \(byte 2\)"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_missing_prompt_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompts file"):
        read_prompts(tmp_path / "no.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path)


def test_prompts_digest_identifies_the_content() -> None:
    assert prompts_digest(["a", "b"]) == prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
    assert prompts_digest(["a", "b"]).startswith("2 prompts")


def test_solver_is_recorded_and_sets_of_different_solvers_do_not_mix(
    teacher: Teacher, made: Path, tmp_path: Path
) -> None:
    # The header of a new set
    settings = PairsSettings(count=9, seed=2, shard_size=4, solver="dpm++", num_inference_steps=2)
    spec = build_spec(teacher, prompts_of, settings, "words")
    assert spec == spec_of(teacher, solver="dpm++")
    make_pairs(teacher, prompts_of, spec, tmp_path / "a", batch_size=2)
    assert open_set(tmp_path / "a").solver == "dpm++"

    # Solved again by the solver of the header
    assert verify_deep(tmp_path / "a", teacher, count=3) == []
    difference = read_all(tmp_path / "a", spec).latents - read_all(made, spec_of(teacher)).latents
    assert float(difference.abs().max()) > 0.01

    # Independent of the batch size
    make_pairs(teacher, prompts_of, spec, tmp_path / "b", batch_size=8)
    torch.testing.assert_close(
        read_all(tmp_path / "a", spec).latents,
        read_all(tmp_path / "b", spec).latents,
        rtol=1e-3,
        atol=1e-4,
    )

    # Neither continued nor merged with another solver
    with pytest.raises(UserError, match=r"solver: 'ddim' in the folder, 'dpm\+\+' requested"):
        make_pairs(teacher, prompts_of, spec, made)
    with pytest.raises(UserError, match=r"solver: 'ddim' and 'dpm\+\+'"):
        merge([made, tmp_path / "a"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_verify_deep_notices_pairs_of_another_solver(teacher: Teacher, tmp_path: Path) -> None:
    """A header that names the wrong solver: its shards are pairs of that set, but not solved so."""
    spec = spec_of(teacher, solver="dpm++", count=4)
    start_set(tmp_path, spec)
    make_pairs(teacher, prompts_of, dataclasses.replace(spec, solver="ddim"), tmp_path / "ddim")
    pairs = read_shard(tmp_path / "ddim", 0)
    write_shard(tmp_path, 0, spec, pairs)
    assert verify(tmp_path) == []
    problems = verify_deep(tmp_path, teacher, count=4)
    assert len(problems) == 4 and "not what the teacher computes" in problems[0]


def test_a_set_from_before_the_choice_of_solvers_is_ddim(
    teacher: Teacher, made: Path, tmp_path: Path
) -> None:
    """Its header lacks the field; it is continued with the settings that it was made with."""
    folder = Path(shutil.copytree(made, tmp_path / "old"))
    values = json.loads((folder / "pairs.json").read_text())
    assert values.pop("solver") == "ddim"
    (folder / "pairs.json").write_text(json.dumps(values))
    assert open_set(folder) == spec_of(teacher)
    shard_path(folder, 1).unlink()
    make_pairs(teacher, prompts_of, spec_of(teacher), folder, batch_size=3)
    assert torch.equal(read_shard(folder, 1).latents, read_shard(made, 1).latents)


def test_unknown_solver_is_refused_before_a_set_is_described(teacher: Teacher) -> None:
    with pytest.raises(UserError, match="unknown solver 'dim'; did you mean 'ddim'"):
        build_spec(teacher, ["a"], PairsSettings(count=1, solver="dim"))


def test_default_number_of_steps_is_the_solvers(teacher: Teacher) -> None:
    found = {}
    for solver in SOLVERS:
        spec = build_spec(teacher, ["a"], PairsSettings(count=1, solver=solver))
        found[spec.solver] = spec.num_inference_steps
    assert found == {"ddim": 50, "dpm++": 20}

    # Without a choice: what is at least as accurate in the fewest network evaluations
    spec = build_spec(teacher, ["a"], PairsSettings(count=1))
    assert (spec.solver, spec.num_inference_steps) == ("dpm++", 20)
    assert default_num_steps("dpm++", flow=True) == 30
    assert default_num_steps("dpm++", flow=False, zero_snr=True) == 40


def test_default_is_no_less_accurate_than_50_ddim_steps_and_cheaper() -> None:
    """By the benchmark's result file."""
    result = read_json(Path(__file__).parents[2] / "docs" / "results" / "ode_error.json")
    for name, share in (("pocket", 0.4), ("flow", 0.6)):
        rows = result[name]["rows"]
        errors = {(r["solver"], r["steps"]): r["mse"] for r in rows if r["precision"] == "float32"}
        num_steps = default_num_steps("dpm++", flow=name == "flow")
        assert errors["dpm++", num_steps] <= errors["ddim", 50]
        assert num_steps <= share * 50


# Precision, negative prompt, offloading, sanity check


def test_precision_is_recorded_and_sets_of_other_precisions_do_not_mix(
    tiny_teacher: Path, made: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    teacher.set_precision("bfloat16")
    settings = PairsSettings(count=9, seed=2, shard_size=4, solver="ddim", num_inference_steps=2)
    spec = build_spec(teacher, prompts_of, settings, "words")
    assert spec == spec_of(teacher, precision="bfloat16")
    make_pairs(teacher, prompts_of, spec, tmp_path, batch_size=3)
    assert open_set(tmp_path).precision == "bfloat16"
    assert verify_deep(tmp_path, teacher, count=3) == []

    # The network was in bfloat16
    latents, expected = (
        read_all(tmp_path, spec).latents,
        read_all(made, spec_of(teacher)).latents,
    )
    error = float((latents - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.1

    # Neither continued nor checked with another precision
    with pytest.raises(
        UserError, match=r"precision: 'float32' in the folder, 'bfloat16' requested"
    ):
        make_pairs(teacher, prompts_of, spec, made)
    with pytest.raises(UserError, match=r"in float32, but the teacher's is in bfloat16"):
        verify_deep(made, teacher, count=1)


def test_negative_prompt_is_recorded_and_used(teacher: Teacher, made: Path, tmp_path: Path) -> None:
    settings = PairsSettings(
        count=4, seed=2, shard_size=4, solver="ddim", num_inference_steps=2, negative_prompt="ring"
    )
    spec = build_spec(teacher, prompts_of, settings, "words")
    make_pairs(teacher, prompts_of, spec, tmp_path)
    assert open_set(tmp_path).negative_prompt == "ring"
    assert verify_deep(tmp_path, teacher, count=2) == []
    difference = read_shard(tmp_path, 0).latents - read_shard(made, 0).latents
    assert float(difference.abs().max()) > 1e-3


def test_negative_prompt_without_guidance_is_refused(
    teacher: Teacher, family_folder: Callable[[str], Path]
) -> None:
    settings = PairsSettings(count=1, guidance_scale=1.0, negative_prompt="blurry")
    with pytest.raises(UserError, match="guidance-scale 1 turns guidance off"):
        build_spec(teacher, ["a"], settings)
    flux = load_teacher(str(family_folder("flux_dev")), resolution=64)
    settings = PairsSettings(count=1, guidance_scale=3.5, negative_prompt="blurry")
    with pytest.raises(UserError, match="has no classifier-free guidance"):
        build_spec(flux, ["a"], settings)


def test_offloading_text_encoders_does_not_change_the_pairs(
    tiny_teacher: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard's prompts are encoded before its first ODE step, then the encoders are moved."""
    teacher = load_teacher(str(tiny_teacher))
    events: list[str] = []
    encode, denoise = teacher.encode, teacher.denoise

    def noted_encode(prompts: Sequence[str]) -> Conditioning:
        events.append("encode")
        return encode(prompts)

    def noted_denoise(*args: object, **options: object) -> torch.Tensor:
        events.append("denoise")
        return denoise(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher, "encode", noted_encode)
    monkeypatch.setattr(teacher, "denoise", noted_denoise)
    monkeypatch.setattr(
        teacher, "move_text_encoders", lambda device: events.append(f"encoders to {device}")
    )
    spec = spec_of(teacher)
    make_pairs(teacher, prompts_of, spec, tmp_path, batch_size=3, offload=True)
    assert torch.equal(read_all(tmp_path, spec).latents, read_all(made, spec).latents)

    # Without the sanity check's step; the first shard has two batches of two steps
    assert events[1:9] == [
        *("encoders to cpu", "encode", "encode", "encoders to cpu"),
        *("denoise", "denoise", "denoise", "denoise"),
    ]
    assert events.count("encode") == 5


def test_share_of_pairs_that_fail_the_sanity_check_is_reported(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    solve = make.solve_pairs

    def two_broken(*args: Any) -> Pairs:
        pairs = solve(*args)
        for row, index in enumerate(pairs.index):
            if index in (1, 5):
                pairs.latents[row] *= 100
        return pairs

    monkeypatch.setattr(make, "solve_pairs", two_broken)
    make_pairs(teacher, prompts_of, spec_of(teacher), tmp_path, batch_size=3)
    assert "2 of 9 pairs (22.2%) fail the sanity check" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_names_the_counted_need_and_what_helps(
    teacher: Teacher, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second shard; the same command with another batch size makes the rest."""
    solve = make.solve_pairs
    num_batches = 0

    def too_large(*args: Any) -> Pairs:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return solve(*args)

    spec = spec_of(teacher)
    with monkeypatch.context() as patch:
        patch.setattr(make, "solve_pairs", too_large)
        with pytest.raises(Failure) as failure:
            make_pairs(teacher, prompts_of, spec, tmp_path, batch_size=2)
    message = str(failure.value)
    assert message.startswith("out of memory with batches of 2 on cpu (CUDA out of memory. Tried")
    assert "What needs less: --batch-size 1; --offload, which" in message
    assert "; --precision bfloat16, in a new set. Finished" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs-00000.parquet", "pairs.json"]

    make_pairs(teacher, prompts_of, spec, tmp_path, batch_size=1)
    found, expected = read_all(tmp_path, spec), read_all(made, spec)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-3, atol=1e-4)


def test_latents_that_are_not_finite_are_not_written(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    with torch.no_grad():
        teacher.network.conv_out.weight.mul_(1e8)  # finite, but not its latents in float16
    with pytest.raises(Failure, match=r"00000\.parquet was not written: .*not finite in float16"):
        make_pairs(teacher, prompts_of, spec_of(teacher), tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
