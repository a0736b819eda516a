"""The served pages, in gradio. Their logic is in the modules `generation`, `history` and `votes`.

Imported only when `serve` starts, because gradio is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from diffusion2gan.compare.text import shorten
from diffusion2gan.errors import Diffusion2GANError, UserError
from diffusion2gan.serve import generation, votes
from diffusion2gan.serve.generation import SharedSystem
from diffusion2gan.serve.history import load_history, save_image
from diffusion2gan.serve.votes import QUESTIONS, Study

MAX_PROMPT_LENGTH = 600  # characters of a prompt on the vote page
MAX_HISTORY = 24  # saved images shown
CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; }
.words { font-size: 1.25rem; line-height: 1.4; overflow-wrap: anywhere; unicode-bidi: isolate; }
.note { min-height: 1.5rem; opacity: 0.75; font-size: 0.875rem; overflow-wrap: anywhere; }
.picture img { width: 100%; object-fit: contain; }
.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) !important; padding-top: 1.75rem;
}
footer { display: none !important; }
@media (max-width: 40rem) {
  .gradio-container main { padding: 0.5rem !important; gap: 0.5rem; }
  .words { font-size: 1.0625rem; max-height: 4.25rem; overflow: auto; }
  #pair { flex-wrap: nowrap; gap: 0.5rem; }
  #pair > * { min-width: 0 !important; }
  #pair .picture { height: calc(50vw - 2.25rem) !important; }
  #pair .picture img { height: 100%; }
  #words, #line { padding: 0 !important; min-height: 0; }
  #questions .form { flex-direction: column; }
  #questions .block { padding: 0.5rem; min-width: 0 !important; }
  #questions .wrap { flex-wrap: nowrap; gap: 0.375rem; }
  #questions label {
    flex: 1 1 auto; justify-content: center; padding: 0.5rem 0.25rem; font-size: 0.875rem;
  }
}
"""

ImageAndNote = tuple[Image.Image | None, str]
Captioned = list[tuple[Image.Image, str]]
Shown = tuple[str, votes.Trial]  # a voter, and the trial that the page shows


# ------------------------------------------------------------------------------- Shared components


def build_theme() -> Any:
    """Gradio's default theme with the fonts of the system, so that none is downloaded."""
    return gr.themes.Default(
        primary_hue="emerald",
        font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an event handler show the package's errors as a warning and leave the page unchanged.

    A `gr.Error` would cover every component that the event updates, such as the questions of a
    vote.
    """

    @wraps(function)
    def handler(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Diffusion2GANError as error:
            gr.Warning(escape(str(error)), title="That did not work")
            return gr.skip()

    return handler


def format_note(text: str) -> str:
    """A line of small text, as HTML."""
    return f'<div class="note" dir="auto">{escape(text)}</div>'


def build_image(elem_id: str, label: str, buttons: Sequence[str], alt_text: str) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=alt_text,
        type="pil",
        format="png",
        interactive=False,
        buttons=list(buttons),
        elem_id=elem_id,
        elem_classes="picture",
        height=420,
    )


def build_gallery(elem_id: str, label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        columns=6,
        interactive=False,
        object_fit="contain",
        elem_id=elem_id,
        elem_classes="pictures",
        buttons=["download", "fullscreen"],
    )


# ------------------------------------------------------------------------------- The student's page


def student_page(
    student: SharedSystem, teacher: SharedSystem | None, history_folder: Path
) -> gr.Blocks:
    """A prompt, the student's image as it is typed, and the teacher's image on request.

    Below it, the images saved in `history_folder`, and a tab with the images of many seeds.
    """
    with gr.Blocks(analytics_enabled=False, title="diffusion2gan", delete_cache=(600, 600)) as page:
        # Inputs
        name = shorten(Path(student.system.name).name, 60)
        gr.HTML(f"<h1>{escape(name)}: images as you type</h1>")
        prompt = gr.Textbox(
            label="Prompt",
            lines=1,
            max_lines=4,
            autofocus=True,
            placeholder="a large striped red ring on sand",
            info="Press Enter to save the image.",
            elem_id="prompt",
            submit_btn="Save",
        )
        with gr.Row():
            seed = gr.Slider(0, 9999, value=0, step=1, label="Seed", elem_id="seed")
            fraction = gr.Slider(
                0,
                1,
                value=0,
                step=0.01,
                label="Noise: from this seed (0) to the next one (1)",
                elem_id="noise",
            )
        inputs = [prompt, seed, fraction]

        # The student's image, and the teacher's beside it
        buttons = ["download", "fullscreen"]
        with gr.Row():
            with gr.Column():
                student_image = build_image(
                    "student",
                    f"Student, {student.system.note}",
                    buttons,
                    "the student's image of the prompt",
                )
                student_note = gr.HTML(format_note("Type a prompt."), elem_id="student-note")
            if teacher is not None:
                with gr.Column():
                    teacher_image = build_image(
                        "teacher",
                        f"Teacher, {teacher.system.note}",
                        buttons,
                        "the teacher's image of the prompt",
                    )
                    teacher_note = gr.HTML(
                        format_note("Press the button for the teacher's image of the same noise."),
                        elem_id="teacher-note",
                    )
                    teacher_button = gr.Button("Generate the teacher's image", elem_id="ask")

        # Tabs below
        with gr.Tab("Saved"):
            saved = build_gallery("kept", f"Saved in {shorten(str(history_folder), 80)}")
        with gr.Tab("Many seeds"):
            build_seeds_tab(student, prompt, seed)

        # Each key press or slider movement generates an image. Of the events that arrive in the
        # meantime only the last is handled.
        gr.on(
            [prompt.change, seed.change, fraction.change],
            make_preview(student),
            inputs,
            [student_image, student_note],
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="student",
            api_visibility="private",
        )

        # Enter and the teacher's button also save it
        prompt.submit(
            make_saver(student, history_folder),
            inputs,
            [student_image, student_note, saved],
            concurrency_id="student",
            api_visibility="private",
        )
        if teacher is not None:
            teacher_button.click(
                make_saver(teacher, history_folder),
                inputs,
                [teacher_image, teacher_note, saved],
                concurrency_id="teacher",
                api_visibility="private",
            )

        def show_history() -> Captioned:
            return load_history(history_folder, MAX_HISTORY)

        page.load(show_history, None, saved, api_visibility="private")
    return page


def make_preview(system: SharedSystem) -> Callable[..., ImageAndNote]:
    """The handler of typing: (prompt, seed, fraction) → (image, note)."""

    @show_errors
    def preview(prompt: str, seed: float, fraction: float) -> ImageAndNote:
        if not prompt.strip():
            return None, format_note("Type a prompt.")
        return generate_one(system, prompt, seed, fraction)

    return preview


def make_saver(system: SharedSystem, folder: Path) -> Callable[..., Any]:
    """The handler of saving: (prompt, seed, fraction) → (image, note, saved images)."""

    @show_errors
    def save(prompt: str, seed: float, fraction: float) -> tuple[Image.Image, str, Captioned]:
        image, note = generate_one(system, prompt, seed, fraction)
        metadata = {
            "prompt": prompt,
            "seed": round(seed),
            "noise": fraction,
            "system": Path(system.system.name).name,
            "num_inference_steps": system.system.num_inference_steps,
            "key": system.system.key,
        }
        save_image(folder, image, metadata)
        return image, note, load_history(folder, MAX_HISTORY)

    return save


def generate_one(
    system: SharedSystem, prompt: str, seed: float, fraction: float
) -> tuple[Image.Image, str]:
    """Generates an image; returns it with a note (time, steps, seed, prompt) as HTML."""
    noise = generation.noise_between(round(seed), float(fraction), system.system.latent_shape)
    images, seconds = system.generate(prompt, noise)

    facts = [f"{seconds:.3f} s", system.system.note, f"seed {round(seed)}"]
    if fraction:
        facts.append(f"noise {fraction:g}")
    truncation = system.truncation_note(prompt)
    if truncation:
        facts.append(truncation)
    facts.append(shorten(prompt.strip(), 120))
    return images[0], format_note(" · ".join(facts))


def build_seeds_tab(student: SharedSystem, prompt: gr.Textbox, seed: gr.Slider) -> None:
    """A tab with the images of one prompt from consecutive seeds."""
    with gr.Row():
        count = gr.Number(
            12,
            precision=0,
            label=f"Number of images (at most {generation.MAX_IMAGES})",
            elem_id="how-many",
        )
        button = gr.Button("Generate", elem_id="make-many")
    note = gr.HTML(elem_id="many-note")
    gallery = build_gallery("many", "From this seed on")

    @show_errors
    def generate_many(prompt: str, seed: float, count: float | None) -> tuple[Captioned, str]:
        shape = student.system.latent_shape
        noise = generation.noise_batch(round(seed), round(count or 0), shape)
        images, seconds = student.generate(prompt, noise)

        captioned = [(image, f"seed {round(seed) + i}") for i, image in enumerate(images)]
        per_image = seconds / len(images)
        text = f"{len(images)} images in {seconds:.2f} s, {per_image:.3f} s per image"
        return captioned, format_note(text)

    button.click(
        generate_many,
        [prompt, seed, count],
        [gallery, note],
        concurrency_id="student",
        api_visibility="private",
    )


# ----------------------------------------------------------------------------------- The vote page


def vote_page(
    study: Study, prompts: Sequence[str], images: Mapping[str, Sequence[Image.Image]], path: Path
) -> gr.Blocks:
    """Blind pairs of images, one after the other. `path` is the file of votes.

    Each browser is a voter, with a random identifier that it stores. After a reload, the page
    continues with the first pair that this voter has not voted on.
    """

    limit = votes.VoteLimit()

    def show_next(stored_voter: str) -> tuple[Any, ...]:
        """The outputs of the page for a voter: their next trial, or thanks if there is none."""
        voter = stored_voter if votes.is_voter(stored_voter) else votes.new_voter()
        done = votes.voted_prompts(path, voter)
        trial = None
        for candidate in votes.trial_order(study, len(prompts), voter):
            if candidate.prompt_index not in done:
                trial = candidate
                break
        progress = format_note(f"{len(done)} of {len(prompts)} pairs done")

        # Finished: thank the voter, and hide everything else
        if trial is None:
            thanks = f"<h1>Thank you! You have voted on all {len(prompts)} pairs.</h1>"
            hidden = gr.update(visible=False)
            no_questions = [hidden for _ in QUESTIONS]
            return voter, None, thanks, progress, hidden, hidden, *no_questions, hidden

        # Next pair: its prompt, its images, and the questions without answers
        text = escape(shorten(prompts[trial.prompt_index], MAX_PROMPT_LENGTH))
        heading = f'<div class="words" dir="auto">{text}</div>'
        left, right = match_sizes(
            images[trial.left][trial.prompt_index], images[trial.right][trial.prompt_index]
        )
        cleared = [gr.update(value=None) for _ in QUESTIONS]
        return voter, (voter, trial), heading, progress, left, right, *cleared, gr.update()

    @show_errors
    def vote(stored_voter: str, shown: Shown | None, *sides: str | None) -> tuple[Any, ...]:
        """Stores the answers to the trial that was shown, by its voter, and shows the next one.

        Both come from the server's memory, not from the browser, which may send anything.
        """
        if shown is None:
            return show_next(stored_voter)
        voter, trial = shown

        answers = {}
        systems = {"left": trial.left, "none": None, "right": trial.right}
        for question, side in zip(QUESTIONS, sides, strict=True):
            if side not in systems:
                raise UserError("please answer both questions, then press Next")
            answers[question] = systems[side]
        record = {
            "study": asdict(study),
            "voter": voter,
            "prompt": prompts[trial.prompt_index],
            **trial._asdict(),
            **answers,
        }
        limit.check()
        votes.append_vote(path, record)
        return show_next(voter)

    with gr.Blocks(
        analytics_enabled=False, title="Which image is better?", delete_cache=(600, 600)
    ) as page:
        # State: the browser keeps the voter's identifier, the server whom it has shown what
        voter_state = gr.BrowserState(
            "", storage_key=f"diffusion2gan-{study.digest}", secret="diffusion2gan"
        )
        shown_state = gr.State(None)

        # Layout
        heading = gr.HTML(elem_id="words")
        progress = gr.HTML(elem_id="line")
        with gr.Row(elem_id="pair"):
            left = build_image("left", "Left", ["fullscreen"], "left image")
            right = build_image("right", "Right", ["fullscreen"], "right image")
        sides = [("Left", "left"), ("No difference", "none"), ("Right", "right")]
        with gr.Row(elem_id="questions"):
            questions = [
                gr.Radio(sides, label=text, elem_id=name) for name, text in QUESTIONS.items()
            ]
        button = gr.Button("Next", variant="primary", elem_id="next")

        # Events
        outputs = [voter_state, shown_state, heading, progress, left, right, *questions, button]
        page.load(show_next, voter_state, outputs, api_visibility="private", show_progress="hidden")
        button.click(
            vote,
            [voter_state, shown_state, *questions],
            outputs,
            api_visibility="private",
            concurrency_limit=None,
            show_progress="hidden",
        )
    return page


def match_sizes(left: Image.Image, right: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Reduces the larger image to the size of the smaller, so that no size reveals a system."""
    if left.size == right.size:
        return left, right
    size = min(left.size, right.size)
    return (
        ImageOps.contain(left, size, Image.Resampling.LANCZOS),
        ImageOps.contain(right, size, Image.Resampling.LANCZOS),
    )
