"""What wraps, replaces or watches layers works on the model: hooks, adapters, quantisers, functorch and processes."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import ALL_KINDS, BACKBONES, enable_checkpointing, random_labels, small_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, replace_all_batch_norm_modules_, stack_module_state, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModel, QuantoConfig

from transformers_degmix import DeGMixForMultiTaskDensePrediction


# The normals do not see the classes: one task attends to all, the other to some.
TASKS = {"semseg": ALL_KINDS["semseg"], "normals": {**ALL_KINDS["normals"], "attends_to": ["normals"]}}
LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.LayerNorm, nn.BatchNorm2d)
all_scopes = pytest.mark.parametrize("scope", ["token", "task", "image"])


def tiny(scope="task", backbone="resnet", seed=0) -> DeGMixForMultiTaskDensePrediction:
    """A model in eval mode with random parameters, whose training is not random."""
    backbone_config = copy.deepcopy(BACKBONES[backbone])
    backbone_config.drop_path_rate = 0.0
    fields = {"backbone_config": backbone_config, "tasks": TASKS, "num_mixer_layers": 1}
    return small_model(seed, interaction_scope=scope, **fields)


def images(batch_size=2, height=33, width=35, **kwargs) -> Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)).to(**kwargs)


@torch.no_grad()
def logits_of(model) -> dict[str, Tensor]:
    return model(images(dtype=next(model.parameters()).dtype)).logits


def gradients_of(loss: Tensor, model: nn.Module, **kwargs) -> dict[str, Tensor]:
    """Of all parameters that take gradients, zeros where there is no influence."""
    names, parameters = zip(*((name, x) for name, x in model.named_parameters() if x.requires_grad))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, **kwargs)
    return dict(zip(names, gradients))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol=1e-4, atol=1e-4):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the tasks' relative errors."""
    return max(((actual[task] - x).norm() / x.norm()).item() for task, x in expected.items())


def own_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions of what follows the backbone, by name."""
    return {n: x for n, x in model.named_modules() if isinstance(x, LAYERS) and "backbone" not in n}


def own_matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Weights of what follows the backbone, in layers or not: the modules that hold them, and their names there."""
    modules = [module for name, module in model.named_modules() if "backbone" not in name]
    return [(module, n) for module in modules for n, x in module.named_parameters(recurse=False) if x.ndim > 1]


# Hooks


@pytest.mark.parametrize(
    "scope, backbone", [("task", "resnet"), ("image", "resnet"), *(("token", name) for name in sorted(BACKBONES))]
)
def test_every_layer_is_called_with_its_input(scope, backbone):
    model = tiny(scope, backbone).train()
    calls = {}
    for name, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            calls[name] = []
            module.register_forward_hook(lambda _, args, output, name=name: calls[name].append((*args, output)))
    model(images(1, 56, 56), output_attentions=True)
    for name, called in calls.items():
        # Modules that hold plain parameters may take and return what they like, as long as they are called.
        assert called, f"{name} was not called"
        if isinstance(model.get_submodule(name), LAYERS + NORMS):
            assert all(len(tensors) == 2 and all(isinstance(x, Tensor) for x in tensors) for tensors in called), name


def test_hooks_may_change_what_goes_into_a_layer_and_out():
    model = tiny()
    expected = logits_of(model)
    for name, layer in own_layers(model).items():
        for handle in (
            layer.register_forward_pre_hook(lambda _, args: tuple(x.sin() for x in args)),
            layer.register_forward_hook(lambda _, args, output: output.sin()),
        ):
            assert difference(logits_of(model), expected) > 0, name
            handle.remove()
    assert_close(logits_of(model), expected, rtol=0, atol=0)


def test_saved_tensors_may_be_packed_and_read_twice():
    model, labels = tiny().train(), random_labels(TASKS, 2, 33, 35)
    expected = gradients_of(model(images(), labels=labels).loss, model)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        loss = model(images(), labels=labels).loss
    for _ in range(2):
        assert_close(gradients_of(loss, model, retain_graph=True), expected)


@pytest.mark.parametrize("backward", [True, False])
def test_activations_go_with_the_outputs(backward):
    # Without the garbage collector, which would come too late for large images.
    model, references = tiny().train(), []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, args, output: (
                references.append(StorageWeakRef(output.untyped_storage())) if isinstance(output, Tensor) else None
            )
        )
    gc.collect()
    gc.disable()
    try:
        outputs = model(images(), labels=random_labels(TASKS, 2, 33, 35))
        assert not all(reference.expired() for reference in references)
        if backward:
            outputs.loss.backward()
        del outputs
        assert all(reference.expired() for reference in references)
    finally:
        gc.enable()


# Weights that are computed at every call


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrised_weights_are_used_and_trained():
    doubled, model = tiny().double(), tiny().double()
    for module, name in own_matrices(doubled):
        getattr(module, name).data.mul_(2)
    for module, name in own_matrices(model):
        parametrize.register_parametrization(module, name, Doubled())
    assert_close(logits_of(model), logits_of(doubled))
    labels = random_labels(TASKS, 2, 33, 35)
    gradients, expected = (
        gradients_of(x(images(dtype=torch.float64), labels=labels).loss, x) for x in (model, doubled)
    )
    for name in list(gradients):
        if name.endswith(".original"):
            plain = name.removesuffix(".original").replace(".parametrizations.", ".")
            gradients[plain] = gradients.pop(name) / 2
    assert_close(gradients, expected)


def test_weight_norm_leaves_the_function_as_it_is():
    model = tiny()
    expected, matrices = logits_of(model), own_matrices(model)
    for module, name in matrices:
        parametrizations.weight_norm(module, name)
    assert_close(logits_of(model), expected)
    model(images(), labels=random_labels(TASKS, 2, 33, 35)).loss.backward()
    magnitudes = [x.grad for name, x in model.named_parameters() if name.endswith(".original0")]
    assert len(magnitudes) == len(matrices) and all(x.any() for x in magnitudes)


def test_pruned_weights_are_masked_before_every_call():
    # By a hook: who reads a layer's weights without calling it has those of the call before.
    model, expected = tiny(), tiny()
    for module, name in own_matrices(model):
        prune.l1_unstructured(module, name, amount=0.5)
    for factor in (1, 1.5):
        with torch.no_grad():
            for (module, original), (plain, name) in zip(own_matrices(model), own_matrices(expected)):
                assert original == f"{name}_orig"
                getattr(module, original).mul_(factor)
                getattr(plain, name).copy_(getattr(module, original) * getattr(module, f"{name}_mask"))
        assert_close(logits_of(model), logits_of(expected))
    assert difference(logits_of(model), logits_of(tiny())) > 0.01


# Adapters


def adapt(model: nn.Module, target_modules: str | list[str]) -> nn.Module:
    """With adapters that are not zero at the start, as they usually are."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=target_modules, r=2, init_lora_weights=False))


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    # Reentrant checkpoints do not know of `torch.autograd.grad`.
    model(images(2, 56, 56), labels=random_labels(TASKS, 2, 56, 56)).loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


@all_scopes
@pytest.mark.parametrize("kind", ["all-linear", "names"])
def test_adapters_are_trained(scope, kind):
    model = tiny(scope, "swin")
    expected = logits_of(model)
    layers = {name for name, x in own_layers(model).items() if kind == "names" or type(x) is nn.Linear}
    model = adapt(model, "all-linear" if kind == "all-linear" else sorted(layers)).train()
    assert difference(logits_of(model.eval()), expected) > 0.01
    gradients = adapter_gradients(model.train())
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in gradients} >= layers
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("kind", ["all-linear", "names"])
def test_adapters_are_merged(kind, tmp_path):
    model = tiny(backbone="swin")
    layers = {name: type(x) for name, x in own_layers(model).items()}
    # PEFT cannot merge adapters of convolutions in groups.
    names = [name for name, x in own_layers(model).items() if getattr(x, "groups", 1) == 1]
    model = adapt(model, "all-linear" if kind == "all-linear" else names).double()
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert_close(logits_of(merged), expected)
    assert {name: type(x) for name, x in own_layers(merged).items()} == layers
    merged.save_pretrained(tmp_path)
    assert_close(logits_of(AutoModel.from_pretrained(tmp_path, dtype="auto")), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_are_trained_with_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(backbone="dinov2")
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        gradients.append(adapter_gradients(adapt(model, "all-linear").train()))
    assert all(gradient.any() for gradient in gradients[0].values())
    assert_close(*gradients)


# Quantisers


class OnlyLinear(Tensor):
    """A weight that only `F.linear` knows, as those of torchao and others: it has no slices and no transpose."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (F.linear, Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__):
            raise NotImplementedError(f"{func} of the weight of a linear layer")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@all_scopes
def test_weights_of_linear_layers_are_of_any_type(scope):
    model = tiny(scope, "swin")
    expected = logits_of(model)
    for layer in own_layers(model).values():
        if isinstance(layer, nn.Linear):
            layer._parameters["weight"] = layer.weight.detach().as_subclass(OnlyLinear)
    assert_close(logits_of(model), expected, rtol=0, atol=0)


def test_torchao():
    # Not among the packages that the tests need: Transformers imports it where it is, and it prints at every import.
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny(backbone="swin")
    expected, linear = logits_of(model), [x for x in model.modules() if isinstance(x, nn.Linear)]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert all(type(layer.weight) is not nn.Parameter for layer in linear)
    assert 0 < difference(logits_of(model), expected) < 0.1


@all_scopes
def test_quanto_quantises_all_layers(scope):
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny(scope, "swin")
    expected, layers = logits_of(model), own_layers(model)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert all(isinstance(model.get_submodule(name), quanto.QModuleMixin) for name in layers)
    assert 0 < difference(logits_of(model), expected) < 0.1


@pytest.mark.parametrize("skipped", [None, ["model.interaction", "heads"]])
def test_quanto_in_from_pretrained(skipped, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny(backbone="swin")
    model.save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8", modules_to_not_convert=skipped)
    quantised = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    for name, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear):
            assert isinstance(layer, quanto.QLinear) != name.startswith(tuple(skipped or ["-"])), name
    assert 0 < difference(logits_of(quantised), logits_of(model)) < 0.1


# Functorch


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the parameters that take gradients and of the buffers, which training changes."""
    parameters = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
    return parameters, {name: x.clone() for name, x in model.named_buffers()}


def loss_function(model: nn.Module):
    """The loss of images and labels as a function of the model's state."""

    def loss(parameters, buffers, pixel_values, labels):
        return functional_call(model, (parameters, buffers), (pixel_values, labels)).loss

    return loss


@pytest.mark.parametrize(
    "scope, backbone, training, checkpointing",
    [
        ("token", "resnet", True, False),
        ("task", "swin", True, False),
        ("image", "swin", False, False),
        ("task", "swin", True, True),
        ("image", "resnet", True, True),
    ],
)
def test_functional_gradients_are_those_of_autograd(scope, backbone, training, checkpointing):
    model = tiny(scope, backbone).double().train(training)
    pixel_values, labels = images(dtype=torch.float64), random_labels(TASKS, 2, 33, 35)
    parameters, buffers = state_of(model)
    outputs = model(pixel_values, labels=labels)
    expected = gradients_of(outputs.loss, model, retain_graph=True)
    cotangents = {task: torch.randn_like(logits) for task, logits in outputs.logits.items()}
    expected_product = gradients_of(sum((cotangents[task] * x).sum() for task, x in outputs.logits.items()), model)
    statistics = {name: x.clone() for name, x in model.named_buffers()}

    if checkpointing:
        enable_checkpointing(model)
    assert_close(grad(loss_function(model))(parameters, buffers, pixel_values, labels), expected)
    assert_close(buffers, statistics)

    def logits(parameters):
        return functional_call(model, (parameters, state_of(model)[1]), (pixel_values,)).logits

    assert_close(vjp(logits, parameters)[1](cotangents)[0], expected_product)


@pytest.mark.parametrize("scope, training", [("token", False), ("task", False), ("image", False), ("task", True)])
def test_gradients_of_each_image(scope, training):
    model = tiny(scope).double().train(training)
    replace_all_batch_norm_modules_(model)  # those that keep statistics cannot be mapped over images
    pixel_values, labels = images(dtype=torch.float64), random_labels(TASKS, 2, 33, 35)
    loss = loss_function(model)

    def loss_of_one(parameters, buffers, image, label):
        return loss(parameters, buffers, image[None], {task: x[None] for task, x in label.items()})

    parameters, buffers = state_of(model)
    actual = vmap(grad(loss_of_one), in_dims=(None, None, 0, 0))(parameters, buffers, pixel_values, labels)
    for i in range(2):
        one = model(pixel_values[i : i + 1], labels={task: x[i : i + 1] for task, x in labels.items()})
        assert_close({name: x[i] for name, x in actual.items()}, gradients_of(one.loss, model))


def test_an_ensemble_is_mapped_over_its_parameters():
    models = [tiny(seed=seed) for seed in range(2)]
    skeleton, pixel_values = copy.deepcopy(models[0]).to("meta"), images()
    logits = vmap(lambda *state: functional_call(skeleton, state, (pixel_values,)).logits)(*stack_module_state(models))
    for i, model in enumerate(models):
        assert_close({task: x[i] for task, x in logits.items()}, logits_of(model))


def test_jacobians():
    model = tiny().double()
    pixel_values = images(1, dtype=torch.float64)

    def means(pixel_values):
        return {task: x.mean(dim=(0, 2, 3)) for task, x in model(pixel_values).logits.items()}

    jacobians = jacrev(means)(pixel_values)
    values = means(pixel_values.requires_grad_())
    for task, rows in jacobians.items():
        for row, value in zip(rows, values[task], strict=True):
            torch.testing.assert_close(row, *torch.autograd.grad(value, pixel_values, retain_graph=True))


# Processes

# Arguments: a folder. Two processes, which begin as copies of one that has imported everything.
DISTRIBUTED = """
import os, sys

import torch
from small_models import ALL_KINDS, BACKBONES, random_labels, small_config
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from transformers_degmix import DeGMixForMultiTaskDensePrediction

FOLDER = sys.argv[1]
TASKS = {name: ALL_KINDS[name] for name in ("semseg", "depth")}


def build(backbone):
    torch.manual_seed(0)
    config = small_config(tasks=TASKS, num_mixer_layers=1, backbone_config=BACKBONES[backbone])
    return DeGMixForMultiTaskDensePrediction(config)


def collate(samples):
    labels = {task: torch.stack([sample[task] for sample in samples]) for task in TASKS}
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}


def train(rank, backbone, **fields):
    model = build(backbone)
    before = {name: x.clone() for name, x in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(TASKS, 12, 32, 32)
    images = torch.randn(12, 3, 32, 32, generator=generator)
    data = [{"pixel_values": x, **{task: labels[task][i] for task in TASKS}} for i, x in enumerate(images)]
    args = TrainingArguments(
        FOLDER, use_cpu=True, ddp_backend="gloo", report_to=[], max_steps=3, per_device_train_batch_size=2,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, learning_rate=0.01, **fields,
    )
    trainer = Trainer(model, args, data_collator=collate, train_dataset=data)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    for name, x in model.named_parameters():
        other = x.detach().clone()
        distributed.broadcast(other, 0)
        assert torch.equal(x, other), name
        assert not x.requires_grad or not torch.equal(x, before[name]), name
        assert x.requires_grad or torch.equal(x, before[name]), name


def shard(rank):
    torch.manual_seed(0)
    pixel_values, labels = torch.randn(2, 3, 32, 32), random_labels(TASKS, 2, 32, 32)
    model, sharded = build("resnet").eval(), build("resnet").eval()
    expected = model(pixel_values, labels=labels).loss
    expected.backward()
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(sharded.modules())):  # those inside first
        if module.__class__.__name__ in sharded._no_split_modules or isinstance(module, (nn.Linear, nn.Conv2d)):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss = sharded(pixel_values, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, x), y in zip(model.named_parameters(), sharded.parameters()):
        if x.requires_grad:
            torch.testing.assert_close(y.grad.full_tensor(), x.grad, rtol=1e-4, atol=1e-5, msg=name)


def run(rank):
    # What torchrun sets; the address serves only to be there, since the processes find each other by the file.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    distributed.init_process_group("gloo", f"file://{FOLDER}/store", rank=rank, world_size=2)
    train(rank, "swin", gradient_checkpointing=True)
    train(rank, "dinov2", ddp_find_unused_parameters=False)
    shard(rank)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run, nprocs=2, start_method="fork")
"""


def test_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    # the folder of `small_models`, as the tests have it
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert process.returncode == 0, process.stderr
