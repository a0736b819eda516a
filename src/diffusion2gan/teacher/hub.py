"""A hub's model, as far as it is on this machine already; nothing is downloaded. And no code of a model's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from diffusion2gan.errors import UserError

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")
LIBRARIES = {
    "diffusers",
    "transformers",
    "stable_diffusion",
    None,
}  # stable_diffusion: the safety checker's, of old


def find(name: str) -> tuple[Path, str]:
    """A folder's path → itself and its last part; `org/name` or `org/name@revision` → its place in the hub's cache.

    That is told as `org/name@commit`. Raises UserError where it is neither; it says which cache was looked in.
    """
    path = Path(name)
    wanted = HUB_ID.fullmatch(name)
    if path.exists() or not wanted:
        return path, path.name
    repository, revision = wanted[1], wanted[2] or "main"
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a folder here, and as a model of the hub it is not in the cache {constants.HF_HUB_CACHE} "
            f"(revision {revision}; HF_HOME moves it). Nothing here downloads: run `hf download {repository} "
            f"--revision {revision}` first, where there is a network, or give a folder."
        ) from error
    return folder, f"{repository}@{folder.name}"


def check_no_code(folder: Path) -> None:
    """Raises UserError where a pipeline folder asks for Python code that comes with it: none is ever run."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    asking = [name for name, kind in index.items() if _is_own_code(name, kind)]
    for config in sorted(folder.glob("*/*config.json")):
        try:
            told = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            continue  # said where it is loaded
        asking += [config.parent.name] if isinstance(told, dict) and told.get("auto_map") else []
    if asking:
        raise UserError(
            f"{folder} asks for code of its own ({', '.join(sorted(set(asking)))}), and code that comes with a model "
            "is never run here. Give a pipeline of diffusers' and transformers' own classes."
        )


def _is_own_code(name: str, kind: Any) -> bool:
    """Whether an entry of model_index.json names a class of neither library."""
    if name == "_class_name":
        return isinstance(kind, list)
    return (
        not name.startswith("_")
        and isinstance(kind, list)
        and len(kind) == 2
        and kind[0] not in LIBRARIES
    )
