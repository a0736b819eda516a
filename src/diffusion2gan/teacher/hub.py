"""Models of the Hugging Face hub that are already in this machine's cache. Nothing is downloaded.

Also the check that a model folder needs no custom Python code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import read_json

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")

# The libraries whose classes a model_index.json may name. `stable_diffusion` is the old name of
# the safety checker's module; None marks an absent component.
LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}


def find_model(name: str) -> tuple[Path, str]:
    """Resolves a model's name to its folder and a display name.

    An existing path, or a name that cannot be a hub id: the path and its last component. A hub id
    `org/name` or `org/name@revision`: the snapshot folder in the hub's cache, and
    `org/name@commit`. Raises UserError, naming the cache, if the id is not in it.
    """
    path = Path(name).expanduser()
    hub_id = HUB_ID.fullmatch(name)
    if path.exists() or not hub_id:
        return path, path.name

    repository = hub_id[1]
    revision = hub_id[2] or "main"
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a folder, and as a hub id it is not in the cache "
            f"{constants.HF_HUB_CACHE} (revision {revision}; HF_HOME changes the location). This "
            f"program does not download models: run `hf download {repository} --revision "
            f"{revision}` first, on a machine with internet access, or give a folder."
        ) from error
    return folder, f"{repository}@{folder.name}"


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's `model_index.json`: components are [library, class], or [null, null].

    Raises UserError if it is anything else.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if not isinstance(index, dict):
        raise UserError(f"{path} does not describe a pipeline: it contains no settings.")
    for name, value in index.items():
        is_component = isinstance(value, list) and not name.startswith("_")
        if is_component and not (
            len(value) == 2 and all(isinstance(item, str | None) for item in value)
        ):
            raise UserError(
                f"{path} does not describe a pipeline: {name} is {value}, not [library, class]. "
                "Copy or download the pipeline again."
            )
    return index


def check_no_custom_code(folder: Path) -> None:
    """Raises UserError if a pipeline folder needs Python code that comes with it.

    Such code is never run.
    """
    # Classes in model_index.json that are from other libraries
    index = read_index(folder)
    custom = {name for name, value in index.items() if _is_custom_class(name, value)}

    # Components with an `auto_map`, transformers' way to name classes in the model's folder
    for path in sorted(folder.glob("*/*config.json")):
        try:
            config = read_json(path)
        except UserError:
            continue  # reported when the component is loaded
        if isinstance(config, dict) and config.get("auto_map"):
            custom.add(path.parent.name)

    if custom:
        raise UserError(
            f"{folder} needs custom code ({', '.join(sorted(custom))}), and code that comes with a "
            "model is never run. Give a pipeline that uses only classes of diffusers and "
            "transformers."
        )


def _is_custom_class(name: str, value: Any) -> bool:
    """Whether an entry of model_index.json names a class outside `LIBRARIES`."""
    if name == "_class_name":
        return isinstance(value, list)
    if name.startswith("_") or not isinstance(value, list):
        return False
    return len(value) == 2 and value[0] not in LIBRARIES
