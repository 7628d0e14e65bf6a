"""All levels' priors together: exact likelihood of a set of grids, and sampling, coarse level first.

B batch, h w code grid, K codebook_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from prior.decoding import Decoders
from prior.level import LevelPrior
from prior.sampling import check_sampling, filtered_probabilities, inverse_cdf, uniforms


@dataclass(frozen=True)
class LevelSampling:
    """How one level is drawn; see `HierarchicalPrior.sample`. A `prior.decoding.Choose`.

    Under guidance the first half of a batch is given its class, the second half is the same samples without it: one
    batch of twice the size, and both halves get the same codes.
    """

    temperature: float
    top_k: int
    top_p: float
    guidance: float

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return the codes int64 (B,) of a position, from logits (B, K) and uniforms (B,)."""
        logits = logits.float()
        if self.guidance != 1:
            given, not_given = logits.chunk(2)
            logits = not_given + self.guidance * (given - not_given)
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p)
        codes = inverse_cdf(probabilities, uniforms[: len(logits)])
        return codes if self.guidance == 1 else torch.cat([codes, codes])


class HierarchicalPrior(nn.Module):
    """p(level 0 | class) p(level 1 | level 0, class) …

    Source: Razavi et al. 2019, section 3.2.

    Args:
        levels: a prior each, coarse to fine, all of one tokenizer and one set of classes.

    Raises:
        ValueError: the levels do not belong together.
    """

    levels: Sequence[LevelPrior]

    def __init__(self, levels: Sequence[LevelPrior]) -> None:
        super().__init__()
        last = levels[-1].config
        for number, level in enumerate(levels):
            config = level.config
            if config.level != number:
                raise ValueError(f"level {number} must be there, but its place is taken by the prior of {config.level}")
            if config.tokenizer != last.tokenizer:
                raise ValueError(
                    f"all levels must come from one tokenizer, but level {number} learned codes of {config.tokenizer} "
                    f"and level {last.level} codes of {last.tokenizer}; train them again on one set of codes"
                )
            same = (config.grids, config.codebook_sizes, config.class_names)
            if same != (last.grids[: number + 1], last.codebook_sizes[: number + 1], last.class_names):
                raise ValueError(f"levels {number} and {last.level} disagree on grids, codebook sizes or classes")
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]  # a ModuleList of priors

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty when there are none."""
        return self.levels[0].config.class_names

    def nll(self, codes: list[Tensor], classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the exact negative log-likelihood in nats, float64 (B,), summed over levels and positions.

        Args:
            codes: int64 (B, h, w) a level, coarse to fine.
            classes: class index of each, or None where no class is given.

        Raises:
            ValueError: a class does not exist.
        """
        classes = self._class_tensor(classes)
        return torch.stack([level.nll(codes[n], codes[:n], classes) for n, level in enumerate(self.levels)]).sum(0)

    @torch.no_grad()
    def sample(
        self,
        classes: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        guidance: float | Sequence[float] = 1.0,
        indices: Sequence[int] | None = None,
        decoders: Decoders | None = None,
    ) -> list[Tensor]:
        """Draw codes, coarse level first.

        A sample is a function of weights, class, settings, seed and its index: not of the others in the batch, but
        for codes whose uniform lies within rounding of an edge of the distribution.

        Args:
            classes: class index of each sample; None for samples of no given class.
            seed: of all streams of uniforms.
            temperature: one for all levels or one a level, as for the three that follow.
            top_k: see `filtered_probabilities`.
            top_p: see `filtered_probabilities`.
            guidance: s of uncond + s (cond - uncond); 1 is the model as it is.
            indices: index of each sample, which picks its stream; 0, 1, 2, … if not given.
            decoders: a dict to keep decoders in, for the next batch of as many samples; made with `{}`, and to be left
                behind when weights change. They hold copies of the weights, and the keys and values of a batch.

        Returns:
            int64 (B, h, w) a level, coarse to fine.

        Raises:
            ValueError: a setting is out of range, a class does not exist, or guidance is asked of no class.

        Source: Ho and Salimans 2022 (guidance without a classifier), on logits.
        """
        device = next(self.parameters()).device
        classes = self._class_tensor(classes)
        if indices is None:
            indices = range(1 if classes is None else len(classes))
        if classes is not None and len(indices) != len(classes):
            raise ValueError(f"indices and classes must be equally many, got {len(indices)} and {len(classes)}")
        sizes = [h * w for h, w in self.levels[-1].config.grids]
        streams = torch.from_numpy(np.stack([uniforms(seed, index, sum(sizes)) for index in indices])).to(device)
        codes: list[Tensor] = []
        given = (temperature, top_k, top_p, guidance)
        if any(isinstance(setting, Sequence) and len(setting) != len(self.levels) for setting in given):
            raise ValueError(f"settings must be one value or one a level ({len(self.levels)}), got {given}")
        for number, (level, stream) in enumerate(zip(self.levels, streams.split(sizes, 1), strict=True)):
            settings = LevelSampling(
                *(setting[number] if isinstance(setting, Sequence) else setting for setting in given)  # type: ignore[arg-type]
            )
            if settings.guidance != 1 and classes is None:
                raise ValueError("guidance needs classes; leave it at 1 where no class is given")
            codes.append(_sample_level(level, codes, classes, stream, settings, decoders))
        return codes

    def _class_tensor(self, classes: Sequence[int] | Tensor | None) -> Tensor | None:
        if classes is None:
            return None
        device = next(self.parameters()).device
        classes = torch.as_tensor(classes, dtype=torch.int64, device=device)
        if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) < len(self.class_names)):
            raise ValueError(f"classes must lie in [0, {len(self.class_names)}), got {classes.tolist()}")
        return classes

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder a level: level0, level1, …"""
        for number, level in enumerate(self.levels):
            level.save_pretrained(Path(folder) / f"level{number}")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load all levels of a folder, in eval mode.

        Raises:
            ValueError: no such folder, a level is missing, or the levels do not belong together.
        """
        folders = sorted(Path(folder).glob("level*"), key=lambda path: path.name[5:].zfill(4))
        if not folders:
            raise ValueError(
                f"{folder} must hold the folders level0, level1, … but holds none; run `smalti train-prior`"
            )
        return cls([LevelPrior.from_pretrained(path) for path in folders]).eval()


def _sample_level(
    level: LevelPrior,
    coarser: list[Tensor],
    classes: Tensor | None,
    stream: Tensor,
    settings: LevelSampling,
    decoders: Decoders | None,
) -> Tensor:
    """Draw one level's codes (B, h, w) from its uniforms (B, h*w)."""
    batch = len(stream)
    if settings.guidance != 1:
        assert classes is not None
        classes = torch.cat([classes, torch.full_like(classes, len(level.config.class_names))])
        coarser = [torch.cat([codes, codes]) for codes in coarser]
        stream = torch.cat([stream, stream])
    drawn = level.decoder(coarser, classes, len(stream), decoders).draw(settings, stream)
    return drawn[:batch].reshape(batch, *level.config.grids[-1])
