"""Merging sets of pairs made separately; export to and import from WebDataset's tar files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import (
    SPEC_FILE,
    Pairs,
    PairsSpec,
    check_pairs,
    column_to_tensor,
    lock_shard,
    open_set,
    present_shards,
    read_shard,
    read_table,
    shard_name,
    start_set,
    write_shard,
)
from diffusion2gan.runtime.files import atomic_write, read_json, translate_error, write_json
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.storage import Location, atomic_put, with_local_copy


def merge(folders: Sequence[Location], out: Location) -> tuple[int, int]:
    """Copies every shard of `folders` that `out` lacks.

    Returns (shards in `out`, shards of the set). Every copied shard is read completely first.
    Raises UserError if the folders are not of one set, Failure if a shard is damaged.
    """
    # All folders must be of one set
    spec = open_set(folders[0])
    expected = asdict(spec)
    for folder in folders[1:]:
        found = asdict(open_set(folder))
        differences = []
        for key, value in expected.items():
            if found[key] != value:
                differences.append(f"{key}: {value!r} and {found[key]!r}")
        if differences:
            raise UserError(
                f"{folders[0]} and {folder} contain pairs of different sets "
                f"({'; '.join(differences)}); merge folders of one set only"
            )

    # Copy
    start_set(out, spec)
    present = set(present_shards(out, spec))
    with Bar("merge", spec.num_shards, len(present)) as bar:
        for folder in folders:
            for shard in sorted(set(present_shards(folder, spec)) - present):
                _copy_shard(folder, out, shard, spec)
                present.add(shard)
                bar.advance(1)
    return len(present), spec.num_shards


def _copy_shard(folder: Location, out: Location, shard: int, spec: PairsSpec) -> None:
    name = shard_name(shard)
    read_shard(folder, shard, spec=spec)  # raises Failure if something is wrong with it
    with lock_shard(out, shard), atomic_put(out, name) as temporary:
        with_local_copy(folder, name, lambda path: shutil.copyfile(path, temporary))


def tar_name(shard: int) -> str:
    return f"pairs-{shard:05d}.tar"


def export_webdataset(folder: Location, out: Path) -> int:
    """Writes one tar file per shard, for WebDataset; returns the number of tar files.

    A pair is KEY.json (index, seed, prompt), KEY.latents.npy (float16) and, if the set keeps it,
    KEY.noise.npy. Existing tar files are kept. Raises UserError if `out` has another set.
    """
    spec = open_set(folder)
    spec_path = out / SPEC_FILE
    if spec_path.is_file() and PairsSpec.parse(read_json(spec_path), spec_path) != spec:
        raise UserError(f"{out} contains an export of another set; choose another --out")

    write_json(spec_path, asdict(spec))
    shards = present_shards(folder, spec)
    with Bar("export", len(shards)) as bar:
        for shard in shards:
            if not (out / tar_name(shard)).exists():
                _write_tar(folder, out, shard, spec)
            bar.advance(1)
    return len(shards)


def _write_tar(folder: Location, out: Path, shard: int, spec: PairsSpec) -> None:
    # Read the shard
    pairs = read_shard(folder, shard, spec=spec, dtype=torch.float16)
    noise = None
    if spec.keep_noise:
        table = read_table(folder, shard, spec)
        noise = column_to_tensor(table, "noise", spec)

    # Write the files of each pair
    with atomic_write(out / tar_name(shard)) as temporary, tarfile.open(temporary, "w") as tar:
        for row, index in enumerate(pairs.index):
            key = f"{index:08d}"
            description = {"index": index, "seed": pairs.seed[row], "prompt": pairs.prompts[row]}
            text = json.dumps(description, ensure_ascii=False)
            _add_file(tar, f"{key}.json", text.encode())
            _add_file(tar, f"{key}.latents.npy", _to_npy(pairs.latents[row]))
            if noise is not None:
                _add_file(tar, f"{key}.noise.npy", _to_npy(noise[row]))


def _to_npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def import_webdataset(folder: Path, out: Location) -> int:
    """The reverse of `export_webdataset`; existing shards are kept. Returns the number of shards.

    Raises UserError if `folder` is not such an export, Failure if a tar file is damaged.
    """
    spec_path = folder / SPEC_FILE
    if not spec_path.is_file():
        raise UserError(
            f"{folder} is not an export of pairs ({SPEC_FILE} is missing); to make one, run `pairs "
            "export`"
        )
    spec = PairsSpec.parse(read_json(spec_path), spec_path)

    # Convert the tar files whose shard does not exist
    start_set(out, spec)
    present = set(present_shards(out, spec))
    exported = [shard for shard in range(spec.num_shards) if (folder / tar_name(shard)).exists()]
    with Bar("import", len(exported)) as bar:
        for shard in exported:
            if shard not in present:
                pairs, noise = read_tar(folder / tar_name(shard), spec)
                with lock_shard(out, shard):
                    write_shard(out, shard, spec, pairs, noise)
            bar.advance(1)
    return len(present | set(exported))


def read_tar(path: Path, spec: PairsSpec) -> tuple[Pairs, Tensor | None]:
    """The pairs of an exported tar file, and their noise if the set keeps it.

    Raises Failure if the file is damaged, or contains other pairs than those of its number.
    """
    try:
        # All files in memory, by name. Compressed archives and sparse files are not read: they
        # could be larger in memory than on the disk.
        files: dict[str, bytes] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and not member.issparse():
                    files[member.name] = _read_member(tar, member)

        # The pairs, in the order of their keys
        keys = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
        rows = [json.loads(files[f"{key}.json"]) for key in keys]
        index = [row["index"] for row in rows]
        seed = [row["seed"] for row in rows]
        prompts = [row["prompt"] for row in rows]
        latents = torch.stack([_from_npy(files[f"{key}.latents.npy"], spec) for key in keys])
        noise = None
        if spec.keep_noise:
            noise = torch.stack([_from_npy(files[f"{key}.noise.npy"], spec) for key in keys])
    except (
        tarfile.TarError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        MemoryError,
        RuntimeError,  # and RecursionError, of JSON
        EOFError,
    ) as error:
        failure = translate_error(path, error)
        raise failure or Failure(f"{path} is damaged ({error}); export it again") from error

    # They must be the pairs of its name, with finite latents and the noise of their seeds
    shard = int(path.stem.removeprefix("pairs-"))
    pairs = Pairs(index, seed, prompts, latents)
    shape = spec.latent_shape
    check_pairs(pairs, spec, shard, str(path))
    if not latents.isfinite().all():
        raise Failure(f"{path} is damaged (its latents are not all finite); export it again")
    if noise is not None and not torch.equal(noise, noise_from_seeds(seed, shape).half()):
        raise Failure(f"{path} is damaged (its noise is not that of its seeds); export it again")
    return replace(pairs, latents=latents.float()), noise


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _from_npy(content: bytes, spec: PairsSpec) -> Tensor:
    """[C, h, w] float16. Raises ValueError if it has another shape or type.

    The header is checked before an array of the size that it states is created.
    """
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    found, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    shape = tuple(spec.latent_shape)
    if found != shape or dtype != np.float16 or is_fortran:
        raise ValueError(f"{dtype} {found} where float16 {shape} was expected")
    values = np.frombuffer(content, np.float16, offset=file.tell())
    return torch.from_numpy(values.reshape(shape).copy())
