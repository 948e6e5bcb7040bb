"""Attention Interaction Alignment (AIA): the method, in one sitting.

How much attention does one modality pay to the other, layer by layer (Eq. 1)?  Ask for the pattern of single-task
models with a Huber term per layer (Eq. 2), and add it to next-token prediction with a weight lambda (Eq. 3).
Paper: "Architecture Decoupling Is Not All You Need For Unified Multimodal Model", arXiv 2511.22663.

    python -m pytest tests/test_aia.py        # every claim below, checked
"""

import math
from pathlib import Path

import torch

from parts.settings import InputError, read_json

# Legend: B samples, H heads, T tokens, L layers. Tasks: "gen" draws a picture from text, "und" answers about one.
TASKS = ("gen", "und")


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1: intensity
# ---------------------------------------------------------------------------------------------------------------------
# `condition` marks the keys of the other modality, `queries` the rows that are averaged; both are (B, T) bool masks:
#   generation      queries: image tokens that predict another image token     condition: all prompt text
#   understanding   queries: answer tokens that predict another answer token   condition: all image tokens
# Tags around a picture, row ends and size text belong to neither modality, padding to none. data.spans makes the masks.
# model.py returns the mass: for every token and head, the sum of its attention, after the softmax, on the condition.
def at_least_float32(x):
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def intensity(mass, queries):
    """Eq. 1 of one layer: mean over heads, then over query tokens, of the attention mass on the condition.

    mass (B, H, T) in [0, 1], queries (B, T) bool -> (B,), 0 for a sample without queries; of K conditions all begin
    with K. Averaged in float32: in bfloat16 the mass of a token is rounded already, and the mean must not add to that.
    """
    # I_l = 1/(H Q) sum_h sum_{q in queries} sum_{k in condition} A_l(h, q, k)
    per_token = at_least_float32(mass).mean(-2)                                 # (B, T)
    return (per_token * queries).sum(-1) / queries.sum(-1).clamp(min=1)         # (B,)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 2: the loss
# ---------------------------------------------------------------------------------------------------------------------
def loss(intensity, target, delta, valid, reduction="mean"):
    """Eq. 2: Huber distance of each sample's intensity to the target, averaged over layers and valid samples.

    intensity (B, L), target (L,), delta (L,), valid (B,) bool -> scalar.
    reduction "mean" divides by the number of valid samples (0 if there are none); "sum" leaves that to the caller, who
    knows the count of the whole step. The released code divides by the batch size, which weakens AIA by the
    portion of dropped prompts. Invalid samples (dropped prompt, no keys or no queries) add exactly nothing.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is unknown: use 'mean' or 'sum'")
    target, delta = target.to(intensity), delta.to(intensity)
    error = (intensity - target).abs()                                          # (B, L)
    # h(e, d) = e^2/2 if |e| <= d, else d (|e| - d/2); with c = min(|e|, d) both are c (|e| - c/2)
    capped = torch.minimum(error, delta)                                        # (B, L)
    per_sample = (capped * (error - capped / 2)).mean(1)                        # (B,)
    total = torch.where(valid, per_sample, 0.0).sum()
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 3: the weight
# ---------------------------------------------------------------------------------------------------------------------
# L = L_NTP + lambda L_AIA, for each task separately (train.accumulate). lambda is fixed before the first update.
# The paper's text says 40 (Sec. 3.2), the released code uses 5 and 10. Our default is neither: lambda is set so that
# NTP : lambda AIA = 50 : 1 at the start, the best row of the paper's ablation.
LAMBDAS = {"paper": {"gen": 40.0, "und": 40.0}, "released": {"gen": 5.0, "und": 10.0}, "off": {"gen": 0.0, "und": 0.0}}
RHO = 50.0


def lambda_for_ratio(ntp, aia, rho=RHO):
    """lambda such that next-token loss : weighted AIA loss is rho : 1; ntp and aia are means before any update.

    Measure on a trained model: at random weights the intensity is just the share of keys, and the ratio means nothing.
    """
    # lambda = NTP_0 / (rho * L_AIA_0)
    return ntp / (rho * aia) if aia > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The paper's targets
# ---------------------------------------------------------------------------------------------------------------------
# A stage is a range of layers with one target (Table S4). Rows: first layer (from 0, of 32), Huber delta, target share.
# Delta limits the pull too, |dL_AIA / dI_l| <= delta_l / L, so the first layers of generation are pulled hardest.
DEPTH = 32
STAGES = {
    "gen": ((0, 0.20, 0.40), (10, 0.10, 0.40), (20, 0.10, 0.40), (25, 0.05, 0.20), (31, 0.05, 0.20)),
    "und": ((0, 0.05, 0.10), (10, 0.05, 0.15), (20, 0.05, 0.30), (25, 0.05, 0.30), (31, 0.05, 0.20)),
}
# Same deltas and targets, other first layers. Janus-Pro-7B's 30 layers never reach a stage at 30; the paper prints it
# ("l > 29"). The released code differs from Table S5 in one layer: 20 still aims at 0.15 in understanding.
FIRST_LAYERS = {                                  # name: (layers, first layers of generation, of understanding)
    "S4": (32, (0, 10, 20, 25, 31), (0, 10, 20, 25, 31)),                     # Table S4, as printed
    "S5": (30, (0, 10, 20, 25, 30), (0, 10, 20, 25, 30)),                     # Table S5, as printed
    "released": (30, (0, 10, 20, 25, 30), (0, 10, 21, 25, 30)),               # the authors' training code
}
VARIANTS = ("full", "raw", "no-huber", "no-first")    # Table 3: what happens without a part; the last is ours
# Reference curves of single-task models, digitised from the paper's figures: figure, model, direction in the file.
CURVES = Path(__file__).parent / "assets" / "paper_curves.json"
REFERENCES = {                                                                # the paper's table of attention patterns
    "hunyuan-image-3": ("fig1", "hunyuan_image_3", "T2I"),
    "simplear": ("fig4", "simplear", "T2I"),
    "qwen-image": ("fig4", "qwen_image", "T2I"),
    "flux": ("fig4", "flux", "T2I"),
}
RAW = {"gen": REFERENCES["hunyuan-image-3"], "und": ("fig1", "qwen3_vl_8b", "I2T")}


def targets(n_layers, task, table="depth", variant="full", curves=CURVES):
    """Target share and Huber delta of every layer: (target, delta), each (L,) float32.

    table    "depth": Table S4 by relative depth, for any model (equal to "S4" at 32 layers)
             "S4", "S5", "released": layer indices as printed, an error for a model of another depth
             "hunyuan-image-3", "simplear", "qwen-image", "flux": generation stages made from that reference by one
             rule (mean of each stage, rounded to 0.05); understanding stays as in "depth"
             a path: JSON {task: [[first_depth, delta, target], ...]}, first_depth from 0 to below 1, or what
             lab.references writes, which has the same under "stages"
    variant  "full"; "raw": the reference curve itself, layer by layer, instead of stages (delta as in `table`);
             "no-huber": delta is infinite, so that every term is e^2/2; "no-first" changes data.Preparer's masks
    curves   JSON file of reference curves, laid out as assets/paper_curves.json
    """
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown: use one of {', '.join(TASKS)}")
    if variant not in VARIANTS:
        raise InputError(f"AIA variant {variant!r} is unknown: use one of {', '.join(VARIANTS)}")
    rows = stages_of(n_layers, task, table, curves)
    layers = [stage_at((layer + 0.5) / n_layers, rows) for layer in range(n_layers)]
    target = [share for _, _, share in layers]
    delta = [bound for _, bound, _ in layers]
    if variant == "raw":
        target = resample(reference_curve(RAW[task], curves), n_layers)
    if variant == "no-huber":
        delta = [math.inf] * n_layers
    return torch.tensor(target), torch.tensor(delta)


def stages_of(n_layers, task, table="depth", curves=CURVES):
    """Rows (first relative depth, delta, target) of one task."""
    if table == "depth" or (table in REFERENCES and task == "und"):
        return [(first / DEPTH, delta, target) for first, delta, target in STAGES[task]]
    if table in REFERENCES:
        return stages_from_curve(reference_curve(REFERENCES[table], curves))
    if table in FIRST_LAYERS:
        layers, *firsts = FIRST_LAYERS[table]
        if n_layers != layers:
            raise InputError(f"targets {table} are printed for {layers} layers, this model has {n_layers}: use 'depth'")
        rows = zip(firsts[TASKS.index(task)], STAGES[task], strict=True)
        return [(first / layers, delta, target) for first, (_, delta, target) in rows]
    return stages_from_file(table, task)


def stage_at(depth, rows):
    """The last stage that begins at or before a relative depth. A layer is looked up at its middle, (l + 0.5) / L, so
    that 32 layers change stage exactly at 10, 20, 25 and 31."""
    return [row for row in rows if row[0] <= depth][-1]


def stages_from_file(path, task):
    """Rows of a user's JSON file, checked."""
    names = ", ".join(["depth", *FIRST_LAYERS, *REFERENCES])
    table = read_json(path, f"targets (known by name: {names})")
    try:
        stages = table.get("stages", table)[task]
        rows = [(float(first), float(delta), float(target)) for first, delta, target in stages]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        layout = '{"gen": [[first_depth, delta, target], ...], "und": ...}'
        raise InputError(f"targets {path}: no usable rows for task {task!r}, expected {layout}") from error
    depths = [first for first, _, _ in rows]
    good = all(0 <= first < 1 and delta > 0 and 0 <= target <= 1 for first, delta, target in rows)
    if not (rows and depths[0] == 0 and depths == sorted(set(depths)) and good):
        raise InputError(f"targets {path}, task {task!r}: depths must start at 0 and rise to below 1, "
                         "delta must be above 0, targets within 0..1")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Where targets come from: curves of single-task models
# ---------------------------------------------------------------------------------------------------------------------
# First layers (of 32) and deltas of the stages in which a reference curve is averaged.
RULE_STAGES = {"gen": ((0, 0.20), (10, 0.10), (25, 0.05)),
               "und": tuple((first, delta) for first, delta, _ in STAGES["und"])}


def stages_from_curve(curve, task="gen"):
    """Rows of a reference curve for `targets`: mean of its layers in each stage of RULE_STAGES, rounded to 0.05.

    A stage in which a short curve has no layer is left out, and the one before it continues; the first starts at 0."""
    starts = [first / DEPTH for first, _ in RULE_STAGES[task]]
    rows = []
    for start, end, (_, delta) in zip(starts, [*starts[1:], 1.0], RULE_STAGES[task], strict=True):
        inside = [value for i, value in enumerate(curve) if start <= (i + 0.5) / len(curve) < end]
        if inside:
            rows.append((start if rows else 0.0, delta, round(sum(inside) / len(inside) / 0.05) / 20))
    return rows


def reference_curve(key, curves=CURVES):
    """One digitised curve, a value for each of its own layers. key: (figure, model, direction)."""
    figure, model, direction = key
    content = read_json(curves, "reference curves")
    try:
        curve = [float(value) for value in content[figure][model][direction]]
        if len(curve) < 3:
            raise ValueError("fewer than three layers")
        return curve
    except (KeyError, TypeError, ValueError) as error:
        name = "/".join(key)
        raise InputError(f"{curves} has no usable curve {name}: lay it out as assets/paper_curves.json") from error


def resample(curve, n):
    """Linear interpolation of a curve over relative depth to n layers; both end layers stay (as in Fig. 5)."""
    values = torch.tensor(curve, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(values, size=n, mode="linear", align_corners=True)[0, 0].tolist()
