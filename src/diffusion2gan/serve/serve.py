"""`diffusion2gan serve`: a student's picture as its prompt is typed, or blind pairs to vote on, in a browser.

gradio (the `[demo]` extra) shows it. It listens on 127.0.0.1 alone unless another host is asked for, reports nothing
to anybody and fetches nothing: no analytics, no fonts, no shared link.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion2gan.compare.pictures import digest, make_pictures, system_of
from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.image_folder import ImageFolder
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.progress import console
from diffusion2gan.serve.studio import Painter
from diffusion2gan.serve.votes import Study, check_study

LOOPBACK = "127.0.0.1"
MAX_PROMPTS = 2000


def serve_student(
    student: str,
    teacher: str | None,
    *,
    host: str,
    port: int,
    history: Path,
    device: str = "cpu",
    precision: str = "float32",
) -> None:
    """Serves the student's page until it is interrupted.

    Raises UserError where gradio is missing, the port taken, or a folder of pictures is named, which makes none.
    """
    with gradio_ready(host, port) as (_, place):
        from diffusion2gan.serve.pages import student_page

        shown = _maker(student, device, precision)
        beside = (
            None
            if teacher is None
            else Painter(_maker(teacher, device, precision, shown.pixels[0]))
        )
        launch(
            student_page(Painter(shown), beside, history), host, place
        )  # both from the same noise


def _maker(path: str, device: str, precision: str, resolution: int | None = None) -> System:
    system = system_of(path, device, precision, resolution)
    if isinstance(system, ImageFolder):
        raise UserError(
            f"{path} is a folder of pictures and makes no new ones; name a pipeline (--vote takes pictures)"
        )
    return system


def serve_vote(
    pair: tuple[str, str],
    prompts: Sequence[str],
    votes: Path,
    *,
    host: str,
    port: int,
    seed: int,
    device: str = "cpu",
    precision: str = "float32",
) -> None:
    """Makes both systems' pictures of the prompts, then serves blind pairs; a vote is one line in `votes`.

    Raises UserError for equal systems, too many prompts, or a file that holds votes on something else.
    """
    if pair[0] == pair[1]:
        raise UserError(f"--vote {pair[0]} {pair[1]}: name two systems that differ")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{len(prompts)} prompts to vote on: at most {MAX_PROMPTS}; give a shorter file"
        )
    with gradio_ready(host, port) as (_, place):
        from diffusion2gan.serve.pages import vote_page

        systems = {name: system_of(name, device, precision) for name in pair}
        study = Study(
            *pair, digest([*(system.key for system in systems.values()), str(seed), *prompts])
        )
        check_study(votes, study)
        cache = votes.with_name(votes.name + ".pictures")
        pictures = make_pictures(systems, prompts, seed, cache, "pictures to vote on")
        launch(vote_page(study, prompts, pictures, votes), host, place)


@contextmanager
def gradio_ready(host: str, port: int) -> Iterator[tuple[Any, int]]:
    """Checks host, port and gradio before anything slow starts; yields gradio and the port (a free one for 0)."""
    place = check_port(host, port)
    if not is_loopback(host):
        console.print(
            f"warning: {host} can be reached from other machines: anybody there can use this page"
        )
    with tempfile.TemporaryDirectory(prefix="diffusion2gan-serve-") as temporary:
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": temporary,
            "HF_HUB_OFFLINE": "1",
        }
        try:
            import gradio
        except ImportError as error:
            raise UserError(
                f"serve needs gradio, which is not installed here ({error}); pip install 'diffusion2gan[demo]'"
            ) from error
        yield gradio, place


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises UserError where it is taken or the host is none of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}). If something else uses the "
            "port, name another with --port, or 0 for any that is free."
        ) from error


def launch(page: Any, host: str, port: int) -> None:
    """Serves until Ctrl-C."""
    from diffusion2gan.serve.pages import CSS, theme

    console.print(f"serving on http://{host}:{port} (Ctrl-C ends it)", soft_wrap=True)
    page.queue(max_size=64)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=1,
        theme=theme(),
        css=CSS,
        allowed_paths=[],
        show_error=True,
    )
