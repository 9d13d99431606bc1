"""Settings that must stand before anything is imported, and what tests of several folders use."""

import os

import pytest
from hub_server import HubServer


# Nothing is fetched, and small tensors are quicker on one thread (tests run side by side, one process per core).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def hub():
    with HubServer(token="hf_right") as server:
        yield server
