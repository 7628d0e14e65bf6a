"""Pictures: any image file to pixels of one size and mode, pixels to bytes, and grids to look at.

H W pixels, C channels.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

# Extensions that image shards may hold, and the format that Pillow must find in them.
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


class Fitted(NamedTuple):
    """Bytes of an image of the wanted size and mode, and the extension that names their format."""

    extension: str
    data: bytes


def open_image(data: bytes, size: int | None = None) -> Image.Image:
    """Decode image bytes, bounded in pixels (Pillow's limit, 89 million) before memory is taken.

    Args:
        data: an image file.
        size: what either side must be, in pixels, if that is known.

    Raises:
        BadImageError: empty, corrupt, truncated, too large, of another size, or no image.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow warns of odd metadata, which pixels do not depend on.
            warnings.filterwarnings("ignore", category=UserWarning)
            image = Image.open(io.BytesIO(data))
            if size and image.size != (size, size):
                raise BadImageError(f"must be {size}x{size} pixels, is {image.size[0]}x{image.size[1]}")
            image.load()
    except BadImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImageError("not an image that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise anything on bytes that lie
        raise BadImageError(f"cannot be decoded: {error}") from error
    return image


def white_of(image: Image.Image) -> float:
    """Return the value that is white in an image of wide grey: what its format or header says, whatever its pixels are.

    Whole numbers of 32 bits, for which nothing says it, count as 8 bits in a wide container, and floats end at 1.
    """
    if image.mode == "F":
        return 1.0
    if image.mode == "I":
        return 65535.0 if image.format == "PPM" else 255.0  # Pillow has scaled those by the maximum in their header
    return 2.0 ** image.tag_v2.get(BITSPERSAMPLE, (16,))[0] - 1 if isinstance(image, TiffImageFile) else 65535.0


def to_mode(image: Image.Image, channels: int, white: float | None = None) -> Image.Image:
    """Convert any Pillow mode to L (1 channel) or RGB (3): alpha onto white, wide grey to 8 bits, palettes resolved.

    Args:
        image: of any mode.
        channels: 1 or 3.
        white: its `white_of`, if it is a copy, which does not know its format any more.

    Raises:
        BadImageError: pixels beyond black or white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, white or white_of(image))
    if "A" in image.getbands() or image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB") and channels == 1:
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def fit(data: bytes, size: int, channels: int, upscale: bool, output_format: str) -> Fitted:
    """Bring an image to size x size pixels: short side scaled with antialiasing, centre cropped, EXIF rotation applied.

    Args:
        data: an image file.
        size: of either side, in pixels.
        channels: 1 or 3.
        upscale: whether an image smaller than size may be enlarged.
        output_format: extension to encode with when the original bytes do not fit as they are.

    Raises:
        BadImageError: it cannot be used.
    """
    image = open_image(data)
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
    mode = "L" if channels == 1 else "RGB"
    plain = image.mode == mode and "transparency" not in image.info
    try:
        if image.size == (size, size) and plain and extension and image.getexif().get(0x0112, 1) == 1:
            return Fitted(extension, data)
        white = white_of(image)
        upright = ImageOps.exif_transpose(image)
        if min(upright.size) < size and not upscale:
            raise BadImageError(
                f"{upright.width}x{upright.height} pixels are fewer than {size}; images.upscale: true would enlarge it"
            )
        pixels = ImageOps.fit(to_mode(upright, channels, white), (size, size), method=Image.Resampling.BICUBIC)
    except BadImageError:
        raise
    except Exception as error:  # metadata and colour profiles are decoded here, and their decoders raise anything
        raise BadImageError(f"cannot be converted: {error}") from error
    return Fitted(output_format, encode_image(pixels, output_format))


def encode_image(image: Image.Image, extension: str) -> bytes:
    """Return the bytes of an image: png, jpg at quality 95 or lossless webp."""
    buffer = io.BytesIO()
    settings: dict[str, dict[str, Any]] = {"jpg": {"quality": 95}, "webp": {"lossless": True}}
    image.save(buffer, FORMATS[extension], **settings.get(extension, {}))
    return buffer.getvalue()


def pixels_of(data: bytes, size: int, channels: int) -> np.ndarray:
    """Decode a fitted image to uint8 (C, H, W).

    Raises:
        BadImageError: it cannot be decoded, or is not of this size.
    """
    pixels = np.asarray(to_mode(open_image(data, size), channels))
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Turn uint8 (C, H, W) into a Pillow image."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]], labels: Sequence[Sequence[str]] = (), smallest: int = 48
) -> Image.Image:
    """Lay images out in rows on white, enlarged by a whole factor until a person can see them.

    Args:
        rows: uint8 (C, H, W) images, all of one size; None leaves a cell white.
        labels: for the first rows, what is written above each of their cells.
        smallest: pixels a side that an image is enlarged to at least.
    """
    side = next(pixels.shape[-1] for row in rows for pixels in row if pixels is not None)
    cell = side * max(1, -(-smallest // side))
    gap = max(2, cell // 24)
    text_height = max(10, min(16, cell // 4))
    font = ImageFont.load_default(size=text_height)
    header = text_height + 2 * gap
    columns = max(len(row) for row in rows)
    height = gap + len(rows) * (cell + gap) + len(labels) * header
    canvas = Image.new("RGB", (gap + columns * (cell + gap), height), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for number, row in enumerate(rows):
        if number < len(labels):
            for column, label in enumerate(labels[number]):
                while len(label) > 1 and draw.textlength(label, font=font) > cell:
                    label = label.rstrip("…")[:-1] + "…"
                draw.text((gap + column * (cell + gap) + cell / 2, top), label, fill="black", font=font, anchor="ma")
            top += header
        for column, pixels in enumerate(row):
            if pixels is not None:
                picture = to_picture(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
                canvas.paste(picture, (gap + column * (cell + gap), top))
        top += cell + gap
    return canvas


def _eight_bits(image: Image.Image, white: float) -> Image.Image:
    """Scale wide grey to 8 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=np.inf, neginf=-np.inf)
    scaled = np.round(values * 255 / white)
    if scaled.min(initial=0) < 0 or scaled.max(initial=0) > 255:
        raise BadImageError(
            f"its pixels must lie in [0, {white:g}], but lie in [{values.min():g}, {values.max():g}]; "
            "convert it to 8 bits, or to 16 without a sign"
        )
    return Image.fromarray(scaled.astype(np.uint8))
