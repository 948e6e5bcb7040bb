"""Claims about attention maps and the picture of the method (lab/maps.py)."""

import json

import pytest
import torch
from made import both_models
from made_folders import opened
from PIL import Image

import aia
import data
import eval as evaluation
import lab.maps
from parts.settings import InputError
from parts.world import World


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_maps_are_those_that_the_model_attends_with(name, task, runs):
    """Rows are shares of what is visible, their mass is Eq. 1's, and the model is left as it was."""
    m, text = opened(runs[name])
    batch, = evaluation.HeldOut(World(0), 0).batches(data.Preparer(m, text), task, 3)
    with torch.inference_mode():
        expected = m(batch).intensity                                           # (B, L)
    found = lab.maps.attention_maps(m, batch)
    assert len(found) == m.config.layers
    for layer, one in enumerate(found):
        assert torch.allclose(one.sum(-1), torch.ones(())) and not one.triu(1).any()
        mass = (one * batch.condition[:, None, None]).sum(-1)                   # (B, H, T)
        torch.testing.assert_close(aia.intensity(mass, batch.queries), expected[:, layer], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(m(batch).intensity, expected)


def test_marked_positions_are_drawn_as_stretches():
    """A row end between two rows of codes is not marked, so a picture is several stretches."""
    assert lab.maps.stretches(torch.tensor([0, 1, 1, 0, 1]).bool()) == [(1, 2), (4, 4)]
    assert lab.maps.stretches(torch.tensor([1, 1]).bool()) == [(0, 1)] and not lab.maps.stretches(torch.zeros(3).bool())


def test_the_picture_of_the_method_is_drawn(runs, tmp_path, capsys):
    """Both maps of one layer, and the curves; a layer that the model lacks is refused."""
    lab.maps.main([str(runs["tiny-emu3"]), "--layer", "1", "--out", str(tmp_path / "method.png")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result "))
    assert result["layer"] == 1 and 0 < result["gen"] < 1 and Image.open(tmp_path / "method.png").width > 1500
    with pytest.raises(InputError, match="--layer 7: the model has layers 0 to 1"):
        lab.maps.main([str(runs["tiny-emu3"]), "--layer", "7", "--out", str(tmp_path / "method.png")])
