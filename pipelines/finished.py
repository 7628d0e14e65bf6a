"""What is there of a run, its own work or another's: where it lies, and whether its val split was held out."""

from pathlib import Path

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.held_out import held_out
from pipelines.manifest import read_manifest
from pipelines.places import is_local, place
from pipelines.stage import is_complete


class Finished:
    """A run's folders.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = place(config.run_dir, writable=True)

    @property
    def images(self) -> Path:
        """The `images` folder: this run's, or the one that images.from names."""
        return _existing(self.config.images.from_, "images.from") or self.root / "images"

    @property
    def tokenizer(self) -> Path:
        """The `tokenizer` folder: this run's, or what tokenizer.from names, which is no folder if it is a hub id."""
        name = self.config.tokenizer.from_
        return place(name) if name else self.root / "tokenizer"

    @property
    def codes(self) -> Path:
        """The `codes` folder: this run's, or the one that codes.from names."""
        return _existing(self.config.codes.from_, "codes.from") or self.root / "codes"

    @property
    def unpacked(self) -> Path:
        """Where codes are unpacked: in the run, or on local disk when that is elsewhere."""
        local = is_local(self.root)
        return self.root / "prior" / "codes" if local else self.config.compute.cache.folder / "codes"

    def needs_images(self) -> bool:
        """Whether the config leaves anything to do with images; another run's tokenizer and codes need none."""
        return bool(self.config.images.from_) or not (self.config.tokenizer.from_ and self.config.codes.from_)

    def has_images(self) -> bool:
        """Whether there are images; those that the config names must be, as for the two that follow."""
        return bool(self.config.images.from_) or (self.needs_images() and is_complete(self.images))

    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        return bool(self.config.tokenizer.from_) or is_complete(self.root / "tokenizer")

    def has_priors(self) -> bool:
        """Whether there are codes, and priors of all their levels."""
        there = bool(self.config.codes.from_) or is_complete(self.codes)
        return there and all(is_complete(folder) for folder in self._prior_folders())

    def tokenizer_held_out(self) -> bool | None:
        """Whether the images' val split was held out from the tokenizer's training; see `held_out`."""
        own = not (self.config.tokenizer.from_ or self.config.images.from_)
        return held_out([self.tokenizer], "images", self.images, own)

    def prior_held_out(self) -> bool | None:
        """Whether the codes' val split was held out from the priors' training; see `held_out`."""
        return held_out(self._prior_folders(), "codes", self.codes, own=not self.config.codes.from_)

    def _prior_folders(self) -> list[Path]:
        levels = read_manifest(self.codes, "codes", "encode")["levels"]
        return [self.root / "prior" / f"level{level}" for level in range(len(levels))]


def _existing(name: str, setting: str) -> Path | None:
    if not name:
        return None
    folder = place(name)
    if is_local(folder) and not folder.is_dir():
        raise StageError(f"{setting} must name a stage folder that exists, there is no {name}")
    return folder
