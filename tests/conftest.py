"""Settings that must stand before anything is imported, and what tests of several folders use."""

import os

import pytest
from hub_server import HubServer
from hypothesis import HealthCheck, settings
from transformers.utils import is_timm_available, is_torchvision_available


# Nothing is fetched, and small tensors are quicker on one thread (tests run side by side, one process per core).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# No test fails because others take the cores.
settings.register_profile("without_limits_of_time", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without_limits_of_time")


def pytest_collection_modifyitems(items):
    if not (is_torchvision_available() and is_timm_available()):
        for item in items:
            if item.get_closest_marker("vision"):
                item.add_marker(pytest.mark.skip(reason="needs torchvision and timm: `make test-vision`"))


@pytest.fixture
def hub():
    with HubServer(token="hf_right") as server:
        yield server
