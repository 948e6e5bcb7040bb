"""Claims about pictures: reading, resizing, and from bytes to tensors and back (parts/pictures.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_data import random
from PIL import Image

import model
from parts.pictures import (
    check_size,
    drawn_at,
    emu3_picture,
    grid_for,
    janus_picture,
    load_picture,
    on_white,
    siglip_picture,
    smart_resize,
    to_picture,
    to_tensor,
    tokenizer_picture,
)
from parts.settings import InputError


@pytest.mark.parametrize("width, height, expected", [
    (640, 427, (424, 640)), (500, 333, (424, 632)), (1000, 301, (304, 1000)), (384, 384, (512, 512)),
    (200, 150, (448, 592)), (1600, 1203, (880, 1176)), (719, 717, (720, 720)), (4000, 3000, (880, 1176)),
    (524, 516, (512, 528)),                             # 64.5 and 65.5 codes: half to even, 64 and 66
    (516, 508, (512, 512)), (1028, 1020, (1024, 1024))])        # exactly the least and the most: nothing to mend
def test_emu3_picture_sizes(width, height, expected):
    """What Emu3's own code makes of a picture: multiples of 8, area within 512^2..1024^2, height x width."""
    assert smart_resize(height, width, model.PRESETS["emu3-8b"]) == expected
    if width < 600:
        assert emu3_picture(Image.new("RGB", (width, height)), model.PRESETS["emu3-8b"]).shape == (3, *expected)


@pytest.mark.parametrize("width, height, inner", [(500, 333, (384, 255)), (333, 500, (255, 384)), (96, 96, (384, 384)),
                                                  (1000, 20, (384, 14))])
def test_janus_reads_a_picture_on_grey_with_truncated_sides(width, height, inner):
    """333 / 500 * 384 = 255.7 becomes 255, at least 14; the rest of the square is 127, its larger part last."""
    pixels = siglip_picture(Image.new("RGB", (width, height), "white"), model.PRESETS["janus-pro-7b"])
    expected = np.full((384, 384, 3), 127, np.uint8)
    left, top = ((384 - side) // 2 for side in inner)
    expected[top:top + inner[1], left:left + inner[0]] = 255
    torch.testing.assert_close(pixels, torch.from_numpy(expected / np.float32(255)).permute(2, 0, 1) * 2 - 1)


def noise(width, height):
    """Independent pixels, on which any two filters differ; none of them overshoots black or white."""
    return Image.fromarray(random(0).integers(80, 176, size=(height, width, 3)).astype(np.uint8))


def bicubic(pixels, height, width):
    """Pixels (3, H, W) by torch's filter; Pillow's rounds to bytes after each direction."""
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def differ(pixels, expected):
    """The largest difference, in steps of a byte."""
    return (pixels - expected).abs().max() * 127.5


FINE = replace(model.PRESETS["emu3-8b"], image_size=64, min_pixels=32 * 32, max_pixels=128 * 128)
SQUARE = replace(model.PRESETS["janus-pro-7b"], image_size=48)


@pytest.mark.parametrize("width, height, first, then", [
    (60, 90, (78, 52), (80, 48)), (200, 100, (45, 91), (48, 88)), (64, 64, (64, 64), (64, 64))])
def test_emu3_learns_from_pictures_of_the_area_that_it_draws(width, height, first, then):
    """In training a picture is first brought to that area and then to whole codes, both bicubically, as its own
    preparation does; asked about, it keeps its size up to whole codes."""
    picture = noise(width, height)
    pixels = tokenizer_picture(picture, FINE)
    assert abs(first[0] * first[1] / 64**2 - 1) < 0.02 and pixels.shape == (3, *then)
    assert differ(pixels, bicubic(bicubic(to_tensor(picture), *first), *then)) < 2.5
    sides = smart_resize(height, width, FINE)
    assert differ(tokenizer_picture(picture, FINE, training=False), bicubic(to_tensor(picture), *sides)) < 1.5


@pytest.mark.parametrize("width, height", [(100, 80), (20, 30)])
def test_janus_reads_through_a_bicubic_filter(width, height):
    """As its own preparation does, downwards with the filter widened."""
    picture, pixels = noise(width, height), siglip_picture(noise(width, height), SQUARE)
    inner = tuple(int(side / max(width, height) * 48) for side in (height, width))
    top, left = ((48 - side) // 2 for side in inner)
    found = pixels[:, top:top + inner[0], left:left + inner[1]]
    assert differ(found, bicubic(to_tensor(picture), *inner)) < 1.5


@pytest.mark.parametrize("factor, halvings", [(1, 0), (2, 1), (4, 2)])
def test_janus_halves_large_pictures_with_a_box(factor, halvings):
    """Whatever is twice the square or more, also exactly so: each pixel is the mean of those it stands for, cut out of
    the centre, the larger rest last. A halving rounds twice by up to half a step."""
    picture = noise(51 * factor, 48 * factor)
    mean = F.avg_pool2d(to_tensor(picture), factor)                             # (3, 48, 51)
    assert differ(janus_picture(picture, SQUARE), mean[:, :, 1:-2]) < halvings + 0.01


def test_janus_draws_bicubically_below_twice_the_square():
    """Beside the box, which halves only."""
    picture = noise(95, 95)
    assert differ(janus_picture(picture, SQUARE), bicubic(to_tensor(picture), 48, 48)) < 1.5


@pytest.mark.parametrize("width, height", [(1600, 800), (800, 1600), (90, 45), (768, 384)])
def test_janus_draws_the_centre_square(width, height):
    """The short side becomes 384 and the long one is cropped on both sides: of bands 1 : 2 : 1 the middle is left."""
    long = max(width, height)
    bands = np.zeros((height, width, 3), np.uint8)
    rows = bands if height > width else bands.transpose(1, 0, 2)
    rows[:] = (255, 0, 0)
    rows[long // 4:long - long // 4] = (0, 255, 0)
    pixels = janus_picture(Image.fromarray(bands), model.PRESETS["janus-pro-7b"])
    assert pixels.shape == (3, 384, 384)
    middle = pixels[:, 192, :] if width > height else pixels[:, :, 192]                      # (3, 384), along the bands
    assert (middle[1, 8:-8] > 0.99).all() and (middle[0, 8:-8] < -0.99).all()


def test_pictures_are_truncated_to_bytes():
    """Both models cut the fraction off instead of rounding, and clip: (0 + 1) / 2 * 255 = 127.5 becomes 127."""
    pixels = torch.tensor([-9.0, -1.0, 0.0, 0.9999, 1.0, 9.0])[None, None].expand(3, 1, 6)
    assert to_picture(pixels)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    picture = random(0).integers(256, size=(5, 4, 3)).astype(np.uint8)
    assert np.abs(to_picture(to_tensor(picture)).astype(int) - picture).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_many_bits_are_refused(mode, album, tmp_path):
    """Made 8-bit by cutting, all but the darkest of their values would be white."""
    ramp = Image.fromarray(np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16))
    ramp.convert(mode).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="a.tiff has more than 8 bits per channel"):
        load_picture(tmp_path / "a.tiff", "emu3")


def test_a_turned_photo_is_read_as_a_viewer_shows_it(tmp_path):
    """Cameras store the pixels lying on their side and note the turn; ignoring it would teach lying cats."""
    upright = Image.new("RGB", (20, 30), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the top of the scene is on the right of the file
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert load_picture(tmp_path / "turned.png", "emu3").size == (20, 30)


def half_clear(mode):
    """A picture of 8 x 8: its left half is black and transparent, its right half grey 100 and opaque."""
    grey = Image.new("L", (8, 8), 0)
    grey.paste(100, (4, 0, 8, 8))
    clear = Image.new("L", (8, 8), 0)
    clear.paste(255, (4, 0, 8, 8))
    if mode in ("L", "RGB", "P"):
        return grey.convert(mode)
    picture = grey.convert(mode)
    picture.putalpha(clear)
    return picture


@pytest.mark.parametrize("mode, ending, transparency", [
    ("RGBA", "png", None), ("LA", "png", None), ("RGBA", "webp", None), ("RGBA", "tiff", None),
    ("P", "png", 0), ("P", "gif", 0), ("P", "png", bytes(100) + b"\xff"), ("L", "png", 0), ("RGB", "png", (0, 0, 0))])
def test_transparent_pixels_are_white(mode, ending, transparency, tmp_path):
    """As in a viewer. What is stored below them, here black, may be anything and is never meant to be seen."""
    how = {"webp": {"lossless": True}}.get(ending, {})
    if transparency is not None:
        how = {"transparency": transparency}
    half_clear(mode).save(tmp_path / f"a.{ending}", **how)
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert opened.convert("RGB").getpixel((1, 1)) == (0, 0, 0)              # what dropping transparency uncovers
    found = np.asarray(load_picture(tmp_path / f"a.{ending}", "emu3"))
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 100).all()


def test_transparency_is_blended_with_white_whatever_the_mode(tmp_path):
    """Half transparent red is pink. A palette may come with a channel of transparency, and a picture may be turned."""
    assert on_white(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)
    assert on_white(half_clear("PA")).getpixel((1, 1)) == (255, 255, 255)
    assert on_white(Image.new("CMYK", (1, 1))).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the top of the scene is on the right of the file
    half_clear("P").save(tmp_path / "turned.png", exif=exif, transparency=0)
    found = np.asarray(load_picture(tmp_path / "turned.png", "emu3"))
    assert (found[:4] == 255).all() and (found[4:] == 100).all()


def test_emu3_refuses_a_side_below_one_code():
    """Its own resize refuses sides under 8 pixels; Janus-Pro takes them."""
    with pytest.raises(InputError, match="20 x 7.*below 8 pixels"):
        check_size(20, 7, "emu3")
    check_size(20, 7, "janus")


@pytest.mark.parametrize("aspect, side, grid", [
    ("1:1", 720, (90, 90)), ("16:9", 720, (68, 120)), ("4:3", 720, (78, 104)), ("9:16", 720, (120, 68)),
    ("5:1", 720, (40, 201)), ("1:1", 512, (64, 64))])
def test_emu3_draws_any_aspect(aspect, side, grid):
    """Rows and columns of codes, height first, all of about the same area; 67.5 becomes 68."""
    assert grid_for(aspect, replace(model.PRESETS["emu3-8b"], image_size=side)) == grid


@pytest.mark.parametrize("height, width", [(512, 512), (40, 40), (3000, 2000), (443, 591), (90, 160)])
def test_emu3_pictures_of_another_size_fit_twice_into_its_context(height, width):
    """At a side of 512 each takes at most 4,160 tokens with row ends, in training and in questions, and is drawn so."""
    c = drawn_at(512, model.EMU3_8B)
    assert c.grid == (64, 64) == grid_for("1:1", c)
    for training in (True, False):
        _, h, w = tokenizer_picture(Image.new("RGB", (width, height)), c, training).shape
        assert 4000 < h // 8 * (w // 8) + h // 8 <= 4160 + 20 and h % 8 == w % 8 == 0


@pytest.mark.parametrize("side, config, reason", [
    (500, model.EMU3_8B, "multiple of 8"), (8, model.EMU3_8B, "4 codes"), (768, model.EMU3_8B, "9216 tokens"),
    (512, model.JANUS_PRO_7B, "Janus-Pro draws and sees pictures of one size")])
def test_a_size_that_a_model_cannot_draw_is_refused(side, config, reason):
    """Whole codes, room in the context, and not Janus-Pro, whose encoder has one size."""
    with pytest.raises(InputError, match=f"--image-size {side}: .*{reason}"):
        drawn_at(side, config)


@pytest.mark.parametrize("kind, aspect", [("emu3", "16x9"), ("emu3", "0:1"), ("emu3", "-4:-3"), ("emu3", "9:1"),
                                          ("janus", "16:9")])
def test_an_aspect_that_cannot_be_drawn_is_refused(kind, aspect):
    """Janus-Pro draws squares only, Emu3 up to 5:1."""
    with pytest.raises(InputError, match=f"--aspect .*{aspect}"):
        grid_for(aspect, model.PRESETS["emu3-8b" if kind == "emu3" else "janus-pro-1b"])
