"""A run's models and images, opened to be explored.

N images, C channels, H W pixels.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipelines.compute.devices import inference_device
from pipelines.config import Config
from pipelines.data.batches import epoch_permutation
from pipelines.data.classes import class_index
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.errors import StageError
from pipelines.finished import Finished
from pipelines.generator import Generator
from prior import HierarchicalPrior

# Training images that the mean of a class is of at most, and those that are looked through for them.
OF_CLASS, LOOKED_AT = 200, 20_000


class Opened:
    """A run.

    Args:
        config: of the run.

    Raises:
        StageError: it holds no images or no finished tokenizer, or these do not fit one another.
    """

    def __init__(self, config: Config) -> None:
        finished = Finished(config)
        if not finished.has_images():
            raise StageError(f"{finished.images} holds no packed images to explore; run `smalti pack` first")
        self.finished, self.seed, self.cache = finished, config.seed, config.compute.cache
        self.device = inference_device(config.compute)
        self.tokenizer = finished.tokenizer().to(self.device).eval()
        self.val = self.split("val")
        read, packed = (
            (one.channels, size)
            for one, size in ((self.tokenizer, self.tokenizer.image_size), (self.val, self.val.size))
        )
        if read != packed:
            raise StageError(f"the tokenizer does not read images of {finished.images}: other size or channels")

    @cached_property
    def prior(self) -> HierarchicalPrior:
        """Of all levels, in eval mode.

        Raises:
            StageError: one is missing, or they learned the codes of another tokenizer.
        """
        return Generator(self.tokenizer, self.finished.prior()).prior.to(self.device)

    @property
    def holds_codes(self) -> bool:
        """Whether levels hold codes and no numbers."""
        return None not in self.tokenizer.codebook_sizes

    @property
    def class_names(self) -> list[str]:
        """Of the images; empty where there are none."""
        return self.val.class_names

    def split(self, name: str) -> ImageShards:
        """Return the images of a split."""
        return ImageShards(self.finished.images, name, self.cache)

    def rows(self, keys: Sequence[str], classes: Sequence[str], number: int) -> list[int]:
        """Return the places of images in the val split.

        Args:
            keys: of them; what is none and a whole number is a place.
            classes: names or indices, of each its first image; looked at where no keys are named.
            number: of images from the first on, where neither are.

        Raises:
            StageError: there is no such image or class.
        """
        if not keys and not classes:
            return list(range(min(number, len(self.val))))
        if not keys:
            return [self.rows_of(self.label_of(name))[0] for name in classes]
        places = {self.val.key(row): row for row in range(len(self.val))}
        found = [places.get(key, int(key) if key.isdecimal() else -1) for key in keys]
        if missing := [key for key, row in zip(keys, found, strict=True) if not 0 <= row < len(self.val)]:
            raise StageError(
                f"the val split has no image {missing[0]!r}; name a key, such as {self.val.key(0)}, "
                f"or a place below {len(self.val)}"
            )
        return found

    def label_of(self, name: str) -> int:
        """Return the index of a class by its name or index."""
        return class_index(name, self.class_names, "the command line")

    def rows_of(self, label: int) -> list[int]:
        """Return the places of val images of a class.

        Raises:
            StageError: there are none.
        """
        found = [row for row in range(len(self.val)) if self.val.read(row).label == label]
        if not found:
            raise StageError(f"the val split has no image of class {self.class_names[label]}")
        return found

    def training_images(self, label: int) -> Tensor:
        """Return training images of a class, some of those that are chosen by seed, (N, C, H, W).

        Raises:
            StageError: none is among those that are looked at.
        """
        train = self.split("train")
        found: list[np.ndarray] = []
        for row in epoch_permutation(self.seed, 0, train.sizes)[:LOOKED_AT]:
            if len(found) < OF_CLASS and (sample := train.read(int(row))).label == label:
                found.append(sample.pixels)
        if not found:
            raise StageError(f"no training image that was looked at is of class {self.class_names[label]}")
        return self._unit(found)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Return val images (N, C, H, W) in [-1, 1]."""
        return self._unit([self.val.pixels(row) for row in rows])

    def given(self, row: int) -> int | None:
        """Return the class that a prior is given of a val image; None where it knows none."""
        return self.val.read(row).label if self.prior.class_names else None

    def named(self, row: int) -> dict[str, str]:
        """Return what tables call a val image."""
        label = self.val.read(row).label
        return {"key": self.val.key(row), "class": self.class_names[label] if self.class_names else ""}

    @property
    def knows_no_class(self) -> bool:
        """Whether the prior says how likely codes are whatever their class."""
        return not self.prior.class_names or all(level.config.unconditional for level in self.prior.levels)

    def _unit(self, pixels: Sequence[np.ndarray]) -> Tensor:
        return to_unit_range(torch.from_numpy(np.stack(pixels)).to(self.device))
