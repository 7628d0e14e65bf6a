"""All levels' priors together: exact likelihood of a set of grids, and sampling, coarse level first.

B batch, h w code grid, K codebook_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from prior.checks import Codes, Float32Module, Numbers, checked, integers
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


class HierarchicalPrior(Float32Module):
    """p(level 0 | class) p(level 1 | level 0, class) …

    Source: Razavi et al. 2019, section 3.2.

    Args:
        levels: a prior each, coarse to fine, all of one tokenizer and one set of classes.

    Raises:
        ValueError: the levels do not belong together, or the tokenizer has more of them.
    """

    levels: Sequence[LevelPrior]

    def __init__(self, levels: Sequence[LevelPrior]) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must be one prior or more, got none")
        last = levels[-1].config
        for number, level in enumerate(levels):
            config = level.config
            if config.num_levels not in (0, len(levels)):
                raise ValueError(
                    f"level {number} is one of {config.num_levels}, which must all be there, but {len(levels)} are; "
                    "train or copy the others too"
                )
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

    def nll(self, codes: Sequence[Codes], classes: Numbers | None = None) -> Tensor:
        """Return the exact negative log-likelihood in nats, float64 (B,), summed over levels and positions.

        Args:
            codes: (B, h, w) in [0, K) a level, coarse to fine, of any integer type, tensors or arrays.
            classes: class index of each, a list, a tensor or an array; None where no class is given.

        Raises:
            ValueError: these are of another kind, shape, number or range, or the prior needs classes or has none.
        """
        last = self.levels[-1].config
        self._check_classes(classes)
        sizes = last.grids, last.codebook_sizes, len(self.class_names)
        found, labels = checked(codes, classes, *sizes, self._device)
        return torch.stack([p.nll_unchecked(found[n], found[:n], labels) for n, p in enumerate(self.levels)]).sum(0)

    @torch.no_grad()
    def sample(
        self,
        classes: Numbers | None = None,
        seed: int = 0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        guidance: float | Sequence[float] = 1.0,
        indices: Numbers | None = None,
        decoders: Decoders | None = None,
    ) -> list[Tensor]:
        """Draw codes, coarse level first.

        A sample is a function of weights, class, settings, seed and its index: not of the others in the batch, but
        for codes whose uniform lies within rounding of an edge of the distribution.

        Args:
            classes: class index of each sample, a list, a tensor or an array; None for samples of no given class.
            seed: of all streams of uniforms.
            temperature: one for all levels or one per level, as for the three that follow.
            top_k: see `filtered_probabilities`.
            top_p: see `filtered_probabilities`.
            guidance: s of uncond + s (cond - uncond); 1 is the model as it is.
            indices: index of each sample, which picks its stream; 0, 1, 2, … if not given. The same index twice draws
                with the same uniforms twice.
            decoders: a dict to keep decoders in, for the next batch of as many samples; made with `{}`, and to be left
                behind when weights change. They hold copies of the weights, and the keys and values of a batch.

        Returns:
            int64 (B, h, w) a level, coarse to fine.

        Raises:
            ValueError: a setting, a class, the seed or an index is of another kind or out of range, the prior needs
                classes or has none, or guidance is asked of no class or of a prior that always had one.

        Source: Ho and Salimans 2022 (guidance without a classifier), on logits.
        """
        settings = self._settings(temperature, top_k, top_p, guidance)
        if classes is None and any(one.guidance != 1 for one in settings):
            raise ValueError("guidance needs classes; leave it at 1 where no class is given")
        self._check_classes(classes)
        number = 1 if classes is None else len(integers("classes", classes, 1))
        places = integers("indices", range(number) if indices is None else indices, 1).tolist()
        if classes is not None and len(places) != number:
            raise ValueError(f"indices and classes must be equally many, got {len(places)} and {number}")
        _, labels = checked([], classes, [], [], len(self.class_names), self._device, len(places))
        grids = self.levels[-1].config.grids
        if not places:
            return [torch.empty(0, h, w, dtype=torch.int64, device=self._device) for h, w in grids]
        sizes = [h * w for h, w in grids]
        drawn = np.stack([uniforms(seed, index, sum(sizes)) for index in places])
        streams = torch.from_numpy(drawn).to(self._device).split(sizes, 1)
        codes: list[Tensor] = []
        for level, stream, one in zip(self.levels, streams, settings, strict=True):
            codes.append(_sample_level(level, codes, labels, stream, one, decoders))
        return codes

    def _settings(self, *given: Any) -> list[LevelSampling]:
        """Return each level's settings from those of `sample`, one value or one per level."""
        if any(isinstance(setting, Sequence) and len(setting) != len(self.levels) for setting in given):
            raise ValueError(f"settings must be one value or one per level ({len(self.levels)}), got {given}")
        settings = []
        for number, level in enumerate(self.levels):
            settings.append(LevelSampling(*(one[number] if isinstance(one, Sequence) else one for one in given)))
            if settings[-1].guidance != 1:
                level.config.check_unconditional()
        return settings

    def _check_classes(self, classes: Numbers | None) -> None:
        """Raise ValueError where classes must be given and are not, or the other way round."""
        if classes is None:
            for level in self.levels:
                level.config.check_unconditional()
        elif not self.class_names:
            raise ValueError("this prior was trained without classes; leave classes out")

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder a level: level0, level1, …"""
        for number, level in enumerate(self.levels):
            level.save_pretrained(Path(folder) / f"level{number}")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load all levels of a folder, in eval mode.

        Priors record how many levels there are; in files from before they did, a finest level that is missing cannot be
        told.

        Raises:
            ValueError: no such folder, a level is missing, something else bears the name of one, or the levels do not
                belong together.
        """
        found = {path.name for path in Path(folder).glob("level*")}
        if not found:
            raise ValueError(
                f"{folder} must hold the folders level0, level1, … but holds none; run `smalti train-prior`"
            )
        names = [f"level{number}" for number in range(len(found))]
        if strays := sorted(found - set(names)):
            raise ValueError(
                f"{folder} must hold level0, level1, … without a gap and nothing else called level, "
                f"but holds {', '.join(strays)}; move that away, or bring what is missing"
            )
        return cls([LevelPrior.from_pretrained(Path(folder) / name) for name in names]).eval()


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
