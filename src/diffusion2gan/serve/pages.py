"""The served pages, in gradio: what is typed and clicked goes to `studio` or `votes`, and what comes back is shown.

Imported when `serve` starts and not before: gradio is an extra.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from diffusion2gan.errors import Diffusion2GANError, UserError
from diffusion2gan.serve import studio, votes
from diffusion2gan.serve.studio import Painter
from diffusion2gan.serve.votes import QUESTIONS, Study

SHOWN_LETTERS = 600  # of a prompt on a page
SHOWN_HISTORY = 24
CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; }
.words { font-size: 1.25rem; line-height: 1.4; overflow-wrap: anywhere; unicode-bidi: isolate; }
.note { min-height: 1.5rem; opacity: 0.75; font-size: 0.875rem; overflow-wrap: anywhere; }
.picture img { width: 100%; object-fit: contain; }
.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) !important; padding-top: 1.75rem;
}
footer { display: none !important; }
"""


def theme() -> Any:
    """Gradio's own, in the system's fonts: nothing is fetched."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
    return gr.themes.Default(
        primary_hue="emerald", font=fonts, font_mono=("ui-monospace", "monospace")
    )


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Our errors become messages, their text escaped, and leave the page as it is.

    Not `gr.Error`: that lays itself over everything the event would have changed, the questions of a vote included.
    """

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Diffusion2GANError as error:
            gr.Warning(escape(str(error)), title="Not done")
            return gr.skip()

    return wrapped


def note(text: str) -> str:
    return f'<div class="note" dir="auto">{escape(text)}</div>'


def shorten(text: str, length: int = SHOWN_LETTERS) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# -------------------------------------------------------------------------------------------------- a student's page


def student_page(student: Painter, teacher: Painter | None, folder: Path) -> gr.Blocks:
    """A prompt, its picture as it is typed, the teacher's beside it, many seeds, and what was kept in `folder`."""
    with gr.Blocks(analytics_enabled=False, title="diffusion2gan", delete_cache=(600, 600)) as page:
        gr.HTML(f"<h1>{escape(shorten(Path(student.system.name).name, 60))}, as you type</h1>")
        prompt = gr.Textbox(
            label="Prompt",
            lines=1,
            max_lines=4,
            autofocus=True,
            placeholder="a large striped red ring on sand",
            info="Enter keeps the picture.",
            elem_id="prompt",
            submit_btn="Keep",
        )
        with gr.Row():
            seed = gr.Slider(0, 9999, value=0, step=1, label="Seed", elem_id="seed")
            part = gr.Slider(
                0,
                1,
                value=0,
                step=0.01,
                label="Noise: from this seed's to the next one's",
                elem_id="noise",
            )
        inputs = [prompt, seed, part]
        with gr.Row():
            with gr.Column():
                ours = picture("student", student.system.note)
                ours_note = gr.HTML(note("Type a prompt."), elem_id="student-note")
            if teacher is not None:
                theirs, theirs_note, ask = teacher_column(teacher)
        with gr.Tab("Kept"):
            kept = gallery("kept", f"Pictures in {shorten(str(folder), 80)}")
        with gr.Tab("Many seeds"):
            seeds_tab(student, prompt, seed)
        on_type(student, inputs, [ours, ours_note])
        save = keeper(student, folder)
        prompt.submit(
            save,
            inputs,
            [ours, ours_note, kept],
            concurrency_id="student",
            api_visibility="private",
        )
        if teacher is not None:
            run = keeper(teacher, folder)
            ask.click(
                run,
                inputs,
                [theirs, theirs_note, kept],
                concurrency_id="teacher",
                api_visibility="private",
            )
        page.load(
            lambda: studio.history(folder, SHOWN_HISTORY), None, kept, api_visibility="private"
        )
    return page


def picture(name: str, label: str) -> gr.Image:
    return gr.Image(
        label=f"{name}, {label}",
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="picture",
        height=420,
    )


def gallery(name: str, label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        columns=6,
        interactive=False,
        object_fit="contain",
        elem_id=name,
        elem_classes="pictures",
        buttons=["download", "fullscreen"],
    )


def teacher_column(teacher: Painter) -> tuple[gr.Image, gr.HTML, gr.Button]:
    with gr.Column():
        theirs = picture("teacher", teacher.system.note)
        theirs_note = gr.HTML(
            note("Press the button for the teacher's picture of the same noise."),
            elem_id="teacher-note",
        )
        ask = gr.Button("Teacher's picture", elem_id="ask")
    return theirs, theirs_note, ask


def on_type(student: Painter, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """A picture at each key or slider's move; what comes while one is being made becomes one request, the last."""

    @told
    def paint(prompt: str, seed: float, part: float) -> tuple[Image.Image | None, str]:
        if not prompt.strip():
            return None, note("Type a prompt.")
        made, words = one_picture(student, prompt, seed, part)
        return made, words

    prompt, seed, part = inputs
    gr.on(
        [prompt.change, seed.change, part.change],
        paint,
        list(inputs),
        list(outputs),
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=1,
        concurrency_id="student",
        api_visibility="private",
    )


def one_picture(painter: Painter, prompt: str, seed: float, part: float) -> tuple[Image.Image, str]:
    """The picture, and a line about it."""
    noise = studio.noise_between(round(seed), float(part), painter.system.latent_shape)
    (made,), seconds = painter.paint(prompt, noise)
    parts = [
        f"{seconds:.3f} s",
        painter.system.note,
        f"seed {round(seed)}",
        f"noise {part:g}" if part else "",
    ]
    return made, note(
        " · ".join(filter(None, [*parts, painter.reads(prompt), shorten(prompt.strip(), 120)]))
    )


def keeper(painter: Painter, folder: Path) -> Callable[..., Any]:
    @told
    def save(
        prompt: str, seed: float, part: float
    ) -> tuple[Image.Image, str, list[tuple[Image.Image, str]]]:
        made, words = one_picture(painter, prompt, seed, part)
        system = painter.system
        about = {
            "prompt": prompt,
            "seed": round(seed),
            "noise": part,
            "system": Path(system.name).name,
            "num_inference_steps": system.num_inference_steps,
            "key": system.key,
        }
        studio.keep(folder, made, about)
        return made, words, studio.history(folder, SHOWN_HISTORY)

    return save


def seeds_tab(student: Painter, prompt: gr.Textbox, seed: gr.Slider) -> None:
    """A grid of one prompt's pictures from neighbouring seeds."""

    @told
    def many(
        prompt: str, seed: float, count: float | None
    ) -> tuple[list[tuple[Image.Image, str]], str]:
        noise = studio.noises(round(seed), round(count or 0), student.system.latent_shape)
        made, seconds = student.paint(prompt, noise)
        words = f"{len(made)} pictures in {seconds:.2f} s, {seconds / len(made):.3f} s each"
        return [(one, f"seed {round(seed) + i}") for i, one in enumerate(made)], note(words)

    with gr.Row():
        count = gr.Number(
            12, precision=0, label=f"Pictures (at most {studio.MAX_PICTURES})", elem_id="how-many"
        )
        button = gr.Button("Make them", elem_id="make-many")
    line = gr.HTML(elem_id="many-note")
    grid = gallery("many", "From this seed on")
    button.click(
        many,
        [prompt, seed, count],
        [grid, line],
        concurrency_id="student",
        api_visibility="private",
    )


# ---------------------------------------------------------------------------------------------------- the vote's page


def vote_page(
    study: Study, prompts: Sequence[str], pictures: Mapping[str, Sequence[Image.Image]], path: Path
) -> gr.Blocks:
    """Blind pairs, one after the other. A voter is known to this browser alone; a reload goes on where it was."""

    def show(voter: str) -> tuple[Any, ...]:
        voter = (
            voter
            if isinstance(voter, str) and voter.isalnum() and len(voter) == 16
            else secrets.token_hex(8)
        )
        done = votes.voted(path, voter)
        order = votes.trial_order(study, len(prompts), voter)
        trial = next((one for one in order if one.prompt_index not in done), None)
        line = f"{len(done)} of {len(prompts)} voted"
        if trial is None:
            words = f"<h1>Thank you: all {len(prompts)} pairs are voted on.</h1>"
            off = gr.update(visible=False)
            return voter, None, words, note(line), off, off, *(off for _ in QUESTIONS), off
        left, right = same_size(
            pictures[trial.left][trial.prompt_index], pictures[trial.right][trial.prompt_index]
        )
        words = (
            f'<div class="words" dir="auto">{escape(shorten(prompts[trial.prompt_index]))}</div>'
        )
        return (
            voter,
            trial,
            words,
            note(line),
            left,
            right,
            *(gr.update(value=None) for _ in QUESTIONS),
            gr.update(),
        )

    @told
    def vote(voter: str, trial: votes.Trial | None, *answers: str | None) -> tuple[Any, ...]:
        if trial is None:
            return show(voter)
        if any(answer not in ("left", "right") for answer in answers):
            raise UserError("answer both questions, then go on")
        chosen = {
            q: getattr(trial, str(answer)) for q, answer in zip(QUESTIONS, answers, strict=True)
        }
        about = {"study": asdict(study), "voter": voter, "prompt": prompts[trial.prompt_index]}
        votes.append_vote(path, {**about, **trial._asdict(), **chosen})
        return show(voter)

    with gr.Blocks(
        analytics_enabled=False, title="Which picture?", delete_cache=(600, 600)
    ) as page:
        voter = gr.BrowserState(
            "", storage_key=f"diffusion2gan-{study.digest}", secret="diffusion2gan"
        )
        trial = gr.State(None)
        words, line = gr.HTML(elem_id="words"), gr.HTML(elem_id="line")
        with gr.Row():
            left, right = (
                gr.Image(
                    label=side,
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=420,
                    elem_id=side.lower(),
                    elem_classes="picture",
                )
                for side in ("Left", "Right")
            )
        choices = [("Left", "left"), ("Right", "right")]
        with gr.Row():
            answers = [
                gr.Radio(choices, label=text, elem_id=name) for name, text in QUESTIONS.items()
            ]
        button = gr.Button("Next", variant="primary", elem_id="next")
        outputs = [voter, trial, words, line, left, right, *answers, button]
        page.load(show, voter, outputs, api_visibility="private", show_progress="hidden")
        button.click(
            vote,
            [voter, trial, *answers],
            outputs,
            api_visibility="private",
            concurrency_limit=None,
            show_progress="hidden",
        )
    return page


def same_size(left: Image.Image, right: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both at the smaller one's size, so that no size tells a system."""
    if left.size == right.size:
        return left, right
    size = min(left.size, right.size)
    return tuple(ImageOps.contain(one, size, Image.Resampling.LANCZOS) for one in (left, right))  # type: ignore
