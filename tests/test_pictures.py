import io
import struct
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from pipelines.data.pictures import BadImageError, encode_image, fit, open_image, picture_grid, pixels_of, to_mode


def data_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_bytes_that_fit_are_kept(kind: str, extension: str) -> None:
    data = data_of(Image.fromarray(noise(16, 16)), kind)
    assert fit(data, 16, 3, False, "png") == (extension, data)


def test_the_short_side_is_scaled_and_the_centre_cropped() -> None:
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, 16:48] = 255
    fitted = fit(data_of(Image.fromarray(pixels)), 16, 3, False, "png")
    assert pixels_of(fitted.data, 16, 3)[:, 2:14, 2:14].min() > 240


def test_scaling_down_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = pixels_of(fit(data_of(Image.fromarray(board)), 16, 1, False, "png").data, 16, 1)
    assert np.abs(pixels.astype(int) - 127).max() < 10


def test_exif_rotation_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    turned = pixels_of(fit(data_of(Image.fromarray(pixels), exif=exif), 16, 3, False, "png").data, 16, 3)
    assert turned[0, :, -1].min() == 255
    assert turned[0, :, 0].max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_made_right(channels: int) -> None:
    grey = noise(8, 8, 1)
    grey[0, :2] = (0, 255)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    floating = Image.fromarray(grey.astype(np.float32) / 255)
    integers = Image.fromarray(grey.astype(np.int32))
    for image in (Image.fromarray(grey), wide, floating, integers, Image.fromarray(grey).convert("RGB")):
        found = np.asarray(to_mode(image, channels)).reshape(8, 8, channels)
        assert np.abs(found.astype(int) - grey[..., None]).max() <= 1, image.mode
    for mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV"):
        source = Image.fromarray(np.full((8, 8, 3), 255, dtype=np.uint8))
        image = source.convert("L").convert("1") if mode == "1" else _converted(source, mode)
        assert np.asarray(to_mode(image, channels)).min() >= 250, mode


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], white) + values.astype(">u2").tobytes()


def plain_pgm(values: np.ndarray, white: int) -> bytes:
    return b"P2 %d %d %d\n" % (*values.shape[::-1], white) + " ".join(map(str, values.flat)).encode()


def twelve_bit_tiff(values: np.ndarray, white: int) -> bytes:
    height, width = values.shape
    first, second = values.reshape(-1, 2).astype(int).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: height, 279: len(packed)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + packed


def saved_as(kind: str) -> Callable[[np.ndarray, int], bytes]:
    return lambda values, white: data_of(Image.fromarray(values), kind)


@pytest.mark.parametrize("highest", [200, 4000])
@pytest.mark.parametrize(
    ("write", "white"),
    [
        (pgm, 65535),
        (pgm, 4095),
        (plain_pgm, 65535),
        (plain_pgm, 4095),
        (twelve_bit_tiff, 4095),
        (saved_as("TIFF"), 65535),
        (saved_as("PNG"), 65535),
    ],
)
def test_wide_grey_is_scaled_by_what_its_file_says_and_never_by_its_pixels(
    write: Callable[[np.ndarray, int], bytes], white: int, highest: int
) -> None:
    values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
    data = write(values, white)
    wanted = values * (255 / white)
    for found in (pixels_of(data, 8, 1), pixels_of(fit(data, 8, 1, False, "png").data, 8, 1)):
        assert np.abs(found[0] - wanted).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 256]], dtype=np.int32), r"must lie in \[0, 255\], but lie in \[0, 256\]"),
        (np.array([[-1, 9]], dtype=np.int32), r"must lie in \[0, 255\], but lie in \[-1, 9\]"),
        (np.array([[0, 2]], dtype=np.float32), r"must lie in \[0, 1\], but lie in \[0, 2\]"),
        (np.array([[0, np.inf]], dtype=np.float32), r"must lie in \[0, 1\]"),
    ],
)
def test_wide_grey_beyond_what_is_white_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(BadImageError, match=message):
        fit(data_of(Image.fromarray(values), "TIFF"), 1, 1, False, "png")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        assert converted is not None
        return converted
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.info["transparency"] = 0
    elif mode == "PA":
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("PA")
    elif mode == "LA":
        image = Image.new("LA", (4, 4), (0, 0))
    assert np.asarray(to_mode(image, 3)).min() == 255


def test_what_is_no_usable_image_says_why() -> None:
    whole = data_of(Image.fromarray(noise(64, 64)), "JPEG")
    for data, message in (
        (b"", "empty file"),
        (b"GIF? no", "not an image"),
        (whole[: len(whole) // 2], "cannot be decoded: .*truncated"),
        (data_of(Image.fromarray(noise(8, 8))), "8x8 pixels are fewer than 16; images.upscale"),
    ):
        with pytest.raises(BadImageError, match=message):
            fit(data, 16, 3, False, "png")


def test_a_gigapixel_image_is_refused_before_memory_is_taken() -> None:
    header = data_of(Image.new("1", (1, 1)))
    # A PNG header that promises 40,000 x 40,000 pixels.
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = header[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    with pytest.raises(BadImageError, match="too many pixels"):
        open_image(data)


def test_metadata_that_lies_makes_a_bad_image_not_a_crash() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("WEBP", "JPEG", "PNG"):
        whole = data_of(Image.fromarray(noise(32, 32)), kind, exif=exif)
        for place in range(0, len(whole), 7):
            data = whole[:place] + b"\xff\x00Z" + whole[place + 3 :]
            with suppress(BadImageError):
                assert fit(data, 16, 3, False, "png").data


def test_resized_png_is_lossless_and_formats_are_as_asked() -> None:
    image = Image.fromarray(noise(16, 16))
    for extension in ("png", "webp"):
        assert np.array_equal(pixels_of(encode_image(image, extension), 16, 3), noise(16, 16).transpose(2, 0, 1))
    assert fit(data_of(Image.fromarray(noise(32, 32))), 16, 3, False, "jpg").extension == "jpg"
    with pytest.raises(BadImageError, match="must be 8x8 pixels, is 16x16"):
        pixels_of(encode_image(image, "png"), 8, 3)


def test_a_grid_holds_every_picture_and_its_labels() -> None:
    rows = [[np.full((1, 8, 8), value, dtype=np.uint8) for value in row] for row in ([0, 85], [170, 200])]
    grid = np.asarray(picture_grid(rows, [["zero", "a very long class name"]]))
    assert grid.shape[1] > 2 * 48
    assert {0, 85, 170, 200} <= set(np.unique(grid))


def test_a_missing_picture_leaves_its_cell_white() -> None:
    black = np.zeros((1, 8, 8), dtype=np.uint8)
    grid = np.asarray(picture_grid([[black, black], [None, black]]))
    half = grid.shape[1] // 2
    assert grid[-48:-4, 4 : half - 4].min() == 255
    assert grid[-48:-4, half + 4 : -4].max() == 0
