import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config
from torch.nn import functional as F

from transformers_degmix.interpretation.pictures import PADDING, draw_sampling
from transformers_degmix.tasks import IGNORE_INDEX, TASK_KINDS, label_palette
from transformers_degmix.visualization import (
    draw_confidence,
    draw_consistency,
    draw_legend,
    draw_overview,
    draw_prediction,
    panel_size,
    stack,
)
from transformers_degmix.visualization.attention import crop_attentions, mean_shares
from transformers_degmix.visualization.geometry import depth_normals_angles
from transformers_degmix.visualization.layout import PAPER
from transformers_degmix.visualization.legends import class_legend, fit_legend
from transformers_degmix.visualization.maps import HATCHING, shown_range


TASKS = small_config().tasks
SIZE = (30, 40)
PHOTO = Image.new("RGB", (40, 30), (1, 2, 3))
GAP, PANEL_WIDTH, PANEL_SIZE = 12, 200, (150, 200)


def constant(kind: str, value: float) -> torch.Tensor:
    if kind == "normals":
        return F.normalize(torch.full((3, *SIZE), float(value)), dim=0)
    return torch.full(SIZE, value, dtype=torch.int64 if kind == "segmentation" else torch.float32)


def predictions(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: constant(task["kind"], value) for name, task in TASKS.items()}


def pixels(picture: Image.Image) -> np.ndarray:
    return np.array(picture)


def colors_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, pixels(picture).reshape(-1, 3).tolist()))


def has_panel(overview: Image.Image, column: int, panel: Image.Image) -> bool:
    """Whether a panel occurs, pixel by pixel, anywhere in a column of an overview."""
    left = GAP + column * (PANEL_WIDTH + GAP)
    strip = pixels(overview)[:, left : left + PANEL_WIDTH]
    panel = pixels(panel)
    return any(np.array_equal(strip[top : top + len(panel)], panel) for top in range(len(strip) - len(panel) + 1))


def overview_of(*args, **kwargs) -> Image.Image:
    return draw_overview(PHOTO, *args, panel_width=PANEL_WIDTH, **kwargs)


@pytest.mark.parametrize("label", [0, 1, 4, 254])
def test_class_has_palette_color(label):
    picture = draw_prediction(constant("segmentation", label), TASKS["semseg"])
    assert colors_of(picture) == {tuple(label_palette(255)[label].tolist())}


@pytest.mark.parametrize(
    ("task", "value", "color"),
    [("sal", 0.0, 0), ("sal", 1.0, 255), ("edge", 0.5, 128)],
)
def test_strengths_are_gray(task, value, color):
    assert colors_of(draw_prediction(constant("saliency", value), TASKS[task])) == {(color,) * 3}


@pytest.mark.parametrize(("axis", "color"), [(0, (255, 128, 128)), (1, (128, 255, 128)), (2, (128, 128, 255))])
def test_axes_of_normals_are_red_green_blue(axis, color):
    normals = F.one_hot(torch.tensor(axis), 3).float().view(3, 1, 1).expand(3, *SIZE)
    assert colors_of(draw_prediction(normals, TASKS["normals"])) == {color}


def test_picture_has_the_shape_and_orientation_of_the_map():
    ids = torch.arange(6).view(2, 3)
    assert np.array_equal(pixels(draw_prediction(ids, TASKS["semseg"])), label_palette(6).view(2, 3, 3))


def test_black_is_for_ignored_pixels_only():
    assert (label_palette(256).sum(dim=1) == 0).nonzero().tolist() == [[IGNORE_INDEX]]


def test_first_classes_are_easy_to_tell_apart():
    palette = label_palette(20).float()
    assert torch.pdist(palette).min() > 45


@pytest.mark.parametrize(
    ("task", "unknown"), [("semseg", 255), ("sal", 255), ("depth", 0), ("depth", 255), ("normals", 0), ("edge", 255)]
)
def test_unknown_pixels_are_hatched(task, unknown):
    values = predictions()[task].clone()
    values[..., :10, :] = unknown
    picture = pixels(draw_prediction(values, TASKS[task]))
    assert set(map(tuple, picture[:10].reshape(-1, 3).tolist())) == set(HATCHING)
    assert not set(map(tuple, picture[10:].reshape(-1, 3).tolist())) & set(HATCHING)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(15, 20), (45, 60), (1, 1)])
def test_resized_picture_has_only_colors_of_the_map(task, size):
    generator = torch.Generator().manual_seed(0)
    values = predictions()[task]
    values = F.normalize(torch.rand(values.shape, generator=generator), dim=0) if values.ndim == 3 else values
    if task == "semseg":
        values = torch.randint(5, SIZE, generator=generator)
    picture = draw_prediction(values, TASKS[task], (0, 2), size)
    assert picture.size == size[::-1]
    assert colors_of(picture) <= colors_of(draw_prediction(values, TASKS[task], (0, 2)))


def test_thin_lines_survive_shrinking():
    lines = torch.zeros(90, 120)
    lines[:, 31] = 1
    lines[44] = 1
    picture = pixels(draw_prediction(lines, TASKS["edge"], size=(9, 12)))[..., 0]
    assert (picture[:, 3] == 255).all() and (picture[4] == 255).all()
    assert (picture == 255).sum() == 9 + 12 - 1


def test_unknown_boundaries_do_not_spread_when_shrunk():
    lines = torch.zeros(90, 120)
    lines[:, :7] = IGNORE_INDEX
    picture = pixels(draw_prediction(lines, TASKS["edge"], size=(9, 12)))
    assert (picture[:, 1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype):
    depth = torch.linspace(1, 4, 1200).view(SIZE)
    expected = pixels(draw_prediction(depth, TASKS["depth"], (1, 4))).astype(int)
    drawn = pixels(draw_prediction(depth.to(dtype), TASKS["depth"], (1, 4)))
    assert np.abs(drawn - expected).max() <= 3


@pytest.mark.parametrize(("task", "shape"), [("depth", (3, 4, 5)), ("normals", (4, 5)), ("normals", (1, 4, 5))])
def test_wrong_shape_is_refused(task, shape):
    with pytest.raises(ValueError, match="must have the shape"):
        draw_prediction(torch.ones(shape), TASKS[task])


def test_shown_range_leaves_out_unknown_pixels_and_outliers():
    depth = torch.linspace(2, 4, 1000).view(20, 50)
    depth[0, :5] = 0
    depth[-1, -5:] = 80
    low, high = shown_range(TASKS["depth"], depth)
    assert 2 < low < 2.1 and 3.9 < high < 4


def test_shown_range_covers_all_maps():
    low, high = shown_range(TASKS["depth"], torch.full((2, 2), 1.0), torch.full((7, 2), 5.0))
    assert 1 <= low < 1.5 and high == 5
    assert shown_range(TASKS["sal"], torch.full((2, 2), 0.3)) == (0, 1)


def test_range_and_picture_of_a_map_without_known_pixels():
    nothing = torch.zeros(SIZE)
    assert shown_range(TASKS["depth"], nothing) == (0, 1)
    assert colors_of(draw_prediction(nothing, TASKS["depth"])) == set(HATCHING)


def test_large_maps():
    low, high = shown_range(TASKS["depth"], torch.full((4100, 4100), 2.0))  # more than torch.quantile takes
    assert low == high == 2


def test_class_legend_has_only_present_classes_by_area():
    ids = torch.full(SIZE, 3)
    ids[:5] = 1
    ids[5:8] = IGNORE_INDEX
    other = torch.full(SIZE, 1)
    palette = [tuple(color) for color in label_palette(5).tolist()]
    assert class_legend(TASKS["semseg"], [ids]) == [(palette[3], "class 3"), (palette[1], "class 1")]
    assert class_legend(TASKS["semseg"], [ids, other])[0] == (palette[1], "class 1")
    assert class_legend(TASKS["human_parts"], [torch.ones(SIZE).byte()]) == [(palette[1], "1")]
    assert class_legend(TASKS["semseg"], [torch.full(SIZE, IGNORE_INDEX)]) == []


def test_names_that_the_font_cannot_show_are_spelt_otherwise_or_ids():
    task = {**TASKS["semseg"], "num_labels": 3, "id2label": {0: "Küche", 1: "床", 2: "floor"}}
    maps = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert [name for _, name in class_legend(task, [maps])] == ["Kuche", "1", "floor"]


def test_legend_wraps_and_counts_what_is_left_over():
    assert fit_legend([40, 40, 40], 100, 4, 30) == [2, 1]
    assert fit_legend([50, 50], 100, 1, 30) == [2]
    assert fit_legend([40] * 9, 100, 2, 30) == [2, 1]  # a fourth entry would leave no place for "+n more"
    assert fit_legend([400, 40], 100, 2, 30) == [1, 1]
    assert fit_legend([], 100, 2, 30) == []
    # "+n more" on a line of its own
    assert fit_legend([100] * 5, 100, 3, 30) == [1, 1, 0]


def test_overview_shows_every_task_and_the_classes_present():
    overview = overview_of(predictions(), TASKS)
    assert overview.width == 8 * (PANEL_WIDTH + GAP) + GAP
    assert has_panel(overview, 0, PHOTO.resize(PANEL_SIZE[::-1]))
    for column, (name, task) in enumerate(TASKS.items(), start=1):
        assert has_panel(overview, column, draw_prediction(predictions()[name], task, size=PANEL_SIZE))
    absent = {tuple(color) for color in label_palette(5)[[0, 2, 3, 4]].tolist()}
    assert not absent & colors_of(overview)


def test_narrow_overviews():
    attentions, confidences = torch.full((6, 2, 6, 4, 5), 1 / 6), dict.fromkeys(TASKS, torch.ones(SIZE))
    picture = draw_overview(PHOTO, predictions(), TASKS, attentions, confidences=confidences, panel_width=60)
    assert picture.width == 8 * (60 + GAP) + GAP


def test_overview_draws_references_with_the_predictions_colors():
    maps, references = predictions(), {"depth": torch.full(SIZE, 3.0)}
    maps["depth"] = torch.linspace(1, 9, 1200).view(SIZE)
    references["depth"][:4] = 0
    overview = overview_of(maps, TASKS, references=references)
    shared = shown_range(TASKS["depth"], maps["depth"], references["depth"])
    for values in (maps["depth"], references["depth"]):
        assert has_panel(overview, 4, draw_prediction(values, TASKS["depth"], shared, PANEL_SIZE))
    assert overview.height > overview_of(maps, TASKS).height + PANEL_SIZE[0]


def test_overview_of_some_tasks():
    assert overview_of(predictions(), {"sal": TASKS["sal"]}).width == 2 * (PANEL_WIDTH + GAP) + GAP


def test_overview_shows_where_depth_and_normals_disagree():
    """By kind, whatever the names; without one of the two there is no panel."""
    tasks = {name: {"kind": kind} for name, kind in (("range", "depth"), ("up", "normals"), ("near", "depth"))}
    normals = torch.tensor([0.0, 0.6, 0.8]).view(3, 1, 1).repeat(1, *SIZE)
    maps = {"range": torch.full(SIZE, 2.0), "up": normals, "near": torch.zeros(SIZE)}
    maps["range"][:10] = 0  # unknown, and the normals there with it
    angles = torch.full(SIZE, 36.87)
    angles[:10] = torch.nan
    overview = overview_of(maps, tasks)
    assert has_panel(overview, 4, draw_consistency(angles, PANEL_SIZE))
    maps["range"] = torch.linspace(1, 2, SIZE[0])[:, None].expand(SIZE)
    angles = depth_normals_angles(maps, tasks, 100)
    assert has_panel(overview_of(maps, tasks, field_of_view=100), 4, draw_consistency(angles, PANEL_SIZE))
    assert overview_of(maps, {"up": tasks["up"]}).width == 2 * (PANEL_WIDTH + GAP) + GAP


def test_consistency_has_colors_for_angles_and_hatches_unknown_ones():
    angles = torch.tensor([[0.0, 60.0, 90.0, torch.nan]])
    picture = pixels(draw_consistency(angles))[0].tolist()
    assert picture[:3] == [[68, 1, 84], [253, 231, 37], [253, 231, 37]] and tuple(picture[3]) in HATCHING


def test_overview_shows_confidences():
    confidences = {"semseg": torch.full(SIZE, 0.25), "depth": torch.linspace(0.1, 0.2, 1200).view(SIZE)}
    plain = overview_of(predictions(), TASKS)
    overview = overview_of(predictions(), TASKS, confidences=confidences)
    assert overview.width == plain.width and overview.height > plain.height + PANEL_SIZE[0]
    for column, name in ((1, "semseg"), (4, "depth")):
        panel = draw_confidence(confidences[name], TASKS[name], PANEL_SIZE)
        assert has_panel(overview, column, panel) and not has_panel(plain, column, panel)
    # A probability has the colour of its value, what only orders pixels all colours.
    assert colors_of(draw_confidence(confidences["semseg"], TASKS["semseg"])) == {(59, 82, 139)}
    assert {(68, 1, 84), (253, 231, 37)} <= colors_of(draw_confidence(confidences["depth"], TASKS["depth"]))


@pytest.mark.parametrize(
    ("size", "panel"), [((1000, 500), (200, 100)), ((100, 400), (67, 267)), ((7, 2000), (1, 267))]
)
def test_panels_keep_the_aspect_ratio(size, panel):
    """`size` and `panel` are (width, height)."""
    tasks = {"sal": TASKS["sal"]}
    overview = draw_overview(
        Image.new("RGB", size, (9, 0, 0)), {"sal": torch.ones(size[::-1])}, tasks, panel_width=200
    )
    rows, columns = np.nonzero((pixels(overview) == (9, 0, 0)).all(axis=-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == panel
    assert overview.width == 2 * (200 + GAP) + GAP


def attentions(num_heads: int = 2) -> torch.Tensor:
    """Every task takes 3/4 from the next and 1/4 from itself."""
    num_tasks = len(TASKS)
    weights = 0.25 * torch.eye(num_tasks) + 0.75 * torch.eye(num_tasks).roll(1, dims=1)
    return weights[:, None, :, None, None].expand(num_tasks, num_heads, num_tasks, 8, 10)


def test_attention_has_the_color_of_the_task_that_leads():
    colors = label_palette(len(TASKS) + 1)[1:].float()
    mixed = (colors + 81 * colors.roll(-1, dims=0)) / 82  # 1 : 3, to the power of four
    overview = overview_of(predictions(), TASKS, attentions())
    for column, color in enumerate(mixed.round().to(torch.uint8).tolist(), start=1):
        assert has_panel(overview, column, Image.new("RGB", PANEL_SIZE[::-1], tuple(color)))


def test_bars_are_as_long_as_shares():
    overview = pixels(overview_of(predictions(0.0), TASKS, attentions()))
    bars = overview[-6 * 20 :, GAP + PANEL_WIDTH + GAP :][:, :PANEL_WIDTH]
    lengths = [(bars == color.numpy()).all(axis=-1).sum(axis=1).max() for color in label_palette(7)[1:]]
    assert lengths[1] == pytest.approx(3 * lengths[0], abs=2) and lengths[0] > 10 and not any(lengths[2:])


def test_all_heads_count_alike():
    one_sided = torch.cat([attentions(1), attentions(1).roll(1, dims=2)], dim=1)
    assert mean_shares(one_sided)[0, :3].tolist() == [0.125, 0.5, 0.375]


def test_mean_shares():
    weights = torch.rand(3, 2, 3, 5, 7).softmax(dim=2)
    shares = mean_shares(weights)
    assert torch.allclose(shares.sum(dim=1), torch.ones(3))
    assert torch.allclose(shares[1, 2], weights[1, :, 2].mean())


def test_crop_attentions_keeps_the_middle():
    maps = torch.arange(8.0).expand(6, 8)
    assert crop_attentions(maps, (24, 32), (24, 16)).tolist() == [[2.0, 3.0, 4.0, 5.0]] * 6
    assert torch.equal(crop_attentions(maps, (24, 32), (24, 32)), maps)
    assert crop_attentions(maps, (24, 32), (1, 1)).shape == (1, 1)


@pytest.mark.parametrize("shape", [(6, 6, 4, 4), (5, 2, 6, 4, 4), (6, 2, 5, 4, 4)])
def test_attention_of_other_tasks_is_refused(shape):
    with pytest.raises(ValueError, match="attentions"):
        overview_of(predictions(), TASKS, torch.ones(shape))


def test_long_and_many_class_names_stay_in_their_column():
    names = dict.fromkeys(range(60), "a very long name of a class " * 3)
    tasks = {"semseg": {"kind": "segmentation", "num_labels": 60, "id2label": names}}
    ids = torch.arange(1200).view(SIZE) % 60
    overview = overview_of({"semseg": ids}, tasks)
    assert overview.width == 2 * (PANEL_WIDTH + GAP) + GAP
    assert (pixels(overview)[:, -GAP:] == PAPER).all()


def test_stack():
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (30, 10), (0, 0, 255))
    stacked = stack([first, second])
    assert stacked.size == (30, 20 + GAP)
    assert stacked.getpixel((0, 0)) == (255, 0, 0) and stacked.getpixel((29, stacked.height - 1)) == (0, 0, 255)
    assert stacked.getpixel((29, 0)) == PAPER


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_every_kind_has_a_legend(kind):
    name = next(name for name, task in TASKS.items() if task["kind"] == kind)
    overview = overview_of({name: predictions()[name]}, {name: TASKS[name]})
    photo_bottom = np.nonzero((pixels(overview) == (1, 2, 3)).all(axis=-1))[0].max()
    assert (pixels(overview)[photo_bottom + GAP :, PANEL_WIDTH + 2 * GAP :] != 255).any()


def test_map_without_any_class():
    nothing = torch.full(SIZE, IGNORE_INDEX)
    overview = overview_of({"semseg": nothing}, {"semseg": TASKS["semseg"]})
    assert set(HATCHING) <= colors_of(overview)


def test_sampling_points_are_on_the_photo_each_half_of_the_channels_in_its_row():
    # A black photo of 40 x 30 in the middle of 60 x 60, in panels of 60 x 60
    names, area = ["depth", "edge"], (-10.0, -15.0, 50.0, 45.0)
    points = torch.full((2, 1, 4, 2), 1000.0)
    points[0, 0, 0], points[1, 0, 3] = torch.tensor([5.5, 5.5]), torch.tensor([-4.5, 25.5])
    outside = points[..., 0] > 100
    photo, chosen = Image.new("RGB", (40, 30)), torch.tensor([[30.5, 15.5]])
    picture = pixels(draw_sampling(photo, area, chosen, points, outside, names, "layer 1", 60))
    left = [GAP + column * (60 + GAP) for column in (1, 2)]
    tops = [row for row in range(1, len(picture)) if (picture[row, left[0]] == PADDING).all()]
    first, second = tops[0], tops[60]
    assert second - first > 60 and len(tops) == 120

    def yellow(column: int, top: int, x: float, y: float) -> bool:
        """Whether there is a dot at a position of the photo."""
        red, green, blue = map(int, picture[int(top + y + 15), int(left[column] + x + 10)])
        return min(red, green) > blue + 80

    assert yellow(0, first, 5.5, 5.5) and not yellow(1, first, 5.5, 5.5) and not yellow(0, second, 5.5, 5.5)
    assert yellow(1, second, -4.5, 25.5) and not yellow(1, first, -4.5, 25.5)
    # rings
    assert all(yellow(column, top, 30.5, 15.5 - 8) for column in (0, 1) for top in (first, second))


def test_overviews_with_common_legends_have_one_size_and_the_same_colours():
    tasks = {"depth": {"kind": "depth"}, "semseg": {"kind": "segmentation", "num_labels": 40}}
    near = {"depth": torch.full((30, 40), 1.0), "semseg": torch.zeros(30, 40, dtype=torch.long)}
    far = {"depth": torch.linspace(1, 9, 40).expand(30, -1), "semseg": torch.arange(40).expand(30, -1)}
    photo = Image.new("RGB", (40, 30))
    legends = {name: draw_legend(task, [near[name], far[name]]) for name, task in tasks.items()}
    frames = [np.array(draw_overview(photo, maps, tasks, legends=legends)) for maps in (near, far)]
    alone = [np.array(draw_overview(photo, maps, tasks)) for maps in (near, far)]
    assert frames[0].shape == frames[1].shape and alone[0].shape != alone[1].shape
    bottom = 12 + panel_size((30, 40))[0] + 40  # below the panels are the legends
    assert (frames[0][bottom:] == frames[1][bottom:]).all()
    row, column = 12 + 100, 12 + 300 + 12  # the first column of the depth: one metre in both
    assert (frames[0][row, column] == frames[1][row, column]).all()
