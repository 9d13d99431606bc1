"""The page: components, and what happens when they are used. Needs the extra `demo`."""

import html
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageDraw
from transformers.image_processing_base import ImageProcessingMixin

from ..images_degmix import DOUBT, decode_image, to_photo
from ..inference.predictor import Result, predict_batch, prepare
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..visualization import draw_overview, draw_prediction
from ..visualization.geometry import FIELD_OF_VIEW, first_of_kind
from .readings import CSS, draw_legend, draw_readings, draw_shares
from .surface import depth_surface


# Pillow decodes more formats, but with code that is less used (and with Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")
# The photos of phones have 12 to 24 million.
MAX_PIXELS = 25_000_000
MAX_PHOTOS = 8
# People who wait for their turn; one photo is predicted at a time.
MAX_WAITING = 16
# Larger photos are shrunk, because the published models are trained with images of at most 560 pixels.
LONGEST_SIDE = 640
SHORTEST_SIDE = 32

HINT = "Click on a picture to read the values of all tasks at that point."

PAGE_CSS = """
.panels {display: grid !important; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(max(150px, 23%), 1fr))}
.panels > * {min-width: 0 !important}
@media (max-width: 640px) {
    .readings {
        position: fixed !important; bottom: 0; left: 0; z-index: 5; width: 100%; padding: 8px 16px;
        background: var(--background-fill-primary); border-top: 1px solid var(--border-color-primary);
    }
    .panels {padding-bottom: 110px}
}
"""
# For `Blocks.launch`, which takes the styles too.
LAUNCH_OPTIONS = {
    "css": PAGE_CSS + CSS,
    # The 3-D view tries WebGPU first, and reports an error where there is none. WebGL is enough.
    "head": "<script>delete Navigator.prototype.gpu</script>",
    "max_file_size": "50mb",
    "share": False,
    "ssr_mode": False,
    "run_history": False,
    "footer_links": ["api"],
}


def build_demo(
    model: DeGMixForMultiTaskDensePrediction,
    processor: ImageProcessingMixin,
    examples: Sequence[Image.Image] = (),
    max_pixels: int = MAX_PIXELS,
) -> gr.Blocks:
    """The page, to be started by `.launch(**LAUNCH_OPTIONS)`.

    Photos are predicted one at a time; at most `MAX_WAITING` wait. Uploads and results are deleted after an hour. The
    panels depend on the model: the surface needs a task of kind depth (the first is shown), the attention a decoder.

    Args:
        model, processor: of one model, as `hub.model_directory.load_model_directory` gives them.
        examples: photos offered on the page.
        max_pixels: of a photo; larger ones are refused.
    """
    page = _Page(model, processor, examples, max_pixels)
    return page.blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


class _Page:
    def __init__(
        self,
        model: DeGMixForMultiTaskDensePrediction,
        processor: ImageProcessingMixin,
        examples: Sequence[Image.Image],
        max_pixels: int,
    ):
        self.model = model
        self.processor = processor
        self.max_pixels = max_pixels
        self.tasks = model.config.tasks
        self.depth_task = first_of_kind(self.tasks, "depth")
        with gr.Blocks(title="DeGMix", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.Markdown(f"# DeGMix\nOne photo, one forward pass: {', '.join(self.tasks)}.")
            self.result = gr.State(time_to_live=3600)
            with gr.Row():
                self._add_input(examples)
            with gr.Column(visible=False) as self.results, gr.Tabs() as self.tabs:
                with gr.Tab("All tasks", id="tasks"):
                    self._add_panels()
                with gr.Tab("Compare"):
                    self._add_comparison()
                with gr.Tab("3-D", visible=self.depth_task is not None) as self.surface_tab:
                    self._add_surface()
                with gr.Tab("Attention", visible=model.config.use_decoder):
                    self._add_attention()
                with gr.Tab("Files"):
                    self.files = gr.File(
                        label="Arrays of all tasks (NumPy), and a picture of everything",
                        file_count="multiple",
                        interactive=False,
                    )
            self._connect()

    # What there is to see

    def _add_input(self, examples: Sequence[Image.Image]):
        self.photo = gr.Image(
            label="Photo", sources=["upload", "webcam", "clipboard"], type="filepath", height=320, scale=2
        )
        # Gradio's own `preprocess` opens the file without limits, before any check.
        self.photo.preprocess = lambda payload: payload and payload.path
        with gr.Column(min_width=240):
            gr.Markdown("or choose one")
            self.gallery = gr.Gallery(
                list(examples),
                show_label=False,
                format="png",
                columns=3,
                height=225,
                buttons=[],
                allow_preview=False,
                interactive=False,
            )
            self.several = gr.UploadButton(
                f"Upload several (up to {MAX_PHOTOS})", file_count="multiple", file_types=["image"], size="sm"
            )

    def _add_panels(self):
        self.note = gr.Markdown()
        self.readings = gr.HTML(HINT, elem_classes="readings")
        self.panels, self.legends = {}, {}
        with gr.Row(elem_classes="panels"):
            with gr.Column():
                self.photo_panel = _panel("photo")
            for name in self.tasks:
                with gr.Column():
                    self.panels[name], self.legends[name] = _panel(name), gr.HTML()

    def _add_comparison(self):
        self.compared = gr.Radio(list(self.tasks), value=next(iter(self.tasks)), label="Prediction")
        self.slider = gr.ImageSlider(label="photo | prediction", format="png", interactive=False)

    def _add_surface(self):
        self.colored_by = gr.Radio(["photo", *self.tasks], value="photo", label="Colours")
        self.surface = gr.Model3D(label=self.depth_task, height=460, interactive=False)
        gr.Markdown(f"The camera is unknown: a field of view of {FIELD_OF_VIEW:g} degrees is assumed. Drag to turn.")

    def _add_attention(self):
        gr.Markdown("How much each task (row) takes from the features of each task (column).")
        self.shares = gr.HTML()
        self.looking = gr.Radio(
            list(self.tasks), value=next(iter(self.tasks)), label="Where does this task take (white: most)"
        )
        with gr.Row(elem_classes="panels"):
            self.maps = [_panel(f"from {name}") for name in self.tasks]

    # What happens

    def _connect(self):
        outputs = [self.result, self.results, self.note, self.readings, self.photo_panel, *self.panels.values()]
        outputs += [*self.legends.values(), self.slider, self.surface, self.shares, *self.maps, self.files, self.tabs]
        shown = self.photo.change(
            self.show_photo, [self.photo, self.compared, self.looking], outputs, api_name="predict"
        )
        # A refused photo is removed, and so are the results of the photo before it.
        shown.failure(lambda: None, None, self.photo, api_visibility="private")
        self.several.upload(self.add_photos, self.several, self.gallery, api_name="add_photos")
        self.gallery.select(choose_photo, self.gallery, self.photo, api_visibility="private")
        for panel in (self.photo_panel, *self.panels.values()):
            panel.select(self.read_clicked, self.result, [self.readings, self.photo_panel], api_visibility="private")
        self.compared.input(
            lambda result, name: (result.photo, self.picture(result, name)),
            [self.result, self.compared],
            self.slider,
            api_visibility="private",
        )
        gr.on(
            [self.surface_tab.select, self.colored_by.input],
            self.save_surface,
            [self.result, self.colored_by],
            self.surface,
            api_visibility="private",
        )
        self.looking.input(self.draw_attentions, [self.result, self.looking], self.maps, api_visibility="private")

    def show_photo(self, path: str | None, compared: str, looking: str) -> dict[gr.blocks.Block, Any]:
        if path is None:
            return {self.result: None, self.results: gr.Column(visible=False)}
        result = predict(self.model, self.processor, self.check_photo(path))
        shown = {
            self.result: result,
            self.results: gr.Column(visible=True),
            self.note: f"Shown at {result.photo.width} x {result.photo.height} pixels.",
            self.readings: HINT,
            self.photo_panel: result.photo,
            self.slider: (result.photo, self.picture(result, compared)),
            self.surface: None,  # Filled when its tab opens: with a value from before, it may stay empty.
            self.files: self.save_files(result, Path(path).stem),
            self.tabs: gr.Tabs(selected="tasks"),
        }
        for name, task in self.tasks.items():
            shown[self.panels[name]] = self.picture(result, name)
            shown[self.legends[name]] = draw_legend(task, result.predictions[name])
        if result.attentions is not None:
            shown[self.shares] = draw_shares(result.attentions, list(self.tasks))
            shown |= zip(self.maps, self.draw_attentions(result, looking))
        return shown

    def check_photo(self, path: str, prefix: str = "") -> Image.Image:
        try:
            return read_photo(path, self.max_pixels)
        except ValueError as error:
            raise gr.Error(prefix + str(error), print_exception=False) from error

    def add_photos(self, paths: list[str]) -> list[Image.Image]:
        if len(paths) > MAX_PHOTOS:
            raise gr.Error(f"{len(paths)} files at once, at most {MAX_PHOTOS} are allowed", print_exception=False)
        return [self.check_photo(path, f"{html.escape(Path(path).name)}: ") for path in paths]

    def picture(self, result: Result, name: str) -> Image.Image:
        """The picture of a task, or the photo."""
        return draw_prediction(result.predictions[name], self.tasks[name]) if name in self.tasks else result.photo

    def read_clicked(self, result: Result, event: gr.SelectData) -> tuple[str, Image.Image]:
        column, row = (min(max(int(at), 0), length - 1) for at, length in zip(event.index, result.photo.size))
        return draw_readings(result.predictions, self.tasks, row, column), draw_marked(result.photo, row, column)

    def draw_attentions(self, result: Result, task: str) -> list[Image.Image]:
        """How much a task takes from each, and where: from black, its smallest share, to white, its largest."""
        # Without a decoder, their tab is hidden.
        shares = result.attentions[list(self.tasks).index(task)].float().mean(dim=0)  # type: ignore[index]
        value_range = float(shares.min()), float(shares.max())
        size = result.photo.height, result.photo.width
        return [draw_prediction(values, {"kind": "saliency"}, value_range, size) for values in shares]

    def save_files(self, result: Result, stem: str) -> list[str]:
        arrays, overview = BytesIO(), BytesIO()
        maps: dict[str, Any] = {name: values.numpy() for name, values in result.predictions.items()}
        np.savez_compressed(arrays, **maps)
        draw_overview(result.photo, result.predictions, self.tasks, result.attentions).save(overview, "PNG")
        return [
            save_bytes_to_cache(file.getvalue(), f"{stem}.{ending}", self.blocks.GRADIO_CACHE)
            for file, ending in ((arrays, "npz"), (overview, "overview.png"))
        ]

    def save_surface(self, result: Result, coloring: str) -> str | None:
        # Without depth, its tab is hidden.
        depth = result.predictions[self.depth_task]  # type: ignore[index]
        mesh = depth_surface(depth, self.picture(result, coloring))
        return mesh and save_bytes_to_cache(mesh.export(file_type="glb"), "surface.glb", self.blocks.GRADIO_CACHE)


def _panel(label: str) -> gr.Image:
    return gr.Image(label=label, format="png", interactive=False, buttons=["fullscreen"])


def choose_photo(offered: list[tuple[str, str | None]], event: gr.SelectData) -> str:
    return offered[event.index][0]


def read_photo(path: str | PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file -> RGB image, upright, at most `LONGEST_SIDE` long. Nothing is decoded before the size is known.

    Raises:
        ValueError: it is no image, too large or too narrow; the message does not name the file.
    """

    def check(image: Image.Image):
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"too large: {width} x {height} pixels, at most {max_pixels / 1e6:g} million are allowed here"
            )
        scale = min(1, LONGEST_SIDE / max(image.size))
        if round(scale * min(image.size)) < SHORTEST_SIDE:
            raise ValueError(
                f"too narrow: {width} x {height} pixels, both sides must have at least {SHORTEST_SIDE}, "
                f"after shrinking to {LONGEST_SIDE}"
            )
        image.draft(None, (LONGEST_SIDE, LONGEST_SIDE))  # a JPEG is decoded no larger than needed

    image = decode_image(path, FORMATS, check)
    if DOUBT in image.info:
        gr.Warning(image.info[DOUBT])
    photo = to_photo(image)
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return photo


def predict(model: DeGMixForMultiTaskDensePrediction, processor: ImageProcessingMixin, photo: Image.Image) -> Result:
    """All maps of a photo, as the pipeline makes them, and the attention."""
    (result,) = predict_batch(model, processor, [prepare(processor, photo)], output_attentions=True)
    return result.cpu()


def draw_marked(photo: Image.Image, row: int, column: int) -> Image.Image:
    """The photo with a ring around a pixel."""
    marked = photo.copy()
    radius = max(5, max(photo.size) // 50)
    draw = ImageDraw.Draw(marked)
    for grow, color in ((1, "black"), (0, "white"), (-1, "white"), (-2, "black")):
        r = radius + grow
        draw.ellipse((column - r, row - r, column + r, row + r), outline=color)
    return marked
