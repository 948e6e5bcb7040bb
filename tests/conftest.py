"""Put the repository root on the path, so that a bare `pytest` finds the code; tests that wait for --slow; the
device of tests that compare numbers; the fixtures that several files share."""
import json
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
# The made modules hold asserts too. pytest must know before their first import, hence the imports in the fixtures.
pytest.register_assert_rewrite(*(file.stem for file in Path(__file__).parent.glob("made*.py")))
torch.set_num_threads(1)          # small tensors: a second thread waits more than it helps


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="run the tests that take minutes too, and write how they went to assets/slow-tests.json")
    parser.addoption("--device", default="cpu", help="where tests that compare numbers compute, such as cuda")


@pytest.fixture(scope="session")
def device(request):
    """What such tests draw is drawn on the CPU and moved here, so that the numbers are the same everywhere."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def seed_and_one_thread():
    """On a busy machine threads that wait for each other make these tiny sizes ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emu3(device):
    """A tiny random Emu3 of transformers, and ours with its weights."""
    from made import emu3_pair
    return emu3_pair(device)


@pytest.fixture(scope="session")
def janus(device):
    """A tiny random Janus of transformers, and ours with its weights."""
    from made import janus_pair
    return janus_pair(device)


@pytest.fixture(params=["emu3", "janus"])
def pair(request):
    """Each of these pairs in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def both_texts(tmp_path_factory):
    """{kind: tokenizer} of the tiny presets."""
    from made_data import train_tokenizers
    return train_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def preparers(both_texts):
    """{kind: preparer} with tiny models of random weights."""
    from made_data import make_preparers
    return make_preparers(both_texts)


@pytest.fixture
def album(tmp_path):
    """A folder with pictures, good and bad; album(*entries) writes a JSON-lines file beside them."""
    from made_data import make_album
    return make_album(tmp_path)


@pytest.fixture
def saved(tmp_path):
    """saved(kind, seed, **changes): tiny weights, and the folder in which they are."""
    from made_data import saver
    return saver(tmp_path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{name: run folder} of models with fresh weights."""
    from made_folders import make_runs
    return make_runs(tmp_path_factory)


@pytest.fixture(scope="session")
def two_steps(runs, tmp_path_factory):
    """A run of two steps with both arms, from fresh weights, scored. It is there to be read only."""
    from made_runs import command
    folder = tmp_path_factory.mktemp("two steps") / "run"
    command("--init", runs["tiny-emu3"], "--arms", "both", "--steps", 2, "--batch-size", 4, "--pool", 8, "--eval-n", 1,
            "--calibration", 1, "--micro-batch", 3, "--log-every", 1, "--lr", 0.01, "--out", folder)
    return folder


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")     # one process is no mistake


def pytest_terminal_summary(terminalreporter, config):
    # Some of them would replace all in the file.
    chosen = config.option.keyword or config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("--slow") and not chosen:
        rows = [{"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
                for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)
                if report.when == "call" and "slow" in report.keywords]
        file = Path(__file__).parent.parent / "assets/slow-tests.json"
        if rows:
            file.write_text(json.dumps({"torch": torch.__version__, "python": platform.python_version(),
                                        "date": time.strftime("%Y-%m-%d"), "tests": rows}, indent=1) + "\n")
