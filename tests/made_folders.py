"""Run folders, and the commands that read them, for tests of eval.py and lab."""

import importlib
import json
from dataclasses import asdict, replace

import torch
from made import NAMES
from PIL import Image

import data
import eval as evaluation
import formats.weights
import model
import train
from formats.checkpoints import save_checkpoint, tensors_of
from parts.settings import run_command, write_json
from parts.text import Text
from parts.world import Thing, draw_scenes

RED, BLUE = Thing(shape="circle", colour="red", cell=0), Thing(shape="cross", colour="blue", cell=3)


def make_runs(tmp_path_factory):
    """A run folder for each kind: a model with fresh weights, its tokenizer, the settings."""
    folders = {}
    for name in NAMES:
        folders[name] = folder = tmp_path_factory.mktemp(name)
        config = replace(model.PRESETS[name], layers=2, width=64, ffn=64)
        data.train_tokenizer(folder / "tokenizer.json", config)
        torch.manual_seed(0)
        manifest = {"config": asdict(config), "dtype": "float32"}
        save_checkpoint(tensors_of(model.from_config(config)), manifest,
                        folder / "checkpoints/0-0000000").result()
        write_json(asdict(train.TrainConfig(preset=name)), folder / "settings.json")
        Image.fromarray(draw_scenes([(RED,)])[0]).save(folder / "red.png")
    return folders


def opened(folder):
    m = formats.weights.load(folder)
    return m, Text(m.tokenizer_file, m.config.kind)


def command(*argv):
    name, *words = map(str, argv)
    if name in ("figures", "alignment", "report"):
        run_command(lambda: importlib.import_module(f"lab.{name}").main(words))
    else:
        run_command(lambda: evaluation.main([name, *words]))


def made_up(folder, preset="tiny-emu3", **arms):
    """A run folder of three layers, as training leaves it, without weights."""
    folder.mkdir(parents=True)
    row = {"std": [0.1, 0.2, 0.3], "uniform": 0.25, "samples": 7}
    curves = {"gen": {"target": [0.4, 0.4, 0.2], "before": row | {"intensity": [0.1, 0.2, 0.6]}} | arms,
              "und": {"target": [0.1, 0.2, 0.3], "before": row | {"intensity": [0.6, 0.2, 0.1], "std": [0, 0, 0.3]}}}
    lines = [{"name": "tune", "step": step, "gen": {"ntp": 1 / step, "aia": 0.1}} for step in (1, 2, 4)]
    for name, content in (("curves", curves), ("settings", {"preset": preset, "out": "<b>&amp;"}),
                          ("scores", {"und_by_topic": {"count": 0.75, "<i>": 1.0}}), ("result", {"und": 0.875})):
        write_json(content, folder / f"{name}.json")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "tu')
    return folder
