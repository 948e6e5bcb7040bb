"""Pictures from files to tensors: what is refused, transparency, and how each model resizes what it sees and draws.

    python -m pytest tests/test_pictures.py
"""

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from parts.settings import InputError, check_out

MAX_RATIO = {"emu3": 5, "janus": 27}             # Emu3's own limit; Janus-Pro shrinks the short side to 14 of 384
MIN_SIDE = {"emu3": 8, "janus": 1}               # Emu3's own limit


def check_size(width, height, kind):
    """Refuse sizes for which no resize of the model makes sense."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"the picture has {width} x {height} pixels (limit {Image.MAX_IMAGE_PIXELS}): shrink it first")
    if max(width, height) > MAX_RATIO[kind] * min(width, height):
        raise InputError(f"the picture is {width} x {height}, one side over {MAX_RATIO[kind]} times the other: crop it")
    if min(width, height) < MIN_SIDE[kind]:
        raise InputError(f"the picture is {width} x {height}, a side below {MIN_SIDE[kind]} pixels: enlarge it")


def open_picture(source, kind):
    """Path or bytes of a picture file -> Pillow picture of an accepted size; its pixels are read later."""
    name = "the picture" if isinstance(source, bytes) else f"picture {source}"
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise InputError(f"{name} is missing: paths in a data set start from its folder, others from here") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large to open safely ({error}): shrink it first") from error
    except Exception as error:                      # Pillow's readers raise anything at a broken file
        why = re.sub(" <.*>", "", str(error))       # without the address of a buffer
        raise InputError(f"{name} cannot be opened ({why}): check or replace this file") from error
    if picture.mode[0] in "IF":
        raise InputError(f"{name} has more than 8 bits per channel ({picture.mode}), which RGB would cut off: save it "
                         "with 8")
    check_size(*picture.size, kind)
    return picture


def on_white(picture):
    """Pillow picture of any mode -> RGB, with white where it is transparent: what a viewer shows. Dropping transparency
    would uncover what is stored below it: noise, or black on black."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


@dataclass(frozen=True)
class Drawn:
    """A picture that a model has drawn: its codes, as encode_images gives them, and what they look like."""

    codes: torch.Tensor
    pixels: np.ndarray                            # (H, W, 3) uint8


def load_picture(source, kind):
    """Path, bytes, uint8 array (H, W, 3) or Drawn -> RGB picture, turned as its EXIF tag says, on white if
    transparent."""
    if isinstance(source, np.ndarray | Drawn):
        return Image.fromarray(source.pixels if isinstance(source, Drawn) else source)
    picture = open_picture(source, kind)
    try:
        return on_white(ImageOps.exif_transpose(picture))
    except Exception as error:
        name = "the picture" if isinstance(source, bytes) else f"picture {source}"
        raise InputError(f"{name} is broken ({error}): replace it") from error


# ---------------------------------------------------------------------------------------------------------------------
# Resizing
# ---------------------------------------------------------------------------------------------------------------------
def smart_resize(height, width, config):
    """Emu3's target sides: multiples of the code size, area within min_pixels..max_pixels."""
    f = config.factor
    area = height * width
    new = [f * round(side / f) for side in (height, width)]                     # Python rounds half to even
    if new[0] * new[1] > config.max_pixels:
        shrink = (area / config.max_pixels) ** 0.5
        new = [f * int(side / shrink / f) for side in (height, width)]
    elif new[0] * new[1] < config.min_pixels:
        grow = (config.min_pixels / area) ** 0.5
        new = [f * -int(-side * grow // f) for side in (height, width)]
    return tuple(new)


def to_tensor(picture):
    """RGB picture or uint8 array (H, W, 3) -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1) * 2 - 1


def to_picture(pixels):
    """(3, H, W) in [-1, 1] -> uint8 array (H, W, 3), rounded down as both models do."""
    return ((pixels.float() + 1) / 2 * 255).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def emu3_picture(picture, config, area=None):
    """Resize for Emu3, keeping the aspect ratio: to `area` pixels if given (in training), then to its code grid."""
    width, height = picture.size
    if area:
        scale = (area / (width * height)) ** 0.5
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    height, width = smart_resize(height, width, config)
    return to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))


def siglip_picture(picture, config):
    """Resize for SigLIP: the longer side to S, sides rounded *down*, centred on a square of grey 127."""
    size = config.image_size
    longest = max(picture.size)
    width, height = (max(int(side / longest * size), config.min_side) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), (127, 127, 127))
    square.paste(picture, ((size - width) // 2, (size - height) // 2))
    return to_tensor(square)


def janus_picture(picture, config):
    """Resize for Janus-Pro's picture tokenizer: halve with a box filter while large, short side to S, centre crop."""
    size = config.image_size
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return to_tensor(picture.crop((left, top, left + size, top + size)))


def tokenizer_picture(picture, config, training=True):
    """Resize for the picture tokenizer of either model; for Emu3 in training, to the area of a drawn picture."""
    if config.kind == "janus":
        return janus_picture(picture, config)
    area = config.image_size**2 if training else None
    return emu3_picture(picture, config, area)


def drawn_at(side, config):
    """A Config of Emu3 whose pictures, drawn and seen, have the area of side x side pixels, as near as codes allow."""
    if config.kind != "emu3":
        raise InputError(f"--image-size {side}: Janus-Pro draws and sees pictures of one size: leave it out")
    if side == config.image_size:
        return config
    codes = side // config.factor                   # of a row; each row has an end
    if side % config.factor or codes < 2 or codes * (codes + 1) >= config.context:
        raise InputError(f"--image-size {side}: give a multiple of {config.factor} whose square has at least 4 codes, "
                         f"and with row ends less than the {config.context} tokens that the model takes")
    return replace(config, image_size=side, min_pixels=(side - config.factor) ** 2, max_pixels=side**2)


def grid_for(aspect, config):
    """Sides (h, w) of the code grid of a drawn picture with aspect ratio W:H and the area of the model's square one."""
    try:
        w, h = (int(part) for part in aspect.split(":"))
    except ValueError:
        w = h = 0
    limit = MAX_RATIO["emu3"]
    if min(w, h) < 1 or max(w, h) > limit * min(w, h):
        raise InputError(f"--aspect {aspect!r}: give two whole numbers as WIDTH:HEIGHT, up to {limit}:1")
    side = config.image_size * (w * h) ** -0.5                                  # pixels per unit of W:H
    grid = tuple(round(n * side / config.factor) for n in (h, w))               # half to even, as the authors round
    if config.kind == "janus" and grid != config.grid:
        raise InputError(f"--aspect {aspect}: Janus-Pro draws squares only")
    return grid


def picture_form(out, images):
    """The form that a picture file is to have by its name, as Pillow calls it. It may be none of those that are
    shown."""
    form = Image.registered_extensions().get(Path(out).suffix.lower())
    check_out(out)
    if form not in Image.SAVE:
        raise InputError(f"--out {out} cannot be written: give a file that ends in .png")
    if Path(out).resolve() in [Path(image).resolve() for image in images]:
        raise InputError(f"--out {out} is one of the pictures of --image, which would be lost: give another --out")
    return form
