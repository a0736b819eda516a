"""Error of the teacher's ODE solvers against the number of network evaluations.

    python benchmarks/ode_error.py
    python benchmarks/ode_error.py --gaussian

The error is the mean squared difference between latents and those of a reference from the same
noises and captions: DDIM with 500 steps, or Euler for a flow model. The guidance scale is 3, so a
step is two network evaluations per pair.

The last row runs the default with the network in bfloat16, and x0 and the solver in float32.

Flow models: the pocket teacher's network, run as a flow model with the σ of Stable Diffusion 3
(shift 3), because a tiny model with random weights is no denoiser.

Writes docs/results/ode_error.json and docs/images/ode_error.svg, and prints a table. `--redraw`
draws the figure from the existing results.

`--gaussian`: the error on normally distributed data, whose ODE is known, with Stable Diffusion's
schedule and the same rescaled to zero terminal SNR; docs/results/ode_error_gaussian.json. It takes
a second and is the reason for the default of 40 steps with zero terminal SNR.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lines
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.schedule import Level, Step, karras_steps

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "ode_error.json"
FIGURE = ROOT / "docs" / "images" / "ode_error.svg"
GAUSSIAN_RESULTS = ROOT / "docs" / "results" / "ode_error_gaussian.json"
NUM_STEPS = (10, 15, 20, 25, 30, 40, 50)
GAUSSIAN_STEPS = (20, 25, 30, 35, 40, 45, 50)
GAUSSIAN_STDS = (0.5, 1.0, 2.0)
SOLVERS = ("ddim", "dpm++")


def measure(
    teacher: Any, count: int, guidance_scale: float, reference_steps: int, seed: int
) -> dict[str, Any]:
    """Errors of every solver and number of steps: `count` noises and captions, as one batch."""
    noise = noise_from_seeds(range(seed, seed + count), teacher.latent_shape)
    cond = teacher.encode(scenes.captions(range(count), HELD_OUT_WORLD))
    uncond = teacher.unconditional().expand(count)

    def solve(solver: str, num_steps: int) -> Tensor:
        return solve_ode(teacher, noise, cond, uncond, num_steps, guidance_scale, solver)

    reference = solve("ddim", reference_steps)
    choices = [("float32", solver, num_steps) for solver in SOLVERS for num_steps in NUM_STEPS]
    if isinstance(teacher, Teacher):
        # The error of the default in reduced precision; the cast is last, because it is lossy
        choices.append(("bfloat16", "dpm++", 20))
    rows = []
    for precision, solver, num_steps in choices:
        if precision != "float32":
            teacher.set_precision(precision)
        start = time.perf_counter()
        error = (solve(solver, num_steps) - reference).square().mean((1, 2, 3))
        row = {
            "solver": solver,
            "precision": precision,
            "steps": num_steps,
            "network_evaluations": 2 * num_steps,
            "mse": float(error.mean()),
            "mse_max": float(error.max()),
            "seconds": round(time.perf_counter() - start, 2),
        }
        rows.append(row)
        print(f"{solver:6} {num_steps:3} steps, {precision}: {row['mse']:.6f}", flush=True)
    return {
        "reference": f"{reference_steps} first-order steps",
        "pairs": count,
        "guidance_scale": guidance_scale,
        "variance": float(reference.var()),
        "rows": rows,
    }


class PocketFlow:
    """The pocket teacher as a flow model, as far as `solve_ode` uses a teacher.

    A flow's latents (1−σ)·x0 + σ·ε, divided by their norm √((1−σ)² + σ²), are the diffusion model's
    at the same signal-to-noise ratio, so its network gives the flow's x0. Beyond its last timestep
    (σ > 0.936) the network runs at that. σ is spaced as in Stable Diffusion 3, with a shift.
    """

    guidance = "classifier_free"

    def __init__(self, pocket: Teacher, shift: float) -> None:
        self.pocket = pocket
        self.shift = shift
        self.latent_shape = pocket.latent_shape
        self.encode = pocket.encode
        self.unconditional = pocket.unconditional
        self.uses_classifier_free_guidance = pocket.uses_classifier_free_guidance
        alpha_bars = pocket.scheduler.alphas_cumprod.double().numpy()
        self.log_ratios = np.log((1 - alpha_bars) / alpha_bars) / 2  # log(σ/α) of each timestep

    def steps(self, num_inference_steps: int, solver: str = "ddim") -> list[Step]:
        uniform = np.linspace(1, 0, num_inference_steps + 1)
        sigmas = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        levels = [Level.flow(float(sigma)) for sigma in sigmas]
        return [Step(1000 * a.sigma, a, b) for a, b in pairwise(levels)]

    def denoise(self, x_t: Tensor, timestep: float, cond: Conditioning, level: Level) -> Tensor:
        norm = math.hypot(level.alpha, level.sigma)
        ratio = math.log(level.sigma / max(level.alpha, 1e-6))
        pocket_timestep = float(np.interp(ratio, self.log_ratios, np.arange(1000)))
        pocket_level = Level(level.alpha / norm, level.sigma / norm)
        return self.pocket.denoise(x_t / norm, pocket_timestep, cond, level=pocket_level)


class Gaussian:
    """Data from N(0, std²), Stable Diffusion's schedule, as far as `solve_ode` needs a teacher.

    x0 is the mean of the data given x_t: α·std²·x_t / (α²·std² + σ²). The ODE scales x_t like its
    standard deviation, so `exact` latents are the noise times std / √(α_T²·std² + σ_T²).
    """

    guidance = "none"

    def __init__(self, std: float, zero_snr: bool) -> None:
        self.variance = std**2
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=zero_snr,
        )
        self.alpha_bars = self.scheduler.alphas_cumprod.double().numpy()
        if zero_snr:
            self.alpha_bars[-1] = 0.0  # diffusers has 2^-24
        last = float(self.alpha_bars[-1])
        self.exact = std / math.sqrt(last * self.variance + 1 - last)

    def uses_classifier_free_guidance(self, guidance_scale: float) -> bool:
        return False

    def steps(self, num_inference_steps: int, solver: str = "ddim") -> list[Step]:
        if solver == "dpm++":
            return karras_steps(self.alpha_bars, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.tolist()
        levels = [Level.diffusion(float(self.alpha_bars[timestep])) for timestep in timesteps]
        levels.append(Level(1.0, 0.0))
        return [Step(t, a, b) for t, (a, b) in zip(timesteps, pairwise(levels), strict=True)]

    def denoise(self, x_t: Tensor, timestep: float, cond: Any, level: Level) -> Tensor:
        alpha, sigma = level
        return alpha * self.variance * x_t / (alpha**2 * self.variance + sigma**2)


def measure_gaussian() -> dict[str, Any]:
    """The squared error of each solver for noise of 1, which is its mean for noise from N(0, 1)."""
    result: dict[str, Any] = {"command": "python benchmarks/ode_error.py --gaussian", "rows": []}
    choices = [("ddim", 50), *(("dpm++", num_steps) for num_steps in GAUSSIAN_STEPS)]
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for zero_snr in (True, False):
        for std in GAUSSIAN_STDS:
            teacher: Any = Gaussian(std, zero_snr)
            row: dict[str, Any] = {"zero_terminal_snr": zero_snr, "std": std}
            for solver, num_steps in choices:
                cond: Any = None
                latents = solve_ode(teacher, noise, cond, cond, num_steps, 1.0, solver)
                error = (float(latents) - teacher.exact) ** 2
                row[f"{solver}-{num_steps}"] = float(f"{error:.3g}")
            result["rows"].append(row)
            print(", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    return result


def share_of_evaluations(rows: list[dict[str, Any]]) -> float:
    """Evaluations of dpm++ for the error of DDIM with 50 steps, as a share of DDIM's."""
    (ddim,) = [row for row in rows if row["solver"] == "ddim" and row["steps"] == 50]
    enough = []
    for row in rows:
        if row["solver"] == "dpm++" and row["mse"] <= ddim["mse"]:
            enough.append(row["network_evaluations"])
    return min(enough, default=float("inf")) / float(ddim["network_evaluations"])


def draw(result: dict[str, Any]) -> None:
    panels = []
    for name in ("pocket", "flow"):
        if name not in result:
            continue
        rows = result[name]["rows"]
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["precision"] != "float32":
                continue
            point = (row["network_evaluations"], row["mse"])
            series.setdefault(row["solver"], []).append(point)
        title = {"pocket": "pocket teacher", "flow": "the same as a flow model"}[name]
        values = [row["mse"] for row in rows]
        low = 10.0 ** (len(f"{1 / min(values):.0f}") * -1)
        high = 1.0
        while high / 10 > max(values):
            high /= 10
        panels.append(
            lines.panel(f"mean squared error, {title}", series, low, high, logarithmic=True)
        )
    lines.draw(FIGURE, panels, "network evaluations per pair")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=8, help="noises and captions")
    parser.add_argument("--reference-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000, help="the first noise")
    parser.add_argument("--redraw", action="store_true", help="only draw the existing results")
    parser.add_argument("--gaussian", action="store_true", help="normally distributed data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.gaussian:
        write_json(GAUSSIAN_RESULTS if args.out == RESULTS else args.out, measure_gaussian())
        return
    if args.redraw:
        draw(read_json(RESULTS))
        return

    teacher = load_teacher()
    options = (args.count, assets.GUIDANCE_SCALE, args.reference_steps, args.seed)
    flow = measure(PocketFlow(teacher, shift=3.0), *options)
    pocket = measure(teacher, *options)

    settings = f"--count {args.count} --reference-steps {args.reference_steps} --seed {args.seed}"
    result = {
        "command": f"python benchmarks/ode_error.py {settings}",
        "gpu": "not measured",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "share_of_evaluations": share_of_evaluations(pocket["rows"]),
        "pocket": pocket,
        "flow": flow,
    }
    write_json(args.out, result)
    if args.out == RESULTS:
        draw(result)
    print(f"dpm++ reaches ddim-50's error in {result['share_of_evaluations']:.0%} of evaluations")


if __name__ == "__main__":
    main()
