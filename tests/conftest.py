"""Put the repository root on the path, so that a bare `pytest` finds the code; tests that wait for --slow; the
device of tests that compare numbers."""
import json
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)          # small tensors: a second thread waits more than it helps


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="run the tests that take minutes too, and write how they went to assets/slow-tests.json")
    parser.addoption("--device", default="cpu", help="where tests that compare numbers compute, such as cuda")


@pytest.fixture(scope="session")
def device(request):
    """What such tests draw is drawn on the CPU and moved here, so that the numbers are the same everywhere."""
    return torch.device(request.config.getoption("--device"))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")     # one process is no mistake


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--slow"):
        rows = [{"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
                for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)
                if report.when == "call" and "slow" in report.keywords]
        file = Path(__file__).parent.parent / "assets/slow-tests.json"
        if rows:
            file.write_text(json.dumps({"torch": torch.__version__, "python": platform.python_version(),
                                        "date": time.strftime("%Y-%m-%d"), "tests": rows}, indent=1) + "\n")
