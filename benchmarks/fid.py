"""Frechet Inception Distance of two sets of pictures (arXiv 1706.08500). Lower is better. The AIA paper reports none.

Variants: "pytorch" and "clean" do what the packages pytorch-fid and clean-fid do; "world" compares drawings of a run
with held-out scenes of the built-in world.
    python eval.py score fid --data REAL --preds DRAWN --out scores/fid
    python eval.py score fid --variant world --checkpoint RUN --out scores/fid
"""

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import eval as evaluation
from parts.pictures import to_tensor
from parts.processes import rank
from parts.settings import InputError, device_of, first_line, stream
from parts.world import draw_scenes, prompt_text, world_of


# ---------------------------------------------------------------------------------------------------------------------
# The distance
# ---------------------------------------------------------------------------------------------------------------------
def fid_stats(features):
    """Features (n, d), n > 1 -> mean (d,) and covariance (d, d), dividing by n - 1, in float64 (as both packages)."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"FID: features have the shape {features.shape}; give one row each for two or more pictures")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def fid_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two normal distributions, mu (d,) and sigma (d, d) each (as both packages).

    May be slightly negative. InputError if the two differ in shape.
    """
    mu1, mu2 = (np.atleast_1d(np.asarray(mu, np.float64)) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(np.asarray(sigma, np.float64)) for sigma in (sigma1, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise InputError(f"FID: {mu1.shape}, {sigma1.shape} against {mu2.shape}, {sigma2.shape}; use one network")
    # |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). The trace of the root is the sum of the roots of the
    # eigenvalues, so scipy's matrix root is not needed. Eigenvalues just below 0 have roots without a real part.
    roots = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Features of pictures
# ---------------------------------------------------------------------------------------------------------------------
FID_FILES = {"pytorch": ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")}
FID_FILES["clean"] = (*FID_FILES["pytorch"], "npy", "JPEG", "JPG", "PNG")
FID_PACKAGE = {"pytorch": ("pytorch-fid", "pt_inception-2015-12-05-6726825d.pth"),
               "clean": ("clean-fid", "inception-2015-12-05.pt")}


def fid_network(mode, device):
    """Inception-v3 of the installed package: function of pixels (B, 3, 299, 299) from fid_pixels -> (B, 2048)."""
    package, weights = FID_PACKAGE[mode]
    try:
        if mode == "pytorch":
            from pytorch_fid.inception import InceptionV3
            network = InceptionV3(resize_input=False, normalize_input=False).to(device).eval()
            return lambda pixels: network(pixels.to(device))[0].flatten(1)
        from cleanfid.features import build_feature_extractor
        network = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
        return lambda pixels: network(pixels.to(device))                        # scales 0..255 itself
    except ImportError as error:
        raise InputError(f"FID variant {mode} needs the network of {package}: pip install {package}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{package} cannot load its weights {weights} ({first_line(error)}): download them "
                         "first") from error


def fid_pixels(file, mode):
    """A picture, resized as the package does: (3, 299, 299), in [-1, 1] for "pytorch", in [0, 255] for "clean"."""
    try:                                            # official: convert("RGB") drops transparency
        content = np.load(file, allow_pickle=False) if file.suffix == ".npy" else Image.open(file).convert("RGB")
        array = np.array(content)
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"its shape is {array.shape}, not (height, width, 3)")
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"picture {file} cannot be read ({first_line(error)}): replace it") from error
    if mode == "pytorch":
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
        return 2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)[0] - 1
    channels = [Image.fromarray(array[..., i].astype(np.float32)) for i in range(3)]
    planes = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255)


def fid_stored(path):
    """(mu, sigma) of an .npz with mu and sigma, or with features (n, d)."""
    try:
        with np.load(path, allow_pickle=False) as content:
            names = content.files
            stored = {name: content[name].astype(np.float64) for name in ("mu", "sigma", "features") if name in names}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): give an .npz without objects") from error
    if {"mu", "sigma"} <= set(stored):
        mu, sigma = np.atleast_1d(stored["mu"]), np.atleast_2d(stored["sigma"])
    elif "features" in stored:
        mu, sigma = fid_stats(stored["features"])
    else:
        raise InputError(f"{path} holds {', '.join(names)[:200] or 'nothing'}: store mu and sigma, or features (n, d)")
    if sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not match or are not finite: make it again")
    return mu, sigma


@torch.inference_mode()
def fid_side(path, mode, load_network, batch=32):
    """(mu, sigma) of a folder of pictures, or of an .npz. load_network() is called only if there are pictures."""
    if Path(path).suffix == ".npz":
        return fid_stored(path)
    pattern = Path(path).rglob("*") if mode == "clean" else Path(path).glob("*")
    files = sorted(file for file in pattern if file.suffix[1:] in FID_FILES[mode])
    if len(files) < 2:
        raise InputError(f"{path} holds {len(files)} pictures: FID needs a folder of them, or an .npz")
    if len(files) < 2048:
        print(f"warning: {path} holds {len(files)} pictures, fewer than features (2048): the covariance is singular")
    network = load_network()
    features = []
    for first in tqdm(range(0, len(files), batch), desc=str(path), unit="batch", disable=None):
        pixels = torch.stack([fid_pixels(file, mode) for file in files[first:first + batch]])
        features.append(network(pixels).double().cpu().numpy())
    return fid_stats(np.concatenate(features))


@torch.inference_mode()
def tokenizer_features(m, pixels):
    """Pixels (n, 3, S, S) -> (n, d): latents of the picture tokenizer (before it picks codes), mean over positions."""
    device = next(m.parameters()).device
    parts = [m.vq.latents(part.to(device)).flatten(2).mean(2).cpu() for part in pixels.split(64)]
    return torch.cat(parts).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def fid_world(settings):
    """Distance of held-out scenes and drawings of their prompts, in the features of the model's own picture tokenizer.
    Not comparable with any other FID."""
    m, text, run = evaluation.load_run(settings)
    if run is None:
        raise InputError("--variant world compares drawings of the built-in world: give --checkpoint a run folder")
    world = world_of(run)
    rng = stream(settings.seed, "prompts")
    pairs = [world.held_out_scene(skill, rng) for skill in world.skills for _ in range(settings.n)]
    prompts = [prompt_text(goal, rng) for _, goal in pairs]
    scenes = draw_scenes([scene for scene, _ in pairs], world.cell_side)
    real = torch.stack([to_tensor(picture) for picture in scenes])                  # (n, 3, S, S)
    drawn = evaluation.draw(m, text, prompts, settings.seed, settings.guidance or None)
    a, b = (fid_stats(tokenizer_features(m, pixels)) for pixels in (real, drawn))
    return {"score": fid_distance(*a, *b), "features": "of the picture tokenizer", "pictures": len(pairs)}


def run_fid(settings, judge):
    """Frechet distance of --data and --preds (or --features), or for "world" of a run's drawings."""
    if rank():
        return None
    if settings.variant == "world":
        return fid_world(settings)
    load_network = functools.cache(lambda: fid_network(settings.variant, device_of(settings.device)))
    paths = (settings.data, settings.features or settings.preds)
    a, b = (fid_side(path, settings.variant, load_network) for path in paths)
    return {"score": fid_distance(*a, *b)}
