"""Settings that must stand before anything is imported."""

import os


# Nothing is fetched, and small tensors are quicker on one thread (tests run side by side, one process per core).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
