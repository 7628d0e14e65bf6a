"""The hierarchical VQ-VAE: an image becomes one grid of codes per level, numbered coarse to fine.

What a level is made of and how it learns is its bottleneck's own; here only the protocol is known.

B batch, C channels, H W pixels, D channels that a bottleneck gives, K codebook_size, h w grid.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.bottlenecks import KINDS, kind_of
from tokenizer.bottlenecks.bottleneck import Bottled, Bottleneck, Settings, StoredGrid, VectorSizes
from tokenizer.bottlenecks.ema import EMAConfig
from tokenizer.checks import Float32Module, check_finite, check_pixels, code_grids, float_tensor, noise_grids
from tokenizer.config import TokenizerConfig
from tokenizer.hub import CARD, check_replaceable, model_folder
from tokenizer.networks import decoder, encoder

# Of config.json. A field that came later has metadata={"introduced": value}: what it is where a file lacks it.
FORMAT = 1
# What weights may be stored as.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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

    Source: Razavi et al. 2019, section 3.1 and appendix A.

    Args:
        config: levels and widths.
        image_size: height and width of the images in pixels.
        channels: 1 for grey, 3 for RGB.
        bottleneck: settings of the family that all levels are of.

    Attributes:
        levels: the grids that stand for an image, coarse to fine: one per level, or several of one stride.

    Raises:
        ValueError: a stride does not divide the image size.
    """

    bottlenecks: Sequence[Bottleneck]

    def __init__(
        self, config: TokenizerConfig, image_size: int, channels: int, bottleneck: Settings | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.channels = channels
        self.bottleneck: Settings = bottleneck or EMAConfig()
        blocks = (config.width, config.residual_width, config.residual_blocks)
        levels = config.num_levels
        # Index l everywhere is the level, 0 the coarsest; a finer neighbour's stride is the next in the list.
        factors = [coarse // fine for coarse, fine in zip(config.strides, config.strides[1:], strict=False)]
        self.encoders = nn.ModuleList(encoder(config.width, *blocks, factor) for factor in factors)
        self.encoders.append(encoder(channels, *blocks, config.strides[-1]))
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
        self.decoder = decoder(seen[-1], channels, *blocks, config.strides[-1])

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

    def forward(self, images: Tensor, noise: Sequence[Tensor | None] | None = None) -> Autoencoded:
        """Encode, pass all bottlenecks and decode. Pure: no buffer changes.

        Args:
            images: float of any precision, (B, C, H, W) in [-1, 1]; training goes through here, so that values are
                not read back to be judged.
            noise: for each bottleneck what it is given, see `Bottleneck`; None for none.

        Returns:
            The reconstruction, in eval mode clamped to [-1, 1] as `decode` does, and each level's `Bottled`.

        Raises:
            ValueError: images are no floats, channels or size are not the configured ones, or noise is not of the
                bottlenecks' shapes.
        """
        levels = self._bottled(self._checked(images), noise)
        decoded = self._decoded([level.seen for level in levels])
        reconstruction = self._in_range(decoded) if self.config.sigmoid or not self.training else decoded
        return Autoencoded(reconstruction, levels, decoded if self.config.sigmoid else None)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Turn images into what stands for them.

        Args:
            images: float, (B, C, H, W) in [-1, 1].
            noise: as of `forward`.

        Returns:
            What is stored of each level, coarse to fine: codes, int64 (B, h, w), or numbers, float32 (B, d, h, w).

        Raises:
            ValueError: images are no floats or leave [-1, 1], or channels or size are not the configured ones.
        """
        images = self._checked(images)
        check_pixels(images)
        return [grid for level in self._bottled(images, noise) for grid in level.stored]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor | np.ndarray | None]) -> Tensor:
        """Turn what is stored back into images (B, C, H, W) in [-1, 1].

        Args:
            codes: as `encode` returns them, coarse to fine; codes of any integer type, tensors or arrays. Finer levels
                may be left out, and any may be None: what their bottleneck calls blank then stands for them, the mean
                code vector of a codebook, which shows what the others hold. Grids of one bottleneck go together.

        Raises:
            ValueError: codes are no integers, a grid is not the configured one, levels hold unequally many, a code is
                out of range, or a number is not finite.
        """
        return self.decode_seen(self.seen(codes))

    @torch.no_grad()
    def seen(self, codes: Sequence[Tensor | np.ndarray | None]) -> list[Tensor]:
        """Return what the decoder sees of each bottleneck, (B, D, h, w); arguments and errors are those of `decode`."""
        given = sum(one is not None for one in codes)
        if not given or len(codes) > len(self.levels):
            raise ValueError(f"codes must have 1 to {len(self.levels)} levels, got {given}")
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
    def decode_seen(self, seen: Sequence[Tensor]) -> Tensor:
        """Turn vectors of each bottleneck (B, D, h, w), which need not be those of codes, into images; see `seen`."""
        return self._in_range(self._decoded(list(seen)))

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

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what encoders make of images, float32 (B, width, h, w) of each bottleneck, coarse to fine."""
        features = [images]
        for encode in reversed(self.encoders):
            features.insert(0, encode(features[0]))
        return features[:-1]

    def _bottled(self, images: Tensor, noise: Sequence[Tensor | None] | None) -> list[Bottled]:
        parts = zip(self.bottlenecks, self.level_grids, strict=True)
        noise = noise_grids(noise, [(len(images), part.noise_channels, *grid) for part, grid in parts])
        features = self.features(images)
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

    def _decoded(self, levels: list[Tensor]) -> Tensor:
        seen = None
        for level, vectors in enumerate(levels):
            seen = self.stack(seen, vectors, level)
        return self.decoder(seen)

    def stack(self, seen: Tensor | None, vectors: Tensor, level: int) -> Tensor:
        """Lay what is seen of a level (B, D, h, w) on that of the coarser ones, upsampled to its grid."""
        return vectors if seen is None else torch.cat([self.upsamplers[level - 1](seen), vectors], 1)

    @property
    def settings(self) -> dict:
        """All that inference needs to know besides the tensors, as `config.json` holds it."""
        later = {f.name for f in fields(self.config) if f.metadata.get("introduced") == getattr(self.config, f.name)}
        config = {name: value for name, value in asdict(self.config).items() if name not in later}
        return {"image_size": self.image_size, "channels": self.channels, **config, **self.family}

    @property
    def family(self) -> dict[str, Any]:
        """What says of which family the bottlenecks are; nothing of EMA codebooks, the only one when files began."""
        kind, of_model = kind_of(self.bottleneck), self.bottleneck.of_model
        if kind == "ema":
            return {}
        return {"bottleneck": {"kind": kind, **{name: getattr(self.bottleneck, name) for name in of_model}}}

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
        save_file({k: v.contiguous() for k, v in self.tensors().items()}, save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(json.dumps({"format": FORMAT, **self.settings}, indent=2) + "\n")

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card that `save_pretrained` puts beside the model: what it reads and gives, how to load it."""
        levels = ", ".join(
            f"{h}x{w} " + (f"codes of {size}" if size else f"vectors of {dim}") for (h, w), size, dim in self.levels
        )
        return ModelCard(
            "---\nlibrary_name: smalti\ntags: [image-tokenizer, vq-vae]\n---\n\n# A smalti tokenizer\n\n"
            f"Images of {self.image_size}x{self.image_size} pixels and {self.channels} channels in [-1, 1] "
            f"become, coarse to fine: {levels}.\n\n```python\nfrom tokenizer import HierarchicalVQVAE\n\n"
            "tok = HierarchicalVQVAE.from_pretrained(FOLDER_OR_REPOSITORY)\n"
            "codes = tok.encode(images)\nimages = tok.decode(codes)\n```\n"
        )

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
        try:
            settings = json.loads((folder / "config.json").read_text())
            tensors = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} holds no readable tokenizer ({error}); train or copy it again") from error
        if isinstance(settings, dict) and settings.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{folder}/config.json is of format {settings['format']}, not {FORMAT}; update smalti")
        known = {"image_size", "channels", *(field.name for field in fields(TokenizerConfig))}
        later = {f.name: f.metadata["introduced"] for f in fields(TokenizerConfig) if "introduced" in f.metadata}
        if not isinstance(settings, dict) or set(later | settings) - {"format", "bottleneck"} != known:
            raise ValueError(f"{folder}/config.json must hold exactly the settings {sorted(known)}")
        settings = {name: value for name, value in (later | settings).items() if name != "format"}
        image_size, channels = settings.pop("image_size"), settings.pop("channels")
        try:
            family = _family(settings.pop("bottleneck", {"kind": "ema"}))
            with torch.device("meta"):  # sizes are believed when the tensors are there, not before memory is taken
                model = cls(TokenizerConfig(**settings), image_size, channels, family)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{folder}/config.json holds settings that cannot be: {error}") from error
        expected = {name: tensor.shape for name, tensor in model.tensors().items()}
        wrong = [n for n in expected | tensors if n not in tensors or expected.get(n) != tensors[n].shape]
        if wrong:
            raise ValueError(
                f"{folder}/model.safetensors lacks, adds or reshapes {len(wrong)} tensors, first {wrong[0]}; "
                "it is not the file of this config.json"
            )
        for key, tensor in tensors.items():
            if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{folder}/model.safetensors must hold finite numbers, but {key} does not; copy or train it again"
                )
        model.bottlenecks = model._built()  # with what is in no file
        named = {
            name: tensors[stored].float() for name, stored in zip(model.state_dict(), model.tensors(), strict=True)
        }
        model.load_state_dict(named, assign=True)
        return model.requires_grad_(True).eval()


def _family(settings: dict[str, Any]) -> Settings:
    """Return the settings of a family from config.json."""
    family = KINDS[settings["kind"]]
    if set(settings) != {"kind", *family.of_model}:
        raise ValueError(f"bottleneck must hold kind and {list(family.of_model)}, got {sorted(settings)}")
    return family(**{name: settings[name] for name in family.of_model})


def upsampling(channels: int, factor: int) -> nn.Sequential:
    """Build log2(factor) 4x4 transposed convolutions that keep the channels and double the grid."""
    doublings = factor.bit_length() - 1
    return nn.Sequential(*[nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in range(doublings)])
