"""A page on which a model is tried out: a photo in; all tasks, the depth as a surface, attention and arrays out.

The functions that compute and draw come first, [`build_demo`] puts them on the page. Needs the extra `demo`.
"""

import html
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
import trimesh
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from ..image_processing_pil_degmix import DOUBT, decode_image, to_pixels
from ..inference.predictor import Result, predict_batch, prepare
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..tasks import TASK_KINDS
from ..visualization import draw_overview, draw_prediction
from ..visualization.attention import mean_shares
from ..visualization.geometry import FIELD_OF_VIEW, first_of_kind, viewing_rays
from ..visualization.legends import class_legend
from ..visualization.maps import ValueRange, shown_range


# Pillow decodes more, with less used code (and with Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")
# The photos of phones have 12 to 24 million.
MAX_PIXELS = 25_000_000
MAX_PHOTOS = 8
# People who wait for their turn; one photo is predicted at a time.
MAX_WAITING = 16
# Larger photos are shrunk, as the published models are trained with images of at most 560 pixels.
LONGEST_SIDE = 640
SHORTEST_SIDE = 32

# Vertices of the surface along its longer side
SURFACE_SIDE = 200
# Neighbours of which one is this much further away lie on different objects.
DEPTH_JUMP = 1.1

MAX_LEGEND_CLASSES = 8
# As `TaskKind.legend` of normals draws them: x to the right, y down, z towards the camera
DIRECTIONS = {"left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0), "facing us": (0, 0, 1)}

CSS = """
.panels {display: grid !important; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(max(150px, 23%), 1fr))}
.panels > * {min-width: 0 !important}
.legend {display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 13px}
.legend span {white-space: nowrap}
.swatch {display: inline-block; width: 12px; height: 12px; margin-right: 5px; border-radius: 2px}
.scale {flex: 1; height: 12px; margin-top: 4px; border-radius: 2px}
.readings div {display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 14px}
.shares table {border: none}
.shares tr {border: none !important}
.shares td, .shares th {padding: 3px 8px; border: none !important; text-align: right; font-size: 14px}
@media (max-width: 640px) {
    .readings {
        position: fixed !important; bottom: 0; left: 0; z-index: 5; width: 100%; padding: 8px 16px;
        background: var(--background-fill-primary); border-top: 1px solid var(--border-color-primary);
    }
    .panels {padding-bottom: 110px}
    .shares table {table-layout: fixed; width: 100%}
    .shares td, .shares th {padding: 3px; font-size: 11px; white-space: normal; overflow-wrap: anywhere}
}
"""
# For `Blocks.launch`, which takes the styles too.
LAUNCH_OPTIONS = {
    "css": CSS,
    # The 3-D view tries WebGPU first, and reports an error where there is none. WebGL does.
    "head": "<script>delete Navigator.prototype.gpu</script>",
    "max_file_size": "50mb",
    "share": False,
    "ssr_mode": False,
    "run_history": False,
    "footer_links": ["api"],
}


def read_photo(path: str | PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file -> RGB image, upright, at most `LONGEST_SIDE` long. Nothing is decoded before the size is known.

    Raises:
        ValueError: it is no image, or one of too many pixels, or too narrow; the message does not name the file.
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
        image.draft(None, (LONGEST_SIDE, LONGEST_SIDE))  # of a JPEG, no more is decoded than needed

    image = decode_image(path, FORMATS, check)
    if DOUBT in image.info:
        gr.Warning(image.info[DOUBT])
    pixels = to_pixels(image, do_convert_rgb=True)
    photo = Image.fromarray(np.moveaxis(pixels, 0, -1).round().clip(0, 255).astype(np.uint8))
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return photo


def predict(model: DeGMixForMultiTaskDensePrediction, processor: ImageProcessingMixin, photo: Image.Image) -> Result:
    """All maps of a photo, as the pipeline makes them, and the attention."""
    (result,) = predict_batch(model, processor, [prepare(processor, photo)], output_attentions=True)
    return result.cpu()


def depth_surface(depth: Tensor, picture: Image.Image) -> trimesh.Trimesh | None:
    """The surface that a depth map shows, with a picture on it.

    The camera is assumed to have a field of view of `FIELD_OF_VIEW` degrees across the image's longer side. The
    surface is torn where one of two neighbours is `DEPTH_JUMP` times as far away, and where depth is unknown.

    Args:
        depth: metres along the optical axis, `(height, width)`.
        picture: of the same aspect ratio.

    Returns:
        In metres, with the axes of glTF: x to the right, y up, z towards the camera, which is at the origin. `None`
        if there is no surface.
    """
    height, width = depth.shape
    step = -(-max(height, width) // SURFACE_SIDE)
    rows, columns = np.meshgrid(np.arange(0, height, step), np.arange(0, width, step), indexing="ij")
    z = depth.numpy()[rows, columns]
    x, y = viewing_rays((height, width)).numpy()[:, rows, columns] * z

    index = np.arange(z.size).reshape(z.shape)
    corners = np.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], axis=-1).reshape(-1, 4)
    nearest, farthest = z.flat[corners].min(axis=1), z.flat[corners].max(axis=1)
    corners = corners[(nearest > 0) & (farthest < DEPTH_JUMP * nearest)]
    if not len(corners):
        return None
    texture = np.stack([(columns + 0.5) / width, 1 - (rows + 0.5) / height], axis=-1)
    # It shines by itself, so that no light changes the picture's colours.
    material = PBRMaterial(
        baseColorFactor=(0, 0, 0, 255),
        emissiveTexture=picture,
        emissiveFactor=(1, 1, 1),
        metallicFactor=0,
        roughnessFactor=1,
        doubleSided=True,
    )
    surface = trimesh.Trimesh(
        vertices=np.stack([x, -y, -z], axis=-1).reshape(-1, 3),
        faces=np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]]),
        visual=TextureVisuals(uv=texture.reshape(-1, 2), material=material),
        process=False,
    )
    surface.remove_unreferenced_vertices()
    return surface


# Legends and readings, as HTML


def _css(color: Sequence[int]) -> str:
    return f"rgb({', '.join(map(str, color))})"


def _entry(color: Sequence[int], text: str) -> str:
    return f'<span><i class="swatch" style="background: {_css(color)}"></i>{html.escape(text)}</span>'


def _color(value: Tensor, task: dict[str, Any], value_range: ValueRange) -> list[int]:
    """Of one pixel: `()` or `(3,)`."""
    return TASK_KINDS[task["kind"]].colorize(value[..., None, None], value_range).flatten().tolist()


def _class_legend(task: dict[str, Any], prediction: Tensor) -> str:
    classes = class_legend(task, [prediction])
    more = len(classes) - MAX_LEGEND_CLASSES
    entries = [_entry(*entry) for entry in classes[:MAX_LEGEND_CLASSES]]
    return "".join([*entries, f"<span>+{more} more</span>"] if more > 0 else entries)


def _scale_legend(task: dict[str, Any], prediction: Tensor) -> str:
    low, high = shown_range(task, prediction)
    colors = ", ".join(_css(_color(value, task, (low, high))) for value in torch.linspace(low, high, 9))
    unit = TASK_KINDS[task["kind"]].unit
    return (
        f"<span>{low:.3g} {unit}</span>"
        f'<i class="scale" style="background: linear-gradient(to right, {colors})"></i>'
        f"<span>{high:.3g} {unit}</span>"
    )


def _direction_legend(task: dict[str, Any], prediction: Tensor) -> str:
    value_range = shown_range(task, prediction)
    return "".join(
        _entry(_color(torch.tensor(vector), task, value_range), name) for name, vector in DIRECTIONS.items()
    )


LEGENDS = {"classes": _class_legend, "scale": _scale_legend, "directions": _direction_legend}


def draw_legend(task: dict[str, Any], prediction: Tensor) -> str:
    """What the colours of a map mean."""
    return f'<div class="legend">{LEGENDS[TASK_KINDS[task["kind"]].legend](task, prediction)}</div>'


def _read_class(task: dict[str, Any], value: Tensor) -> str:
    return (task.get("id2label") or {}).get(int(value), f"class {int(value)}")


def _read_scale(task: dict[str, Any], value: Tensor) -> str:
    return f"{float(value):.2f} {TASK_KINDS[task['kind']].unit}".rstrip()


def _read_direction(_, value: Tensor) -> str:
    """The nearest of the named directions, and the vector."""
    names, vectors = list(DIRECTIONS), torch.tensor(list(DIRECTIONS.values())).float()
    x, y, z = value.tolist()
    return f"{names[(vectors @ value.float()).argmax()]} ({x:.2f}, {y:.2f}, {z:.2f})"


READINGS = {"classes": _read_class, "scale": _read_scale, "directions": _read_direction}


def read_point(predictions: dict[str, Tensor], tasks: dict[str, dict], row: int, column: int) -> dict[str, str]:
    """What every task says about one pixel: task -> class, value with its unit, or direction."""
    readings = {}
    for name, task in tasks.items():
        kind, value = TASK_KINDS[task["kind"]], predictions[name][..., row, column]
        is_unknown = bool(kind.unknown(value[..., None, None]).any())
        readings[name] = "unknown" if is_unknown else READINGS[kind.legend](task, value)
    return readings


def draw_readings(predictions: dict[str, Tensor], tasks: dict[str, dict], row: int, column: int) -> str:
    """[`read_point`], each in the colour that it has on its map."""
    entries = []
    for name, text in read_point(predictions, tasks, row, column).items():
        color = _color(predictions[name][..., row, column], tasks[name], shown_range(tasks[name], predictions[name]))
        entries.append(_entry(color, f"{name}: {text}"))
    return f"<div><b>row {row}, column {column}</b>{''.join(entries)}</div>"


def draw_shares(attentions: Tensor, tasks: Sequence[str]) -> str:
    """A table: how much of its attention each task (row) pays to each (column)."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in tasks)
    rows = []
    for task, shares in zip(tasks, mean_shares(attentions).tolist()):
        cells = "".join(
            f'<td style="background: rgba(59, 130, 246, {share:.2f})">{share:.0%}</td>' for share in shares
        )
        rows.append(f"<tr><th>{html.escape(task)}</th>{cells}</tr>")
    return f'<div class="shares"><table><tr><th>takes from</th>{head}</tr>{"".join(rows)}</table></div>'


def draw_attentions(result: Result, tasks: Sequence[str], task: str) -> list[Image.Image]:
    """How much one task takes from each, and where: from black, its smallest share anywhere, to white, its largest."""
    shares = result.attentions[list(tasks).index(task)].float().cpu().mean(dim=0)
    value_range = float(shares.min()), float(shares.max())
    size = result.photo.height, result.photo.width
    return [draw_prediction(values, {"kind": "saliency"}, value_range, size) for values in shares]


def draw_marked(photo: Image.Image, row: int, column: int) -> Image.Image:
    """The photo with a ring around a pixel."""
    marked = photo.copy()
    radius = max(5, max(photo.size) // 50)
    draw = ImageDraw.Draw(marked)
    for grow, color in ((1, "black"), (0, "white"), (-1, "white"), (-2, "black")):
        r = radius + grow
        draw.ellipse((column - r, row - r, column + r, row + r), outline=color)
    return marked


# The page

HINT = "Click on a picture to read the values of all tasks at that point."


def _panel(label: str) -> gr.Image:
    return gr.Image(label=label, format="png", interactive=False, buttons=["fullscreen"])


def build_demo(
    model: DeGMixForMultiTaskDensePrediction,
    processor: ImageProcessingMixin,
    examples: Sequence[Image.Image] = (),
    max_pixels: int = MAX_PIXELS,
) -> gr.Blocks:
    """The page, to be started by `.launch(**LAUNCH_OPTIONS)`.

    Photos are predicted one at a time, `MAX_WAITING` wait at most. What was uploaded or made is deleted after an hour.
    The panels follow from the model's tasks: the surface needs one of kind depth (the first counts), the attention a
    decoder.

    Args:
        model, processor: of one model, as `hub.model_directory.load_model_directory` gives them.
        examples: photos offered on the page.
        max_pixels: photos of more are refused.
    """
    tasks = model.config.tasks
    names = list(tasks)
    depth_task = first_of_kind(tasks, "depth")

    def picture(result: Result, name: str) -> Image.Image:
        return draw_prediction(result.predictions[name], tasks[name]) if name in tasks else result.photo

    def check_photo(path: str, prefix: str = "") -> Image.Image:
        try:
            return read_photo(path, max_pixels)
        except ValueError as error:
            raise gr.Error(prefix + str(error), print_exception=False) from error

    def show_photo(path: str | None, task_compared: str, task_looking: str) -> dict[gr.blocks.Block, Any]:
        if path is None:
            return {state: None, results: gr.Column(visible=False)}
        result = predict(model, processor, check_photo(path))
        shown = {
            state: result,
            results: gr.Column(visible=True),
            note: f"Predicted at {result.photo.width} x {result.photo.height} pixels.",
            readings: HINT,
            photo_panel: result.photo,
            slider: (result.photo, picture(result, task_compared)),
            surface: None,  # Filled when it is looked at: a Model3D with a value may stay empty when its tab opens.
            files: save_files(result, Path(path).stem),
            tabs: gr.Tabs(selected="tasks"),
        }
        for name, (panel, legend) in panels.items():
            shown[panel] = picture(result, name)
            shown[legend] = draw_legend(tasks[name], result.predictions[name])
        if result.attentions is not None:
            shown[shares] = draw_shares(result.attentions, names)
            shown |= zip(maps, draw_attentions(result, names, task_looking))
        return shown

    def save_files(result: Result, stem: str) -> list[str]:
        arrays, overview = BytesIO(), BytesIO()
        np.savez_compressed(arrays, **{name: values.numpy() for name, values in result.predictions.items()})
        draw_overview(result.photo, result.predictions, tasks, result.attentions).save(overview, "PNG")
        return [
            save_bytes_to_cache(file.getvalue(), f"{stem}.{ending}", demo.GRADIO_CACHE)
            for file, ending in ((arrays, "npz"), (overview, "overview.png"))
        ]

    def save_surface(result: Result, coloring: str) -> str | None:
        mesh = depth_surface(result.predictions[depth_task], picture(result, coloring))
        return mesh and save_bytes_to_cache(mesh.export(file_type="glb"), "surface.glb", demo.GRADIO_CACHE)

    def read_clicked(result: Result, event: gr.SelectData) -> tuple[str, Image.Image]:
        column, row = (min(max(int(at), 0), length - 1) for at, length in zip(event.index, result.photo.size))
        return draw_readings(result.predictions, tasks, row, column), draw_marked(result.photo, row, column)

    def add_photos(paths: list[str]) -> list[Image.Image]:
        if len(paths) > MAX_PHOTOS:
            raise gr.Error(f"{len(paths)} files at once, at most {MAX_PHOTOS} are allowed", print_exception=False)
        return [check_photo(path, f"{html.escape(Path(path).name)}: ") for path in paths]

    def choose_photo(offered: list[tuple[str, str | None]], event: gr.SelectData) -> str:
        return offered[event.index][0]

    with gr.Blocks(title="DeGMix", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.Markdown(f"# DeGMix\nOne photo, one forward pass: {', '.join(names)}.")
        state = gr.State(time_to_live=3600)
        with gr.Row():
            photo = gr.Image(
                label="Photo", sources=["upload", "webcam", "clipboard"], type="filepath", height=320, scale=2
            )
            # Gradio's own opens the file, without limits, before any check.
            photo.preprocess = lambda payload: payload and payload.path
            with gr.Column(min_width=240):
                gr.Markdown("or choose one")
                gallery = gr.Gallery(
                    list(examples),
                    show_label=False,
                    format="png",
                    columns=3,
                    height=225,
                    buttons=[],
                    allow_preview=False,
                    interactive=False,
                )
                several = gr.UploadButton(
                    f"Upload several (up to {MAX_PHOTOS})", file_count="multiple", file_types=["image"], size="sm"
                )
        with gr.Column(visible=False) as results:
            with gr.Tabs() as tabs:
                with gr.Tab("All tasks", id="tasks"):
                    note = gr.Markdown()
                    readings = gr.HTML(HINT, elem_classes="readings")
                    with gr.Row(elem_classes="panels"):
                        with gr.Column():
                            photo_panel = _panel("photo")
                        panels = {}
                        for name in names:
                            with gr.Column():
                                panels[name] = _panel(name), gr.HTML()
                with gr.Tab("Compare"):
                    compared = gr.Radio(names, value=names[0], label="Prediction")
                    slider = gr.ImageSlider(label="photo | prediction", format="png", interactive=False)
                with gr.Tab("3-D", visible=depth_task is not None) as surface_tab:
                    colored_by = gr.Radio(["photo", *names], value="photo", label="Colours")
                    surface = gr.Model3D(label=depth_task, height=460, interactive=False)
                    gr.Markdown(
                        f"The camera is unknown: a field of view of {FIELD_OF_VIEW:g} degrees is assumed. "
                        "Drag to turn."
                    )
                with gr.Tab("Attention", visible=model.config.use_decoder):
                    gr.Markdown("How much each task (row) takes from the features of each task (column).")
                    shares = gr.HTML()
                    looking = gr.Radio(names, value=names[0], label="Where does this task take (white: most)")
                    with gr.Row(elem_classes="panels"):
                        maps = [_panel(f"from {name}") for name in names]
                with gr.Tab("Files"):
                    files = gr.File(
                        label="Arrays of all tasks (NumPy), and a picture of everything",
                        file_count="multiple",
                        interactive=False,
                    )

        legends = [component for panel in panels.values() for component in panel]
        outputs = [state, results, note, readings, photo_panel, *legends, slider, surface, shares, *maps, files, tabs]
        shown = photo.change(show_photo, [photo, compared, looking], outputs, api_name="predict")
        # What was refused does not stay, nor do the results of the photo before it.
        shown.failure(lambda: None, None, photo, api_visibility="private")
        several.upload(add_photos, several, gallery, api_name="add_photos")
        gallery.select(choose_photo, gallery, photo, api_visibility="private")
        for panel in (photo_panel, *(panel for panel, _ in panels.values())):
            panel.select(read_clicked, state, [readings, photo_panel], api_visibility="private")
        compared.input(
            lambda result, name: (result.photo, picture(result, name)),
            [state, compared],
            slider,
            api_visibility="private",
        )
        gr.on(
            [surface_tab.select, colored_by.input],
            save_surface,
            [state, colored_by],
            surface,
            api_visibility="private",
        )
        looking.input(
            lambda result, name: draw_attentions(result, names, name), [state, looking], maps, api_visibility="private"
        )
    return demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


__all__ = ["LAUNCH_OPTIONS", "build_demo", "depth_surface", "predict", "read_photo", "read_point"]
