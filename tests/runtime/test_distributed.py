"""torchrun's environment, and the recovery of two nodes after one rank is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.distributed import rank_device, store_prefix


def set_torchrun_environment(
    monkeypatch: pytest.MonkeyPatch,
    shared_store: bool,
    nodes: int,
    restart_count: int,
    max_restarts: int,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(shared_store))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart_count))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))


def test_attempts_that_share_a_store_have_different_prefixes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_torchrun_environment(
        monkeypatch, shared_store=True, nodes=1, restart_count=0, max_restarts=3
    )
    first = store_prefix()
    set_torchrun_environment(
        monkeypatch, shared_store=True, nodes=1, restart_count=1, max_restarts=3
    )
    assert store_prefix() != first


def test_nodes_with_different_restart_counts_share_the_prefix_of_a_new_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_torchrun_environment(
        monkeypatch, shared_store=False, nodes=2, restart_count=0, max_restarts=3
    )
    first = store_prefix()
    set_torchrun_environment(
        monkeypatch, shared_store=False, nodes=2, restart_count=1, max_restarts=3
    )
    assert store_prefix() == first


def test_a_shared_store_is_refused_if_several_nodes_may_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_torchrun_environment(
        monkeypatch, shared_store=True, nodes=2, restart_count=0, max_restarts=3
    )
    with pytest.raises(
        UserError, match=r"--max-restarts 3 on 2 nodes.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    ):
        store_prefix()
    set_torchrun_environment(
        monkeypatch, shared_store=True, nodes=2, restart_count=0, max_restarts=0
    )  # without restarts a shared store is safe
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
def test_two_nodes_recover_after_one_rank_is_killed(tmp_path: Path) -> None:
    """Two agents with one rank each; one rank is killed with SIGKILL, and both finish."""
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
        outputs = [node.communicate(timeout=600) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (tmp_path / "lost").exists() and all("DONE" in out for out, _ in outputs), outputs


def test_cuda_is_the_gpu_of_the_rank_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "7"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert rank_device("cuda") == "cuda:3"
    assert rank_device("cuda:1") == "cuda:1"
    assert rank_device("cpu") == "cpu"
