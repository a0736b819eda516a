"""A sharded state on disk: written by several ranks, read by one process, wrong shards named."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffusion2gan.errors import Failure
from diffusion2gan.runtime import checkpoint, sharded_checkpoint
from diffusion2gan.runtime.files import sha256

WRITE = """
import json, os, sys
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
sys.path.insert(0, sys.argv[2])
from test_sharded_checkpoint import state
from diffusion2gan.errors import Failure
from diffusion2gan.runtime import sharded_checkpoint
from diffusion2gan.runtime.distributed import connect_ranks

def main(out):
    with connect_ranks(torch.device("cpu")) as group:
        mesh = init_device_mesh("cpu", (group.ranks.world_size,))
        second_group = group.new_gloo_group()
        tensors = state()
        for key, value in tensors.items():
            if value.ndim and key != "full":
                tensors[key] = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        write = sharded_checkpoint.prepare_write(out / "parts", tensors, second_group)
        for value in tensors.values():
            value.zero_()  # training continues before the shards are written
        digests = write()
        (out / f"digests{group.ranks.rank}").write_text(json.dumps(digests))
        folder = out / "no" / "such" if group.ranks.is_main else Path(__file__) / "below"
        failing_write = sharded_checkpoint.prepare_write(folder, tensors, second_group)
        try:
            failing_write()
        except Failure as error:
            (out / f"error{group.ranks.rank}").write_text(str(error))

main(Path(sys.argv[1]))
"""
NAMES = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]


def state() -> dict[str, Tensor]:
    """Odd numbers of rows, fewer than ranks, and none; scalars; other types; a full tensor."""
    generator = torch.Generator().manual_seed(0)
    rows = {f"rows/{count}": torch.randn(count, 3, generator=generator) for count in (0, 1, 2, 5)}
    rows |= {
        "half": torch.randn(5, generator=generator).bfloat16(),
        "integers": torch.arange(3),
        "full": torch.ones(4),
    }
    return rows | {"adam/0/step": torch.tensor(3.0), "count": torch.tensor(2**40)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    (out / "write.py").write_text(WRITE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, out / "write.py", out, Path(__file__).parent]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return out


def test_one_process_reads_the_shards_of_two_ranks(written: Path) -> None:
    numels = {key: value.numel() for key, value in state().items()}
    files = sharded_checkpoint.check_written(written / "parts", numels)
    assert list(files) == NAMES and min(files.values()) > 0
    found = sharded_checkpoint.load(written / "parts", files, {})
    assert found.keys() == state().keys()
    for key, value in state().items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    rows = [
        safe_open(written / "parts" / name, "pt").get_slice("rows/5").get_shape()[0]
        for name in NAMES
    ]
    assert rows == [3, 2]  # each rank has written its rows only
    with pytest.raises(Failure, match=r"15 of the 18 elements of rows/5.*all ranks share"):
        sharded_checkpoint.check_written(written / "parts", numels | {"rows/5": 18})
    with pytest.raises(Failure, match=r"0 of the 1 elements of another"):
        sharded_checkpoint.check_written(written / "parts", numels | {"another": 1})


def test_all_ranks_report_a_rank_that_cannot_write(written: Path) -> None:
    for rank in (0, 1):
        message = (written / f"error{rank}").read_text()
        assert "rank 1: NotADirectoryError" in message
        assert "The previous checkpoint is intact" in message
        assert "\n" not in message
    assert not (written / "no" / "such").exists()


def test_a_missing_altered_or_extra_shard_is_named(written: Path, tmp_path: Path) -> None:
    """Missing (DCP alone would return random or fewer rows), truncated, extra, overwritten."""
    for name in NAMES:
        files = sharded_checkpoint.file_sizes(written / "parts")
        for damage, message in (
            (
                lambda path: path.unlink(),
                "no such file, but .* bytes when the checkpoint was written",
            ),
            (
                lambda path: path.write_bytes(path.read_bytes()[:-1]),
                "bytes, but .* bytes when the checkpoint",
            ),
            (
                lambda path: shutil.copy(path, path.with_name("shard-3.safetensors")),
                "shard-3.*but no such file when",
            ),
            (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "are damaged"),
        ):
            folder = tmp_path / "parts"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(written / "parts", folder)
            checkpoint.save(
                tmp_path / "newest",
                {},
                {"parts": {"folder": "parts", "files": files}, "pairs_seen": 3},
            )
            tensors, meta = checkpoint.load(tmp_path / "newest")
            assert torch.equal(tensors["rows/5"], state()["rows/5"]) and meta["pairs_seen"] == 3
            damage(folder / name)
            with pytest.raises(Failure, match=message + r"(.|\n)*another checkpoint of the run"):
                checkpoint.load(tmp_path / "newest")


def test_a_flipped_bit_in_a_shard_is_noticed(written: Path, tmp_path: Path) -> None:
    """Sizes and headers fit, so that only the digests, equal on both ranks, show it."""
    digests = json.loads((written / "digests0").read_text())
    assert digests == json.loads((written / "digests1").read_text())
    assert digests == {name: sha256(written / "parts" / name) for name in NAMES}
    files = sharded_checkpoint.file_sizes(written / "parts")
    shutil.copytree(written / "parts", tmp_path / "parts")
    parts = {"folder": "parts", "files": files, "sha256": digests}
    checkpoint.save(tmp_path / "newest", {}, {"parts": parts})
    assert torch.equal(checkpoint.load(tmp_path / "newest")[0]["rows/5"], state()["rows/5"])

    for name in NAMES:
        path = tmp_path / "parts" / name
        intact = path.read_bytes()
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        with pytest.raises(Failure, match=rf"{name} is damaged .*{digests[name][:16]}"):
            checkpoint.load(tmp_path / "newest")
        path.write_bytes(intact)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_pickled_metadata_is_never_loaded(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "parts", tmp_path / "parts")
    (tmp_path / "parts" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match="unpickled"):
        pickle.loads((tmp_path / "parts" / ".metadata").read_bytes())
    assert (
        sharded_checkpoint.load(
            tmp_path / "parts", sharded_checkpoint.file_sizes(written / "parts"), {}
        ).keys()
        == state().keys()
    )
