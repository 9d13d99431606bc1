import resource
import signal

import pytest
import torch
from accelerate import Accelerator

from transformers_degmix.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def parts():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_everything_comes_back(tmp_path, parts):
    save_checkpoint(tmp_path / "c.pt", parts, {"seed": 1}, Accelerator())
    drawn, weight = torch.rand(3), parts["model"].weight.detach().clone()
    fresh = torch.nn.Linear(3, 2)
    others = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters())}
    load_checkpoint(tmp_path / "c.pt", others, {"seed": 1}, Accelerator())
    assert torch.equal(fresh.weight, weight) and torch.equal(torch.rand(3), drawn)
    assert others["optimizer"].state_dict()["state"][0]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_other_arguments_are_named(tmp_path, parts):
    save_checkpoint(tmp_path / "c.pt", parts, {"seed": 1, "batch_size": 2}, Accelerator())
    with pytest.raises(ValueError, match="c.pt is of a run with other arguments: `batch_size` was 2 and is 4$"):
        load_checkpoint(tmp_path / "c.pt", parts, {"seed": 1, "batch_size": 4}, Accelerator())


def test_nan_equals_itself(tmp_path, parts):
    save_checkpoint(tmp_path / "c.pt", parts, {"columns": {"depth": {"invalid": [0, float("nan")]}}}, Accelerator())
    load_checkpoint(tmp_path / "c.pt", parts, {"columns": {"depth": {"invalid": [0, float("nan")]}}}, Accelerator())
    with pytest.raises(ValueError, match=r"`columns` was .*nan.* and is .*\[0, 1\]"):
        load_checkpoint(tmp_path / "c.pt", parts, {"columns": {"depth": {"invalid": [0, 1]}}}, Accelerator())


def test_generators_of_devices_that_are_not_there_are_left_out(tmp_path, parts, monkeypatch):
    save_checkpoint(tmp_path / "c.pt", parts, {}, Accelerator())
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    checkpoint["generators"][0]["cuda"].append(torch.get_rng_state())
    torch.save(checkpoint, tmp_path / "c.pt")
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    load_checkpoint(tmp_path / "c.pt", parts, {}, Accelerator())
    assert len(restored) == torch.cuda.device_count()


@pytest.mark.parametrize("damage", ["empty", "cut", "something else", "object"])
def test_damaged_checkpoint(tmp_path, parts, damage):
    path = tmp_path / "c.pt"
    save_checkpoint(path, parts, {}, Accelerator())
    if damage == "something else":
        torch.save({"weights": 1}, path)
    elif damage == "object":  # whose class would be imported and run
        torch.save({"arguments": Accelerator}, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 1000])
    with pytest.raises(ValueError, match="c.pt is no checkpoint of a training run"):
        load_checkpoint(path, parts, {}, Accelerator())


def test_full_disk_leaves_the_last_checkpoint(tmp_path, parts):
    path = tmp_path / "c.pt"
    save_checkpoint(path, parts, {}, Accelerator())
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*c.pt"):
            save_checkpoint(path, parts, {}, Accelerator())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
