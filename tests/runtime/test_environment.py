"""Numbers from the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.runtime import storage
from diffusion2gan.runtime.environment import env_number


def test_a_variable_is_read_or_its_default_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSION2GAN_X", raising=False)
    assert env_number("DIFFUSION2GAN_X", 60) == 60
    monkeypatch.setenv("DIFFUSION2GAN_X", "0.5")
    assert env_number("DIFFUSION2GAN_X", 60) == 0.5


@pytest.mark.parametrize("text", ["soon", "", "-1", "nan", "inf"])
def test_values_that_are_not_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("DIFFUSION2GAN_CACHE_GIB", text)
    with pytest.raises(UserError, match=rf"DIFFUSION2GAN_CACHE_GIB='{text}' .*unset it for 20"):
        storage.cache_bytes()


def test_the_command_line_reports_it_in_one_line() -> None:
    env = os.environ | {"DIFFUSION2GAN_PATIENCE_S": "a minute"}
    command = [sys.executable, "-m", "diffusion2gan", "pairs", "info", "nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 2 and ran.stderr.startswith(
        "error: DIFFUSION2GAN_PATIENCE_S='a minute'"
    ), ran.stderr
