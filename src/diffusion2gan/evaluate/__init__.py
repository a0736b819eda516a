"""Evaluation: protocols, feature networks, metrics and intervals. Called, it is `api.evaluate`."""

from diffusion2gan.callable_module import make_callable

make_callable(__name__)
