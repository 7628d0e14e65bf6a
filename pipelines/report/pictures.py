"""Pictures inside a page: pixels and numbers as data URIs that are small and described.

C channels, H W pixels, h w grid.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.pictures import encode_image, to_picture

# Larger images are shown at this many pixels a side, and not without loss.
LARGEST, QUALITY = 256, 82
# CSS pixels that they take: fewer than they have, for screens of fine pixels.
LARGE_SHOWN = 160
# Up to this many pixels a side an image keeps each of them, enlarged by a whole factor to about as many as SHOWN.
PIXELATED, SHOWN = 96, 64
# The same of sheets, pictures laid side by side.
LARGEST_SHEET, SHEET_SHOWN = 720, 360
# Viridis at nine points, dark to bright: even to the colour-blind, and in grey.
VIRIDIS = np.array(
    [
        [68, 1, 84],
        [71, 44, 122],
        [59, 81, 139],
        [44, 113, 142],
        [33, 144, 141],
        [39, 173, 129],
        [92, 200, 99],
        [170, 220, 50],
        [253, 231, 37],
    ]
)


class Picture(NamedTuple):
    """A picture in the page.

    Attributes:
        uri: of its data.
        width: in the page, in CSS pixels.
        height: in the page, in CSS pixels.
        alt: what there is to see.
        pixelated: whether its pixels stay squares when enlarged.
    """

    uri: str
    width: int
    height: int
    alt: str
    pixelated: bool


def picture(pixels: np.ndarray, alt: str, shown: int = SHOWN) -> Picture:
    """Return a picture of pixels.

    Args:
        pixels: uint8 (C, H, W), C 1 or 3.
        alt: what there is to see.
        shown: about how many CSS pixels its longer side takes where it is smaller.
    """
    image = to_picture(pixels)
    side = max(image.size)
    if side <= PIXELATED:
        factor = max(1, round(shown / side))
        uri = _uri("png", encode_image(image, "png"))
        return Picture(uri, image.width * factor, image.height * factor, alt, True)
    if side > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    width, height = (round(one * LARGE_SHOWN / max(image.size)) for one in image.size)
    return Picture(_uri("webp", _lossy(image)), width, height, alt, False)


def sheet(pixels: np.ndarray, alt: str) -> Picture:
    """Return a picture of many, uint8 (C, H, W), large enough to look at each of them."""
    image = to_picture(pixels)
    image.thumbnail((LARGEST_SHEET, LARGEST_SHEET), Image.Resampling.LANCZOS)
    width, height = (round(one * SHEET_SHOWN / max(image.size)) for one in image.size)
    return Picture(_uri("png", encode_image(image, "png")), width, height, alt, False)


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return numbers (h, w) as colours, uint8 (3, h, w): low dark blue, high yellow, as VIRIDIS has them."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(VIRIDIS) - 1)
    points = np.arange(len(VIRIDIS))
    channels = [np.interp(place, points, VIRIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels).round().astype(np.uint8)


def _lossy(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def _uri(extension: str, data: bytes) -> str:
    return f"data:image/{extension};base64,{base64.b64encode(data).decode()}"
