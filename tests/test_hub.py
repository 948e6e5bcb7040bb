"""Claims about folders of weights: what a name stands for, and what is no weights at all (formats/hub.py)."""

import pytest

import formats.weights
from parts.settings import InputError

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


def test_a_hub_id_is_resolved_or_the_download_is_named(janus, tmp_path, monkeypatch):
    """With a local copy it is that folder; without network the one line says what to run."""
    import huggingface_hub
    janus[0].save_pretrained(tmp_path / "copy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(tmp_path / "copy"))
    assert formats.weights.load("someone/some-model").config.layers == 3

    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^someone/some-model is no folder .*\(no network\): run `hf download"):
        formats.weights.load("someone/some-model")
