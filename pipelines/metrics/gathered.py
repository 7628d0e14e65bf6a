"""Features of whole splits: those of real images are kept in the cache.

N images, d features.
"""

import os
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from pipelines.compute.devices import this_worker
from pipelines.compute.ranks import sum_over_ranks
from pipelines.metrics.metric import Rows
from pipelines.metrics.subject import Seen, Split, Subject
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import whole


class SplitFeatures:
    """Gathers the features of a split's images, or of their reconstructions, on all ranks.

    Those of images are kept under what they are of: images, network, how they are brought to its size, kind of device.

    Args:
        subject: that has the split.
        split: of it.
        reconstructed: of reconstructions instead of images.
    """

    def __init__(self, subject: Subject, split: Split, reconstructed: bool) -> None:
        assert subject.features
        self.split, self.features, self.reconstructed = split, subject.features, reconstructed
        made_of = [split.about, split.rows.tolist(), subject.features.record(), subject.device.type]
        kept = not (reconstructed or split.name == "samples")
        self.path = subject.cache.folder / "features" / f"{digest(made_of)}.npy" if kept else None
        self.cache, self.known = subject.cache, self._known()
        self.rows = Rows(0 if self.known is not None else split.count, self.features.num_features, dtype=torch.float32)

    def update(self, seen: Seen) -> None:
        """See a batch of the split."""
        if self.known is None:
            self.rows.put(seen.rows, self.features(seen.reconstructions if self.reconstructed else seen.images))

    def compute(self) -> Tensor:
        """Return the features, float32 (N, d) on the CPU."""
        if self.known is not None:
            return self.known
        self.known = found = self.rows.all()
        if self.path and this_worker().rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.cache.make_room()
            with whole(self.path) as temporary, temporary.open("wb") as file:
                np.save(file, found.numpy())
        return found

    def _known(self) -> Tensor | None:
        """Return what is kept, where all ranks find it."""
        found = None
        with suppress(OSError, ValueError):
            if self.path:
                found = torch.from_numpy(np.load(self.path, allow_pickle=False))
                os.utime(self.path)  # so that it gives way last
        fits = found is not None and found.shape == (self.split.count, self.features.num_features)
        ranks = int(sum_over_ranks(torch.tensor(int(fits))))
        return found if ranks == this_worker().world_size else None
