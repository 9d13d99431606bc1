import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.ndimage import map_coordinates
from small_models import ALL_KINDS, small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.mapping import map_columns
from transformers_degmix.interpretation.attention import (
    describe_affinity,
    describe_sampling,
    find_sampling_points,
    inspect_images,
)
from transformers_degmix.interpretation.pictures import draw_affinity
from transformers_degmix.layers_degmix import pad_centred


TASKS = {name: ALL_KINDS[name] for name in ("semseg", "depth", "edge")}
# Images in the middle of inputs of 64 x 96, and what they cover of the maps of 16 x 24
SIZES = [(48, 64), (64, 96), (32, 80)]
COVERED = [(slice(2, 14), slice(4, 20)), (slice(0, 16), slice(0, 24)), (slice(4, 12), slice(2, 22))]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor_of(model, **settings) -> DeGMixImageProcessorPil:
    return DeGMixImageProcessorPil(tasks=model.config.tasks, **settings)


def model_with_offsets(offsets: torch.Tensor, **fields):
    """A model whose mixers sample channel c at `offsets[c]`, (rows, columns) away from each pixel."""
    model = small_model(tasks=TASKS, **fields)
    with torch.no_grad():
        for mixers in model.model.mixers.values():
            for mixer in mixers:
                mixer.spatial_mixing.channel_offsets.weight.zero_()
                mixer.spatial_mixing.channel_offsets.bias.copy_(offsets.flip(1).flatten())
    return model


@pytest.fixture(scope="module")
def inspected():
    """A model, the images of a data set as the model takes them, and what was seen in them."""
    model = small_model(tasks=TASKS)
    processor = processor_of(model, pad_size={"height": 64, "width": 96})
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    batch = processor(images, return_tensors="pt")["pixel_values"]
    return model, batch, inspect_images(model, processor, map_columns(Dataset.from_dict({"image": images}), {}))


def test_shares_are_means_over_the_pixels_of_the_images_without_padding(inspected):
    model, batch, inspection = inspected
    with torch.no_grad():
        attentions = model(batch, output_attentions=True).attentions[0].numpy()
    for index, (rows, columns) in enumerate(COVERED):
        inside = attentions[index][..., rows, columns]
        padded = attentions[index].mean(axis=(3, 4)).swapaxes(0, 1)
        for head in range(2):
            for query in range(3):
                expected = inside[query, head].reshape(3, -1).mean(axis=1)
                np.testing.assert_allclose(inspection.shares[index, head, query], expected, atol=1e-5)
        if index != 1:
            assert np.abs(padded - inspection.shares[index].numpy()).max() > 1e-3
    np.testing.assert_allclose(inspection.shares.sum(dim=-1), 1, atol=1e-6)
    assert inspection.shares.std() > 0.01


def test_affinity_has_means_and_deviations(inspected):
    shares = inspected[2].shares
    affinity = describe_affinity(shares, list(TASKS))
    means = shares.numpy().mean(axis=1)
    np.testing.assert_allclose(affinity["mean"], means.mean(axis=0))
    np.testing.assert_allclose(affinity["std"], means.std(axis=0, ddof=1))
    np.testing.assert_allclose(affinity["heads"][1]["mean"], shares[:, 1].numpy().mean(axis=0))
    np.testing.assert_allclose(affinity["heads"][1]["std"], shares[:, 1].numpy().std(axis=0, ddof=1))
    assert (affinity["tasks"], affinity["num_images"], affinity["uniform"]) == (list(TASKS), 3, 1 / 3)
    assert describe_affinity(shares[:1], list(TASKS))["std"] is None


def test_plot_shows_the_numbers_of_all_heads(inspected):
    affinity = describe_affinity(inspected[2].shares, list(TASKS))
    axes = draw_affinity(affinity).axes
    assert [a.get_title() for a in axes[:3]] == ["mean over the heads", "head 1", "head 2"]
    texts = [text.get_text() for text in axes[2].texts]
    head = affinity["heads"][1]
    assert texts[2] == f"{head['mean'][0][1]:.2f}" and texts[3] == f"± {head['std'][0][1]:.2f}"
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(TASKS)
    single = draw_affinity(describe_affinity(inspected[2].shares[:1, :1], list(TASKS)))
    assert len(single.axes) == 2 and not any("±" in text.get_text() for text in single.axes[0].texts)


def test_distances_and_points_outside():
    offsets = torch.zeros(16, 2)
    offsets[5:14], offsets[14:] = torch.tensor([3, 4]), torch.tensor([0, -12])
    model = model_with_offsets(offsets)
    processor = processor_of(model, pad_size={"height": 64, "width": 96})
    data = map_columns(Dataset.from_dict({"image": [photo(*SIZES[0])]}), {})
    inspection = inspect_images(model, processor, data)
    assert inspection.distances.shape == (1, 2, 3, 2) and inspection.outside.shape == (1, 2, 3)
    rows, columns = (range(24)[covered] for covered in COVERED[0])
    outside = sum(
        not (0 <= row + down < 16 and 0 <= column + right < 24)
        for row in rows
        for column in columns
        for down, right in offsets.tolist()
    )
    expected = {
        "median_distance": pytest.approx(5, abs=1e-4),
        "distance_90th_percentile": pytest.approx(12, abs=1e-4),
        "outside": pytest.approx(outside / (len(rows) * len(columns) * 16)),
    }
    assert outside > 0 and describe_sampling(inspection, list(TASKS)) == [dict.fromkeys(TASKS, expected)] * 2


def test_points_without_offsets_are_the_pixels_themselves():
    model = model_with_offsets(torch.zeros(16, 2))
    found = find_sampling_points(model, processor_of(model), photo(64, 96), [(0, 0), (50, 33), (95, 63)])
    centres = torch.tensor([[2.0, 2], [50, 34], [94, 62]])
    np.testing.assert_allclose(found.pixels, centres, atol=1e-4)
    np.testing.assert_allclose(found.points, centres[None, None, :, None].expand(2, 3, -1, 16, -1), atol=1e-4)
    assert not found.outside.any() and found.area == pytest.approx((0, 0, 96, 64))


def test_offsets_of_pixels_of_the_map_in_pixels_of_a_resized_and_padded_photo():
    offsets = torch.zeros(16, 2)
    offsets[1], offsets[15] = torch.tensor([2, -3]), torch.tensor([0, 10])
    model = model_with_offsets(offsets)
    processor = processor_of(
        model, do_resize=True, size={"height": 64, "width": 96}, pad_size={"height": 96, "width": 128}
    )
    # Twice as wide and thrice as high as in the middle of 96 x 128, of which a pixel of the map covers 4 x 4
    found = find_sampling_points(model, processor, photo(192, 192), [(100, 20)])
    assert found.area == pytest.approx((-32, -48, 224, 240))
    np.testing.assert_allclose(found.pixels, [[100, 18]], atol=1e-4)
    np.testing.assert_allclose(found.points[:, :, 0, 0], np.full((2, 3, 2), [100, 18]), atol=1e-3)
    np.testing.assert_allclose(found.points[:, :, 0, 1], np.full((2, 3, 2), [100 - 3 * 8, 18 + 2 * 12]), atol=1e-3)
    np.testing.assert_allclose(found.points[:, :, 0, 15], np.full((2, 3, 2), [100 + 10 * 8, 18]), atol=1e-3)
    assert not found.outside.any()
    found = find_sampling_points(model, processor, photo(192, 192), [(160, 20)])
    np.testing.assert_array_equal(found.outside.sum(dim=(0, 1, 2)), [0] * 15 + [6])


def test_the_processor_pads_and_then_the_model():
    model = model_with_offsets(torch.zeros(16, 2), size_divisor=32)
    processor = processor_of(model, pad_size={"height": 45, "width": 45})
    white = processor_of(model, pad_size={"height": 45, "width": 45}, do_normalize=False)
    image = Image.fromarray(np.full((40, 40, 3), 255, np.uint8))
    pixel_values = pad_centred(white(image, return_tensors="pt")["pixel_values"], (64, 64))
    left, top = pixel_values[0, 0].nonzero().min(dim=0).values.flip(0).tolist()
    found = find_sampling_points(model, processor, image, [(0, 0)])
    assert found.area == pytest.approx((-left, -top, 64 - left, 64 - top)) and left == 11  # not (64 - 40) / 2


def test_points_are_where_the_mixers_take_their_values():
    model = small_model(tasks=TASKS)
    height, width, scale_x, scale_y = 24, 32, 96 / 150, 64 / 110
    processor = processor_of(
        model, do_resize=True, size={"height": 64, "width": 96}, pad_size={"height": 96, "width": 128}
    )
    seen = {}
    for mixer in (mixer for mixers in model.model.mixers.values() for mixer in mixers):
        for part in (mixer.spatial_mixing, mixer.spatial_mixing.projection):
            part.register_forward_pre_hook(lambda part, inputs: seen.update({part: inputs[0][0]}))
    found = find_sampling_points(model, processor, photo(110, 150), [(10, 20), (75, 60), (149, 109)])
    start = torch.tensor([16, 16])
    to_map = torch.tensor([scale_x, scale_y]) / 4
    columns, rows = ((found.pixels * to_map + start / 4) - 0.5).round().long().unbind(1)
    inside = 0
    for task, name in enumerate(TASKS):
        for layer, mixer in enumerate(model.model.mixers[name]):
            features = seen[mixer.spatial_mixing].numpy()
            sampled = seen[mixer.spatial_mixing.projection].numpy()
            assert features.shape == (16, height, width)
            for pixel in range(3):
                for channel in range(16):
                    x, y = (found.points[layer, task, pixel, channel] * to_map + start / 4 - 0.5).tolist()
                    value = map_coordinates(features[channel], [[y], [x]], order=1, mode="grid-constant")
                    expected = sampled[channel, rows[pixel], columns[pixel]]
                    np.testing.assert_allclose(value, expected, atol=1e-4)
                    is_outside = not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5)
                    assert found.outside[layer, task, pixel, channel] == is_outside
                    inside += not is_outside
    assert 0 < inside < 2 * 3 * 3 * 16


def test_nothing_stays_on_the_model():
    model = small_model(tasks=TASKS)
    find_sampling_points(model, processor_of(model), photo(32, 32), [(0, 0)])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("pixel", [(-1, 0), (40, 0), (0, 32)])
def test_pixels_outside_of_the_photo_are_named(pixel):
    model = small_model(tasks=TASKS)
    with pytest.raises(ValueError, match=f"{pixel[0]},{pixel[1]} is outside .* 40 x 32: x must be from 0 to 39, y"):
        find_sampling_points(model, processor_of(model), photo(32, 40), [(0, 0), pixel])


def test_models_and_images_without_anything_to_see_are_named():
    images = [photo(32, 32), photo(32, 80)]
    data = map_columns(Dataset.from_dict({"image": images}), {})
    bare = small_model(tasks=TASKS, use_decoder=False)
    with pytest.raises(ValueError, match="no decoder"):
        inspect_images(bare, processor_of(bare), data)
    flat = small_model(tasks=TASKS, num_mixer_layers=0)
    assert inspect_images(flat, processor_of(flat), data).distances.shape == (2, 0, 3, 2)
    with pytest.raises(ValueError, match="no mixer layers"):
        find_sampling_points(flat, processor_of(flat), images[0], [(0, 0)])
    with pytest.raises(ValueError, match="sample 1: .* larger than `pad_size`"):
        inspect_images(flat, processor_of(flat, pad_size={"height": 64, "width": 64}), data)
