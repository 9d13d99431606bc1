import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import ALL_KINDS, BACKBONES, STAGES, enable_checkpointing, random_labels, small_config, small_model
from textbook import sample_channels, sample_channels_one_by_one, textbook_forward
from transformers import AutoConfig, AutoModel, SwinConfig

from transformers_degmix import DeGMixConfig, DeGMixForMultiTaskDensePrediction, DeGMixModel
from transformers_degmix.modeling_degmix import DeGMixAttention


SCOPES = ("token", "task", "image")
COARSE_SWIN = SwinConfig(patch_size=8, embed_dim=4, depths=[1, 1], num_heads=[1, 2], out_features=STAGES[:2])


def images(batch_size=1, height=41, width=35, seed=0, **kwargs):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@settings(max_examples=30)
@given(
    height=st.integers(32, 80),
    width=st.integers(32, 80),
    batch_size=st.integers(1, 2),
    tasks=st.lists(st.sampled_from(sorted(ALL_KINDS)), min_size=1, max_size=3, unique=True),
    num_attention_heads=st.sampled_from([1, 2, 4]),
    scope_and_reduction=st.sampled_from([("token", 1), ("task", 1), ("image", 1), ("image", 2), ("image", 3)]),
    use_gating=st.booleans(),
    num_mixer_layers=st.integers(1, 2),
    training=st.booleans(),
    levels=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    offset_position=st.sampled_from(["absolute", "normalized", "none"]),
    attention_norm_eps=st.sampled_from([1e-5, 1.0]),
    portion=st.sampled_from([1, 15, 1024]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_textbook_formulation(
    height,
    width,
    batch_size,
    tasks,
    num_attention_heads,
    scope_and_reduction,
    use_gating,
    num_mixer_layers,
    training,
    levels,
    offset_position,
    attention_norm_eps,
    portion,
    seed,
):
    scope, reduction = scope_and_reduction
    levels = dict(zip(tasks, levels))
    seen = {name: [other for other in tasks if levels[other] <= levels[name]] for name in tasks}
    tasks = {name: {**ALL_KINDS[name], "attends_to": seen[name]} for name in tasks}
    model = small_model(
        seed,
        backbone_config=COARSE_SWIN,
        tasks=tasks,
        hidden_size=4,
        gating_intermediate_size=6,
        head_hidden_size=3,
        num_attention_heads=num_attention_heads,
        interaction_scope=scope,
        interaction_reduction=reduction,
        use_gating=use_gating,
        num_mixer_layers=num_mixer_layers,
        offset_position=offset_position,
        attention_norm_eps=attention_norm_eps,
    ).double()
    model.model.CPU_PORTION = portion
    for name, module in model.named_modules():
        # Batch statistics of the new blocks; the backbone has none, and its drop path would be random.
        module.training = training and "backbone" not in name
    pixel_values = images(batch_size, height, width, seed, dtype=torch.float64)

    fast = model(pixel_values, output_attentions=True)
    logits, attentions = textbook_forward(model, pixel_values)

    assert list(fast.logits) == list(tasks)
    torch.testing.assert_close(fast.attentions[0], attentions, rtol=0, atol=1e-9)
    for task in tasks:
        torch.testing.assert_close(fast.logits[task], logits[task], rtol=0, atol=1e-9)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if "swin.layernorm" not in n])
    target = {task: torch.randn(x.shape, dtype=x.dtype) for task, x in logits.items()}
    gradients = [
        torch.autograd.grad(sum((target[task] * x).mean() for task, x in outputs.items()), parameters)
        for outputs in (fast.logits, logits)
    ]
    for name, ours, textbook in zip(names, *gradients):
        torch.testing.assert_close(ours, textbook, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_outputs_of_attentions_may_pass_through_zero():
    """Behind a LayerNorm with a small eps, they would jump from one side to the other."""
    jumps = {}
    for eps in (1e-5, 1.0):
        attention = DeGMixAttention(DeGMixConfig(hidden_size=4, num_attention_heads=1, attention_norm_eps=eps))
        outputs = attention.norm(torch.tensor([[-0.01], [0.01]]) * torch.tensor([1.0, -1.0, 2.0, -2.0]))
        jumps[eps] = (outputs[1] - outputs[0]).norm().item()
    assert jumps[1e-5] > 3 and jumps[1.0] < 0.1


def test_the_textbook_samples_as_defined():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 7, generator=generator)
    rows, columns = torch.randn(2, *maps.shape, generator=generator) * 4 + 2
    torch.testing.assert_close(
        sample_channels(maps, rows, columns), sample_channels_one_by_one(maps, rows, columns), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 49), (70, 98)])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_backbones_and_sizes(backbone, size):
    model = small_model(backbone_config=BACKBONES[backbone])
    outputs = model(images(2, *size), labels=random_labels(model.config.tasks, 2, *size))
    outputs.loss.backward()
    for task, fields in model.config.tasks.items():
        assert outputs.logits[task].shape == (2, fields["num_labels"], *size)
        assert outputs.logits[task].isfinite().all()
    assert model.heads["semseg"].conv.out_channels == sum(model.model.backbone.channels) // 8
    assert all(p.grad is not None for n, p in model.named_parameters() if "backbone" not in n)


def test_demt_is_a_configuration():
    model = small_model(use_gating=False, num_mixer_layers=1, num_attention_heads=4)
    assert not any("gating" in name for name in model.state_dict())
    assert all(len(mixer) == 1 for mixer in model.model.mixers.values())
    assert model(images(), output_attentions=True).attentions[0].shape == (1, 6, 4, 6, 11, 9)


@pytest.mark.parametrize("scope", SCOPES)
def test_save_and_load(tmp_path, scope):
    model = small_model(interaction_scope=scope)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    auto = AutoModel.from_pretrained(tmp_path)
    assert type(auto) is DeGMixForMultiTaskDensePrediction
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == model.config.to_json_string()
    expected = model(images()).logits
    for reloaded in (loaded, auto):
        outputs = reloaded(images()).logits
        assert list(outputs) == list(ALL_KINDS)
        assert all(torch.equal(outputs[task], expected[task]) for task in expected)


def test_base_model_loads_from_the_full_one(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    base, info = DeGMixModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    outputs = base(images())
    assert torch.equal(outputs.fused_features, model.model(images()).fused_features)
    assert list(outputs.task_features) == list(ALL_KINDS)
    assert outputs.task_features["depth"].shape == (1, 16, 11, 9)


def test_hidden_states_and_attentions():
    model = small_model()
    assert model(images()).hidden_states is None and model(images()).attentions is None
    outputs = model(images(2), output_hidden_states=True, output_attentions=True)
    shapes = [tuple(x.shape) for x in outputs.hidden_states]
    assert shapes[:2] == [(2, 8, 11, 9), (2, 16, 6, 5)]
    assert shapes[4:] == [(2, 16, 11, 9), (2, 6, 16, 11, 9), (2, 6, 16, 11, 9)]
    (attention,) = outputs.attentions
    assert attention.shape == (2, 6, 2, 6, 11, 9)
    torch.testing.assert_close(attention.sum(dim=3), torch.ones(2, 6, 2, 11, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tmp_path, dtype):
    model = small_model()
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    labels = random_labels(ALL_KINDS, 1, 41, 35)
    outputs = half(images(dtype=dtype), labels=labels)
    expected = model(images(), labels=labels)
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=0.05, atol=0)
    assert all(x.dtype == dtype for x in outputs.logits.values())


def test_sampling_positions_stay_in_float32():
    module = small_model().model.mixers["depth"][0].spatial_mixing
    features = torch.randn(1, 16, 80, 160)
    expected = module.sampling_grid(features)
    exact = copy.deepcopy(module).double().sampling_grid(features.double())
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.sampling_grid(features), expected)
    half = copy.deepcopy(module).bfloat16()
    restored = copy.deepcopy(half).float()
    assert torch.equal(half.sampling_grid(features.bfloat16()), restored.sampling_grid(features.bfloat16().float()))


def test_autocast_is_close_to_float32():
    model = small_model()
    labels = random_labels(ALL_KINDS, 1, 41, 35)
    expected = model(images(), labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(), labels=labels)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_checkpointing_changes_nothing(scope):
    plain = small_model(interaction_scope=scope).train()
    for module in plain.model.backbone.modules():
        module.training = False  # no random drop path
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed)
    labels = random_labels(ALL_KINDS, 2, 41, 35)
    losses = []
    for model in (plain, checkpointed):
        losses.append(model(images(2), labels=labels).loss)
        losses[-1].backward()
    assert checkpointed.model.query.gradient_checkpointing
    torch.testing.assert_close(*losses)
    for (name, ours), theirs in zip(plain.named_parameters(), checkpointed.parameters()):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(plain.buffers(), checkpointed.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_saves_memory_by_recomputing():
    model = small_model().train()
    enable_checkpointing(model)
    calls = []
    model.model.gating.norm.register_forward_hook(lambda *_: calls.append(1))
    model(images(2), labels=random_labels(ALL_KINDS, 2, 41, 35)).loss.backward()
    assert len(calls) == 2 * len(ALL_KINDS)  # for each task once forward, once again for the gradients


def test_parameters_without_influence_have_zero_gradients():
    # Weight decay acts on them and distributed training waits for them, as in the released code.
    model = small_model(interaction_scope="token")
    model(images(), labels=random_labels(ALL_KINDS, 1, 41, 35)).loss.backward()
    query_and_key, value = model.model.interaction.attention.in_proj.weight.grad.split([32, 16])
    assert torch.equal(query_and_key, torch.zeros(32, 16)) and value.abs().sum() > 0
    key_bias = model.model.query.attentions["depth"].in_proj.bias.grad[16:32]
    torch.testing.assert_close(key_bias, torch.zeros(16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_normals_of_length_zero_do_not_spoil_a_step(seed):
    # A classifier's bias starts at zero: where no feature is positive, so is the prediction.
    torch.manual_seed(seed)
    tasks = {"normals": ALL_KINDS["normals"]}
    model = DeGMixForMultiTaskDensePrediction(
        small_config(backbone_config=BACKBONES["resnet"], tasks=tasks, hidden_size=32, head_hidden_size=6)
    )
    outputs = model(torch.rand(4, 3, 32, 32), labels=random_labels(tasks, 4, 32, 32))
    outputs.loss.backward()
    assert torch.stack([x.grad.norm() for x in model.parameters() if x.grad is not None]).norm() < 1000


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    model = DeGMixForMultiTaskDensePrediction(small_config(hidden_size=64))
    block, attention = model.model.mixers["depth"][0], model.model.query.attentions["depth"]
    assert not block.spatial_mixing.point_offsets.weight.any()
    assert block.spatial_mixing.point_offsets.bias.any()
    assert not model.model.gating.gate.weight.any() and (model.model.gating.gate.bias == 1).all()
    assert not attention.in_proj.bias.any() and not attention.out_proj.bias.any() and attention.linear.bias.any()
    bounds = {
        attention.in_proj.weight: (6 / (64 + 3 * 64)) ** 0.5,
        attention.out_proj.weight: 64**-0.5,
        block.channel_mixing.weight: 64**-0.5,
        block.spatial_mixing.channel_offsets.weight: (9 * 9) ** -0.5,
        model.heads["depth"].conv.weight: (64 * 9) ** -0.5,
    }
    for weight, bound in bounds.items():
        assert 0.9 * bound < weight.abs().max() <= bound
    assert 0.005 < model.heads["semseg"].classifier.weight.std() < 0.02
    assert not model.heads["semseg"].classifier.bias.any()


def test_swin_t_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = DeGMixForMultiTaskDensePrediction(DeGMixConfig())
    unread = model.model.backbone.swin.layernorm
    counted = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in unread.parameters())
    assert counted == 33_198_779  # counted on the released code


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 31, 64), (1, 3, 64, 16)])
def test_images_too_small_or_not_a_batch(shape):
    with pytest.raises(ValueError, match=r"at least 32.*" + str(shape[-1])):
        small_model()(torch.zeros(shape))


@pytest.mark.parametrize("backbone", ["swin", "resnet", "dinov2"])
def test_files_can_be_loaded_as_state_dicts(tmp_path, backbone):
    model = small_model(backbone_config=BACKBONES[backbone])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = small_model(seed=1, backbone_config=BACKBONES[backbone])
    other.load_state_dict(saved)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key.*heads.flow.conv"):
        other.load_state_dict({**saved, "heads.flow.conv.weight": torch.zeros(1)})


def test_plain_baseline_is_part_of_the_model():
    whole = small_model()
    plain = small_model(num_mixer_layers=0, use_decoder=False)
    weights = whole.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    images = torch.randn(1, 3, 40, 56)
    outputs = plain(images, output_attentions=True, output_hidden_states=True)
    hidden_states = whole(images, output_hidden_states=True).hidden_states
    for task, logits in outputs.logits.items():
        expected = torch.nn.functional.interpolate(whole.heads[task](hidden_states[4]), size=(40, 56), mode="bilinear")
        torch.testing.assert_close(logits, expected)
    assert not outputs.attentions and len(outputs.hidden_states) == len(
        whole(images, output_hidden_states=True).hidden_states
    )
