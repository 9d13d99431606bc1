"""What Transformers asks of every vision model with a backbone, of both models, on the oldest and newest version."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file, save_file
from small_models import ALL_KINDS, BACKBONES, STAGES, random_labels, small_config, small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from transformers_degmix import DeGMixConfig, DeGMixForMultiTaskDensePrediction, DeGMixImageProcessor, DeGMixModel


CLASSES = [DeGMixModel, DeGMixForMultiTaskDensePrediction]
SCOPES = ["token", "task", "image"]
TASKS = {name: ALL_KINDS[name] for name in ("semseg", "normals", "edge")}
both_classes = pytest.mark.parametrize("model_class", CLASSES)
all_scopes = pytest.mark.parametrize("scope", SCOPES)


def small(model_class, scope="token", backbone="swin", **fields):
    """One of `CLASSES` in eval mode with random parameters."""
    model = small_model(interaction_scope=scope, backbone_config=BACKBONES[backbone], tasks=TASKS, **fields)
    return model if model_class is DeGMixForMultiTaskDensePrediction else model.model


def images(batch_size=2, height=41, width=35):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def tensors_of(outputs, path=""):
    """All tensors of nested outputs by their place, where dictionaries and tuples look alike."""
    if isinstance(outputs, torch.Tensor):
        return {path: outputs}
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return {k: v for i, part in enumerate(parts) for k, v in tensors_of(part, f"{path}/{i}").items()}


@torch.no_grad()
def run(model, **kwargs):
    return tensors_of(model(images(), output_hidden_states=True, output_attentions=True, **kwargs))


def assert_same_parameters(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# Outputs


@both_classes
@all_scopes
def test_outputs_are_deterministic_and_of_one_image_each(model_class, scope):
    model = small(model_class, scope)
    together = run(model)
    assert all(torch.equal(tensor, together[place]) for place, tensor in run(model).items())
    with torch.no_grad():
        for i, image in enumerate(images()):
            alone = tensors_of(model(image[None], output_hidden_states=True, output_attentions=True))
            for place, tensor in alone.items():
                torch.testing.assert_close(together[place][i : i + 1], tensor, rtol=1e-5, atol=1e-5)


@both_classes
def test_tuples_hold_the_same_as_dictionaries(model_class):
    model = small(model_class)
    inputs = {"pixel_values": images()}
    if model_class is DeGMixForMultiTaskDensePrediction:
        inputs["labels"] = random_labels(TASKS, 2, 41, 35)
    for flags in ({}, {"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
        with torch.no_grad():
            named = model(**inputs, **flags, return_dict=True)
            unnamed = model(**inputs, **flags, return_dict=False)
            without = copy.deepcopy(model)
            without.config.return_dict = False
            by_config = without(**inputs, **flags)
        assert isinstance(unnamed, tuple) and isinstance(by_config, tuple)
        for outputs in (unnamed, by_config):
            torch.testing.assert_close(tensors_of(outputs), tensors_of(named.to_tuple()), rtol=0, atol=0)


@both_classes
def test_configuration_can_ask_for_hidden_states_and_attentions(model_class, tmp_path):
    model = model_class(small_config(tasks=TASKS, output_hidden_states=True, output_attentions=True))
    model.save_pretrained(tmp_path)
    outputs = model_class.from_pretrained(tmp_path)(images())
    assert len(outputs.hidden_states) == 4 + 1 + 2 and len(outputs.attentions) == 1
    outputs = model_class.from_pretrained(tmp_path, output_attentions=False)(images(), output_hidden_states=False)
    assert outputs.hidden_states is None and outputs.attentions is None


@both_classes
@all_scopes
def test_hidden_states_and_attentions_carry_gradients(model_class, scope):
    model = small(model_class, scope)
    outputs = model(images(), output_hidden_states=True, output_attentions=True)
    for tensor in (*outputs.hidden_states, *outputs.attentions):
        tensor.retain_grad()
    sum(x.square().mean() for x in (getattr(outputs, "logits", None) or outputs.task_features).values()).backward()
    for tensor in (*outputs.hidden_states, *outputs.attentions):
        assert tensor.grad.any()
    model.zero_grad()
    model(images(), output_attentions=True).attentions[0].square().sum().backward()
    assert model.base_model.query.attentions["edge"].in_proj.weight.grad.any()


@both_classes
def test_some_hidden_states(model_class):
    # From 5.24 on, Transformers' own models keep `None` in the place of others, and pass over what is not there.
    model = small(model_class)
    with torch.no_grad():
        hidden_states = model(images(), output_hidden_states=True).hidden_states
        for selection, chosen in (([0, 5], {0, 5}), ([-1], {6}), ((1, -2), {1, 5}), ([2, 7, -8], {2}), (3, {3})):
            options = {"output_hidden_states": selection, "output_attentions": True}
            selected = model(images(), **options).hidden_states
            assert len(selected) == len(hidden_states) == 7
            for i, (actual, expected) in enumerate(zip(selected, hidden_states)):
                assert torch.equal(actual, expected) if i in chosen else actual is None
            unnamed = model(images(), **options, return_dict=False)[-2]
            torch.testing.assert_close(unnamed, selected, rtol=0, atol=0)
        assert model(images(), output_hidden_states=[]).hidden_states is None


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_flags_of_the_backbone_change_nothing(backbone):
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone)
    model.set_attn_implementation("eager")
    expected = tensors_of(model(images(1, 56, 56)))
    model.config.backbone_config.output_hidden_states = True
    model.config.backbone_config.output_attentions = True
    actual = tensors_of(model(images(1, 56, 56)))
    assert actual.keys() == expected.keys() and all(torch.equal(x, expected[place]) for place, x in actual.items())


# Attention


@pytest.mark.parametrize("backbone", ["swin", "dinov2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_and_sdpa_agree(backbone, dtype, tmp_path, monkeypatch):
    small(DeGMixForMultiTaskDensePrediction, "image", backbone, interaction_reduction=2).save_pretrained(tmp_path)
    pixel_values, results = images(1, 56, 56).to(dtype), {}
    for implementation in ("sdpa", "eager"):
        model = DeGMixForMultiTaskDensePrediction.from_pretrained(
            tmp_path, attn_implementation=implementation, dtype=dtype
        )
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        assert all(config._attn_implementation == implementation for config in configs)
        if implementation == "eager":
            monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
        results[implementation] = tensors_of(model(pixel_values, output_attentions=True))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for place, tensor in results["eager"].items():
        difference = (tensor - results["sdpa"][place]).abs().mean() / tensor.abs().mean()
        assert difference < tolerance, place


@both_classes
def test_attention_is_chosen_for_the_model_and_its_backbone(model_class, tmp_path):
    model = small(model_class, "image")
    base = model.base_model

    def chosen():
        return base.interaction.config._attn_implementation, base.backbone.config._attn_implementation

    assert base.backbone.config is model.config.backbone_config and base.interaction.config is model.config
    assert chosen() == ("sdpa", "sdpa")
    expected = run(model)
    for implementation, expectation in (
        ("eager", ("eager", "eager")),
        ({"": "sdpa"}, ("sdpa", "eager")),
        ({"backbone_config": "sdpa", "": "eager"}, ("eager", "sdpa")),
        ("sdpa", ("sdpa", "sdpa")),
    ):
        model.set_attn_implementation(implementation)
        assert chosen() == expectation
        for place, tensor in run(model).items():
            torch.testing.assert_close(tensor, expected[place], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert chosen() == ("sdpa", "sdpa")
    config = small_config(attn_implementation="eager")
    assert config._attn_implementation == config.backbone_config._attn_implementation == "eager"
    # A backbone without attention has no other implementation than eager.
    small(model_class, "image", "resnet").save_pretrained(tmp_path)
    resnet = model_class.from_pretrained(tmp_path, attn_implementation={"": "sdpa"})
    assert resnet.config._attn_implementation == "sdpa"
    assert resnet.config.backbone_config._attn_implementation == "eager"


# Files


@both_classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_dtypes_are_saved_and_loaded(model_class, dtype, tmp_path):
    model = small(model_class).to(dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_parameters(model_class.from_pretrained(tmp_path, dtype="auto"), model)
    for asked in (torch.float32, "bfloat16"):
        expected = copy.deepcopy(model).to(getattr(torch, str(asked).removeprefix("torch.")))
        assert_same_parameters(model_class.from_pretrained(tmp_path, dtype=asked), expected)
        assert_same_parameters(model_class.from_pretrained(tmp_path, torch_dtype=asked), expected)
    assert {x.dtype for x in model.buffers()} <= {dtype, torch.int64}


@both_classes
def test_files_in_shards_and_variants(model_class, tmp_path):
    model = small(model_class)
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="small")
    assert len(list(tmp_path.glob("model.small-*-of-*.safetensors"))) > 3
    loaded, info = model_class.from_pretrained(tmp_path, variant="small", output_loading_info=True)
    assert not any(info.values())
    assert_same_parameters(loaded, model)
    with pytest.raises(OSError, match="model.safetensors"):
        model_class.from_pretrained(tmp_path)
    # Saved once more, in one file, nothing of the shards is left over.
    loaded.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "once")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "once"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert DeGMixConfig.from_pretrained(tmp_path / "again").to_json_string() == loaded.config.to_json_string()


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_weights_are_whole_and_their_own(backbone, tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone)
    assert not model.all_tied_weights_keys
    assert len({x.data_ptr() for x in model.state_dict().values()}) == len(model.state_dict())
    assert model.num_parameters() == sum(x.numel() for x in model.parameters())
    # With the names of this version of Transformers, not those of the Hub's files.
    model.save_pretrained(tmp_path, save_original_format=False)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded = DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path)
    assert_same_parameters(loaded, model)
    assert all(x.is_contiguous() for x in loaded.parameters())
    assert_same_parameters(
        DeGMixForMultiTaskDensePrediction.from_pretrained(None, config=model.config, state_dict=model.state_dict()),
        model,
    )


def test_base_files_lack_the_heads_and_nothing_else(tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction)
    model.model.save_pretrained(tmp_path)
    full, info = DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name for name in full.state_dict() if name.startswith("heads.")}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_parameters(full.model, model.model)


@both_classes
def test_files_without_any_weight_lack_all(model_class, tmp_path):
    model = small(model_class)
    model.save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    # Transformers' SwinBackbone declares what it does not read.
    assert info["missing_keys"] == {name for name in model.state_dict() if "swin.layernorm" not in name}
    assert info["unexpected_keys"] == {"other"}
    assert all(x.isfinite().all() for x in loaded.state_dict().values())


@both_classes
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_copies_and_pickles(model_class, backbone):
    model = small(model_class, backbone=backbone)
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_json_string() == model.config.to_json_string() == copy.deepcopy(config).to_json_string()
    expected, copies = run(model), [copy.deepcopy(model)]
    if backbone != "swin":  # which has hooks of Transformers that cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert all(torch.equal(tensor, expected[place]) for place, tensor in run(other).items())


def test_state_dicts_take_the_place_of_files(tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction)
    made = DeGMixForMultiTaskDensePrediction.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_parameters(made, model)
    # Conversions between names and layouts leave no views behind.
    model.save_pretrained(tmp_path)
    for each in (model, made, DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path)):
        assert all(x.is_contiguous() for x in each.state_dict().values())


# Another number of classes


def test_changed_classes_start_one_classifier_anew(tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction)
    model.save_pretrained(tmp_path)
    tasks = {**TASKS, "semseg": {"kind": "segmentation", "num_labels": 9}}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path, tasks=tasks)
    loaded = []
    for _ in range(2):
        torch.manual_seed(0)
        changed, info = DeGMixForMultiTaskDensePrediction.from_pretrained(
            tmp_path, tasks=tasks, ignore_mismatched_sizes=True, output_loading_info=True
        )
        loaded.append(changed)
    assert_same_parameters(*loaded)
    new = {"heads.semseg.classifier.weight", "heads.semseg.classifier.bias"}
    assert {name for name, *_ in info["mismatched_keys"]} == new
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in changed.state_dict().items():
        assert name in new or torch.equal(tensor, model.state_dict()[name]), name
    assert not changed.heads["semseg"].classifier.bias.any()
    assert 0.005 < changed.heads["semseg"].classifier.weight.std() < 0.02
    assert changed.config.tasks["semseg"] == DeGMixConfig(tasks=tasks).tasks["semseg"]
    assert changed(images()).logits["semseg"].shape == (2, 9, 41, 35)


# Devices


@both_classes
def test_ways_of_loading_are_equal(model_class, tmp_path):
    model = small(model_class)
    model.save_pretrained(tmp_path)
    expected = run(model)
    for kwargs in (
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
    ):
        loaded = model_class.from_pretrained(tmp_path, **kwargs)
        assert not loaded.training
        assert_same_parameters(loaded, model)
        assert all(torch.equal(tensor, expected[place]) for place, tensor in run(loaded).items()), kwargs


@all_scopes
@pytest.mark.parametrize("share", [0, 0.5])
def test_parts_may_stay_on_disk(scope, share, tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction, scope)
    model.save_pretrained(tmp_path)
    size = sum(x.nbytes for x in model.state_dict().values())
    device_map = {"": "disk"} if share == 0 else "auto"
    memory = {"cpu": int(share * size), "disk": 2 * size}
    loaded = DeGMixForMultiTaskDensePrediction.from_pretrained(
        tmp_path, device_map=device_map, max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values() and any(x.is_meta for x in loaded.parameters())
    assert all(torch.equal(*pair) for pair in zip(run(loaded).values(), run(model).values()))


@all_scopes
def test_every_layer_may_be_loaded_when_it_is_called(scope):
    model = small(DeGMixForMultiTaskDensePrediction, scope)
    expected = run(model)
    cpu_offload(model, execution_device="cpu")
    assert all(x.is_meta for x in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(run(model).values(), expected.values()))


@pytest.mark.parametrize(
    "scope, backbone", [("task", "resnet"), ("image", "resnet"), *(("token", name) for name in sorted(BACKBONES))]
)
def test_shapes_are_known_without_memory(scope, backbone):
    model = small(DeGMixForMultiTaskDensePrediction, scope, backbone)
    pixel_values, labels = images(2, 56, 70), random_labels(TASKS, 2, 56, 70)
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = tensors_of(model(pixel_values, labels, **options))
    labels = {task: label.to("meta") for task, label in labels.items()}
    outputs = tensors_of(model.to("meta")(pixel_values.to("meta"), labels, **options))
    assert outputs.keys() == expected.keys()
    for place, tensor in outputs.items():
        assert tensor.is_meta and (tensor.shape, tensor.dtype) == (expected[place].shape, expected[place].dtype), place


@pytest.mark.parametrize(
    "backbone, device, strict",
    [("swin", "cpu", False), ("swin", "meta", False), ("swin", "meta", True), ("dinov2", "meta", True)],
)
def test_files_are_assigned_as_they_are(backbone, device, strict, tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    with torch.device(device):
        empty = DeGMixForMultiTaskDensePrediction(model.config)
    result = empty.load_state_dict(saved, strict=strict, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_parameters(empty, model)
    assert [x.requires_grad for x in empty.parameters()] == [x.requires_grad for x in model.parameters()]
    assert {x.data_ptr() for x in empty.state_dict().values()} == {x.data_ptr() for x in saved.values()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parts_of_files_are_assigned(device, tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    # The first of the backbone has another name in Swin's files.
    for left_out in (min(name for name in saved if "backbone" in name), "heads.edge.conv.weight"):
        part = {name: x for name, x in saved.items() if name != left_out}
        with torch.device(device):
            empty = DeGMixForMultiTaskDensePrediction(model.config)
        result = empty.load_state_dict({**part, "heads.flow.weight": torch.zeros(1)}, strict=False, assign=True)
        assert result.unexpected_keys == ["heads.flow.weight"]
        (missing,) = result.missing_keys
        for name, x in model.state_dict().items():
            assert name == missing or torch.equal(empty.state_dict()[name], x), name
        with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
            empty.load_state_dict(part, assign=True)


def undivided_blocks(model):
    """Names of the smallest parts that `device_map="auto"` may put on different devices; the backbone is one."""

    def blocks(module, name):
        if type(module).__name__ in model._no_split_modules or "backbone" in name or not list(module.children()):
            return [name] if module.state_dict() else []
        return [x for child, part in module.named_children() for x in blocks(part, f"{name}.{child}".lstrip("."))]

    return blocks(model, "")


@all_scopes
def test_every_block_may_have_a_device_of_its_own(scope, monkeypatch):
    model = small(DeGMixForMultiTaskDensePrediction, scope)
    device_map = {name: f"cpu:{index}" for index, name in enumerate(undivided_blocks(model))}
    assert len(device_map) == 2 + 3 * 2 + 3 + 3
    assert set(DeGMixModel._no_split_modules) <= {type(x).__name__ for x in model.modules()}
    make = torch.tensor  # forgets the number of a CPU
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **kwargs: make(data, **kwargs).to(device))
    # Fake tensors compute nothing, but have any device, and refuse to be used with those of another.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for name, device in device_map.items():
            for module in model.get_submodule(name).modules():
                for tensors, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda x: x)):
                    for key, x in tensors.items():
                        if x is not None:
                            tensors[key] = kind(torch.empty_like(x, device=device))
        dispatch_model(model, device_map, main_device="cpu:0")
        inputs = {"pixel_values": torch.empty(2, 3, 41, 35, device="cpu:0")}
        labels = random_labels(TASKS, 2, 41, 35)
        inputs["labels"] = {task: torch.empty_like(x, device="cpu:0") for task, x in labels.items()}
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert {str(x.device) for x in tensors_of(outputs).values()} == {"cpu:0"}


# Initialisation


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_tensor_has_a_defined_start(backbone, monkeypatch):
    config = small_config(backbone_config=BACKBONES[backbone], tasks=TASKS)
    built = DeGMixForMultiTaskDensePrediction(config)
    with torch.device("meta"):
        model = DeGMixForMultiTaskDensePrediction(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in model.state_dict().values():
            x.fill_(float("nan") if x.is_floating_point() else 99)
    model.init_weights()
    for name, x in model.named_parameters():
        assert x.isfinite().all() and x.abs().max() <= 3 and abs(x.mean()) <= 1, name
    for (name, x), expected in zip(model.named_buffers(), built.buffers()):
        assert torch.equal(x, expected), name
    assert all(x.isfinite().all() for x in tensors_of(model.eval()(images(1, 56, 56))).values())

    # The same, whether made as a whole or by `from_pretrained` for lack of weights.
    initialize = PreTrainedModel._initialize_weights

    def seeded(self, module, *args, **kwargs):
        torch.manual_seed(0)
        initialize(self, module, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
    built = DeGMixForMultiTaskDensePrediction(config)
    assert_same_parameters(
        DeGMixForMultiTaskDensePrediction.from_pretrained(None, config=config, state_dict={}), built
    )


def test_initialisation_depends_on_the_seed_alone():
    config = small_config(tasks=TASKS)
    ways = [
        lambda: DeGMixForMultiTaskDensePrediction(config),
        lambda: CLASSES[1].from_pretrained(None, config=config, state_dict={}),
    ]
    for make in ways:
        torch.manual_seed(1)
        first = make()
        make()
        torch.manual_seed(1)
        assert_same_parameters(make(), first)


# Training


def backward(model):
    outputs = model(images(2, 56, 56))
    maps = getattr(outputs, "logits", None) or outputs.task_features
    sum(x.square().mean() for x in maps.values()).backward()


@both_classes
@pytest.mark.parametrize(
    "backbone, unread",
    [
        ("swin", ["swin.layernorm.weight", "swin.layernorm.bias"]),
        ("resnet", []),
        ("efficientnet_lite", []),
        ("dinov2", ["embeddings.mask_token"]),
    ],
)
def test_training_reaches_all_that_is_read(model_class, backbone, unread):
    model = small(model_class, backbone=backbone).train()
    backward(model)
    without = [name.split("backbone.")[-1] for name, x in model.named_parameters() if x.grad is None]
    assert without == unread
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("stages, fields", [(4, {}), (2, {}), (2, {"use_decoder": False, "num_mixer_layers": 0})])
def test_what_takes_gradients_has_them(backbone, stages, fields):
    # Distributed training waits for the gradient of every parameter that takes one.
    backbone_config = copy.deepcopy(BACKBONES[backbone])
    backbone_config.out_features = STAGES[:stages]
    config = small_config(tasks=TASKS, backbone_config=backbone_config, **fields)
    model = DeGMixForMultiTaskDensePrediction(config).train()
    backward(model)
    assert all(x.requires_grad == (x.grad is not None) for x in model.parameters())


@pytest.mark.parametrize("backbone", ["swin", "dinov2"])
def test_what_takes_no_gradients_is_kept(backbone, tmp_path):
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone)
    assert {x.requires_grad for x in model.parameters()} == {True, False}
    model.save_pretrained(tmp_path)
    for other in (DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert_same_parameters(other, model)
        assert [x.requires_grad for x in other.parameters()] == [x.requires_grad for x in model.parameters()]


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_frozen_parts_keep_evaluating(backbone):
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone)
    wrapped, frozen = nn.Sequential(model), [model.model.backbone, model.model.mixers["edge"], model.model.gating]
    trained = [model.model.mixers["semseg"], model.model.query, model.heads]

    def training_of(parts):
        return {module.training for part in parts for module in part.modules()}

    for part in frozen:
        part.requires_grad_(False)
    for train in (wrapped.train, model.train, model.train):
        train()
        assert training_of(frozen) == {False} and training_of(trained) == {True}
        statistics = [x.clone() for part in frozen for x in part.buffers()]
        model(images(), labels=random_labels(TASKS, 2, 41, 35)).loss.backward()
        assert all(torch.equal(*pair) for pair in zip(statistics, (x for part in frozen for x in part.buffers())))
        model.eval()
        assert not any(module.training for module in model.modules())
    model.requires_grad_(True).train()
    assert all(x.training for x in model.modules() if all(p.requires_grad for p in x.parameters()))


def test_one_batch_is_learnt():
    torch.manual_seed(0)
    config = small_config(tasks=TASKS, backbone_config=BACKBONES["resnet"], num_mixer_layers=1)
    model, losses = DeGMixForMultiTaskDensePrediction(config).train(), []
    left = (torch.arange(32) < 16).expand(2, 32, 32)
    normals = torch.stack([0.6 * left, 1 - left.float(), 0.8 * left], dim=1)
    labels = {"semseg": left.long(), "normals": normals, "edge": left.float()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        outputs = model(images(2, 32, 32), labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({task: loss.item() for task, loss in outputs.losses.items()})
    for task, first in losses[0].items():
        assert losses[-1][task] < 0.5 * first, task


@both_classes
def test_gradient_checkpointing_is_a_field_of_the_configuration(model_class):
    model = model_class(small_config(tasks=TASKS, gradient_checkpointing=True))
    assert {x.gradient_checkpointing for x in model.modules() if hasattr(x, "gradient_checkpointing")} == {True}
    model = model_class(small_config(tasks=TASKS))
    assert {x.gradient_checkpointing for x in model.modules() if hasattr(x, "gradient_checkpointing")} == {False}


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_switched_on_and_off(backbone, use_reentrant):
    # renamed within the supported range of Transformers
    prefix = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    model = small(DeGMixForMultiTaskDensePrediction, backbone=backbone).train()
    for module in model.model.backbone.modules():
        module.training = False  # no random drop path
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    labels, gradients = random_labels(TASKS, 2, 41, 35), []
    for switch in ("disable", "enable", "disable"):
        kwargs = {f"{prefix}_checkpointing_kwargs": {"use_reentrant": use_reentrant}} if switch == "enable" else {}
        getattr(model, f"{prefix}_checkpointing_{switch}")(**kwargs)
        assert {module.gradient_checkpointing for module in layers} == {switch == "enable"}
        assert getattr(model, f"is_{prefix}_checkpointing") == (switch == "enable")
        model.zero_grad()
        model(images(), labels=labels).loss.backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


# Interface


@both_classes
def test_what_transformers_reads_of_the_classes(model_class):
    model = small(model_class)
    assert list(inspect.signature(model_class.forward).parameters)[1] == model_class.main_input_name == "pixel_values"
    assert model.base_model is (model if model_class is DeGMixModel else model.model)
    assert not model.can_generate() and model.get_output_embeddings() is None
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")


# config.json of earlier versions of this package, without the backbone
WRITTEN = {
    "first": """{
        "gating_intermediate_size": 12, "head_hidden_size": null, "hidden_size": 16, "interaction_reduction": 1,
        "interaction_scope": "token", "model_type": "degmix", "num_attention_heads": 2, "num_mixer_layers": 2,
        "tasks": [{"id2label": {"0": "a", "1": "b"}, "kind": "segmentation", "loss_weight": 1.0,
                   "name": "human_parts", "num_labels": 2},
                  {"kind": "boundary", "loss_weight": 50.0, "name": "edge", "num_labels": 1, "pos_weight": 0.8}],
        "transformers_version": "5.17.0", "use_gating": true}""",
    "with ignore_empty and use_decoder": """{
        "gating_intermediate_size": 12, "head_hidden_size": null, "hidden_size": 16, "interaction_reduction": 1,
        "interaction_scope": "token", "model_type": "degmix", "num_attention_heads": 2, "num_mixer_layers": 2,
        "tasks": [{"id2label": {"0": "a", "1": "b"}, "ignore_empty": false, "kind": "segmentation",
                   "loss_weight": 1.0, "name": "human_parts", "num_labels": 2},
                  {"kind": "boundary", "loss_weight": 50.0, "name": "edge", "num_labels": 1, "pos_weight": 0.8}],
        "transformers_version": "5.23.0", "use_decoder": true, "use_gating": true}""",
    "with code beside the weights": """{
        "architectures": ["DeGMixForMultiTaskDensePrediction"],
        "auto_map": {"AutoConfig": "configuration_degmix.DeGMixConfig",
                     "AutoModel": "modeling_degmix.DeGMixForMultiTaskDensePrediction"},
        "custom_pipelines": {"multi-task-dense-prediction": {
            "impl": "pipeline_degmix.MultiTaskDensePredictionPipeline", "pt": ["AutoModel"], "type": "image"}},
        "dtype": "float32",
        "gating_intermediate_size": 12, "head_hidden_size": null, "hidden_size": 16, "interaction_reduction": 1,
        "interaction_scope": "token", "model_type": "degmix", "num_attention_heads": 2, "num_mixer_layers": 2,
        "tasks": [{"id2label": {"0": "a", "1": "b"}, "ignore_empty": false, "kind": "segmentation",
                   "loss_weight": 1.0, "name": "human_parts", "num_labels": 2},
                  {"kind": "boundary", "loss_weight": 50.0, "name": "edge", "num_labels": 1, "pos_weight": 0.8}],
        "transformers_version": "5.23.0", "use_decoder": true, "use_gating": true}""",
}


@pytest.mark.parametrize("version", WRITTEN)
def test_configurations_of_earlier_versions(version, tmp_path):
    written = {**json.loads(WRITTEN[version]), "backbone_config": BACKBONES["resnet"].to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(written))
    tasks = {
        "human_parts": {"kind": "segmentation", "num_labels": 2, "id2label": {0: "a", 1: "b"}},
        "edge": {"kind": "boundary", "pos_weight": 0.8},
    }
    expected = small_config(backbone_config=BACKBONES["resnet"], tasks=tasks)
    loaded = DeGMixConfig.from_pretrained(tmp_path)
    assert list(loaded.tasks) == ["human_parts", "edge"]
    for field in DeGMixConfig.__annotations__.keys() - {"backbone_config"}:
        assert getattr(loaded, field) == getattr(expected, field), field
    assert loaded.backbone_config.hidden_sizes == expected.backbone_config.hidden_sizes


def test_configurations_through_json_and_dictionaries(tmp_path):
    config = small_config(interaction_scope="image", interaction_reduction=2, note="kept")
    config.to_json_file(tmp_path / "config.json")
    copies = [
        DeGMixConfig.from_json_file(tmp_path / "config.json"),
        DeGMixConfig.from_pretrained(tmp_path),
        DeGMixConfig.from_dict(config.to_dict()),
        DeGMixConfig(**config.to_diff_dict()),
        copy.deepcopy(config),
    ]
    for loaded in copies:
        assert loaded.to_json_string() == config.to_json_string()
        assert loaded.note == "kept"  # a field of a version to come
    assert DeGMixConfig().hidden_size == 256 and DeGMixConfig().num_attention_heads == 2


def test_fields_given_to_from_pretrained_are_completed_and_checked(tmp_path):
    small_config().save_pretrained(tmp_path)
    changed, unused = DeGMixConfig.from_pretrained(
        tmp_path, tasks={"d": {"kind": "depth"}}, hidden_size=32, other=1, return_unused_kwargs=True
    )
    assert changed.tasks == DeGMixConfig(tasks={"d": {"kind": "depth"}}).tasks
    assert changed.hidden_size == 32 and unused == {"other": 1}
    backbone = DeGMixConfig.from_pretrained(tmp_path, backbone_config={"drop_path_rate": 0.5}).backbone_config
    assert backbone.drop_path_rate == 0.5 and backbone.embed_dim == 8
    with pytest.raises(ValueError, match=r"`num_attention_heads`.*16.*got 3"):
        DeGMixConfig.from_pretrained(tmp_path, num_attention_heads=3)


# Arguments: model directories.
USE = """
import logging, sys

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: records.append(f"{record.name}: {record.getMessage()}")
for name in ("transformers", "transformers_degmix", "accelerate", "huggingface_hub", "torch"):
    logging.getLogger(name).addHandler(handler)

import torch
import transformers_degmix
from transformers import AutoConfig, AutoModel
from transformers_degmix import DeGMixImageProcessor, DeGMixModel

for directory in sys.argv[1:]:
    AutoConfig.from_pretrained(directory)
    images = DeGMixImageProcessor.from_pretrained(directory)(torch.zeros(2, 3, 40, 44), return_tensors="pt")
    for load in (AutoModel, DeGMixModel):
        for options in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"attn_implementation": "eager"}):
            load.from_pretrained(directory, **options)
        model = load.from_pretrained(directory)
        for training in (False, True):
            model.train(training)
            outputs = model(**images, output_hidden_states=True, output_attentions=True)
            outputs.hidden_states[-1].sum().backward()
assert not records, records
"""


def test_no_warnings(tmp_path):
    directories = [tmp_path / backbone for backbone in ("swin", "resnet")]
    for directory in directories:
        small(DeGMixForMultiTaskDensePrediction, "image", directory.name).save_pretrained(directory)
        DeGMixImageProcessor(tasks=TASKS).save_pretrained(directory)
    command = [sys.executable, "-W", "error", "-c", USE, *map(str, directories)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not re.search("warn", process.stdout + process.stderr, re.IGNORECASE)
