"""Feature networks of the pocket protocol: the pocket CLIP and the pocket probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffusion2gan import assets
from diffusion2gan.evaluate.images import Images
from diffusion2gan.pocket import models, scenes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.images import from_uint8
from diffusion2gan.teacher.strict_loading import load_model

BATCH = 64
ATTRIBUTES = ("count", "shape", "colour", "pattern", "ground")


@dataclass(frozen=True)
class ClipFeatures:
    """`image_embeds` [N, D], unit length, and `patches` [N, P, W] of N images."""

    image_embeds: NDArray[np.float32]
    patches: NDArray[np.float32]


class PocketClip:
    """The pocket world's CLIP."""

    def __init__(self) -> None:
        folder = assets.folder("clip")
        self._model = load_model(CLIPModel, folder).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode_images(self, images: Images) -> ClipFeatures:
        """Features of [N, 64, 64, 3] uint8 images."""
        embeds, patches = [], []
        for batch in _batches(images):
            out = self._model.vision_model(batch)
            embeds.append(self._model.visual_projection(out.pooler_output))
            patches.append(out.last_hidden_state[:, 1:])  # without the class token

        unit = torch.nn.functional.normalize(torch.cat(embeds), dim=1)
        return ClipFeatures(unit.numpy(), torch.cat(patches).numpy())

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """[N, D] unit-length embeddings."""
        embeds = []
        for start in range(0, len(prompts), BATCH):
            tokens = self._tokenizer(
                list(prompts[start : start + BATCH]),
                padding="max_length",
                max_length=models.MAX_LENGTH,
                truncation=True,
                return_tensors="pt",
            )
            pooled = self._model.text_model(tokens.input_ids).pooler_output
            embeds.append(self._model.text_projection(pooled))
        return np.asarray(torch.nn.functional.normalize(torch.cat(embeds), dim=1).numpy())


def clip_sha256() -> str:
    """Identifies the weights of the pocket world's CLIP."""
    return sha256(assets.folder("clip"))


def load_probe() -> models.Probe:
    """The pocket world's attribute classifier, in float32 and evaluation mode."""
    path = assets.folder("probe") / "model.safetensors"
    stored, _ = checkpoint.load(path)
    tensors = {}
    for name, tensor in stored.items():
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor

    probe = models.Probe()
    checkpoint.check_weights(path, probe.state_dict(), tensors)
    probe.load_state_dict(tensors)
    return probe.eval().requires_grad_(False)


def probe_sha256() -> str:
    """Identifies the probe's weights."""
    return sha256(assets.folder("probe"))


@torch.no_grad()
def probe_features(probe: models.Probe, images: Images) -> NDArray[np.float32]:
    """[N, 128]: the probe's last feature map of [N, 64, 64, 3] uint8 images, averaged over space.

    The counterpart of Inception's last pool in the FID (Heusel et al. 2017). Unlike the pocket
    CLIP's embeddings, which contain what a caption can express, these features also depend on how
    sharp an image is (benchmarks/feature_spaces.py).
    """
    maps = [probe.features(batch) for batch in _batches(images)]
    return np.asarray(torch.cat(maps).mean((2, 3)).numpy())


def score_attributes(
    probe: models.Probe, images: Images, prompts: Sequence[str]
) -> dict[str, list[bool]]:
    """Whether the probe finds each stated attribute in the image, by kind of attribute.

    One entry per attribute that a prompt states:

    - count: the image has as many objects.
    - ground: it has that ground.
    - shape: one object has that shape.
    - colour, pattern: they belong to an object. Its shape must be present, and the colour among
      the k most likely ones for that shape, k being how many objects of that shape the prompt has
      (so that a red ring beside a blue star does not count as a blue ring).
    """
    rows = score_attributes_per_image(probe, images, prompts)
    answers: dict[str, list[bool]] = {kind: [] for kind in ATTRIBUTES}
    for row in rows:
        for kind in ATTRIBUTES:
            answers[kind].extend(row[kind])
    return answers


@torch.no_grad()
def score_attributes_per_image(
    probe: models.Probe, images: Images, prompts: Sequence[str]
) -> list[dict[str, list[bool]]]:
    """`score_attributes` of each image."""
    # The probe's logits
    outputs = [probe(batch) for batch in _batches(images)]
    logits = models.split_logits(torch.cat(outputs))
    grounds = list(scenes.GROUNDS)
    colours = list(scenes.COLOURS)
    patterns = list(scenes.PATTERNS)

    # Logits of combinations, [N, shape, colour or pattern]
    num_shapes = len(scenes.SHAPES)
    colour_logits = logits["shape_colour"].reshape(-1, num_shapes, len(colours))
    pattern_logits = logits["shape_pattern"].reshape(-1, num_shapes, len(patterns))

    # Compare them with the attributes that each prompt states
    rows = []
    for i, prompt in enumerate(prompts):
        stated = scenes.parse_caption(prompt)
        answers: dict[str, list[bool]] = {kind: [] for kind in ATTRIBUTES}

        # Count and ground: the most likely class
        count_class = int(logits["count"][i].argmax())
        answers["count"].append(count_class + 1 == stated.count)
        if stated.ground is not None:
            ground_class = int(logits["ground"][i].argmax())
            answers["ground"].append(grounds[ground_class] == stated.ground)

        # Shape, colour and pattern of each object
        for k, name in enumerate(stated.shape):
            shape = scenes.SHAPES.index(name)
            num_same_shape = stated.shape.count(name)
            is_present = bool(logits["shape"][i, shape] > 0)
            answers["shape"].append(is_present)

            colour = stated.colour[k]
            if colour is not None:
                likely = _top_k(colour_logits[i, shape], num_same_shape)
                is_likely = colours.index(colour) in likely
                answers["colour"].append(is_present and is_likely)

            pattern = stated.pattern[k]
            if pattern is not None:
                likely = _top_k(pattern_logits[i, shape], num_same_shape)
                is_likely = patterns.index(pattern) in likely
                answers["pattern"].append(is_present and is_likely)
        rows.append(answers)
    return rows


def _top_k(logits: Tensor, k: int) -> list[int]:
    """The indices of the k largest of `logits` [V]."""
    return [int(index) for index in logits.topk(k).indices]


def _batches(images: Images) -> list[Tensor]:
    """[≤ 64, 3, H, W] batches in [−1, 1] of [N, H, W, 3] uint8 images."""
    return [from_uint8(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
