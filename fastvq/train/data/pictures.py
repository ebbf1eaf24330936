"""Picture files: decoding to uint8, resizing with a centre crop, grey and colour.

Which pictures a data set holds is in files.py; arrays of pictures are in arrays.py.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvq.train.data.files import Files, Layout
from fastvq.train.data.source import Array, BrokenItem, Source

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ImportError("Reading pictures needs pillow: pip install 'fastvq[train]'.") from error

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
# Pillow goes by content, not by name; other formats stay closed to it (EPS starts an interpreter).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY_MODES = ("1", "L", "LA", "La")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's "L"


class PictureFiles(Source):
    """The picture files of a folder or a zip, decoded when they are read."""

    kind = "pictures"
    dtype = np.dtype(np.uint8)

    def __init__(self, files: Files, layout: Layout) -> None:
        self.path = files.path
        self._files = files
        self._names, self.split, self.labels, self.class_names = layout

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def read(self, index: int, *, at_least: int | None = None) -> Array:
        # Decoders raise nearly every exception type on damaged input.
        try:
            return decode_picture(self._files.read(self._names[index]), at_least=at_least)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BrokenItem(self.name(index), reason) from None


def decode_picture(data: bytes, *, at_least: int | None = None) -> NDArray[np.uint8]:
    """Decodes one picture file to what a person sees in a viewer.

    The EXIF orientation is applied, transparency is laid over white, palettes, CMYK and other
    colour spaces become RGB, 16-bit grey is rounded to 8 bits, and of an animation the first frame
    is taken.

    Args:
        data: the bytes of the file.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as
            neither side falls below this many pixels. None: full size.
    Returns:
        (H, W, C) uint8; C = 1 for grey, 3 for RGB.
    """
    try:
        file = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not a picture of a known format, or damaged") from None
    with file as opened:
        if at_least is not None and min(opened.size) > at_least:
            opened.draft(None, (at_least, at_least))
        picture: Image.Image = opened
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode == "I" or picture.mode.startswith("I;16"):
            return _from_16_bits(np.asarray(picture))
        if picture.mode == "F":
            raise ValueError("floating-point pictures have no fixed range; save it with 8 bits")
        mode = "L" if picture.mode in _GREY_MODES else "RGB"
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        pixels = np.asarray(picture.convert(mode))
        return pixels[:, :, None] if mode == "L" else pixels


def _from_16_bits(pixels: Array) -> NDArray[np.uint8]:
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integers from {low} to {high} do not fit 16 bits; save it with 8 bits")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)[:, :, None]


def fit_picture(picture: Array, height: int, width: int) -> Array:
    """Resizes so that the picture just covers height × width, and crops the centre.

    Antialiased (Lanczos). Float pictures are clipped to 0…1, since Lanczos overshoots.

    Args:
        picture: (H, W, C), C = 1 or 3, uint8 or float32.
    Returns:
        (height, width, C), dtype unchanged.
    """
    old_height, old_width, channels = picture.shape
    scale = max(height / old_height, width / old_width)
    if scale == 1.0:
        top, left = (old_height - height) // 2, (old_width - width) // 2
        return picture[top : top + height, left : left + width]
    crop_height, crop_width = height / scale, width / scale
    top, left = (old_height - crop_height) / 2, (old_width - crop_width) / 2
    box = (left, top, min(left + crop_width, old_width), min(top + crop_height, old_height))

    def resize(pixels: Array) -> Array:
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))

    if picture.dtype == np.uint8 and channels == 3:
        return resize(picture)
    planes = [resize(np.ascontiguousarray(picture[:, :, c])) for c in range(channels)]
    fitted: NDArray[Any] = np.stack(planes, axis=2)
    return fitted if picture.dtype == np.uint8 else fitted.clip(0.0, 1.0)


def with_channels(pictures: Array, channels: int) -> Array:
    """(..., 1 or 3) to (..., channels): grey is repeated, colour is weighted to its luma."""
    if pictures.shape[-1] == channels:
        return pictures
    if channels == 3:
        return np.repeat(pictures, 3, axis=-1)
    luma = pictures.astype(np.float32) @ _LUMA
    if pictures.dtype == np.uint8:
        luma = np.rint(luma)
    return luma.astype(pictures.dtype)[..., None]
