"""What is evaluated: models, and splits of images and codes that are read in batches, each thing when it is asked for.

B batch, C channels, H W pixels, h w code grid, K codebook_size, F features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.compute.devices import this_worker
from pipelines.data.images import to_unit_range
from pipelines.data.noise import noise_for
from pipelines.metrics.distances import Moments, moments
from pipelines.metrics.features import Features
from pipelines.progress import progress_bar
from pipelines.storage.cache import Cache
from prior import HierarchicalPrior, LevelPrior
from tokenizer import Autoencoded, HierarchicalVQVAE
from tokenizer.posterior import Summands, log_posterior, summands

# Images at once; nothing but rounding depends on it.
BATCH_SIZE = 64
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


@dataclass(frozen=True)
class Split:
    """A set of images that metrics see, with their codes where they have some.

    Attributes:
        name: of the set.
        rows: index of each image in `images`, int64 (N,).
        images: with `pixels` and `key` by index; None where only codes are there.
        codes: with `batch` by indices; None where only images are there.
        about: what tells it from another, plain data.
        views: codes of each image, of which the first is taken.
    """

    name: str
    rows: np.ndarray
    images: Any
    codes: Any
    about: dict[str, Any]
    views: int = 1

    @property
    def count(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def num_parts(self) -> int:
        """Parts that it is seen in."""
        return min(PARTS, -(-self.count // BATCH_SIZE))

    def part(self, batch: int) -> int:
        """Return the part that a batch belongs to."""
        return batch * self.num_parts // -(-self.count // BATCH_SIZE)


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        splits: "val", all of it; "train", images chosen by seed, in the order of the choice; "samples"; and "real",
            which samples are held against: images of the reference, or without one those of "train".
        tokenizer: in eval mode, if there is one.
        prior: in eval mode, if there is one.
        marks: fingerprints of the models: "tokenizer", "prior0", "prior1", …
        features: the space in which images are compared; None where there are no images.
        moments: of the reference in that space, if the reference brings them.
        dims: values of an image, C * H * W.
        seed: of all that is drawn.
        device: where models are.
        cache: for features of real images.
        gathered: what metrics share: features of whole splits, float32 (N, d), by need, filled before metrics compute;
            and the bound's scales.
        importance_samples: draws per image for importance-weighted bounds.
    """

    splits: dict[str, Split]
    tokenizer: HierarchicalVQVAE | None
    prior: HierarchicalPrior | None
    marks: dict[str, str]
    features: Features | None
    moments: Moments | None
    dims: int
    seed: int
    device: torch.device
    cache: Cache
    gathered: dict[str, Tensor]
    importance_samples: int = 0

    def there(self) -> set[str]:
        """Return what metrics can be shown, as "SPLIT.WHAT".

        SPLIT is a name of `splits`. WHAT is an attribute of `Seen`: images, pixels and keys; output and reconstructions
        where there is a tokenizer; of codes codes and classes, with a tokenizer decoded and, where it draws, posterior;
        with a prior nats, which is `Seen.judged`, and rate, where those bound what an image takes. Or it is features,
        of images, or reconstruction_features: they stand in `gathered` when metrics compute, of whole splits.
        "real.moments" are `real_moments`.
        """
        found = set()
        for name, split in self.splits.items():
            given = {"images", "pixels", "keys", "features"} if split.images else set()
            given |= {"output", "reconstructions", "reconstruction_features"} if given and self.tokenizer else set()
            given |= {"codes", "classes"} if split.codes else set()
            given |= {"decoded"} if split.codes and self.tokenizer else set()
            given |= {"nats"} if split.codes and self.prior else set()
            given |= {"rate"} if split.codes and self.prior and self._is_bounded else set()
            given |= {"posterior"} if split.images and split.codes and self.draws else set()
            found |= {f"{name}.{what}" for what in given}
        return found | ({"real.moments"} if self.moments or "real.features" in found else set())

    def real_moments(self) -> Moments:
        """Return the moments of what samples are held against: those that the reference brings, or of its images."""
        return self.moments or moments(self.gathered["real.features"])

    @property
    def _is_bounded(self) -> bool:
        """Whether all that is stored has a rate. Numbers without noise have no density given the image."""
        tokenizer = self.tokenizer
        return tokenizer is None or bool(tokenizer.bottleneck.rate) or None not in tokenizer.codebook_sizes

    @property
    def draws(self) -> bool:
        """Whether what stands for an image is drawn from a distribution q(z | x)."""
        return self.tokenizer is not None and all(part.noise_channels for part in self.tokenizer.bottlenecks)

    @property
    def conditions(self) -> list[str]:
        """What codes are predicted from: "given_class"; "without_class" where there are none, or training hid some."""
        assert self.prior
        names, knowing = self.prior.class_names, [one.config for one in self.prior.levels if one.config.class_names]
        if names and self.tokenizer and self.tokenizer.num_classes:  # codes and images are then of their class
            return ["given_class"]
        without = all(getattr(config, "unconditional", True) for config in knowing)
        return ["given_class"] * bool(names) + ["without_class"] * without


class Seen:
    """A batch of a split; what is asked of it is computed when it is asked, once for all metrics.

    Attributes:
        split: name of its split.
        rows: place of each image in the split, which is its row in `Rows(split.count)`.
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
        """What the tokenizer makes of the images, of one draw where bottlenecks draw."""
        return self.drawn(0, range(len(self.rows)))

    def drawn(self, number: int, chosen: Sequence[int]) -> Autoencoded:
        """Return what the tokenizer makes of some of the images, of one of many draws; the first is that of `output`.

        Args:
            number: of the draw.
            chosen: places in the batch.
        """
        tokenizer, seed = self._subject.tokenizer, self._subject.seed
        assert tokenizer
        levels, places = len(tokenizer.bottlenecks), [self.rows[one] for one in chosen]
        streams = [(seed, number * levels + level) for level in range(levels)]
        told = None if self.told is None else self.told[[*chosen]]
        return tokenizer(self.images[[*chosen]], noise_for(tokenizer, streams, places), told)

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
    def told(self) -> Tensor | None:
        """Class index of each image as the tokenizer is told, int64 (B,); None where it is not, or there are none."""
        tokenizer, prior, images = self._subject.tokenizer, self._subject.prior, self._split.images
        if not tokenizer or not tokenizer.num_classes:
            return None
        if self._split.codes:
            return self.classes if prior and prior.class_names else None
        return torch.tensor([images.read(index).label for index in self._indices]) if images.class_names else None

    @cached_property
    def decoded(self) -> Tensor:
        """What the codes decode to, float (B, C, H, W), in [-1, 1] or somewhat beyond."""
        assert self._subject.tokenizer
        return self._subject.tokenizer.decode(self.codes, self.told)

    @cached_property
    def posterior(self) -> list[Summands]:
        """What q(z | x) is made of for each bottleneck, z being the codes: what is stored."""
        assert self._subject.tokenizer
        return summands(self._subject.tokenizer, self.images, self.codes, self.told)

    @cached_property
    def log_posterior(self) -> Tensor:
        """log q(z | x) of each image, float64 (B,), z being the codes."""
        assert self._subject.tokenizer
        return log_posterior(self._subject.tokenizer, [part.total for part in self.posterior], self.codes).cpu()

    def rate(self, condition: str) -> Tensor:
        """Return the rate of each image in nats, float64 (B,): -log p of the codes, and log q where they are drawn."""
        nats = torch.stack([level.nats for level in self.judged(condition)]).sum(0)
        return nats + self.log_posterior if self._subject.draws else nats

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
    with progress_bar(split.count, f"evaluate {split.name}", "images", disable=rank > 0) as bar:
        for number, first in enumerate(range(0, split.count, BATCH_SIZE)):
            rows = list(range(first, min(first + BATCH_SIZE, split.count)))
            if (part := split.part(number)) % world_size == rank:
                yield Seen(subject, split, rows, part)
            bar.update(len(rows))
