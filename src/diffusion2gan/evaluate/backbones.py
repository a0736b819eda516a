"""Feature networks of others: Inception-v3 of the FID, CLIP, DINOv2. From local weights, each named by its sha256."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, from_numpy
from transformers import AutoTokenizer, CLIPModel, Dinov2Model

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.metrics import check_features
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher.hub import find_model

Pictures = NDArray[np.uint8]
Features = NDArray[np.float32]

# torch-fidelity's weights-inception-2015-12-05-6726825d.pth: the original FID's network. By torch's custom a file's
# name ends with the beginning of its sha256.
INCEPTION_SHA256 = "6726825d"
INCEPTION_SIDE = 299
REMEDY = (
    "install the extra: pip install 'diffusion2gan[eval]' with a torchvision made for this torch"
)


@dataclass(frozen=True)
class Space:
    """A feature space: `features(pictures [N, H, W, 3] uint8) → [N, D]`. `revision` names its weights and settings."""

    name: str
    revision: str
    features: Callable[[Pictures], Features]


@dataclass(frozen=True)
class ClipSpace(Space):
    """CLIP: `texts(prompts) → [N, D]` beside its pictures' features, all of unit length."""

    texts: Callable[[Sequence[str]], Features]


def cached(space: Space, pictures: Pictures, folder: Path) -> Features:
    """`space.features(pictures)`, kept in `folder` under the sha256 of the space and the pictures' bytes.

    Raises UserError where a feature is not finite; nothing is kept then.
    """
    key = hashlib.sha256(f"{space.name}:{space.revision}:{pictures.shape}".encode())
    key.update(np.ascontiguousarray(pictures).tobytes())
    path = folder / f"{space.name}-{key.hexdigest()[:32]}.safetensors"
    if not path.exists():
        found = space.features(pictures)
        check_features(found, space.name)
        checkpoint.save(
            path, {"features": from_numpy(found)}, {"space": space.name, "revision": space.revision}
        )
    return np.asarray(checkpoint.load(path)[0]["features"].numpy())


def all_cached(space: Space, chunks: Iterable[Pictures], folder: Path) -> Features:
    """[N, D] of pictures too many to hold, chunk by chunk."""
    return np.concatenate([cached(space, chunk, folder) for chunk in chunks])


def inception(weights: Path, expected: str = INCEPTION_SHA256, device: str = "cpu") -> Space:
    """The FID's Inception-v3 by torch-fidelity, its last pool [N, 2048]; pictures resized to 299 by Pillow's bicubic.

    Raises UserError where torch-fidelity does not load, or the weights' sha256 does not begin with `expected`.
    """
    digest = _checked(weights, expected)
    module = torch_fidelity("feature_extractor_inceptionv3")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    safe = (
        io.BytesIO()
    )  # torch-fidelity loads with pickle: what it gets is written here, from tensors alone
    torch.save(state, safe)
    safe.seek(0)
    network = module.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=safe
    ).to(device)

    @torch.no_grad()
    def features(pictures: Pictures) -> Features:
        resized = np.stack(
            [_resized(picture, INCEPTION_SIDE, INCEPTION_SIDE) for picture in pictures]
        )
        return np.asarray(
            network(from_numpy(resized).permute(0, 3, 1, 2).to(device))[0].cpu().numpy()
        )

    return Space("inception", f"{digest}-bicubic299", features)


def torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises UserError with the remedy where it, or its torchvision, does not load."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # a torchvision of another torch raises RuntimeError
        raise UserError(
            f"the Inception features need torch-fidelity and torchvision ({error}): {REMEDY}"
        ) from error


def clip(name: str, device: str = "cpu") -> ClipSpace:
    """A CLIP of transformers by folder or id (already fetched), with its own preprocessing and float32."""
    folder = _folder(name)
    network = _loaded(CLIPModel, folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prepare = preprocessing(folder)

    @torch.no_grad()
    def features(pictures: Pictures) -> Features:
        out = network.vision_model(prepare(pictures).to(device))
        return _unit(network.visual_projection(out.pooler_output))

    @torch.no_grad()
    def texts(prompts: Sequence[str]) -> Features:
        length = network.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(prompts), 64):
            some = list(prompts[start : start + 64])
            tokens = tokenizer(
                some, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            out = network.text_model(
                tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
            )
            parts.append(_unit(network.text_projection(out.pooler_output)))
        return np.concatenate(parts)

    return ClipSpace("clip", sha256(folder), features, texts)


def dinov2(name: str, device: str = "cpu") -> Space:
    """A DINOv2 of transformers by folder or id (already fetched): its class token after the last norm [N, D]."""
    folder = _folder(name)
    network, prepare = _loaded(Dinov2Model, folder).to(device), preprocessing(folder)

    @torch.no_grad()
    def features(pictures: Pictures) -> Features:
        return np.asarray(network(prepare(pictures).to(device)).pooler_output.cpu().numpy())

    return Space("dinov2", sha256(folder), features)


def preprocessing(folder: Path) -> Callable[[Pictures], Tensor]:
    """`preprocessor_config.json` of a CLIP or DINOv2: shorter side by Pillow's bicubic, centre crop, normalised.

    Written out here because transformers' own needs torchvision for some models, and rounds otherwise with it than
    without. Raises UserError where the file is missing or asks for something else.
    """
    path = folder / "preprocessor_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        short = (
            config["size"] if isinstance(config["size"], int) else config["size"]["shortest_edge"]
        )
        crop = (
            config["crop_size"]
            if isinstance(config["crop_size"], int)
            else config["crop_size"]["height"]
        )
        mean, std = (np.asarray(config[key], np.float32) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say how pictures are prepared ({error!r}); fetch the model again"
        ) from error
    if config.get("resample", 3) != 3:
        raise UserError(
            f"{path} asks for resample {config['resample']}; only bicubic (3) is known here"
        )

    def prepare(pictures: Pictures) -> Tensor:
        height, width = pictures.shape[1:3]
        scale = short / min(height, width)
        size = (max(short, int(width * scale)), max(short, int(height * scale)))
        top, left = (size[1] - crop) // 2, (size[0] - crop) // 2
        resized = [_resized(p, *size)[top : top + crop, left : left + crop] for p in pictures]
        values = (np.stack(resized).astype(np.float32) / 255 - mean) / std
        return from_numpy(values).permute(0, 3, 1, 2).contiguous()

    return prepare


def _resized(picture: Pictures, width: int, height: int) -> Pictures:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def _unit(x: Tensor) -> Features:
    return np.asarray(torch.nn.functional.normalize(x, dim=1).cpu().numpy())


def _checked(weights: Path, expected: str) -> str:
    if not weights.is_file():
        raise UserError(
            f"no weights file {weights}; fetch torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        )
    digest = sha256(weights)
    if not digest.startswith(expected):
        raise UserError(
            f"{weights} has sha256 {digest}, expected {expected}…: not the FID's network, or damaged on its way; FIDs "
            "of other weights do not compare. Fetch weights-inception-2015-12-05-6726825d.pth again."
        )
    return digest


def _folder(name: str) -> Path:
    """The folder of a model: a folder as it is, or a hub id's in the local cache."""
    folder, _ = find_model(name)
    if not folder.is_dir():
        raise UserError(f"{name} is neither a folder nor a model's id; give one of the two")
    return folder


def _loaded(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not load as a {kind.__name__}: {error}") from error
