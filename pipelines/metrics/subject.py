"""What is evaluated: models, and splits of images and codes that are read in batches, each thing when it is asked for.

B batch, C channels, H W pixels, h w code grid, K codebook_size, F features.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.compute.devices import ComputeConfig, inference_device, this_worker
from pipelines.data.batches import epoch_permutation
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.data.samples import Samples
from pipelines.errors import StageError
from pipelines.progress import progress_bar
from pipelines.storage.fingerprint import check_belong_together
from pipelines.storage.manifest import read_manifest
from prior import HierarchicalPrior, LevelPrior
from tokenizer import Autoencoded, HierarchicalVQVAE

# Images at once; nothing but rounding depends on it.
BATCH_SIZE = 64
# Training images that are looked at, at most.
TRAIN_IMAGES = 50_000
# Parts of a split, at most. A process takes whole parts, so that what is added up in a part is so whoever does it.
PARTS = 64


class Judged(NamedTuple):
    """What a level's prior makes of what is stored.

    Attributes:
        nats: -log p, summed over the grid, float64 (B,).
        confidence: probability of the likeliest code at each position, float32 (B, h, w); None of continuous levels.
        right: whether that is the code, bool (B, h, w).
    """

    nats: Tensor
    confidence: Tensor | None = None
    right: Tensor | None = None


class Split:
    """A set of images that metrics see, with their codes where they have some.

    Args:
        name: of the set.
        rows: index of each image in `images`, int64 (N,).
        images: read by index; None where only codes are there.
        codes: with `batch`; None where only images are there.
        views: codes of each image, of which the first is taken.
    """

    def __init__(self, name: str, rows: np.ndarray, images: Any, codes: Any, views: int = 1) -> None:
        self.name, self.rows, self.images, self.codes, self.views = name, rows, images, codes, views

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_parts(self) -> int:
        """Parts that it is seen in."""
        return min(PARTS, -(-len(self) // BATCH_SIZE))

    def part(self, batch: int) -> int:
        """Return the part that a batch belongs to."""
        return batch * self.num_parts // -(-len(self) // BATCH_SIZE)


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        splits: "val", all of it; "train", images chosen by seed in the order of the choice; "samples".
        tokenizer: in eval mode, if there is one.
        prior: in eval mode, if there is one.
        dims: values of an image, C * H * W.
        seed: of all that is drawn.
        device: where models are.
    """

    splits: dict[str, Split]
    tokenizer: HierarchicalVQVAE | None
    prior: HierarchicalPrior | None
    dims: int
    seed: int
    device: torch.device

    def there(self) -> set[str]:
        """Return what metrics can be shown, as "SPLIT.WHAT".

        SPLIT is a name of `splits`. WHAT is an attribute of `Seen`: images, pixels, keys, output and reconstructions of
        images and a tokenizer, codes and classes, decoded of codes and a tokenizer, nats of codes and a prior; rate
        where those nats, or what the bottleneck adds to numbers, bound what an image takes: numbers that are stored
        without noise have no density given the image.
        """
        found = set()
        for name, split in self.splits.items():
            given = {"images", "pixels", "keys"} if split.images else set()
            given |= {"output", "reconstructions"} if split.images and self.tokenizer else set()
            given |= {"codes", "classes"} if split.codes else set()
            given |= {"decoded"} if split.codes and self.tokenizer else set()
            given |= {"nats"} if split.codes and self.prior else set()
            given |= {"rate"} if split.codes and self.prior and self.tokenizer and self._bounded else set()
            found |= {f"{name}.{what}" for what in given}
        return found

    @property
    def _bounded(self) -> bool:
        parts = self.tokenizer.bottlenecks if self.tokenizer else []
        return all(part.noise_channels or None not in part.sizes for part in parts)

    @property
    def conditions(self) -> list[str]:
        """What codes are predicted from: "given_class"; "without_class" where there are none, or training hid some."""
        assert self.prior
        if any(level.config.codebook_sizes[-1] is None for level in self.prior.levels):
            return ["without_class"]
        names = self.prior.class_names
        without = not names or all(getattr(level.config, "unconditional", True) for level in self.prior.levels)
        return ["given_class"] * bool(names) + ["without_class"] * without


class Seen:
    """A batch of a split; what is asked of it is computed when it is asked, once for all metrics.

    Attributes:
        split: name of its split.
        rows: place of each image in the split, which is its row in `Rows(len(split))`.
        part: of the split, the row of sums in `Rows(split.num_parts)`.
    """

    def __init__(self, subject: Subject, split: Split, rows: list[int], part: int) -> None:
        self._subject, self._split = subject, split
        self.split, self.rows, self.part = split.name, rows, part
        self._judged: dict[str, list[Judged]] = {}

    @cached_property
    def keys(self) -> list[str]:
        """Key of each image."""
        return [self._split.images.key(index) for index in self._indices]

    @cached_property
    def pixels(self) -> Tensor:
        """Images, uint8 (B, C, H, W), on the CPU."""
        return torch.from_numpy(np.stack([self._split.images.pixels(index) for index in self._indices]))

    @cached_property
    def images(self) -> Tensor:
        """Images, float32 (B, C, H, W) in [-1, 1]."""
        return to_unit_range(self.pixels.to(self._subject.device))

    @cached_property
    def output(self) -> Autoencoded:
        """What the tokenizer makes of the images, without noise."""
        assert self._subject.tokenizer
        return self._subject.tokenizer(self.images)

    @property
    def reconstructions(self) -> Tensor:
        """What the tokenizer makes of the images, float (B, C, H, W), in [-1, 1] or somewhat beyond."""
        return self.output.reconstruction

    @property
    def codes(self) -> list[Tensor]:
        """What is stored per level, int64 (B, h, w) or float32 (B, d, h, w)."""
        return self._stored[0]

    @property
    def classes(self) -> Tensor:
        """Class index of each image, int64 (B,); 0 where there are no classes."""
        return self._stored[1]

    @cached_property
    def decoded(self) -> Tensor:
        """What the codes decode to, float (B, C, H, W), in [-1, 1] or somewhat beyond."""
        assert self._subject.tokenizer
        return self._subject.tokenizer.decode(self.codes)

    def judged(self, condition: str) -> list[Judged]:
        """Return what the prior of each level makes of the codes, under one of the subject's `conditions`."""
        if condition not in self._judged:
            assert self._subject.prior
            given = self.classes if condition == "given_class" else None
            levels = enumerate(self._subject.prior.levels)
            self._judged[condition] = [_judged(one, self.codes[n], self.codes[:n], given) for n, one in levels]
        return self._judged[condition]

    @cached_property
    def _stored(self) -> tuple[list[Tensor], Tensor]:
        codes, classes = self._split.codes.batch([index * self._split.views for index in self._indices])
        return [grid.to(self._subject.device) for grid in codes], classes.to(self._subject.device)

    @property
    def _indices(self) -> list[int]:
        return self._split.rows[self.rows].tolist()


def _judged(level: LevelPrior, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Judged:
    """One pass through the network for nats and confidence; the nats are those of `LevelPrior.nll`."""
    if level.config.codebook_sizes[-1] is None:
        return Judged(level.nll(codes, coarser, classes).double().cpu())
    logits = level.logits(codes, coarser, classes).float()  # (B, h, w, K)
    nats = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view(codes.shape)
    likeliest, guess = logits.max(-1)
    confidence = (likeliest - logits.logsumexp(-1)).exp()
    return Judged(nats.flatten(1).double().sum(1).cpu(), confidence, guess == codes)


def batches(subject: Subject, split: Split) -> Iterator[Seen]:
    """Yield this process's batches of a split: those of its share of parts."""
    rank, world_size = this_worker()
    with progress_bar(len(split), f"evaluate {split.name}", "images", disable=rank > 0) as bar:
        for number, first in enumerate(range(0, len(split), BATCH_SIZE)):
            rows = list(range(first, min(first + BATCH_SIZE, len(split))))
            if (part := split.part(number)) % world_size == rank:
                yield Seen(subject, split, rows, part)
            bar.update(len(rows))


def open_subject(
    tokenizer: HierarchicalVQVAE | None,
    images: Path | None,
    prior: HierarchicalPrior | None,
    codes: Path,
    unpacked: Path,
    samples: Path | None,
    seed: int,
    compute: ComputeConfig,
) -> Subject:
    """Open what there is of a run.

    Args:
        tokenizer: in eval mode, if there is one.
        images: folder, if there is one; only with a tokenizer.
        prior: in eval mode, if there is one.
        codes: folder; read only for a prior, and made from these images by this tokenizer, where they are there.
        unpacked: local folder for the unpacked codes.
        samples: folder, if there is one of these models; only with both.
        seed: of what is chosen and drawn.
        compute: where.

    Raises:
        StageError: what is there does not belong together.
    """
    cache, device = compute.cache, inference_device(compute)
    manifest = read_manifest(codes, "codes", "encode") if prior else {}
    if prior:
        check_belong_together(prior, manifest["tokenizer"])
    splits = {}
    for name in ("val", "train"):
        shards = ImageShards(images, name, cache) if images else None
        stored = Codes(codes, name, unpacked, cache) if prior else None
        views = len(manifest.get("views", [0])) if name == "train" else 1
        if shards and tokenizer and (shards.size, shards.channels) != (tokenizer.image_size, tokenizer.channels):
            raise StageError(f"the tokenizer does not read images of {images}: other size or channels")
        if shards and stored and len(stored) != views * len(shards):
            raise StageError(f"{images} holds {len(shards)} images but {len(stored)} codes of them are there")
        count = len(shards) if shards else len(stored or ()) // views
        if count:
            rows = np.arange(count) if name == "val" else epoch_permutation(seed, 0, (count,))[:TRAIN_IMAGES]
            splits[name] = Split(name, rows, shards, stored, views)
    if samples and tokenizer:
        drawn = Samples(samples, tokenizer.levels, cache)
        splits["samples"] = Split("samples", np.arange(len(drawn)), drawn, drawn)
    if not splits.get("val"):
        raise StageError(f"{images or codes} holds nothing of the val split; give images.val_fraction and pack again")
    val = splits["val"].images
    size, channels = (val.size, val.channels) if val else (manifest["image_size"], manifest["channels"])
    tokenizer, prior = tokenizer and tokenizer.to(device), prior and prior.to(device)
    return Subject(splits, tokenizer, prior, channels * size**2, seed, device)
