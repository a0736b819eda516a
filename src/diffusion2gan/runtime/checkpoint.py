"""A training state in one safetensors file: tensors, and all else in a JSON header. No pickle.

The tensors may instead be in a folder of shards beside the file, written by several ranks
(`sharded_checkpoint`); the header entry `parts` then names that folder and its files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime import fsdp, integrity, sharded_checkpoint
from diffusion2gan.runtime.files import atomic_write, translate_error

DIGESTS = "sha256"  # the header's key for the digests


class Stateful(Protocol):
    """A module or an average of its weights: an object with named tensors."""

    def state_dict(self) -> dict[str, Any]: ...


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes `tensors` and `meta` (JSON) atomically, with digests of both."""
    on_cpu = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    digests = {
        "meta": integrity.hash_text(json.dumps(meta)),
        "tensors": integrity.hash_tensors(on_cpu),
    }
    # One entry in the file's header: safetensors writes several in a random order
    header = json.dumps({**meta, DIGESTS: digests})
    with atomic_write(path) as temporary:
        save_file(on_cpu, temporary, {"meta": header})


def meta(path: Path) -> dict[str, Any]:
    """The `meta` given to `save`, without reading the tensors. Raises as `load` does."""
    with open_checkpoint(path) as (_, header, _):
        return header


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, meta) as given to `save`; tensors from shards are full tensors.

    Raises UserError if there is no such file, Failure if it or one of its shards is damaged.
    """
    tensors: dict[str, Tensor] = {}
    with open_checkpoint(path) as (file, header, written):
        for key in file.keys():  # noqa: SIM118
            tensors[key] = file.get_tensor(key)
        if written is not None and integrity.is_verifying():
            found = integrity.hash_tensors(tensors)
            if found != written:
                raise damaged(path, integrity.describe_difference(found, written))

    if "parts" in header:
        shards = header["parts"]
        is_named = isinstance(shards, dict) and isinstance(shards.get("folder"), str)
        if not is_named or not isinstance(shards.get("files"), dict):
            raise damaged(path, "its header does not name the files of its shards")
        folder = path.parent / shards["folder"]
        tensors = sharded_checkpoint.load(folder, shards["files"], shards.get("sha256", {}))
    return tensors, header


@contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[Any, dict[str, Any], str | None]]:
    """Yields (the open safetensors file, `meta` as given to `save`, the digest of the tensors).

    The digest is None if the file has none. Errors of reading in the block are translated: raises
    UserError if there is no such file, Failure if it is damaged or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("meta", "{}"))
            if not isinstance(header, dict):
                raise damaged(path, "its header is not a JSON object")
            digests = header.pop(DIGESTS, None) or {}

            if "meta" in digests and integrity.is_verifying():
                found = integrity.hash_text(json.dumps(header))
                if found != digests["meta"]:
                    difference = integrity.describe_difference(found, digests["meta"])
                    raise damaged(path, f"header: {difference}")
            yield file, header, digests.get("tensors")
    except (OSError, MemoryError) as error:
        raise _reading_error(path, error) from error
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise translate_error(path, error) or damaged(path, str(error)) from error


def damaged(path: Path, problem: str) -> Failure:
    return Failure(
        f"{path} is damaged ({problem}). Restore it from a copy, or move it away and run the "
        "command that made it again."
    )


def _reading_error(path: Path, error: OSError | MemoryError) -> UserError | Failure:
    """What to raise for a file that cannot be opened.

    safetensors reports every such error as a missing file, so it is opened again to find out.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return UserError(f"no such file: {path}")
    except OSError as cause:
        error = cause
    return translate_error(path, error) or Failure(f"{path} cannot be read ({error}).")


def find_non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys of the tensors that contain NaN or infinity; of sharded ones, in this rank's shard.

    One reduction per tensor on its device, and one transfer for all of them.
    """
    keys = []
    flags = []
    for key, value in tensors.items():
        if value.is_floating_point():
            keys.append(key)
            flags.append(fsdp.local_shard(value).detach().isfinite().all())
    if not flags:
        return []
    is_finite = torch.stack(flags).tolist()
    return [key for key, finite in zip(keys, is_finite, strict=True) if not finite]


def check_finite(tensors: Mapping[str, Tensor], problem: str) -> None:
    """Raises Failure if a number is not finite: the first tensor with one, then `problem`."""
    keys = find_non_finite(tensors)
    if keys:
        raise Failure(
            f"{len(keys)} of {len(tensors)} tensors contain NaN or infinity (such as {keys[0]}): "
            f"{problem}"
        )


def check_weights(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises Failure if `found`, read from `path`, has other keys or shapes than `expected`.

    Also if one of its numbers is not finite.
    """
    problem = None
    for key, value in expected.items():
        if key not in found:
            problem = f"{key} is missing"
        elif found[key].shape != value.shape:
            shapes = f"{list(found[key].shape)}, expected {list(value.shape)}"
            problem = f"{key} has the shape {shapes}"
        if problem:
            break
    surplus = [key for key in found if key not in expected]
    if problem is None and surplus:
        problem = f"{surplus[0]} is not expected"
    if problem:
        raise Failure(
            f"the weights in {path} do not fit the settings beside it: {problem}. Restore the "
            "original file, or use another checkpoint."
        )
    check_finite(found, f"{path} is of a diverged run or damaged; use another checkpoint.")


def check_counts(path: Path, header: dict[str, Any], *keys: str) -> None:
    """Raises Failure if the header of `path` lacks one of `keys`, or it is not a count."""
    for key in keys:
        value = header.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise damaged(path, f"its header has {key} = {value!r}")


def pack(name: str, source: Stateful) -> dict[str, Tensor]:
    """The state of `source` with every key prefixed: `name/key`."""
    return {f"{name}/{key}": value for key, value in source.state_dict().items()}


def unpack(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors packed under `name`, with the prefix removed."""
    prefix = f"{name}/"
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def pack_optimizer(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's tensors by parameter index: `name/12/exp_avg`. Its settings come from the recipe."""
    packed: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if not isinstance(value, dict):
                packed[f"{name}/{index}/{key}"] = torch.as_tensor(value)
                continue
            # bitsandbytes nests its quantisation state; some of these tensors share memory,
            # which safetensors refuses.
            for inner_key, tensor in value.items():
                packed[f"{name}/{index}/{inner_key}"] = tensor.clone()
    return packed


def unpack_optimizer(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Restores the state from `pack_optimizer`; sharded parameters get this rank's shard."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in unpack(name, tensors).items():
        index_text, field = key.split("/")
        index = int(index_text)
        entry = state.setdefault(index, {})

        # Integers are Adam's step counts; tensors like the parameter are its averages
        if value.dtype == torch.int64:
            entry[field] = int(value)
        elif value.ndim > 0 and value.shape == parameters[index].shape:
            entry[field] = fsdp.shard_like(value, parameters[index])
        else:
            entry[field] = value

    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})
