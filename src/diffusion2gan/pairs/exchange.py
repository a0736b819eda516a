"""Sets of pairs from and to elsewhere: parts that were made apart, and WebDataset's tar files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.store import (
    SPEC_FILE,
    Pairs,
    PairsSpec,
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
from diffusion2gan.runtime.files import atomic_write, read_json, write_json
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.storage import Location, atomic_put, with_local_copy


def merge(parts: Sequence[Location], out: Location) -> tuple[int, int]:
    """Copies into `out` every shard of `parts` that is not there yet; returns (shards there, shards of the set).

    Every copied shard is read whole first. Raises UserError where the parts are not of one set, Failure where a
    shard is damaged.
    """
    spec = open_set(parts[0])
    for part in parts[1:]:
        if (other := open_set(part)) != spec:
            theirs, ours = asdict(other), asdict(spec)
            differ = "; ".join(
                f"{k}: {ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]
            )
            raise UserError(
                f"{parts[0]} and {part} hold pairs of different sets ({differ}); only one set is merged"
            )
    start_set(out, spec)
    there = set(present_shards(out, spec))
    with Bar("merge", spec.num_shards, len(there)) as bar:
        for part in parts:
            for shard in sorted(set(present_shards(part, spec)) - there):
                _copy(part, out, shard, spec)
                there.add(shard)
                bar.advance(1)
    return len(there), spec.num_shards


def _copy(part: Location, out: Location, shard: int, spec: PairsSpec) -> None:
    if read_shard(part, shard, spec=spec).index != list(spec.shard_indices(shard)):
        raise Failure(
            f"{part}/{shard_name(shard)} holds other pairs than its name says; delete it and continue"
        )
    with lock_shard(out, shard), atomic_put(out, shard_name(shard)) as temporary:
        with_local_copy(part, shard_name(shard), lambda path: shutil.copyfile(path, temporary))


def tar_name(shard: int) -> str:
    return f"pairs-{shard:05d}.tar"


def export_webdataset(folder: Location, out: Path) -> int:
    """One tar a shard, ready for WebDataset: a pair is KEY.json (index, seed, prompt), KEY.latents.npy (float16) and,
    where the set keeps it, KEY.noise.npy. Tars that are there stay. Returns how many there are."""
    spec = open_set(folder)
    if (out / SPEC_FILE).is_file() and PairsSpec.parse(
        read_json(out / SPEC_FILE), out / SPEC_FILE
    ) != spec:
        raise UserError(f"{out} holds an export of another set; choose another --out")
    write_json(out / SPEC_FILE, asdict(spec))
    shards = present_shards(folder, spec)
    with Bar("export", len(shards)) as bar:
        for shard in shards:
            if not (out / tar_name(shard)).exists():
                _write_tar(folder, out, shard, spec)
            bar.advance(1)
    return len(shards)


def _write_tar(folder: Location, out: Path, shard: int, spec: PairsSpec) -> None:
    pairs = read_shard(folder, shard, spec=spec, dtype=torch.float16)
    noise = (
        column_to_tensor(read_table(folder, shard, spec), "noise", spec)
        if spec.keep_noise
        else None
    )
    with atomic_write(out / tar_name(shard)) as temporary, tarfile.open(temporary, "w") as tar:
        for row, (index, seed, prompt) in enumerate(
            zip(pairs.index, pairs.seed, pairs.prompts, strict=True)
        ):
            about = json.dumps({"index": index, "seed": seed, "prompt": prompt}, ensure_ascii=False)
            _add(tar, f"{index:08d}.json", about.encode())
            _add(tar, f"{index:08d}.latents.npy", _npy(pairs.latents[row]))
            if noise is not None:
                _add(tar, f"{index:08d}.noise.npy", _npy(noise[row]))


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def import_webdataset(folder: Path, out: Location) -> int:
    """The reverse of `export_webdataset`; shards that are there stay. Returns how many shards there are.

    Raises UserError where `folder` is no such export, Failure where a tar is damaged.
    """
    if not (folder / SPEC_FILE).is_file():
        raise UserError(
            f"{folder} is no export of pairs ({SPEC_FILE} is missing); `pairs export` writes one"
        )
    spec = PairsSpec.parse(read_json(folder / SPEC_FILE), folder / SPEC_FILE)
    start_set(out, spec)
    there = set(present_shards(out, spec))
    tars = [shard for shard in range(spec.num_shards) if (folder / tar_name(shard)).exists()]
    with Bar("import", len(tars)) as bar:
        for shard in tars:
            if shard not in there:
                pairs, noise = read_tar(folder / tar_name(shard), spec)
                with lock_shard(out, shard):
                    write_shard(out, shard, spec, pairs, noise)
            bar.advance(1)
    return len(there | set(tars))


def read_tar(path: Path, spec: PairsSpec) -> tuple[Pairs, Tensor | None]:
    """The pairs of one exported tar, and their noise where it is kept. Raises Failure where it is damaged."""
    try:
        with tarfile.open(path) as tar:
            files = {member.name: _content(tar, member) for member in tar if member.isfile()}
        keys = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
        about = [json.loads(files[f"{key}.json"]) for key in keys]
        latents = torch.stack([_tensor(files[f"{key}.latents.npy"], spec) for key in keys])
        noise = (
            torch.stack([_tensor(files[f"{key}.noise.npy"], spec) for key in keys])
            if spec.keep_noise
            else None
        )
        columns = [[row[name] for row in about] for name in ("index", "seed", "prompt")]
    except (tarfile.TarError, KeyError, ValueError, OSError, RuntimeError, EOFError) as error:
        raise Failure(f"{path} is damaged ({error}); export it again") from error
    shard = int(path.stem.removeprefix("pairs-"))
    if columns[0] != list(spec.shard_indices(shard)):
        raise Failure(f"{path} holds other pairs than its name says; export it again")
    return Pairs(columns[0], columns[1], columns[2], latents.float()), noise


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _tensor(content: bytes, spec: PairsSpec) -> Tensor:
    values = np.load(io.BytesIO(content), allow_pickle=False)
    if values.shape != tuple(spec.latent_shape) or values.dtype != np.float16:
        raise ValueError(
            f"{values.dtype} {values.shape} where float16 {tuple(spec.latent_shape)} was expected"
        )
    return torch.from_numpy(values)
