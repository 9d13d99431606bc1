"""`prepare_dataset.py --push-to-hub` and `load_dataset` from there: the real client, and a server on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hub_server import File, Repo
from test_nyud import write_nyud


REPO = Path(__file__).parents[2]
PREPARE = ("-m", "transformers_degmix", "prepare")


@pytest.fixture
def run(hub, tmp_path):
    """Runs a command or the arguments of this Python, with an empty cache in each call."""

    def run(*words, shell=False, **env):
        home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        home.mkdir()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.run(
            words if shell else [sys.executable, *map(str, words)],
            shell=shell,
            cwd=REPO,
            env={**os.environ, **hub.env, "HF_HOME": str(home), "PATH": path, **env},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("dataset", ["rooms", "nyud"])
def test_what_is_pushed_can_be_loaded(run, hub, tmp_path, dataset):
    source, output = "2,1" if dataset == "rooms" else write_nyud(tmp_path), tmp_path / "out"
    process = run(*PREPARE, dataset, source, output, "--push-to-hub", "user/set")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"{hub.url}/datasets/user/set"
    assert hub.repos["datasets", "user/set"].private
    assert hub.files("user/set")["README.md"] == (output / "README.md").read_bytes()

    script = "import datasets, sys; datasets.load_dataset('user/set').save_to_disk(sys.argv[1])"
    process = run("-c", script, tmp_path / "pushed")
    assert process.returncode == 0, process.stderr
    pushed = datasets.load_from_disk(tmp_path / "pushed")
    local = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert list(pushed) == list(local) == ["train", "validation"]
    for split in local:
        assert pushed[split].features == local[split].features
        assert pushed[split].with_format("arrow")[:].equals(local[split].with_format("arrow")[:])
    assert pushed["train"].features["semseg_classes"].feature.names[:2] == ["wall", "floor"]


def push_earlier(hub, name: str):
    """A data set of more shards."""
    shards = {f"data/train-0000{k}-of-00002.parquet": File(b"old", is_lfs=True) for k in range(2)}
    hub.repos["datasets", name] = Repo(private=True)
    hub.repos["datasets", name].commit({**shards, ".gitattributes": File(b"* text", is_lfs=False)})


def check_retry(run, hub, output: Path, name: str, error: str, reason: str):
    """Nothing was pushed. The command that the error names pushes the whole, and nothing earlier is left."""
    pattern = f"error: {output} is complete but not pushed; `(.*)` tries again: .*{reason}.*"
    command = re.fullmatch(pattern, error)
    assert command, error
    assert "data/train-00001-of-00002.parquet" in hub.files(name) and (output / "README.md").exists()
    process = run(command[1], shell=True)
    assert process.returncode == 0, process.stderr
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    assert hub.files(name) == {
        ".gitattributes": b"* text",
        **{path: (output / path).read_bytes() for path in ("README.md", *shards)},
    }


def test_without_access_the_data_is_kept_and_a_retry_pushes_the_whole(run, hub, tmp_path):
    push_earlier(hub, "user/set")
    output = tmp_path / "out"
    process = run(*PREPARE, "nyud", write_nyud(tmp_path), output, "--push-to-hub", "user/set", HF_TOKEN="hf_wrong")
    (error,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    check_retry(run, hub, output, "user/set", error, "401 Unauthorized.*Invalid username or password")


# Prints the errors of several calls.
PREPARE_EACH = """
import sys
from pathlib import Path
from transformers_degmix.cli import main

source, *outputs = sys.argv[1:]
for output in outputs:
    sys.argv = ["degmix", "prepare", "nyud", source, output, "--push-to-hub", f"user/{Path(output).name}"]
    try:
        main()
    except SystemExit as exit:
        print(exit.code)
"""


def test_failures_of_the_hub_keep_the_data_and_a_retry_pushes_the_whole(run, hub, tmp_path):
    failures = {
        "refused": (403, "/lfs-objects/", "Error while uploading 'data/.*403 Forbidden"),
        "failed": (500, "/failed/commit/", "500 Internal Server Error"),
        "dropped": (None, "/dropped/commit/", "Server disconnected"),
    }
    for name, (status, path, _) in failures.items():
        push_earlier(hub, f"user/{name}")
        hub.fail_next(status, path=path)
    process = run("-c", PREPARE_EACH, write_nyud(tmp_path), *(tmp_path / name for name in failures))
    errors = [line for line in process.stdout.splitlines() if line.startswith("error: ")]
    for error, (name, (*_, reason)) in zip(errors, failures.items(), strict=True):
        check_retry(run, hub, tmp_path / name, f"user/{name}", error, reason)
