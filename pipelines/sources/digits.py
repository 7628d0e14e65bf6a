"""Source digits: real handwritten digits that come with a library, for the demo and for tests."""

import io
from collections.abc import Collection

import numpy as np
from PIL import Image

from pipelines.sources.source import Raw, Source, label_at


class _Digits:
    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = np.round(digits.images * 255 / 16).astype(np.uint8)  # (N, 8, 8)
        self.labels: np.ndarray | None = digits.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def read(self, index: int) -> Raw:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, "PNG")
        return Raw(self.key(index), buffer.getvalue(), label_at(self.labels, index))

    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]:
        return {}


def open_digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (Alpaydin and Kaynak 1998)."""
    return Source({"train": _Digits()}, [str(digit) for digit in range(10)], "digits")
