"""Put the repository root on the path, so that a bare `pytest` finds the five files."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)          # small tensors: a second thread waits more than it helps


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")     # one process is no mistake
