"""The hierarchical VQ-VAE: an image becomes one grid of codes per level, numbered coarse to fine.

What a level is made of and how it learns is its bottleneck's own; here only the protocol is known.

B batch, C channels, H W pixels, D channels that a bottleneck gives, K codebook_size, h w grid.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, Bottleneck, Settings, StoredGrid, VectorSizes
from tokenizer.bottlenecks.ema import EMAConfig
from tokenizer.checks import Float32Module, check_finite, check_pixels, code_grids, float_tensor, noise_grids
from tokenizer.classes import CHANNELS, BesideClass, Classes, class_tensor
from tokenizer.config import TokenizerConfig
from tokenizer.files import SETTINGS_ERRORS, check_tensors, family, read_files, told, write_files
from tokenizer.hub import CARD, card, check_replaceable, model_folder
from tokenizer.networks import decoder, encoder, upsampling


class Autoencoded(NamedTuple):
    """What comes of a batch of images.

    Attributes:
        reconstruction: (B, C, H, W).
        levels: what each bottleneck made of its features, coarse to fine.
        logits: of the reconstruction as values in [0, 1], where the decoder gives such.
    """

    reconstruction: Tensor
    levels: list[Bottled]
    logits: Tensor | None = None


class HierarchicalVQVAE(Float32Module, PyTorchModelHubMixin, library_name="smalti"):
    """N encoders, N bottlenecks, one decoder: with codebooks VQ-VAE for N = 1, VQ-VAE-2 for N = 2 or 3.

    Encoders chain fine to coarse, each on the features of the one below. Quantisation runs coarse to fine: the
    latents of a level are projected from its features beside what all coarser levels decode to, so that a finer
    level holds what the coarser ones lack. The decoder sees all levels at the finest grid.

    A conditional one lays a vector of the class beside the image, whose features coarser encoders go on from, and
    beside what the decoder sees; a further vector stands for no class (Sohn et al. 2015).

    Source: Razavi et al. 2019, section 3.1 and appendix A.

    Args:
        config: levels and widths.
        image_size: height and width of the images in pixels.
        channels: 1 for grey, 3 for RGB.
        bottleneck: settings of the family that all levels are of.
        num_classes: of images, where the config is conditional; else it is not looked at.

    Attributes:
        levels: the grids that stand for an image, coarse to fine: one per level, or several of one stride.

    Raises:
        ValueError: a stride does not divide the image size, or a conditional tokenizer has no classes.
    """

    bottlenecks: Sequence[Bottleneck]

    def __init__(
        self,
        config: TokenizerConfig,
        image_size: int,
        channels: int,
        bottleneck: Settings | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.channels = channels
        self.bottleneck: Settings = bottleneck or EMAConfig()
        self.num_classes = num_classes if config.conditional else 0
        if config.conditional and not num_classes >= 1:
            raise ValueError("conditional needs images with classes; set tokenizer.model.conditional to false")
        beside = CHANNELS if self.num_classes else 0
        blocks = (config.width, config.residual_width, config.residual_blocks)
        levels = config.num_levels
        # Index l everywhere is the level, 0 the coarsest; a finer neighbour's stride is the next in the list.
        factors = [coarse // fine for coarse, fine in zip(config.strides, config.strides[1:], strict=False)]
        self.encoders = nn.ModuleList(encoder(config.width, *blocks, factor) for factor in factors)
        self.encoders.append(encoder(channels + beside, *blocks, config.strides[-1]))
        self.bottlenecks = self._built()
        dims = [part.channels for part in self.bottlenecks]
        self.level_grids = config.grids(image_size)  # (h, w) of each bottleneck
        self.levels = [
            StoredGrid(grid, size, 1 if size else part.channels)
            for part, grid in zip(self.bottlenecks, self.level_grids, strict=True)
            for size in part.sizes
        ]
        seen = [sum(dims[: level + 1]) for level in range(levels)]  # channels of the levels up to this one
        contexts = [0] + [config.width] * (levels - 1)
        self.projections = nn.ModuleList(
            nn.Conv2d(config.width + context, part.features, 1)
            for context, part in zip(contexts, self.bottlenecks, strict=True)
        )
        self.context_decoders = nn.ModuleList(
            decoder(seen[level], config.width, *blocks, factor) for level, factor in enumerate(factors)
        )
        self.upsamplers = nn.ModuleList(upsampling(seen[level], factor) for level, factor in enumerate(factors))
        self.decoder = decoder(seen[-1] + beside, channels, *blocks, config.strides[-1])
        if self.num_classes:
            self.classes = BesideClass(self.num_classes)

    def _built(self) -> Sequence[Bottleneck]:
        """Return new bottlenecks, coarse to fine."""
        sizes = zip(self.config.codebook_sizes, self.config.code_dims, strict=True)
        return nn.ModuleList(  # type: ignore[return-value]  # a ModuleList of bottlenecks
            self.bottleneck.build(VectorSizes(codebook_size=size, code_dim=dim, normalize=self.config.normalize))
            for size, dim in sizes
        )

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of each stored grid, coarse to fine."""
        return [level.grid for level in self.levels]

    @property
    def codebook_sizes(self) -> list[int | None]:
        """K of each stored grid, coarse to fine; None where it is continuous."""
        return [level.codebook_size for level in self.levels]

    def forward(
        self, images: Tensor, noise: Sequence[Tensor | None] | None = None, classes: Classes = None
    ) -> Autoencoded:
        """Encode, pass all bottlenecks and decode. Pure: no buffer changes.

        Args:
            images: float of any precision, (B, C, H, W) in [-1, 1]; training goes through here, so that values are
                not read back to be judged.
            noise: for each bottleneck what it is given, see `Bottleneck`; None for none.
            classes: class index of each image, -1 where none is known; None for all of them. Any other
                tokenizer than a conditional one judges kind and number, and looks no further.

        Returns:
            The reconstruction, in eval mode clamped to [-1, 1] as `decode` does, and each level's `Bottled`.

        Raises:
            ValueError: images are no floats, channels or size are not the configured ones, noise is not of the
                bottlenecks' shapes, or classes are no integers or not as many.
        """
        levels = self._bottled(self._checked(images), noise, classes)
        decoded = self._decoded([level.seen for level in levels], classes)
        reconstruction = self._in_range(decoded) if self.config.sigmoid or not self.training else decoded
        return Autoencoded(reconstruction, levels, decoded if self.config.sigmoid else None)

    @torch.no_grad()
    def encode(
        self, images: Tensor, noise: Sequence[Tensor | None] | None = None, classes: Classes = None
    ) -> list[Tensor]:
        """Turn images into what stands for them.

        Args:
            images: float, (B, C, H, W) in [-1, 1].
            noise: as of `forward`.
            classes: as of `forward`.

        Returns:
            What is stored of each level, coarse to fine: codes, int64 (B, h, w), or numbers, float32 (B, d, h, w).

        Raises:
            ValueError: images are no floats or leave [-1, 1], channels or size are not the configured ones, or a class
                does not exist.
        """
        images = self._checked(images)
        check_pixels(images)
        return [grid for level in self._bottled(images, noise, classes) for grid in level.stored]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor | np.ndarray | None], classes: Classes = None) -> Tensor:
        """Turn what is stored back into images (B, C, H, W) in [-1, 1].

        Args:
            codes: as `encode` returns them, coarse to fine; codes of any integer type, tensors or arrays. Finer levels
                may be left out, and any may be None: what their bottleneck calls blank then stands for them, the mean
                code vector of a codebook, which shows what the others hold. Grids of one bottleneck go together.
            classes: as of `forward`.

        Raises:
            ValueError: codes are no integers, a grid is not the configured one, levels hold unequally many, a code or a
                class is out of range, or a number is not finite.
        """
        return self.decode_seen(self.seen(codes), classes)

    @torch.no_grad()
    def seen(self, codes: Sequence[Tensor | np.ndarray | None]) -> list[Tensor]:
        """Return what the decoder sees of each bottleneck, (B, D, h, w); arguments and errors are those of `decode`."""
        given = sum(one is not None for one in codes)
        if not given or len(codes) > len(self.levels):
            levels = "1 level" if len(self.levels) == 1 else f"1 to {len(self.levels)} levels"
            raise ValueError(f"codes must be a list of {levels}, got {given}")
        device = next(self.parameters()).device
        found = {n: self._stored(n, one, device) for n, one in enumerate(codes) if one is not None}
        numbers = [len(one) for one in found.values()]
        if len(set(numbers)) > 1:
            raise ValueError(f"all levels must hold equally many grids, got {numbers}")
        seen, first = [], 0
        for part, grid in zip(self.bottlenecks, self.level_grids, strict=True):
            own = [found[n] for n in range(first, first + len(part.sizes)) if n in found]
            first += len(part.sizes)
            seen.append(
                part.lookup(own)
                if len(own) == len(part.sizes)
                else part.blank()[None, :, None, None].expand(numbers[0], -1, *grid)
            )
        return seen

    @torch.no_grad()
    def decode_seen(self, seen: Sequence[Tensor], classes: Classes = None) -> Tensor:
        """Turn vectors of each bottleneck (B, D, h, w), which need not be those of codes, into images; see `seen`."""
        return self._in_range(self._decoded(list(seen), classes))

    def _stored(self, number: int, given: Tensor | np.ndarray, device: torch.device) -> Tensor:
        """Return a stored grid on a device, if kind and shape are what this tokenizer reads."""
        level = self.levels[number]
        if level.codebook_size:
            return code_grids(f"level {number} codes", given, device, level.grid)
        name, values = f"level {number} values", torch.from_numpy(given) if isinstance(given, np.ndarray) else given
        values = float_tensor(name, values, ("B", level.channels, *level.grid)).to(device)
        check_finite(name, values)
        return values

    def _checked(self, images: Tensor) -> Tensor:
        """Return images as float32, if kind and shape are what this tokenizer reads."""
        return float_tensor("images", images, ("B", self.channels, self.image_size, self.image_size))

    def _beside_class(self, values: Tensor, classes: Classes) -> Tensor:
        """Lay the class of each beside values (B, C, h, w), if it is looked at."""
        if self.num_classes:
            return self.classes(values, classes)
        if classes is not None:
            class_tensor(classes, len(values))
        return values

    def features(self, images: Tensor, classes: Classes = None) -> list[Tensor]:
        """Return what encoders make of images, float32 (B, width, h, w) of each bottleneck, coarse to fine."""
        features = [self._beside_class(images, classes)]
        for encode in reversed(self.encoders):
            features.insert(0, encode(features[0]))
        return features[:-1]

    def _bottled(self, images: Tensor, noise: Sequence[Tensor | None] | None, classes: Classes) -> list[Bottled]:
        parts = zip(self.bottlenecks, self.level_grids, strict=True)
        noise = noise_grids(noise, [(len(images), part.noise_channels, *grid) for part, grid in parts])
        features = self.features(images, classes)
        levels: list[Bottled] = []
        seen = None  # (B, sum of D, h, w) of all coarser levels on the grid of the last one
        for level, bottleneck in enumerate(self.bottlenecks):
            known = features[level]
            if seen is not None:
                known = torch.cat([self.context_decoders[level - 1](seen), known], 1)
            output = bottleneck(self.projections[level](known), noise[level])
            levels.append(output)
            seen = self.stack(seen, output.seen, level)
        return levels

    def _in_range(self, decoded: Tensor) -> Tensor:
        """Return what the decoder gives as images in [-1, 1]: 2 sigmoid(x) - 1 of logits."""
        return torch.tanh(decoded.float() / 2) if self.config.sigmoid else decoded.clamp(-1, 1)

    def _decoded(self, levels: list[Tensor], classes: Classes) -> Tensor:
        seen = None
        for level, vectors in enumerate(levels):
            seen = self.stack(seen, vectors, level)
        assert seen is not None
        return self.decoder(self._beside_class(seen, classes))

    def stack(self, seen: Tensor | None, vectors: Tensor, level: int) -> Tensor:
        """Lay what is seen of a level (B, D, h, w) on that of the coarser ones, upsampled to its grid."""
        return vectors if seen is None else torch.cat([self.upsamplers[level - 1](seen), vectors], 1)

    @property
    def settings(self) -> dict:
        """All that inference needs to know besides the tensors, as `config.json` holds it."""
        later = {f.name for f in fields(self.config) if f.metadata.get("introduced") == getattr(self.config, f.name)}
        config = {name: value for name, value in asdict(self.config).items() if name not in later}
        classes = {"num_classes": self.num_classes} if self.num_classes else {}
        return {"image_size": self.image_size, "channels": self.channels, **classes, **config, **told(self.bottleneck)}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names that files have: there bottlenecks are called codebooks, as all were once."""
        return {name.replace("bottlenecks.", "codebooks.", 1): value for name, value in self.state_dict().items()}

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `model.safetensors`, `config.json` and a card, in place of a tokenizer saved there before.

        Args:
            save_directory: a folder.
            options: of the hub's mixin.

        Raises:
            ValueError: the folder holds anything else, such as a stage's work.
        """
        check_replaceable(folder := Path(save_directory))
        (folder / CARD).unlink(missing_ok=True)  # which the mixin would leave as it was
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write `model.safetensors` and `config.json`; called by `save_pretrained` and `push_to_hub`."""
        write_files(save_directory, self.settings, self.tensors())

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card that `save_pretrained` puts beside the model: what it reads and gives, how to load it."""
        return ModelCard(card(self.bottleneck.called, self.image_size, self.channels, self.levels, self.num_classes))

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:  # type: ignore[override]
        """Load a tokenizer in eval mode from a folder, or from the hub.

        Args:
            name: folder with `model.safetensors` and `config.json`; what cannot be a folder here is a hub id.
            revision: branch, tag or commit on the hub.

        Raises:
            ValueError: no such folder, or the files lack or add a tensor or a setting.
        """
        folder = model_folder(name, "tokenizer", ["config.json", "model.safetensors"], revision)
        settings, tensors = read_files(folder)
        image_size, channels, num_classes, kind = (
            settings.pop(name) for name in ("image_size", "channels", "num_classes", "bottleneck")
        )
        try:
            with torch.device("meta"):  # sizes are believed when the tensors are there, not before memory is taken
                model = cls(TokenizerConfig(**settings), image_size, channels, family(kind), num_classes)
        except SETTINGS_ERRORS as error:
            raise ValueError(f"{folder}/config.json holds settings that cannot be: {error}") from error
        check_tensors(folder, tensors, model.tensors())
        model.bottlenecks = model._built()  # with what is in no file
        named = {
            name: tensors[stored].float() for name, stored in zip(model.state_dict(), model.tensors(), strict=True)
        }
        model.load_state_dict(named, assign=True)
        return model.requires_grad_(True).eval()
