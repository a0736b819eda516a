"""The names that `import diffusion2gan` offers."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import diffusion2gan
from diffusion2gan import api


@pytest.mark.parametrize("name", diffusion2gan.__all__)
def test_public_name_is_listed_and_importable(name: str) -> None:
    assert name in dir(diffusion2gan)
    public = getattr(diffusion2gan, name)
    assert callable(public)
    assert public.__name__.rpartition(".")[2] == name


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_student'"):
        diffusion2gan.load_student  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "from diffusion2gan import distill",
        "import diffusion2gan.distill.health; from diffusion2gan import distill",
        "from diffusion2gan import distill; import diffusion2gan.distill.health",
        "import diffusion2gan; diffusion2gan.distill.__doc__",
    ],
)
def test_importing_a_job_loads_no_torch_and_its_name_is_callable_in_any_order(code: str) -> None:
    # `health` imports torch itself, so only the first and the last must be light
    script = f"""
import sys
{code}
import diffusion2gan
assert callable(diffusion2gan.distill)
assert diffusion2gan.distill is sys.modules["diffusion2gan.distill"]
assert {"health" in code} or "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_version_loads_no_torch() -> None:
    script = """
import sys
from diffusion2gan.cli import main
sys.argv = ["diffusion2gan", "--version"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["compare", "distill", "evaluate", "export"])
def test_a_module_that_is_called_has_the_signature_of_its_function(name: str) -> None:
    module = getattr(diffusion2gan, name)
    assert inspect.signature(module) == inspect.signature(getattr(api, name))
