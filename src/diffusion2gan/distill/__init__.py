"""Distillation: training a one-step student on a teacher's pairs. Called, it is `api.distill`."""

from diffusion2gan.callable_module import make_callable

make_callable(__name__)
