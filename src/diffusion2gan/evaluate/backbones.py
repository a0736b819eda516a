"""Published feature networks: the FID's Inception-v3, CLIP and DINOv2.

Their weights are read from local files and identified by their sha256; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import io
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
from diffusion2gan.evaluate.images import Images
from diffusion2gan.evaluate.metrics import check_features
from diffusion2gan.runtime.cache import load_or_compute
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.teacher.hub import find_model
from diffusion2gan.teacher.strict_loading import load_model, translated_errors

Features = NDArray[np.float32]

# The original FID's network as torch-fidelity distributes it. By torch's convention the name of a
# file ends with the beginning of its sha256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
INCEPTION_SIDE = 299
REMEDY = (
    "install the extra: pip install 'diffusion2gan[eval]' with a torchvision made for this torch"
)
BICUBIC = 3  # Pillow's number for the filter, as written in preprocessor_config.json
TEXT_BATCH = 64


@dataclass(frozen=True)
class FeatureSpace:
    """A feature network: `extract(images [N, H, W, 3] uint8) → [N, D]`.

    `revision` identifies its weights and preprocessing.
    """

    name: str
    revision: str
    extract: Callable[[Images], Features]


@dataclass(frozen=True)
class ClipSpace(FeatureSpace):
    """A CLIP: `extract` and `encode_texts(prompts) → [N, D]` both return vectors of unit length."""

    encode_texts: Callable[[Sequence[str]], Features]


# ---------------------------------------------------------------------------- cached features


def extract_cached(space: FeatureSpace, chunks: Iterable[Images], folder: Path) -> Features:
    """[N, D]: the features of all images, chunk by chunk, cached in `folder`.

    The images of all chunks together need not fit into memory.
    """
    return np.concatenate([extract_chunk_cached(space, chunk, folder) for chunk in chunks])


def extract_chunk_cached(space: FeatureSpace, images: Images, folder: Path) -> Features:
    """`space.extract(images)`, cached in `folder`.

    The key is the sha256 of the space's name and revision and of the images' bytes.
    Raises UserError if a feature is not finite; nothing is cached then.
    """
    digest = hashlib.sha256(f"{space.name}:{space.revision}:{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    path = folder / f"{space.name}-{digest.hexdigest()[:32]}.safetensors"

    def extract() -> dict[str, Tensor]:
        features = space.extract(images)
        check_features(features, space.name)
        return {"features": from_numpy(features)}

    meta = {"space": space.name, "revision": space.revision}
    return np.asarray(load_or_compute(path, meta, extract)["features"].numpy())


# ----------------------------------------------------------------------------------- Inception


def load_inception(
    weights: Path, expected: str = INCEPTION_SHA256, device: str = "cpu"
) -> FeatureSpace:
    """The FID's Inception-v3 as in torch-fidelity: its last pool [N, 2048].

    Images are resized to 299 × 299 by Pillow's bicubic filter. Raises UserError if torch-fidelity
    does not load, or the sha256 of `weights` does not begin with `expected`.
    """
    digest = _check_inception_weights(weights, expected)
    module = import_torch_fidelity("feature_extractor_inceptionv3")

    # torch-fidelity loads its file with pickle, so give it a file that contains only these tensors
    state = torch.load(weights, map_location="cpu", weights_only=True)
    safe_file = io.BytesIO()
    torch.save(state, safe_file)
    safe_file.seek(0)
    network = module.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=safe_file
    ).to(device)

    @torch.no_grad()
    def extract(images: Images) -> Features:
        resized = np.stack([_resize(image, INCEPTION_SIDE, INCEPTION_SIDE) for image in images])
        pixels = from_numpy(resized).permute(0, 3, 1, 2).to(device)  # [N, 3, 299, 299] uint8
        return np.asarray(network(pixels)[0].cpu().numpy())

    return FeatureSpace("inception", f"{digest}-bicubic299", extract)


def import_torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises UserError if it or its torchvision does not load."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision made for another torch raises RuntimeError
        raise UserError(
            f"the Inception features need torch-fidelity and torchvision ({error}): {REMEDY}"
        ) from error


def _check_inception_weights(weights: Path, expected: str) -> str:
    """The sha256 of the file. Raises UserError if the file is missing or has another sha256."""
    if not weights.is_file():
        raise UserError(f"no weights file {weights}; download torch-fidelity's {INCEPTION_FILE}")
    digest = sha256(weights)
    if not digest.startswith(expected):
        raise UserError(
            f"{weights} has sha256 {digest}, expected {expected}…: it is not the FID's network or "
            "was damaged in transfer, and FIDs of other weights are not comparable. Download "
            f"{INCEPTION_FILE} again."
        )
    return digest


# ------------------------------------------------------------------------------ CLIP and DINOv2


def load_clip(name: str, device: str = "cpu") -> ClipSpace:
    """A transformers CLIP in float32, with its preprocessing.

    `name` is a folder or the id of a downloaded model.
    """
    # Network, tokenizer and preprocessing
    folder = _find_folder(name)
    network = load_model(CLIPModel, folder).eval().to(device)
    with translated_errors(f"the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    preprocess = load_preprocessing(folder)

    @torch.no_grad()
    def extract(images: Images) -> Features:
        pooled = network.vision_model(preprocess(images).to(device)).pooler_output
        return _normalize(network.visual_projection(pooled))

    @torch.no_grad()
    def encode_texts(prompts: Sequence[str]) -> Features:
        embeds = []
        for start in range(0, len(prompts), TEXT_BATCH):
            tokens = tokenizer(
                list(prompts[start : start + TEXT_BATCH]),
                padding="max_length",
                max_length=network.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )
            ids = tokens.input_ids.to(device)
            mask = tokens.attention_mask.to(device)
            pooled = network.text_model(ids, attention_mask=mask).pooler_output
            embeds.append(_normalize(network.text_projection(pooled)))
        return np.concatenate(embeds)

    return ClipSpace("clip", sha256(folder), extract, encode_texts)


def load_dinov2(name: str, device: str = "cpu") -> FeatureSpace:
    """A transformers DINOv2: its class token after the last norm [N, D].

    `name` is a folder or the id of a downloaded model.
    """
    folder = _find_folder(name)
    network = load_model(Dinov2Model, folder).eval().to(device)
    preprocess = load_preprocessing(folder)

    @torch.no_grad()
    def extract(images: Images) -> Features:
        return np.asarray(network(preprocess(images).to(device)).pooler_output.cpu().numpy())

    return FeatureSpace("dinov2", sha256(folder), extract)


def load_preprocessing(folder: Path) -> Callable[[Images], Tensor]:
    """The preprocessing of a CLIP or DINOv2: [N, H, W, 3] uint8 → [N, 3, crop, crop] float32.

    As in `preprocessor_config.json`: the shorter side is resized by Pillow's bicubic filter, the
    centre cropped, the values normalised. transformers' implementation is not used because it
    needs torchvision for some models, and rounds differently with it than without. Raises
    UserError if the file is missing or requires another filter.
    """
    path = folder / "preprocessor_config.json"
    try:
        config = read_json(path)
        short = _get_size(config["size"], "shortest_edge")
        crop = _get_size(config["crop_size"], "height")
        mean = np.asarray(config["image_mean"], np.float32)
        std = np.asarray(config["image_std"], np.float32)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not specify how images are preprocessed ({error!r}); download the model "
            "again"
        ) from error
    resample = config.get("resample", BICUBIC)
    if resample != BICUBIC:
        raise UserError(
            f"{path} requires the resize filter {resample}; only bicubic ({BICUBIC}) is supported"
        )

    def preprocess(images: Images) -> Tensor:
        # Resize the shorter side
        height, width = images.shape[1:3]
        scale = short / min(height, width)
        new_width = max(short, int(width * scale))
        new_height = max(short, int(height * scale))

        # Centre crop
        top = (new_height - crop) // 2
        left = (new_width - crop) // 2
        cropped = []
        for image in images:
            resized = _resize(image, new_width, new_height)
            cropped.append(resized[top : top + crop, left : left + crop])

        # Normalise
        scaled = np.stack(cropped).astype(np.float32) / 255
        values = (scaled - mean) / std
        return from_numpy(values).permute(0, 3, 1, 2).contiguous()

    return preprocess


def _get_size(value: int | dict[str, int], key: str) -> int:
    """A size in preprocessor_config.json, which is a number or a mapping."""
    return value if isinstance(value, int) else value[key]


def _resize(image: Images, width: int, height: int) -> Images:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _normalize(embeds: Tensor) -> Features:
    """Rows of unit length, as an array."""
    return np.asarray(torch.nn.functional.normalize(embeds, dim=1).cpu().numpy())


def _find_folder(name: str) -> Path:
    """The folder of a model: `name` itself, or if it is a hub id the folder in the hub's cache."""
    folder, _ = find_model(name)
    if not folder.is_dir():
        raise UserError(f"{name} is neither a folder nor a hub id (org/name); give one of the two")
    return folder
