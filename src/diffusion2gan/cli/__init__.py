"""The command line: one module per command group, combined in `application`.

A command parses its options and calls one function. Heavy libraries (torch, diffusers, …) are
imported inside the commands, so `--help` and shell completion stay fast.
"""

from __future__ import annotations

from diffusion2gan.cli.startup import quiet_signals

with quiet_signals():
    from diffusion2gan.cli.application import app, main

__all__ = ["app", "main"]
