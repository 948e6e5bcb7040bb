"""Put the repository root on the path, so that a bare `pytest` finds the five files."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)          # small tensors: a second thread waits more than it helps


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")     # one process is no mistake
