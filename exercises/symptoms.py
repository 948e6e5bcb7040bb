"""Exercise 7: three numbers, each computed in two ways that must agree. In a broken copy one pair does not.

    python -m exercises.symptoms
"""

import tempfile
from pathlib import Path

import torch

import aia
import data
import model
import train
from parts.world import World

TARGETS = {task: aia.targets(model.PRESETS["tiny-emu3"].layers, task) for task in aia.TASKS}
NOTHING = dict.fromkeys(aia.TASKS, 0.0)             # lambda 0: L_AIA is measured, and adds nothing


def alone_and_padded(m, text):
    """Probability of the likeliest word after a prompt: by itself, and padded on the left beside a longer one."""
    short, long = ([*text.encode(prompt)] for prompt in ("a red circle", "a blue square below a green triangle"))
    gap = len(long) - len(short)
    alone = m.logits(torch.tensor([short]))
    both = torch.tensor([[m.ids["pad"]] * gap + short, long])
    mask = torch.ones_like(both).bool()
    mask[0, :gap] = False
    padded = m.logits(both, mask=mask)
    return [logits[0, -1].softmax(-1).max() for logits in (alone, padded)]


def measured(m, batches):
    """Both losses of a step, {task: {"ntp", "aia", ...}}."""
    return train.metrics_of(train.accumulate(m, batches, TARGETS, NOTHING, backward=False))


def whole_and_cut(m, step):
    """Next-token loss of the answers of a step: in one micro-batch, and cut into four."""
    return [measured(m, step(micro_batch, 0.0))["und"]["ntp"] for micro_batch in (16, 4)]


def dropped_and_left_out(m, step):
    """L_AIA of 16 drawings, some with their prompts dropped: as a step reports it, and of the others by themselves."""
    batches = step(16, 0.5)
    valid = batches[0].aia_valid
    return measured(m, batches)["gen"]["aia"], aia.loss(m(batches[0]).intensity[valid], *TARGETS["gen"], valid[valid])


@torch.no_grad()
def main():
    torch.manual_seed(0)
    m = model.build("tiny-emu3").eval()
    with tempfile.TemporaryDirectory() as folder:
        text = data.train_tokenizer(Path(folder) / "tokenizer.json", m.config)
    source, preparer = data.WorldSource(World(0), 32, 0), data.Preparer(m, text)

    def step(micro_batch, drop):
        return data.Schedule(source, preparer, 0, 32, (1, 1), micro_batch, drop).step(0)
    pairs = {"a prompt alone | beside a longer one": alone_and_padded(m, text),
             "a step in one micro-batch | in four": whole_and_cut(m, step),
             "prompts dropped | left out": dropped_and_left_out(m, step)}
    for name, (one, other) in pairs.items():
        same = abs(one - other) < 1e-4 * abs(one)
        print(f"{name:38} {one:.5f} | {other:.5f}   {'the same' if same else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
