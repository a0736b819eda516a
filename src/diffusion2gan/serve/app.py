"""`diffusion2gan serve`: a student's image as its prompt is typed, or blind votes, in a browser.

The pages use gradio (the `[demo]` extra). The server listens on 127.0.0.1 unless another host is
given. It sends nothing to other machines and loads nothing from them: no analytics, no fonts, no
share link.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from diffusion2gan.compare.images import generate_images, parse_system, short_digest
from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.image_folder import ImageFolder
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.files import temporary_folder
from diffusion2gan.runtime.progress import console
from diffusion2gan.serve.generation import SharedSystem
from diffusion2gan.serve.guard import Guard, is_loopback
from diffusion2gan.serve.votes import Study, check_study

MAX_PROMPTS = 2000


# ------------------------------------------------------------------------------- The two commands


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
    """Serves the page of a student, with a teacher beside it if one is given, until interrupted.

    Saved images are written into `history`. Raises UserError if gradio is missing, if the port is
    in use, or if a system is a folder of images, which cannot generate new ones.
    """
    with prepare_gradio(host, port) as free_port:
        from diffusion2gan.serve.pages import student_page

        shared_student = SharedSystem(_load_generator(student, device, precision))
        shared_teacher = None
        if teacher is not None:
            # The student's resolution, so that both start from the same noise
            resolution, _ = shared_student.system.image_size
            shared_teacher = SharedSystem(_load_generator(teacher, device, precision, resolution))
        page = student_page(shared_student, shared_teacher, history)
        launch(page, host, free_port)


def _load_generator(
    path: str, device: str, precision: str, resolution: int | None = None
) -> System:
    """Loads a system that generates images. Raises UserError for a folder of images."""
    system = parse_system(path, device, precision, resolution)
    if isinstance(system, ImageFolder):
        raise UserError(
            f"{path} is a folder of images and cannot generate new ones; name a pipeline instead "
            "(only --vote accepts folders of images)"
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
    """Generates the images of both systems, then serves blind pairs to vote on until interrupted.

    Each vote is one line in the file `votes`. Raises UserError if both systems are the same, if
    there are too many prompts, or if the file has votes on something else.
    """
    if pair[0] == pair[1]:
        raise UserError(f"--vote {pair[0]} {pair[1]}: name two different systems")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"there are {len(prompts)} prompts, but at most {MAX_PROMPTS} can be voted on; "
            "use a shorter prompts file"
        )

    with prepare_gradio(host, port) as free_port:
        from diffusion2gan.serve.pages import vote_page

        # The digest covers everything that the images depend on
        systems = {name: parse_system(name, device, precision) for name in pair}
        keys = [system.key for system in systems.values()]
        study = Study(*pair, digest=short_digest([*keys, str(seed), *prompts]))
        check_study(votes, study)

        cache = votes.with_name(votes.name + ".pictures")
        images = generate_images(systems, prompts, seed, cache, "images to vote on")
        launch(vote_page(study, prompts, images, votes), host, free_port)


# ----------------------------------------------------------------------------------------- Server


@contextmanager
def prepare_gradio(host: str, port: int) -> Iterator[int]:
    """Checks the host, the port and gradio before anything slow starts; yields the port to use.

    If `port` is 0, that is any free port. Gradio's temporary files are deleted at the end.
    """
    free_port = check_port(host, port)
    if not is_loopback(host):
        console.print(
            f"warning: other machines can reach {host}; anyone who can connect to it can use "
            "this page",
            soft_wrap=True,
        )

    with temporary_folder("diffusion2gan-serve") as temporary:
        # Gradio reads these when it is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(temporary)
        os.environ["HF_HUB_OFFLINE"] = "1"
        bypass_proxy(host)
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"serve needs gradio, which is not installed ({error}); install it with "
                "pip install 'diffusion2gan[demo]'"
            ) from error
        yield free_port


def bypass_proxy(host: str) -> None:
    """Excludes this machine from the proxy of http_proxy, which could not reach it.

    Gradio checks the page that it serves by a request to `host`.
    """
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [text for text in os.environ.get(name, "").split(",") if text]
        for local in ("127.0.0.1", "localhost", "::1", host):
            if local not in hosts:
                hosts.append(local)
        os.environ[name] = ",".join(hosts)


def check_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0.

    Raises UserError if the port is in use or the host is not an address of this machine.
    """
    try:
        # The probe allows the address to be reused, as gradio's server does
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen on it ({error.strerror or error}). If "
            "another program uses the port, name another with --port, or use --port 0 for any "
            "free one."
        ) from error


def launch(page: Any, host: str, port: int) -> None:
    """Serves a gradio page until Ctrl-C."""
    from diffusion2gan.serve.pages import CSS, build_theme

    console.print(f"Serving on http://{host}:{port} (press Ctrl-C to stop)", soft_wrap=True)
    page.queue(max_size=64)

    # Around everything, also around gradio's own rules for requests from other ports
    @asynccontextmanager
    async def guarded(application: Any) -> AsyncIterator[None]:
        application.middleware_stack = Guard(application.middleware_stack, host)
        yield

    # Nothing leaves this machine: no share link, no monitoring, no links in the footer
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
        theme=build_theme(),
        css=CSS,
        allowed_paths=[],
        show_error=True,
        app_kwargs={"lifespan": guarded},
    )
