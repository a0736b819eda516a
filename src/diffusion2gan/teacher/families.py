"""The pipeline classes that can teach, and what each needs. One row per family."""

from __future__ import annotations

FAMILIES = {
    "StableDiffusionPipeline": "Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional UNet, ε or v",
}
