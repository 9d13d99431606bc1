"""Backbones of every kind: from construction to the prediction of a photo of any size."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import ALL_KINDS, BACKBONES, STAGES, random_labels, randomize, small_config, small_model
from transformers import AutoConfig, AutoModel, PreTrainedConfig, TimmBackboneConfig, pipeline

from transformers_degmix import DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil, backbone_degmix
from transformers_degmix.backbone_degmix import build_backbone, find_unread_parameters
from transformers_degmix.layers_degmix import crop_centred, pad_centred
from transformers_degmix.modeling_degmix import DeGMixModel


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "out_features": STAGES}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_features": STAGES}


def config_of(model_type: str, **fields) -> PreTrainedConfig:
    return BACKBONES[model_type] if model_type in BACKBONES else AutoConfig.for_model(model_type, **fields)


# Kind, fields, and the divisor that it needs.
KINDS = [
    ("swin", {}, 1),
    ("resnet", {}, 1),
    ("efficientnet_lite", {}, 1),
    ("convnextv2", {}, 32),
    ("dinov2", {}, 14),
    ("dinov3_vit", {**TRANSFORMER, "intermediate_size": 32, "num_register_tokens": 2}, 16),
    ("dinov3_convnext", PYRAMID, 32),
    ("tipsv2_vision_model", {**TRANSFORMER, "image_size": 56}, 14),
    ("rf_detr_dinov2", {**TRANSFORMER, "image_size": 56}, 56),  # in windows of 4 x 4 patches of 14
]


@pytest.mark.parametrize("model_type, fields, divisor", KINDS)
def test_a_step_and_photos_of_any_size(tmp_path, model_type, fields, divisor):
    model = DeGMixForMultiTaskDensePrediction(small_config(backbone_config=config_of(model_type, **fields)))
    assert model.config.size_divisor == divisor
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = None
    labels = random_labels(ALL_KINDS, 2, 45, 70)
    model.train()(torch.randn(2, 3, 45, 70), labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    predict_and_reload(model.eval(), tmp_path, Image.fromarray(random_photo(33, 50)))


def random_photo(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def predict_and_reload(model, directory, photo):
    """Through the pipeline, from memory and from a directory."""
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    maps = pipeline("multi-task-dense-prediction", model=model, image_processor=processor)(photo)
    assert {values.shape[-2:] for values in maps.values()} == {(photo.height, photo.width)}
    for part in (model, processor):
        part.save_pretrained(directory)
    loaded = pipeline("multi-task-dense-prediction", model=str(directory), image_processor=processor)(photo)
    for task, values in maps.items():
        # Rounding depends on where in memory weights are, on some CPUs.
        if not values.is_floating_point():
            assert (values == loaded[task]).float().mean() > 0.99
        else:
            torch.testing.assert_close(loaded[task], values, rtol=1e-3, atol=1e-3)


@settings(max_examples=10)
@given(height=st.integers(32, 100), width=st.integers(32, 100))
def test_padding_is_that_of_a_padded_image(height, width):
    model = small_model(backbone_config=BACKBONES["convnextv2"])
    pixel_values = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    padded = model.config.padded_size((height, width))
    assert all(size % 32 == 0 and 0 <= size - length < 32 for size, length in zip(padded, (height, width)))
    with torch.no_grad():
        logits, expected = model(pixel_values).logits, model(pad_centred(pixel_values, padded)).logits
    for task in logits:
        assert torch.equal(logits[task], crop_centred(expected[task], (height, width)))


@given(st.integers(0, 7), st.integers(0, 7))
def test_crop_centred_undoes_pad_centred(rows, columns):
    images = torch.arange(1.0, 31).view(2, 3, 5)
    padded = pad_centred(images, (3 + rows, 5 + columns))
    assert torch.equal(crop_centred(padded, (3, 5)), images) and padded.sum() == images.sum()
    # in the middle, the odd pixel below and at the right
    assert padded[0, rows // 2, columns // 2] == 1


def test_the_divisor_is_found_out_once(tmp_path, monkeypatch):
    model = small_model(backbone_config=BACKBONES["dinov2"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["size_divisor"] == 14

    def fail(backbone):
        raise AssertionError("it is known")

    monkeypatch.setattr(backbone_degmix, "find_size_divisor", fail)
    assert AutoModel.from_pretrained(tmp_path).config.size_divisor == 14
    assert small_model(backbone_config=BACKBONES["resnet"], size_divisor=32).config.size_divisor == 32


def test_trying_leaves_the_backbone_as_it_is():
    torch.manual_seed(0)
    backbone = build_backbone(small_config(backbone_config=BACKBONES["resnet"]))
    torch.manual_seed(0)
    expected = build_backbone(small_config(backbone_config=BACKBONES["resnet"], size_divisor=1))
    assert backbone.training == expected.training
    assert all(map(torch.equal, backbone.state_dict().values(), expected.state_dict().values()))


def test_building_a_model_draws_nothing_but_its_weights():
    backbone_config = copy.deepcopy(BACKBONES["swin"])
    backbone_config.drop_path_rate = 0.5  # of no other test: a configuration that is known is not tried again
    config, weights = small_config(backbone_config=backbone_config), []
    for _ in range(2):
        torch.manual_seed(0)
        model = DeGMixModel(config)
        assert model.backbone.training
        weights.append(model.state_dict().values())
    assert all(map(torch.equal, *weights))


def test_a_backbone_of_one_size_is_refused_in_a_sentence():
    config = AutoConfig.for_model("vitpose_backbone", **TRANSFORMER, image_size=[64, 48], patch_size=[16, 16])
    with pytest.raises(ValueError, match=r"backbone 'vitpose_backbone' .* for 448 x 448 it says .*64\*48") as error:
        DeGMixModel(small_config(backbone_config=config))
    assert "\n" not in str(error.value)


def test_unread_parameters_of_a_backbone_with_large_patches():
    backbone = build_backbone(config := small_config(backbone_config=BACKBONES["dinov2"]))
    assert find_unread_parameters(backbone, config.padded_size((64, 64))) == ["embeddings.mask_token"]


TIMM_MODELS = {
    "tf_efficientnet_lite0": ([1, 2, 3, 4], 1),
    "mobilenetv4_conv_small": ([1, 2, 3, 4], 1),
    "convnext_atto": ([0, 1, 2, 3], 32),
    "hrnet_w18_small_v2": ([1, 2, 3, 4], 32),
    "swin_tiny_patch4_window7_224": ([0, 1, 2, 3], 32),
    "vit_tiny_patch16_224": ([2, 5, 8, 11], 16),
}


@pytest.mark.vision
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_predicts_a_photo(tmp_path, name):
    out_indices, divisor = TIMM_MODELS[name]
    config = small_config(backbone_config=TimmBackboneConfig(backbone=name, out_indices=out_indices))
    model = randomize(DeGMixForMultiTaskDensePrediction(config)).eval()
    assert config.size_divisor == divisor
    predict_and_reload(model, tmp_path, Image.fromarray(random_photo(534, 800)))


@pytest.mark.vision
@pytest.mark.parametrize("name", ["convnext_atto", "hrnet_w18_small_v2", "swin_tiny_patch4_window7_224", "test_vit"])
def test_timm_learns_from_images_of_any_size(name):
    indices = TIMM_MODELS[name][0] if name in TIMM_MODELS else [1, 2, 4, 5]
    config = small_config(backbone_config=TimmBackboneConfig(backbone=name, out_indices=indices))
    model = DeGMixForMultiTaskDensePrediction(config).train()
    model(torch.randn(2, 3, 45, 70), labels=random_labels(ALL_KINDS, 2, 45, 70)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.vision
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_at_their_own_size_timms_transformers_compute_the_same(name):
    import timm

    out_indices, _ = TIMM_MODELS[name]
    config = small_config(backbone_config=TimmBackboneConfig(backbone=name, out_indices=out_indices))
    model = randomize(DeGMixModel(config)).eval()
    fixed = timm.create_model(name, features_only=True, out_indices=out_indices).eval()
    fixed.load_state_dict(model.backbone._backbone.state_dict())
    pixel_values = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model(pixel_values, output_hidden_states=True).hidden_states[: len(out_indices)]
        for feature_map, expected in zip(maps, fixed(pixel_values), strict=True):
            expected = expected.movedim(-1, 1) if name.startswith("swin") else expected
            assert torch.equal(feature_map, expected)


@pytest.mark.vision
def test_timm_models_that_cannot_train_with_a_single_image_are_built():
    config = TimmBackboneConfig(backbone="resnest14d", out_indices=[1, 2, 3, 4])  # batch norms after global pooling
    assert DeGMixModel(small_config(backbone_config=config)).config.size_divisor == 1


@pytest.mark.vision
def test_timm_model_of_one_size_is_refused():
    config = small_config(backbone_config=TimmBackboneConfig(backbone="mixer_s32_224", out_indices=[1, 3, 5, 7]))
    with pytest.raises(ValueError, match=r"backbone 'mixer_s32_224' .* for 448 x 448 it says .*\(224\)"):
        DeGMixModel(config)


@pytest.mark.vision
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backbone": "hrnet_w18_small_v2", "size_divisor": 1}, "for 97 x 130 it says"),
        ({"backbone": "no_such_model"}, "timm cannot build 'no_such_model'"),
        ({"backbone": "test_resnet", "model_args": {"no_such": 1}}, "timm cannot build 'test_resnet' with .*no_such"),
    ],
)
def test_what_timm_cannot_build_is_refused_in_a_sentence(fields, message):
    size_divisor = fields.pop("size_divisor", None)
    config = TimmBackboneConfig(**fields, out_indices=[1, 2])
    with pytest.raises(ValueError, match=message) as error:
        DeGMixModel(small_config(backbone_config=config, size_divisor=size_divisor))
    assert "\n" not in str(error.value)


def test_what_one_configuration_needs_is_not_taken_for_what_another_does():
    divisors = {}
    for patch_size in (14, 16, 14):
        config = copy.deepcopy(BACKBONES["dinov2"])
        config.patch_size, config.image_size = patch_size, 4 * patch_size
        divisors[patch_size] = small_model(backbone_config=config).config.size_divisor
    assert divisors == {14: 14, 16: 16}
    for stages in (2, 4):
        config = copy.deepcopy(BACKBONES["resnet"])
        config.out_features = config.stage_names[1 : stages + 1]
        unread = small_model(backbone_config=config).model.unread_parameters
        assert bool(unread) == (stages == 2)
