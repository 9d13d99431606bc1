"""The model computes what the authors' released code computes (`tests/fixtures`), Transformers' Swin included."""

import math

import numpy as np
import pytest
import torch
from released_weights import MODELS, draw_weights, load_fixture, nyud_shapes, released_state_dict
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

import transformers_degmix  # noqa: F401 (registers the model)
from transformers_degmix import DeGMixForMultiTaskDensePrediction
from transformers_degmix.hub.conversion import convert_state_dict


TRAINED = [name for name in MODELS if name.startswith("degmix")]


def build_model(name: str, drop_path_rate: float = 0.0) -> DeGMixForMultiTaskDensePrediction:
    config, parameters = convert_state_dict(released_state_dict(name), MODELS[name][2])
    config.backbone_config.drop_path_rate = drop_path_rate
    model = DeGMixForMultiTaskDensePrediction(config)
    model.load_state_dict({**model.state_dict(), **parameters})
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Model and fixture; tests leave the model as it is."""
    return build_model(request.param), load_fixture(request.param)


def labels_of(fixture: dict[str, np.ndarray], model: DeGMixForMultiTaskDensePrediction) -> dict[str, Tensor]:
    return {task: torch.from_numpy(fixture[f"label.{task}"]) for task in model.config.tasks}


def test_logits(case):
    model, fixture = case
    with torch.no_grad():
        logits = model(torch.from_numpy(fixture["x"])).logits
    assert [f"out.{task}" for task in logits] == [key for key in fixture if key.startswith("out.")]
    for task, values in logits.items():
        np.testing.assert_allclose(values.numpy(), fixture[f"out.{task}"], rtol=0, atol=2e-5)


def test_backbone(case):
    model, fixture = case
    with torch.no_grad():
        feature_maps = model.model.backbone(torch.from_numpy(fixture["x"])).feature_maps
    for i, feature_map in enumerate(feature_maps):
        np.testing.assert_allclose(feature_map.numpy(), fixture[f"feat.{i}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_losses(name):
    model, fixture = build_model(name), load_fixture(name)
    with torch.no_grad():
        outputs = model(torch.from_numpy(fixture["x"]), labels=labels_of(fixture, model))
    expected = {task: fixture[f"eval.loss.{task}"].item() for task in model.config.tasks}
    for task, loss in outputs.losses.items():
        assert loss.item() == pytest.approx(expected[task], rel=1e-5), task
    assert outputs.loss.item() == pytest.approx(sum(expected.values()), rel=1e-5)


# Gradients jump where a sampling point crosses a pixel, which rounding decides: in single precision, a curve computed
# with one thread differs from one with two by 1e-4 at the third step. The released curve is in single precision.
@pytest.mark.parametrize("dtype, num_steps, rtol", [(torch.float64, 4, 5e-6), (torch.float32, 8, 1e-2)])
@pytest.mark.parametrize("name", TRAINED)
def test_training_curve(name, dtype, num_steps, rtol):
    model, fixture = build_model(name).train().to(dtype), load_fixture(name)
    pixel_values = torch.from_numpy(fixture["x"]).to(dtype)
    labels = {task: x.to(dtype) if x.is_floating_point() else x for task, x in labels_of(fixture, model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 40) ** 0.9)
    curve = []
    for _ in range(num_steps):
        outputs = model(pixel_values, labels=labels)
        curve.append([outputs.loss.item(), *(loss.item() for loss in outputs.losses.values())])
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(curve, fixture["train.curve"][:num_steps], rtol=rtol)


def test_saved_directory_gives_the_same_bits(case, tmp_path):
    model, fixture = case
    model.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        expected = model(torch.from_numpy(fixture["x"])).logits
        logits = loaded(torch.from_numpy(fixture["x"])).logits
    assert list(logits) == list(expected)
    assert all(torch.equal(logits[task], expected[task]) for task in expected)


# The fixtures' Swin has one block in three of its stages: shifted windows in each of them are checked against a Swin
# without windows, where every token attends to every other and a mask says which pairs share a window.


def reference_swin(
    state_dict: dict[str, Tensor], image: Tensor, num_heads: tuple[int, ...], window: int
) -> list[Tensor]:
    """Released Swin backbone, `(1, 3, height, width)` -> `(1, channels, h, w)` per stage."""
    weights = {key.removeprefix("backbone."): value for key, value in state_dict.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def attention(x: Tensor, name: str, heads: int, shift: int) -> Tensor:
        """`(height, width, channels)`, padded at the right and bottom to whole windows."""
        height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        padded_height, padded_width = x.shape[:2]
        allowed, index = [], []
        for size, position in zip(x.shape, torch.meshgrid(*map(torch.arange, x.shape[:2]), indexing="ij")):
            # Windows start `shift` pixels in; the strips cut off at both ends share a window, yet do not mix.
            shifted = (position.flatten() - shift) % size
            home = shifted // window * 2 + (position.flatten() < shift)
            allowed.append(home[:, None] == home[None])
            index.append((shifted[:, None] - shifted[None] + window - 1).clamp(0, 2 * window - 2))
        bias = weights[name + ".relative_position_bias_table"][index[0] * (2 * window - 1) + index[1]].permute(2, 0, 1)
        bias = bias.masked_fill(~(allowed[0] & allowed[1]), -math.inf)
        query, key, value = (
            linear(x.flatten(0, 1), name + ".qkv").view(-1, 3, heads, channels // heads).permute(1, 2, 0, 3)
        )
        scores = query @ key.transpose(1, 2) / math.sqrt(channels // heads) + bias
        attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(padded_height, padded_width, channels)
        return linear(attended, name + ".proj")[:height, :width]

    image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
    projection = F.conv2d(
        image, weights["patch_embed.projection.weight"], weights["patch_embed.projection.bias"], stride=4
    )
    x = norm(projection[0].permute(1, 2, 0), "patch_embed.norm")
    feature_maps = []
    for stage, heads in enumerate(num_heads):
        blocks = {key.split(".")[3] for key in weights if key.startswith(f"stages.{stage}.blocks.")}
        for block in range(len(blocks)):
            name = f"stages.{stage}.blocks.{block}."
            x = x + attention(norm(x, name + "norm1"), name + "attn.w_msa", heads, block % 2 * (window // 2))
            x = x + linear(F.gelu(linear(norm(x, name + "norm2"), name + "ffn.layers.0.0")), name + "ffn.layers.1")
        feature_maps.append(norm(x, f"norm{stage}").permute(2, 0, 1).unsqueeze(0))
        if stage < len(num_heads) - 1:
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            height, width, _ = x.shape
            patches = F.unfold(x.permute(2, 0, 1).unsqueeze(0), kernel_size=2, stride=2)[0].T
            x = linear(norm(patches, f"stages.{stage}.downsample.norm"), f"stages.{stage}.downsample.reduction").view(
                height // 2, width // 2, -1
            )
    return feature_maps


@pytest.mark.parametrize("size", [(49, 63), (32, 32), (100, 36)])
def test_swin_shifts_the_windows_of_every_stage_at_every_size(size):
    num_heads, window = (2, 2, 4, 4), 4
    state_dict = draw_weights(nyud_shapes(24, (2, 2, 4, 2), num_heads, window), seed=3)
    config, parameters = convert_state_dict(state_dict)
    model = DeGMixForMultiTaskDensePrediction(config).eval()
    model.load_state_dict({**model.state_dict(), **parameters})
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        feature_maps = model.model.backbone(image).feature_maps
    for feature_map, expected in zip(feature_maps, reference_swin(state_dict, image, num_heads, window), strict=True):
        torch.testing.assert_close(feature_map, expected, rtol=0, atol=2e-5)
