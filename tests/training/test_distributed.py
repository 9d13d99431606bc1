import copy
import importlib
import os
import sys
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from transformers_degmix.cli import evaluate
from transformers_degmix.data.splits import DataSplit
from transformers_degmix.inference.dataset import Job, predict_dataset
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.distributed import CpuSyncBatchNorm, convert_sync_batch_norm
from transformers_degmix.training.loop import train


def batch_norm(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    norm = kind(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    return norm


def forward_and_backward(norm: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    outputs = norm(inputs)
    (outputs.sin() * torch.arange(outputs[0].numel()).view_as(outputs[0])).sum().backward()
    return {
        "outputs": outputs.detach(),
        "inputs": inputs.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "variance": norm.running_var,
    }


def one_of_two(rank: int, folder: str, cases: list[tuple[torch.Tensor, nn.Module]]):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for inputs, norm in cases:
        norm = copy.deepcopy(norm)  # whose tensors are in memory that the processes share
        norm = convert_sync_batch_norm(nn.Sequential(norm), torch.device("cpu"))[0]
        results.append(forward_and_backward(norm, inputs[:1] if rank == 0 else inputs[1:]))  # of unequal sizes
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "kinds",
    [
        [(nn.BatchNorm2d, torch.float32), (nn.BatchNorm2d, torch.bfloat16), (nn.BatchNorm1d, torch.float32)],
        pytest.param([("BatchNormAct2d", torch.float32)], marks=pytest.mark.vision),
    ],
    ids=["torch", "timm"],
)
def test_two_processes_are_one_batch(tmp_path, kinds):
    cases = []
    for kind, dtype in kinds:
        kind = getattr(importlib.import_module("timm.layers"), kind) if isinstance(kind, str) else kind
        inputs = (10 + 3 * torch.randn(3, 3, 4, 5)).to(dtype)
        cases.append((inputs.flatten(2) if kind is nn.BatchNorm1d else inputs, batch_norm(kind)))
    # Not forked, because backward passes of the tests before have started threads.
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path), cases), nprocs=2, start_method="spawn")
    results = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)))
    for (inputs, norm), (first, second) in zip(cases, results, strict=True):
        expected = forward_and_backward(norm, inputs)
        # The gradients of this test are of a sine, which makes much of the rounding to bfloat16.
        is_exact = inputs.dtype == torch.float32
        for name in ("outputs", "inputs") if is_exact else ("outputs",):
            both, tolerance = torch.cat([first[name], second[name]]), 1e-4 if is_exact else 2e-2
            torch.testing.assert_close(both, expected[name], rtol=tolerance, atol=1e-4)
        for name in ("weight", "bias") if is_exact else ():  # gradients, which DistributedDataParallel adds up
            torch.testing.assert_close(first[name] + second[name], expected[name], rtol=1e-4, atol=1e-3)
        for name in ("mean", "variance"):
            torch.testing.assert_close(first[name], expected[name])
            assert torch.equal(first[name], second[name])


def evaluate_rooms():
    sys.argv[1:] = "--dataset rooms --split test --num-images 1 --image-size 32 48 --output unused".split()
    evaluate.main()


@pytest.mark.parametrize(
    "start",
    [
        lambda: train(TrainingArguments(output_dir="unused")),
        evaluate_rooms,
        lambda: predict_dataset(Job("unused", DataSplit("unused", "test"), "unused")),
    ],
    ids=["train", "evaluate", "predict"],
)
def test_processes_wait_long_for_the_first(monkeypatch, start):
    """Which downloads, renders and examines the data."""
    timeouts = []

    def init_process_group(timeout=timedelta(minutes=10), **options):
        timeouts.append(timeout)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        # As launchers do; Accelerate sets more.
        with patch.dict(os.environ, LOCAL_RANK="0"), pytest.raises(InterruptedError):
            start()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert min(timeouts) > timedelta(days=30)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_keep_their_names(device):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 3, 1), batch_norm()), "b": nn.BatchNorm1d(2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 4, 4)
    expected = model.eval()["a"](images)
    model = convert_sync_batch_norm(model, torch.device(device))
    assert type(model["a"][1]) is (CpuSyncBatchNorm if device == "cpu" else nn.SyncBatchNorm)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(model["a"](images), expected)


@pytest.mark.vision
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_of_timm_stay(device):
    from timm.layers import BatchNormAct2d

    norm = batch_norm(BatchNormAct2d).eval()
    images = torch.randn(2, 3, 4, 4)
    expected = norm(images)
    assert torch.equal(convert_sync_batch_norm(nn.Sequential(norm), torch.device(device)).eval()(images), expected)
    assert (expected >= 0).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_norms_that_do_more_are_refused(device):
    class Scaled(nn.BatchNorm2d):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    with pytest.raises(ValueError, match=r"'1' is a Scaled, .* cannot work over several processes: train in one"):
        convert_sync_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), Scaled(3)), torch.device(device))
