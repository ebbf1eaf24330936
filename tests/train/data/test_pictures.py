"""Decoding, resizing and channels of pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvq.train.data.pictures import decode_picture, fit_picture, with_channels

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, np.full_like(GREY, 7)], axis=2)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_come_back_exactly(form: str) -> None:
    if form != "GIF":  # which may hold grey as a palette, and colour with one
        assert np.array_equal(decode_picture(saved(Image.fromarray(GREY), form))[:, :, 0], GREY)
    assert np.array_equal(decode_picture(saved(Image.fromarray(COLOUR), form)), COLOUR)


def test_webp() -> None:
    assert np.array_equal(
        decode_picture(saved(Image.fromarray(COLOUR), "WEBP", lossless=True)), COLOUR
    )


def test_palette() -> None:
    image = Image.fromarray(COLOUR).quantize(12)
    assert np.array_equal(decode_picture(saved(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_rounded() -> None:
    wide = np.array([[0, 128, 129, 257, 65535, 65406]], np.uint16)
    for form in ("PNG", "TIFF"):
        got = decode_picture(saved(Image.fromarray(wide), form))
        assert got[:, :, 0].tolist() == np.rint(wide / 257).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    opaque = COLOUR if mode == "RGBA" else GREY[:, :, None]
    alpha = np.full_like(GREY, 255)
    alpha[0] = 0
    got = decode_picture(saved(Image.fromarray(np.dstack([opaque, alpha])), "PNG"))
    assert got.shape == opaque.shape
    assert (got[0] == 255).all()
    assert np.array_equal(got[1:], opaque[1:])


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    got = decode_picture(saved(image, "PNG", transparency=0))
    assert got.tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    red, green, blue = decode_picture(saved(image, "JPEG", quality=95))[8, 8].tolist()
    assert red > 200
    assert green < 50
    assert blue < 50


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    got = decode_picture(saved(Image.fromarray(COLOUR), "PNG", exif=exif))
    assert np.array_equal(got, np.rot90(COLOUR, -1))


def test_large_jpeg_is_decoded_smaller_but_no_side_below_the_limit() -> None:
    data = saved(Image.new("RGB", (640, 400), (10, 200, 30)), "JPEG")
    assert decode_picture(data).shape == (400, 640, 3)
    assert decode_picture(data, at_least=100).shape == (100, 160, 3)
    assert decode_picture(data, at_least=101).shape == (200, 320, 3)


def test_other_formats_and_float_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="not a picture of a known format, or damaged"):
        decode_picture(saved(Image.fromarray(COLOUR), "ICO"))
    with pytest.raises(ValueError, match="floating-point"):
        decode_picture(saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="70000 do not fit 16 bits"):
        decode_picture(saved(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_keeps_shape_dtype_and_constant(dtype: Any, channels: int) -> None:
    value = dtype(200) if dtype is np.uint8 else dtype(0.75)
    for height, width in [(5, 7), (31, 40), (64, 8), (1, 1)]:
        picture = np.full((20, 33, channels), value, dtype)
        got = fit_picture(picture, height, width)
        assert got.shape == (height, width, channels)
        assert got.dtype == dtype
        # A filter's weights sum to 1 within float32 rounding of some hundred terms.
        assert np.allclose(got, value, rtol=0, atol=0 if dtype is np.uint8 else 200 * 2.0**-24)


def test_fit_crops_the_centre() -> None:
    picture = np.zeros((8, 24, 1), np.uint8)
    picture[:, 8:16] = 255
    assert (fit_picture(picture, 8, 8) == 255).all()  # same height: a crop, bit for bit
    assert np.array_equal(fit_picture(picture.transpose(1, 0, 2), 8, 8), np.full((8, 8, 1), 255))
    half = fit_picture(picture, 4, 4)[:, :, 0]
    assert (half[:, 1:3] > 250).all()
    assert np.array_equal(half, half[:, ::-1])


def test_fit_clips_the_overshoot_of_float_pictures() -> None:
    step = np.zeros((16, 16, 1), np.float32)
    step[:, 8:] = 1
    got = fit_picture(step, 37, 37)
    assert got.min() == 0.0
    assert got.max() == 1.0


def test_channels() -> None:
    assert np.array_equal(with_channels(GREY[:, :, None], 3), np.dstack([GREY] * 3))
    luma = with_channels(COLOUR, 1)[:, :, 0].astype(int)
    expected = np.asarray(Image.fromarray(COLOUR).convert("L")).astype(int)
    assert np.abs(luma - expected).max() <= 1  # both round the same weighted sum
    floats = with_channels(COLOUR[None].astype(np.float32) / 255, 1)
    assert floats.shape == (1, 3, 4, 1)
    assert floats.dtype == np.float32
