"""`push_to_hub.py` and what loads from there: the real client, and a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_command
from small_models import small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.hub.model_directory import save_model_directory


REPO = Path(__file__).parents[2]

# Arguments: revision, where to put outputs. With and without the package.
LOAD = """
import sys

import torch

revision, output, *without = sys.argv[1:]
if without:
    class HidePackage:
        def find_spec(self, name, *_):
            if name.split(".")[0] == "transformers_degmix":
                raise ModuleNotFoundError(f"{name} is hidden")

    sys.meta_path.insert(0, HidePackage())
else:
    import transformers_degmix
from transformers import AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

trust = {"trust_remote_code": bool(without)}
pixels = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
logits = []
for options in ({}, {"revision": revision}):
    model = AutoModel.from_pretrained("user/model", **options, **trust)
    assert type(model).__module__.startswith("transformers_modules." if without else "transformers_degmix.")
    with torch.no_grad():
        logits.append(model(pixels).logits)
torch.save(logits, output)
assert AutoImageProcessor.from_pretrained("user/model", backend="pil", **trust).size == {"shortest_edge": 48}
predict = pipeline("multi-task-dense-prediction", model="user/model", **trust)
assert predict.image_processor.size == {"shortest_edge": 48}
"""

PUSH = """
import sys
from transformers_degmix.hub.model_directory import push_model_directory

for directory in sys.argv[1:]:
    try:
        push_model_directory(directory, "user/model")
        print("pushed")
    except OSError as error:
        print(error)
"""


@pytest.fixture
def run(hub, tmp_path):
    """Runs this Python, with an empty cache in each call."""

    def run(*words, **env):
        home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=REPO,
            env={**os.environ, **hub.env, "HF_HOME": str(home), **env},
            capture_output=True,
            text=True,
        )

    return run


def save_model(path: Path, seed: int = 0) -> torch.nn.Module:
    model = small_model(seed)
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks, do_resize=True, size={"shortest_edge": 48})
    card = {"README.md": b"---\nlicense: mit\n---\n# card", "predictions.jpg": b"\0picture"}
    save_model_directory(path, model, processor, overwrite=True, more=card)
    return model


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_round_trip(run, hub, tmp_path):
    directories = [tmp_path / "first", tmp_path / "second"]
    models = [save_model(directory, seed) for seed, directory in enumerate(directories)]
    process = run("-c", PUSH, *directories)
    assert process.stdout == "pushed\n" * 2, process.stderr
    repo = hub.repos["models", "user/model"]
    _, *commits = repo.commits
    for directory, commit in zip(directories, commits, strict=True):
        assert {path: file.content for path, file in repo.files(commit).items()} == contents(directory)
    assert {path for path, file in repo.files("main").items() if file.is_lfs} == {
        "model.safetensors",
        "predictions.jpg",
    }

    pixels = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    for without in ([], ["without"]):
        process = run("-c", LOAD, commits[0], tmp_path / "logits", *without)
        assert process.returncode == 0, process.stderr
        for model, loaded in zip(models[::-1], torch.load(tmp_path / "logits")):
            with torch.no_grad():
                expected = model(pixels).logits
            assert all(torch.equal(loaded[task], expected[task]) for task in expected)


def test_failures_leave_nothing_and_a_retry_pushes_the_whole(run, hub, tmp_path):
    directory = tmp_path / "model"
    save_model(directory)
    process = run("-m", "transformers_degmix", "push", directory, "user/model", HF_TOKEN="hf_wrong")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    (error,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {directory} is not pushed; the same command tries again: ")
    assert "401" in error and "Invalid username or password" in error and not hub.repos

    hub.fail_next(500, path="/repos/create")
    for failure in ((403, "/lfs-objects/"), (500, "/commit/"), (None, "/commit/")):
        hub.fail_next(failure[0], path=failure[1])
    process = run("-c", PUSH, *[directory] * 5)
    assert process.returncode == 0, process.stderr
    for message, line in zip(
        ("500", "403", "500", "disconnected", "pushed"), process.stdout.splitlines(), strict=True
    ):
        assert message in line
    assert hub.files("user/model", "models") == contents(directory)
    assert len(hub.repos["models", "user/model"].commits) == 2  # the empty one and this


def test_weights_of_an_earlier_push_are_replaced(run, hub, tmp_path):
    directory = tmp_path / "model"
    model = save_model(directory)
    earlier = tmp_path / "earlier"
    save_model(earlier)
    (earlier / "model.safetensors").unlink()
    (earlier / "notes.txt").write_text("kept")
    model.save_pretrained(earlier, max_shard_size="20KB")
    assert "model.safetensors.index.json" in contents(earlier)
    process = run("-m", "transformers_degmix", "push", earlier, "user/model", "--private")
    assert (process.returncode, process.stdout.splitlines()[-1]) == (0, f"{hub.url}/user/model"), process.stderr
    assert hub.repos["models", "user/model"].private
    process = run("-c", PUSH, directory)
    assert process.stdout == "pushed\n", process.stderr
    assert hub.files("user/model", "models") == {**contents(directory), "notes.txt": b"kept"}


def test_incomplete_directories_are_not_pushed(monkeypatch, tmp_path):
    directory = tmp_path / "model"
    save_model(directory)
    for name in ("README.md", "model.safetensors"):
        (directory / name).unlink()
    error = run_command(monkeypatch, "push", directory, "user/model")
    assert error == f"error: {directory} is not a complete model directory: it lacks model*.safetensors, README.md"
    assert "lacks config.json" in run_command(monkeypatch, "push", tmp_path / "nothing", "user/model")
