"""What only a GPU shows; skipped where there is none."""

import pytest
import torch
from accelerate.state import AcceleratorState
from small_models import BACKBONES, random_labels, small_model
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from transformers_degmix.data.rooms import ROOMS_TASKS
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.distributed import convert_sync_batch_norm
from transformers_degmix.training.loop import train


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SCOPES = {
    "token": {},
    "task": {"interaction_scope": "task"},
    "image": {"interaction_scope": "image", "interaction_reduction": 2},
}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(scope: str = "token", device: str = "cuda") -> nn.Module:
    return small_model(backbone_config=BACKBONES["resnet"], **SCOPES[scope]).to(device)  # without random depth


def run(model: nn.Module, device: str, **autocast) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """Loss, logits and gradients, on the CPU, of random images and labels."""
    tasks = getattr(model, "module", model).config.tasks
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(device)
    labels = {name: label.to(device) for name, label in random_labels(tasks, 2, 64, 96).items()}
    with torch.autocast(device, **autocast or {"enabled": False}):
        outputs = model(images, labels=labels)
    outputs.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach().cpu(), {name: x.detach().cpu() for name, x in outputs.logits.items()}, gradients


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_cpu(scope, training):
    loss, logits, gradients = run(build(scope, "cpu").train(training), "cpu")
    own_loss, own_logits, own_gradients = run(build(scope).train(training), "cuda")
    torch.testing.assert_close(own_loss, loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own_logits, logits, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(scope, dtype):
    _, logits, _ = run(build(scope), "cuda")
    _, own_logits, gradients = run(build(scope), "cuda", dtype=dtype)
    for name, expected in logits.items():
        assert (own_logits[name].float() - expected).norm() <= 0.1 * expected.norm(), name
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    model = build()
    images = torch.randn(2, 3, 64, 96, device="cuda")
    with torch.no_grad():
        expected = model(images).logits
        logits = model.to(dtype)(images.to(dtype)).logits
    for name in expected:
        assert logits[name].dtype == dtype
        assert (logits[name].float() - expected[name]).norm() <= 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_trains(mixed_precision, tmp_path):
    AcceleratorState._reset_state(True)  # which has the precision of the process's first accelerator
    scores = train(
        TrainingArguments(
            output_dir=str(tmp_path),
            num_train_images=4,
            num_eval_images=3,
            image_size=[64, 96],
            max_steps=4,
            batch_size=2,
            eval_steps=4,
            num_workers=0,
            num_logged_images=1,
            optimizer="adamw",
            ema_decay=0.9,
            model={"hidden_size": 16, "gating_intermediate_size": 12},
            mixed_precision=mixed_precision,
        )
    )
    assert scores.keys() == ROOMS_TASKS.keys()
    assert (tmp_path / "last" / "model.safetensors").exists()


def test_nccl_with_one_process_is_the_model_itself():
    expected_loss, _, expected = run(build().train(), "cuda")
    init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    try:
        model = convert_sync_batch_norm(build().train(), torch.device("cuda"))
        loss, _, gradients = run(DistributedDataParallel(model, find_unused_parameters=True), "cuda")
    finally:
        destroy_process_group()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-4)
    for name, gradient in expected.items():
        assert (gradients[f"module.{name}"] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-4, name
