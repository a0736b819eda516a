"""Feature spaces: the pocket CLIP and the pocket probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPModel, CLIPTokenizer

from diffusion2gan import assets
from diffusion2gan.pocket import models, scenes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.images import from_uint8

BATCH = 64
ATTRIBUTES = ("count", "shape", "colour", "pattern", "ground")
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class ClipFeatures:
    """`image_embeds` [N, D], unit length, and `patches` [N, P, W] of N pictures."""

    image_embeds: NDArray[np.float32]
    patches: NDArray[np.float32]


class PocketClip:
    """The pocket world's CLIP: `images` and `texts` → features; `sha256` names its weights."""

    def __init__(self) -> None:
        folder = assets.folder("clip")
        self._model = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        ).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.sha256 = sha256(folder)

    @torch.no_grad()
    def images(self, pictures: Pictures) -> ClipFeatures:
        """Features of [N, 64, 64, 3] uint8 pictures."""
        embeds, patches = [], []
        for start in range(0, len(pictures), BATCH):
            out = self._model.vision_model(from_uint8(pictures[start : start + BATCH]))
            embeds.append(self._model.visual_projection(out.pooler_output))
            patches.append(out.last_hidden_state[:, 1:])
        unit = torch.nn.functional.normalize(torch.cat(embeds), dim=1)
        return ClipFeatures(unit.numpy(), torch.cat(patches).numpy())

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """[N, D] unit-length embeddings."""
        ids = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=models.MAX_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        embeds = self._model.text_projection(self._model.text_model(ids).pooler_output)
        return np.asarray(torch.nn.functional.normalize(embeds, dim=1).numpy())


def load_probe() -> models.Probe:
    tensors, _ = checkpoint.load(assets.folder("probe") / "model.safetensors")
    probe = models.Probe()
    probe.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    )
    return probe.eval().requires_grad_(False)


def probe_sha256() -> str:
    """Names the probe's weights."""
    return sha256(assets.folder("probe"))


@torch.no_grad()
def probe_features(probe: models.Probe, pictures: Pictures) -> NDArray[np.float32]:
    """[N, 128] of [N, 64, 64, 3] uint8 pictures: the classifier's last feature map, averaged over the picture.

    What Inception's last pool is to the FID (Heusel et al. 2017). Unlike the pocket CLIP's embeddings, which hold what
    a caption can say, these also see how sharp a picture is (benchmarks/feature_spaces.py).
    """
    maps = [
        probe.features(from_uint8(pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)
    ]
    return np.asarray(torch.cat(maps).mean((2, 3)).numpy())


def attributes_right(
    probe: models.Probe, pictures: Pictures, prompts: Sequence[str]
) -> dict[str, list[bool]]:
    """For every attribute a prompt states, whether the probe sees it in the picture. One entry per stated attribute.

    count: as many objects. ground. shape: one of that shape is there. colour and pattern belong to an object: its
    shape must be there and the colour be among the k most likely ones for that shape, k being how many objects of that
    shape the prompt has (so that a red ring beside a blue star does not pass for a blue ring).
    """
    rows = attributes_of_each(probe, pictures, prompts)
    return {kind: [answer for row in rows for answer in row[kind]] for kind in ATTRIBUTES}


@torch.no_grad()
def attributes_of_each(
    probe: models.Probe, pictures: Pictures, prompts: Sequence[str]
) -> list[dict[str, list[bool]]]:
    """`attributes_right`, picture by picture."""
    logits = torch.cat(
        [probe(from_uint8(pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)]
    )
    parts = models.split_logits(logits)
    tables = {  # [N, shape, value]
        "colour": parts["shape_colour"].reshape(-1, len(scenes.SHAPES), len(scenes.COLOURS)),
        "pattern": parts["shape_pattern"].reshape(-1, len(scenes.SHAPES), len(scenes.PATTERNS)),
    }
    rows = []
    for i, prompt in enumerate(prompts):
        right: dict[str, list[bool]] = {kind: [] for kind in ATTRIBUTES}
        said = scenes.parse_caption(prompt)
        right["count"].append(int(parts["count"][i].argmax()) + 1 == said.count)
        if said.ground is not None:
            right["ground"].append(
                list(scenes.GROUNDS)[int(parts["ground"][i].argmax())] == said.ground
            )
        for k, name in enumerate(said.shape):
            shape = scenes.SHAPES.index(name)
            there = bool(parts["shape"][i, shape] > 0)
            right["shape"].append(there)
            for kind, values, value in (
                ("colour", tuple(scenes.COLOURS), said.colour[k]),
                ("pattern", scenes.PATTERNS, said.pattern[k]),
            ):
                if value is not None:
                    likely = tables[kind][i, shape].topk(said.shape.count(name)).indices.tolist()
                    right[kind].append(there and values.index(value) in likely)
        rows.append(right)
    return rows
