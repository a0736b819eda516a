"""Comparisons: several systems on the same prompts and noise. Called, it is `api.compare`."""

from diffusion2gan.callable_module import make_callable

make_callable(__name__)
