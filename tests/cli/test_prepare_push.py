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


@pytest.mark.parametrize(
    ("failure", "token", "reason"),
    [
        (None, "hf_wrong", "401 Unauthorized.*Invalid username or password"),
        ((403, "/lfs-objects/"), "hf_right", "Error while uploading 'data/.*403 Forbidden"),
        ((500, "/commit/"), "hf_right", "500 Internal Server Error"),
        ((None, "/commit/"), "hf_right", "Server disconnected"),
    ],
)
def test_a_failed_push_keeps_the_data_and_a_retry_pushes_the_whole(run, hub, tmp_path, failure, token, reason):
    # An earlier push, of more shards.
    old = {f"data/train-0000{k}-of-00002.parquet": File(b"old", is_lfs=True) for k in range(2)}
    earlier = hub.repos["datasets", "user/set"] = Repo(private=True)
    earlier.commit({**old, ".gitattributes": File(b"* text", is_lfs=False)})
    if failure:
        status, path = failure
        hub.fail_next(status, path=path)
    source, output = write_nyud(tmp_path), tmp_path / "out"
    process = run(
        "-m", "transformers_degmix", "prepare", "nyud", source, output, "--push-to-hub", "user/set", HF_TOKEN=token
    )
    (error,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert re.fullmatch(f"error: {output} is complete but not pushed; `.*` tries again: .*{reason}.*", error), error
    assert "data/train-00001-of-00002.parquet" in hub.files("user/set") and (output / "README.md").exists()

    again = run(re.search("`(.*)`", error)[1], shell=True)
    assert again.returncode == 0, again.stderr
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    assert hub.files("user/set") == {
        ".gitattributes": b"* text",
        **{name: (output / name).read_bytes() for name in ("README.md", *shards)},
    }
