"""The names that `import diffusion2gan` offers."""

from __future__ import annotations

import pytest

import diffusion2gan


@pytest.mark.parametrize("name", diffusion2gan.__all__)
def test_public_name_is_listed_and_importable(name: str) -> None:
    assert name in dir(diffusion2gan)
    assert getattr(diffusion2gan, name).__name__ == name


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_student'"):
        diffusion2gan.load_student  # noqa: B018
