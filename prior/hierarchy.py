"""All levels' priors together: exact likelihood of a set of grids, and sampling, coarse level first.

B batch, h w code grid, K codebook_size.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from prior.checks import FILES, Codes, Float32Module, Numbers, check_replaceable, checked, integers
from prior.decoder import Decoders
from prior.known import Known, checked_known
from prior.level import LevelPrior
from prior.sampling import LevelSampling, uniforms


class Completed(NamedTuple):
    """What was known and what was drawn beside it.

    Attributes:
        codes: as of `HierarchicalPrior.sample`.
        known_nats: -log p of the known values, each given all that comes before it, drawn ones too; float64 (B,).
        drawn_nats: the same of the drawn ones. Both are of the model as it is, whatever temperature, filters and
            guidance they were drawn with; their sum is `nll`.
    """

    codes: list[Tensor]
    known_nats: Tensor
    drawn_nats: Tensor


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
        last, names = levels[-1].config, class_names(levels)
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
            other_classes = config.knows_classes and config.class_names != names
            if other_classes or config.levels != last.levels[: number + 1]:
                raise ValueError(f"levels {number} and {last.level} disagree on grids, codebook sizes or classes")
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]  # a ModuleList of priors

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty when there are none."""
        return class_names(self.levels)

    def nll(self, codes: Sequence[Codes], classes: Numbers | None = None) -> Tensor:
        """Return the exact negative log-likelihood in nats, float64 (B,), summed over levels and positions.

        Args:
            codes: (B, h, w) in [0, K) per level, coarse to fine, of any integer type, tensors or arrays.
            classes: class index of each, a list, a tensor or an array; None where no class is given.

        Raises:
            ValueError: these are of another kind, shape, number or range, or the prior needs classes or has none.
        """
        last = self.levels[-1].config
        self._check_classes(classes)
        found, labels = checked(codes, classes, last.levels, len(self.class_names), self._device)
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
        known: Sequence[Known | None] = (),
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
            known: of each level, coarse to fine, what is given and left as it is; None, or no more levels, for nothing.
                See `Known` for what is conditioned on it; a coarser level never is on a finer one. What is drawn
                beside it is drawn with the uniforms that it would have had without.

        Returns:
            int64 (B, h, w) per level, coarse to fine; float32 (B, d, h, w) of a continuous one.

        Raises:
            ValueError: a setting, a class, the seed or an index is of another kind or out of range, the prior needs
                classes or has none, or guidance is asked of no class or of a prior that always had one.

        Source: Ho and Salimans 2022 (guidance without a classifier), on logits.
        """
        settings = self._settings(temperature, top_k, top_p, guidance)
        if classes is None and any(one.guidance != 1 for one in settings):
            raise ValueError("guidance needs classes; leave it at 1 where no class is given")
        self._check_classes(classes)
        sizes_known = [len(one.mask) for one in known if one is not None]
        number = max(sizes_known, default=1) if classes is None else len(integers("classes", classes, 1))
        places = integers("indices", range(number) if indices is None else indices, 1).tolist()
        if classes is not None and len(places) != number:
            raise ValueError(f"indices and classes must be equally many, got {len(places)} and {number}")
        _, labels = checked([], classes, [], len(self.class_names), self._device, len(places))
        if not places:
            return [_nothing(*level).to(self._device) for level in self.levels[-1].config.levels]
        given = checked_known(known, self.levels[-1].config.levels, self._device, len(places))
        sizes = [level.num_uniforms for level in self.levels]
        drawn = np.stack([uniforms(seed, index, sum(sizes)) for index in places])
        streams = torch.from_numpy(drawn).to(self._device).split(sizes, 1)
        codes: list[Tensor] = []
        for level, stream, one, stands in zip(self.levels, streams, settings, given, strict=True):
            codes.append(level.draw(codes, labels, stream, one, decoders, stands))
        return codes

    @torch.no_grad()
    def complete(self, known: Sequence[Known | None], classes: Numbers | None = None, **settings: Any) -> "Completed":
        """Draw what is not known, and score both.

        Args:
            known: as of `sample`.
            classes: as of `sample`.
            settings: the others of `sample`.

        Raises:
            ValueError: as of `sample`.
        """
        codes = self.sample(classes, known=known, **settings)
        levels = self.levels[-1].config.levels
        found, labels = checked(codes, classes, levels, len(self.class_names), self._device)
        given = checked_known(known, levels, self._device, len(found[0]))
        nats = torch.zeros(2, len(found[0]), dtype=torch.float64, device=self._device)  # of what is known, and drawn
        for number, (level, one) in enumerate(zip(self.levels, given, strict=True)):
            each = level.nats_unchecked(found[number], found[:number], labels)  # (B, h, w) or (B, d, h, w)
            mask = torch.zeros_like(each, dtype=torch.bool)
            if one is not None:
                mask |= one.mask if mask.ndim == 3 else one.mask[:, None]
            nats += torch.stack([torch.where(which, each, 0).flatten(1).sum(1) for which in (mask, ~mask)])
        return Completed(codes, *nats)

    def _settings(self, *given: Any) -> list[LevelSampling]:
        """Return each level's settings from those of `sample`, one value or one per level."""
        for name, setting in zip((one.name for one in fields(LevelSampling)), given, strict=True):
            if isinstance(setting, Sequence) and len(setting) != len(self.levels):
                raise ValueError(f"{name} must be one value or one per level ({len(self.levels)}), got {setting}")
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
        return self.levels[0].device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder per level, level0, level1, …, in place of a prior saved there before.

        Raises:
            ValueError: the folder holds anything else, such as a stage's work.
        """
        found = {path.name: path for path in Path(folder).glob("[!.]*")}
        if strays := sorted(name for name in found if not re.fullmatch(r"level\d+", name)):
            raise ValueError(
                f"{folder} must be empty or hold a saved prior and nothing else, but holds {', '.join(strays)}; "
                "choose another folder"
            )
        for path in found.values():
            check_replaceable(path)
        for number, level in enumerate(self.levels):
            level.save_pretrained(Path(folder) / f"level{number}")
        for path in (
            path for name, path in found.items() if name not in [f"level{n}" for n in range(len(self.levels))]
        ):
            for file in FILES:
                (path / file).unlink(missing_ok=True)
            with suppress(OSError):  # it holds hidden files of others
                path.rmdir()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load all levels of a folder, in eval mode.

        Priors record how many levels there are; in files from before they did, a finest level that is missing cannot be
        told.

        Raises:
            ValueError: no such folder, a level is missing, something else bears the name of one, or the levels do not
                belong together.
        """
        if not Path(folder).exists():
            raise ValueError(f"no prior at {folder}: there is no such folder; run `smalti train-prior`")
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


def class_names(levels: Sequence[LevelPrior]) -> list[str]:
    """Return the names of the classes that levels know, of the finest that knows any; empty when there are none."""
    return next((level.config.class_names for level in reversed(levels) if level.config.knows_classes), [])


def _nothing(grid: tuple[int, int], codebook_size: int | None, channels: int) -> Tensor:
    """Return a level of no samples."""
    return torch.empty(0, *grid, dtype=torch.int64) if codebook_size else torch.empty(0, channels, *grid)
