"""Checks that students load and compute the same in transformers 4.57 and diffusers 0.35.

Not a test of the suite, because it needs a second environment:

    pip install --no-deps --target old "transformers==4.57.*" "diffusers==0.35.*" \
        "huggingface_hub<1" "tokenizers<0.23"
    PYTHONPATH=src:tests python tests/older_versions.py old

For Stable Diffusion 1.5 and SDXL: the older versions save a tiny teacher, with a safety checker and
a feature extractor; this version makes pairs, trains a student and exports it; the older versions
generate an image with it, which must be the image of this version, within a grey level.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SAVE = """
import json, sys, torch, transformers, diffusers
from pathlib import Path
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler,
    StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel,
    CLIPTextModelWithProjection, CLIPTokenizer)
assert transformers.__version__.startswith("4."), transformers.__version__
kind, out = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)

# A tokenizer in its two files, as everywhere before transformers 5
letters = [chr(i) for i in range(97, 123)]
vocab = letters + [l + "</w>" for l in letters] + ["<|startoftext|>", "<|endoftext|>"]
words = out.parent / "words"
words.mkdir(exist_ok=True)
(words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocab)}))
(words / "merges.txt").write_text("#version: 0.2\\n")
tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77)

def text(width):
    return CLIPTextConfig(vocab_size=len(vocab), hidden_size=width, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
        bos_token_id=52, eos_token_id=53, pad_token_id=53)

vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
    up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 4, 8),
    norm_num_groups=2, layers_per_block=1, sample_size=64)
unet = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    cross_attention_dim=16, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
if kind == "sd15":
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=32, patch_size=16)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, projection_dim=16, text_config=text(16).to_dict()))
    pipe = StableDiffusionPipeline(vae, CLIPTextModel(text(16)), tokenizer,
        UNet2DConditionModel(**unet), PNDMScheduler(skip_prk_steps=True, **betas), checker,
        CLIPImageProcessor())
else:
    unet |= dict(cross_attention_dim=40, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=48,
        use_linear_projection=True)
    pipe = StableDiffusionXLPipeline(vae, CLIPTextModel(text(16)),
        CLIPTextModelWithProjection(text(24)), tokenizer, tokenizer,
        UNet2DConditionModel(**unet), EulerDiscreteScheduler(**betas))
pipe.save_pretrained(out)
"""

GENERATE = """
import sys, numpy, torch, transformers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
image = pipe("a star", latents=noise, num_inference_steps=1, guidance_scale=0,
    output_type="np").images[0]
numpy.save(sys.argv[2], image)
print("transformers", transformers.__version__)
"""


def python(code: str, *arguments: object, site: Path | None) -> None:
    """Runs Python code, with the packages in `site` before the installed ones."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(site.resolve()) if site else os.environ["PYTHONPATH"]
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    import numpy as np
    import torch

    from diffusion2gan.distill.train import distill
    from diffusion2gan.export import export
    from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
    from diffusion2gan.recipe import Recipe
    from diffusion2gan.teacher.loading import load_teacher

    site = Path(sys.argv[1])
    for kind in ("sd15", "sdxl"):
        with tempfile.TemporaryDirectory() as name:
            # The teacher, saved by the older versions
            root = Path(name)
            python(SAVE, kind, root / "teacher", site=site)

            # Pairs, training and export by this version
            teacher = load_teacher(str(root / "teacher"))
            settings = PairsSettings(4, solver="ddim", num_inference_steps=1, shard_size=4)
            spec = build_spec(teacher, ["a star"], settings)
            make_pairs(teacher, ["a star"], spec, root / "pairs")
            recipe = Recipe(
                teacher=str(root / "teacher"),
                loss="mse",
                total_pairs=6,
                batch_size=2,
                learning_rate=1e-2,
                adversarial_weight=0,
            )
            distill(recipe, root / "pairs", root / "run")
            for half in (False, True):
                out = root / ("half" if half else "export")
                export(root / "run", out, torch.float16 if half else torch.float32)

                # An image by both versions
                images = []
                for versions in (site, None):
                    file = root / "image.npy"
                    python(GENERATE, out, file, site=versions)
                    images.append(np.load(file))
                difference = 255 * float(np.abs(images[0] - images[1]).max())
                index = json.loads((out / "model_index.json").read_text())
                print(
                    f"{kind} {out.name}: largest difference {difference:.4f} grey levels, {index}"
                )
                assert difference < 1, difference


if __name__ == "__main__":
    main()
