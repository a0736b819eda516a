"""Jobs on a simulated `cuda:0`: no operation mixes devices, and the host hardly ever waits.

Each job runs in a process of its own (device.py, jobs.py). No GPU is needed, but a C++ compiler.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"

# Waits of the host per training step: the one for the numbers of the step before
TRAINING = [
    "regression",
    "with_d_and_r1",
    "micro_batches",
    "lora",
    "pixel_lpips",
    "teacher_features",
]
NUM_WAITS = 1
# The same of other families. Sana's pipeline selects tokens by a list, twice per encoding.
NUM_FAMILY_WAITS = {"sdxl": 1, "sd3": 1, "flux_dev": 1, "sana": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device guard, built for this torch in half a minute."""
    out = tmp_path_factory.mktemp("simulated_cuda") / "libguard.so"
    command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", "-o", str(out)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in include_paths()]
    command += [str(HERE / "guard.cpp")]
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    command += ["-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def run_job(library: Path, job: str, device: str = "cuda", **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "jobs.py"), job, device],
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "SIMULATED_CUDA_LIBRARY": str(library),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_simulation_notices_mixed_devices_and_waits(library: Path) -> None:
    result = run_job(library, "mixed_devices")
    assert "found at least two devices, cuda:0 and cpu" in result["message"]
    assert result["num_waits"] == 1


@pytest.mark.parametrize("name", TRAINING)
def test_training_mixes_no_devices_and_waits_once_per_step(library: Path, name: str) -> None:
    """Two steps, a checkpoint and its loading; the loss is the CPU's."""
    result = run_job(library, name)
    assert result["device"] == "cuda:0"
    assert result["loss"] == pytest.approx(run_job(library, name, "cpu")["loss"], rel=1e-5)

    waits = result["waits"]
    report = "\n".join(f"{count:4d}  {line}" for line, count in waits.items())
    assert sum(waits.values()) == NUM_WAITS, report


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux_dev", "sana"])
def test_every_family_trains_on_the_device(library: Path, family: str) -> None:
    """With the discriminator and R1, on a tiny pipeline."""
    result = run_job(library, f"family-{family}")
    assert result["device"] == "cuda:0"
    expected = run_job(library, f"family-{family}", "cpu")
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert sum(result["waits"].values()) == NUM_FAMILY_WAITS[family], result["waits"]


def test_distill_waits_once_per_step_and_resumes(library: Path) -> None:
    """Also with batches from a thread, numbers logged a step later, and a step that is skipped."""
    result = run_job(library, "distill")
    expected = run_job(library, "distill", "cpu")
    assert result["num_waits"] == NUM_WAITS
    assert result["num_steps"] == expected["num_steps"] == [5, 6]
    assert result["matmul_precisions"] == ["high", "highest"]  # TF32 in the steps alone
    assert expected["matmul_precisions"] == ["highest"]
    assert result["num_updates"] == expected["num_updates"] == 5
    assert result["skipped"] == expected["skipped"] == [0, 1, 1, 1, 1, 1]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-3)


def test_diverged_run_stops_before_a_checkpoint_is_written(library: Path) -> None:
    result = run_job(library, "diverge")
    assert "not finite in 10 steps in a row, up to 24 pairs" in result["message"]
    assert result["num_lines"] == 12
    assert result["pairs_seen"] == 4
    assert result["num_bad"] == 0


def test_pairs_are_those_of_the_cpu(library: Path) -> None:
    result = run_job(library, "pairs")
    assert result["device"] == "cuda:0"
    # Stored in half precision
    assert result["latents"] == pytest.approx(run_job(library, "pairs", "cpu")["latents"], abs=1e-3)


def test_r1_that_does_not_fit_is_refused_before_the_run(library: Path) -> None:
    exact, finite_differences, enough = run_job(library, "refuse_r1")["messages"]
    assert "r1_method = exact) needs 0." in exact and "cuda:0 has 0.20 GiB" in exact
    assert "set r1_method=finite_differences, which needs 0." in exact
    assert "To train here, set r1_weight=0, or a smaller resolution." in finite_differences
    assert enough == ""


def test_perceptual_fit_waits_once_per_step(library: Path) -> None:
    result = run_job(library, "fit")
    assert result["sum"] == pytest.approx(run_job(library, "fit", "cpu")["sum"], rel=1e-2)
    ((name, counts),) = result["waits_per_step"]
    assert name == "Classifier" and len(counts) > 3
    assert set(counts) == {NUM_WAITS}


def test_pocket_train_waits_once_per_step(library: Path) -> None:
    """The heads are fitted on the CPU."""
    counts = run_job(library, "pocket_train")["waits_per_step"]
    expected = ["AutoencoderKL"] * 2 + ["CLIPModel", "Probe"] + ["ModuleDict"] * 2
    assert [name for name, _ in counts] == [*expected, "Ranker", "Ranker", "Denoiser"]
    for name, waits in counts:
        if name != "CLIPModel":  # one step
            assert set(waits) == {0 if name == "Ranker" else NUM_WAITS}, name


def test_pairs_in_bfloat16_with_offloading_are_those_of_the_cpu(library: Path) -> None:
    result = run_job(library, "pairs_in_bfloat16")
    expected = run_job(library, "pairs_in_bfloat16", "cpu")
    # Numbers up to 2, rounded to 8 bits in every layer of two steps
    assert result["latents"] == pytest.approx(expected["latents"], abs=0.05)
    assert result["devices"] == {"network": "cuda:0", "vae": "cpu", "text_encoder": "cpu"}


def test_dry_run_of_pairs_waits_for_the_device_before_it_reads_a_clock(library: Path) -> None:
    assert run_job(library, "cost")["calls"] == ["synchronize", "clock"] * 3


def test_generate_and_evaluate_run_on_the_device(library: Path) -> None:
    result = run_job(library, "evaluate")
    assert result["device"] == "cuda:0"
    expected = run_job(library, "evaluate", "cpu")
    assert result["clip_score"] == pytest.approx(expected["clip_score"], abs=1e-3)


def test_gpu_of_a_rank_becomes_torchs_current_device(library: Path) -> None:
    result = run_job(library, "set_device", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert result["calls"] == ["set_device cuda:0"]
