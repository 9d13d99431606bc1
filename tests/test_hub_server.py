"""The Hub that other tests talk to: commits, ranges of bytes and errors, as the real client expects them."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    api = HfApi(hub.url, token="hf_right")
    api.create_repo("user/model")
    return api


def commit(api: HfApi, *operations: CommitOperationAdd | CommitOperationDelete) -> str:
    return api.create_commit("user/model", operations, commit_message="change").oid


def test_revisions(api, tmp_path):
    weights = [bytes([0, k]) * 1000 for k in range(2)]
    commits = [
        commit(api, CommitOperationAdd("config.json", b"%d" % k), CommitOperationAdd("a/weights.bin", weights[k]))
        for k in range(2)
    ]
    last = commit(api, CommitOperationDelete("config.json"))
    assert api.create_repo("user/model", exist_ok=True).repo_id == "user/model"
    assert api.model_info("user/model").sha == last and api.list_repo_files("user/model") == ["a/weights.bin"]
    for k in range(2):
        folder = tmp_path / str(k)
        api.snapshot_download("user/model", revision=commits[k], cache_dir=tmp_path / "cache", local_dir=folder)
        assert (folder / "config.json").read_bytes() == b"%d" % k
        assert (folder / "a/weights.bin").read_bytes() == weights[k]


def test_paths_and_ranges(hub, api):
    content = bytes(range(256)) * 10
    commit(api, CommitOperationAdd("a/b.bin", content))
    url, headers = f"{hub.url}/user/model/resolve/main/a/b.bin", {"Authorization": "Bearer hf_right"}
    for wanted, part in (("300-349", content[300:350]), ("2550-", content[-10:]), ("2559-3000", content[-1:])):
        response = get_session().get(url, headers={**headers, "Range": f"bytes={wanted}"})
        assert response.status_code == 206 and response.content == part
    assert get_session().get(url, headers={**headers, "Range": "bytes=2560-"}).status_code == 416
    file, folder = api.get_paths_info("user/model", ["a/b.bin", "a", "c"])
    assert (file.size, file.lfs.size, folder.path) == (2560, 2560, "a")


def test_errors(hub, api, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/other")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/model", revision="1" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("user/model", "nothing", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="401.*\n*.*Invalid username"):
        HfApi(hub.url, token="hf_wrong").create_repo("user/model", exist_ok=True)
    hub.fail_next(502, times=2, path="/create")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="502"):
            api.create_repo("user/more")
    hub.fail_next(None)
    with pytest.raises(Exception, match="disconnected"):
        api.create_repo("user/more")
    api.create_repo("user/more")
    assert hub.requests["POST", "/api/repos/create"] == 6
