"""What ranks find in torchrun's environment, and that two nodes come back after one has lost its rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.distributed import store_prefix


def torchrun_says(
    monkeypatch: pytest.MonkeyPatch, lent: bool, nodes: int, count: int, most: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(lent))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))


def test_attempts_are_told_apart_where_one_store_serves_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchrun_says(monkeypatch, lent=True, nodes=1, count=0, most=3)
    first = store_prefix()
    torchrun_says(monkeypatch, lent=True, nodes=1, count=1, most=3)
    assert store_prefix() != first


def test_nodes_that_count_differently_meet_in_a_fresh_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchrun_says(monkeypatch, lent=False, nodes=2, count=0, most=3)
    first = store_prefix()
    torchrun_says(monkeypatch, lent=False, nodes=2, count=1, most=3)
    assert store_prefix() == first


def test_a_lent_store_is_refused_where_several_nodes_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchrun_says(monkeypatch, lent=True, nodes=2, count=0, most=3)
    with pytest.raises(
        UserError, match=r"--max-restarts 3 on 2 nodes.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    ):
        store_prefix()
    torchrun_says(
        monkeypatch, lent=True, nodes=2, count=0, most=0
    )  # what never restarts may keep it
    assert store_prefix()


LOSES_ONE = """
import os, signal, sys, torch
from pathlib import Path
from diffusion2gan.runtime.distributed import connect_ranks
layer, mark = torch.nn.Linear(2, 2), Path(sys.argv[1])
layer(torch.ones(1, 2)).sum().backward()
with connect_ranks(torch.device("cpu")) as group:
    group.sum(layer, [])
    if group.ranks.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    group.sum(layer, [])
    print("DONE", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
"""


@pytest.mark.slow
def test_two_nodes_come_back_after_one_has_lost_its_rank(tmp_path: Path) -> None:
    """Two agents of one rank each; kill −9 of one rank, and both end well. The attempts they count are told."""
    (tmp_path / "loses_one.py").write_text(LOSES_ONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        "--nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id test".split()
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    ]
    command += [str(tmp_path / "loses_one.py"), str(tmp_path / "lost")]
    fresh = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "DIFFUSION2GAN_RANK_TIMEOUT_S": "20",
        "OMP_NUM_THREADS": "1",
    }
    nodes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | fresh,
        )
        for _ in range(2)
    ]
    try:
        told = [node.communicate(timeout=600) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], told
    assert (tmp_path / "lost").exists() and all("DONE" in out for out, _ in told), told
