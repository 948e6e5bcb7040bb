"""Reference curves of any transformers model, and targets made of them (paper, Fig. 4 and the choice of targets).

Targets come from single-task models, and transformers knows hundreds. With eager attention each of their layers returns
its map; a hook reduces it to two numbers and drops it, so there is never more than one map.

    python -m lab.references --hf FOLDER --data questions.jsonl
    python -m lab.references --hf FOLDER --data ids.jsonl --image-ids 151854:184621      # a generator, from token ids
"""

import contextlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import aia
import data
import eval as evaluation
from formats.datasets import FileSource
from formats.records import conversation_parts
from parts.pictures import load_picture
from parts.settings import InputError, check_out, device_of, opt, parse, run_command, tell, text_lines, write_json

# Legend: H heads, T tokens, L layers. A sample is (task, origin, inputs of the model, roles (1, T) as in data.py).


@dataclass(frozen=True)
class References:
    """Measure the intensity per layer of any transformers model, and make targets of it."""

    hf: str = opt("", "folder or hub id of any transformers model")
    data: str = opt("", "questions about pictures, as for train.py --data; with --image-ids, JSON lines of token ids")
    image_ids: str = opt("", "FIRST:LAST of the ids that are picture codes")
    n: int = opt(100, "samples for each task")
    dtype: str = opt("stored", "of the weights", ("stored", "float32", "bfloat16"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = opt("curves.json", "JSON file to write")


def from_hub(folder, name, *others, **how):
    """Open a local folder or a hub id with the first Auto class of transformers (by name) that fits it."""
    try:
        import transformers
        return getattr(transformers, name).from_pretrained(folder, **how)
    except (OSError, ValueError, ImportError) as error:
        if others and "configuration class" in str(error):      # the next class may know the model
            return from_hub(folder, *others, **how)
        raise InputError(f"--hf {folder}: {name} failed with {error!r:.200}: give the folder or hub id of a model that "
                         "transformers knows, and install what it needs") from error


@torch.inference_mode()
def hf_intensity(m, inputs, condition, queries):
    """One sample through a transformers model -> (L, 2): intensity (Eq. 1) of each layer, and attention on the first
    token.

    inputs as the model takes them; condition, queries (1, T) bool. InputError if a layer returns no attention map.
    """
    found = {}                                                                  # {layer: (2,)}
    condition = condition.to(m.device)
    queries = queries.to(m.device)

    def keep(module, args, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if torch.is_tensor(weights) and weights.shape[-2:] == (queries.shape[1],) * 2:      # (1, H, T, T)
            # M_l(h, q) = sum_{k in condition} A_l(h, q, k)
            mass = weights[..., condition[0]].sum(-1, dtype=torch.float32)      # (1, H, T)
            found[module.layer_idx] = torch.cat([aia.intensity(part, queries) for part in (mass, weights[..., 0])])
            return output[0], None, *output[2:]      # without the map, which can be freed now
    inputs = {key: x.to(m.device, m.dtype if x.is_floating_point() else None) for key, x in inputs.items()}
    if "logits_to_keep" in inspect.signature(m.forward).parameters:             # nobody reads the (T, V) logits
        inputs["logits_to_keep"] = 1
    decoder = m.get_decoder()                        # the language model, without a picture encoder
    with contextlib.ExitStack() as hooks:
        for part in decoder.modules():
            if hasattr(part, "layer_idx"):
                hooks.enter_context(part.register_forward_hook(keep))
        m(**inputs, use_cache=False)
    layers = range(decoder.config.num_hidden_layers)
    if missing := sorted(set(layers) - set(found)):
        raise InputError(f"{type(m).__name__}: {len(missing)} of {len(layers)} layers (first: {missing[0]}) return no "
                         "attention map: choose a model with eager softmax attention in every layer")
    return torch.stack([found[layer] for layer in layers]).cpu()                # (L, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
def hf_question(config, processor, record):
    """First turn of a record -> inputs in the model's own chat template, and roles (1, T); answer and EOS come last."""
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", -1)
    asked, (answer,) = conversation_parts(record.turns, len(record.pictures))[0]
    content = []
    for part in asked:                               # a text, or the number of a picture
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image", "image": load_picture(record.pictures[part], "janus")})
    try:
        inputs = dict(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                                    add_generation_prompt=True, return_dict=True, return_tensors="pt"))
        said = processor.tokenizer.encode(answer, add_special_tokens=False) + [processor.tokenizer.eos_token_id]
    except Exception as error:                       # templates, tokenizers and picture readers raise what they like
        raise InputError(f"{record.origin}: {error!r:.200}: choose a model that chats about pictures") from error
    roles = torch.where(inputs["input_ids"] == image, data.IMAGE, data.CONTROL)             # (1, P), of the prompt
    for key, x in inputs.items():
        if x.shape == roles.shape:                                              # ids, mask, types of tokens (0: text)
            inputs[key] = torch.nn.functional.pad(x, (0, len(said)), value=int(key == "attention_mask"))    # (1, T)
    inputs["input_ids"][:, -len(said):] = torch.tensor(said)
    return inputs, torch.cat([roles, torch.full((1, len(said)), data.ANSWER)], 1)


def hf_ids(file, codes, vocab):
    """Samples that are token ids already, JSON lines {"ids", "task"} or with "answer", the position where it begins.
    codes: range of the ids that are parts of a picture."""
    for origin, line in text_lines(file):
        try:
            entry = json.loads(line)
            ids, task, start = entry["ids"], entry["task"], entry.get("answer")
            good = task in aia.TASKS and good_ids(ids, start, codes, vocab)
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise InputError(f'{origin}: give {{"ids": [below {vocab}], "task": "gen" or "und"}}, "answer" after codes')
        image = torch.tensor([[token in codes for token in ids]])               # (1, T)
        before = image.cumsum(1)                                                # codes up to each token (1, T)
        if task == "gen":
            words, role, shown = before == 0, data.TEXT, data.DRAWN
        else:
            words = (before == before[:, -1:]) & (torch.arange(len(ids)) >= (start or 0))
            role, shown = data.ANSWER, data.IMAGE
        other = torch.where(words, role, data.CONTROL)
        yield task, origin, {"input_ids": torch.tensor([ids])}, torch.where(image, shown, other)


def good_ids(ids, start, codes, vocab):
    """Whether ids are a list of ids below vocab, with no code from start on (None: no start is given)."""
    if not ids or not all(type(token) is int and 0 <= token < vocab for token in ids):
        return False
    return start is None or 0 <= start and not any(token in codes for token in ids[start:])


# ---------------------------------------------------------------------------------------------------------------------
# Curves, and targets made of them
# ---------------------------------------------------------------------------------------------------------------------
def hf_measure(m, samples, n):
    """The first n samples of each task -> {task: intensity (mean, std) and sink per layer, share of keys, count}."""
    found = {}                                                                  # {task: [((L, 2), (1,)), ...]}
    for task, origin, inputs, roles in samples:
        condition, queries = data.spans(roles, task)
        if not (condition.any() and queries.any()):
            raise InputError(f"{origin}: nothing to measure: give a picture, and text before (gen) or after it (und)")
        rows = found.setdefault(task, [])
        if len(rows) < n:
            rows.append((hf_intensity(m, inputs, condition, queries), evaluation.uniform_share(condition, queries)))
    curves = {}
    for task, rows in found.items():
        each, even = (torch.stack(part) for part in zip(*rows, strict=True))    # (n, L, 2), (n, 1)
        curves[task] = {"intensity": each.mean(0)[:, 0].tolist(), "std": each.std(0, correction=0)[:, 0].tolist(),
                        "uniform": even.mean().item(), "sink": each.mean(0)[:, 1].tolist(), "samples": len(rows)}
    return curves


def hf_curves(settings):
    """Write the curves of a transformers model, and stages for --aia-targets: those of the measured tasks, and the
    paper's for the other task."""
    first, colon, last = settings.image_ids.partition(":")
    good = not settings.image_ids or (first.isdigit() and last.isdigit() and int(first) <= int(last))
    if not (settings.hf and settings.data and good):
        raise InputError("give --hf FOLDER, --data FILE and, if that holds token ids, --image-ids FIRST:LAST")
    check_out(settings.out)
    dtype = "auto" if settings.dtype == "stored" else settings.dtype
    device = device_of(settings.device)
    m = from_hub(settings.hf, "AutoModelForImageTextToText", "AutoModelForCausalLM", dtype=dtype,
                 attn_implementation="eager").eval().to(device)
    if colon:
        samples = hf_ids(settings.data, range(int(first), int(last) + 1), m.get_input_embeddings().num_embeddings)
    else:
        processor = from_hub(settings.hf, "AutoProcessor")
        source = FileSource(settings.data, "janus")
        records = (source.record("und", i) for i in range(min(settings.n, source.count("und"))))
        samples = (("und", record.origin, *hf_question(m.config, processor, record)) for record in records)
    result = hf_measure(m, samples, settings.n)
    if not result:
        raise InputError(f"--data {settings.data} has nothing to measure: give questions about pictures, or token ids")
    paper = {task: aia.stages_of(aia.DEPTH, task) for task in aia.TASKS}
    stages = {task: aia.stages_from_curve(row["intensity"], task) for task, row in result.items()}
    out = Path(settings.out).with_suffix(".json")
    write_json(result | {"stages": paper | stages}, out)
    return {"out": str(out), "stages": stages}


def main(argv=None):
    tell(hf_curves(parse(References, argv, "python -m lab.references")))


if __name__ == "__main__":
    run_command(main)
