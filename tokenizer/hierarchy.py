"""The hierarchical VQ-VAE: an image becomes one grid of codes a level, numbered coarse to fine.

B batch, C channels, H W pixels, D code_dim, K codebook_size, h w code grid.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.checks import Float32Module, check_pixels, code_grids, float_tensor
from tokenizer.codebook import Codebook, Quantized
from tokenizer.hub import model_folder
from tokenizer.networks import decoder, encoder

# Beyond these a setting is damage or malice, not a model.
MAX_WIDTH, MAX_BLOCKS, MAX_LEVELS, MAX_CODES = 2**16, 50, 8, 2**31


# Of config.json. A field that came later has metadata={"introduced": value}: what it is where a file lacks it.
FORMAT = 1
# What weights may be stored as.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What a tokenizer is, whatever the images. Defaults: VQ-VAE-2 at 256 pixels.

    Attributes:
        strides: image pixels per code along each side, a level each, coarse to fine; powers of two.
        codebook_size: K, one for all levels or a list of one each.
        code_dim: D, one for all levels or a list of one each.
        width: channels of encoders and decoders.
        residual_width: channels inside a residual block.
        residual_blocks: residual blocks in each encoder and decoder.
        normalize: l2-normalise latents and codes.
    """

    strides: list[int] = field(default_factory=lambda: [8, 4])
    codebook_size: int | list[int] = 512
    code_dim: int | list[int] = 64
    width: int = 128
    residual_width: int = 32
    residual_blocks: int = 2
    normalize: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.strides) <= MAX_LEVELS:
            raise ValueError(f"strides must name at least one level and at most {MAX_LEVELS}, got {len(self.strides)}")
        for stride in self.strides:
            if stride < 2 or stride & (stride - 1):
                raise ValueError(f"strides must be powers of two from 2 on, got {stride}")
        if any(coarse <= fine for coarse, fine in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(f"strides must fall from coarse to fine, got {self.strides}")
        for name in ("codebook_size", "code_dim"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != len(self.strides):
                raise ValueError(f"{name} must have one value per level ({len(self.strides)}), got {values}")
        for name, most in (("width", MAX_WIDTH), ("residual_width", MAX_WIDTH), ("residual_blocks", MAX_BLOCKS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}, got {getattr(self, name)}")
        if self.strides[0] > MAX_WIDTH or max(self.codebook_sizes) > MAX_CODES or max(self.code_dims) > MAX_WIDTH:
            raise ValueError("strides, codebook_size or code_dim are beyond all bounds")
        if min(self.codebook_sizes) < 2 or min(self.code_dims) < 1:
            raise ValueError(
                "a codebook needs at least 2 codes of at least 1 dimension, "
                f"got {self.codebook_size} of {self.code_dim}"
            )

    @property
    def num_levels(self) -> int:
        """N, the number of levels."""
        return len(self.strides)

    @property
    def codebook_sizes(self) -> list[int]:
        """K of each level, coarse to fine."""
        return self.codebook_size if isinstance(self.codebook_size, list) else [self.codebook_size] * self.num_levels

    @property
    def code_dims(self) -> list[int]:
        """D of each level, coarse to fine."""
        return self.code_dim if isinstance(self.code_dim, list) else [self.code_dim] * self.num_levels

    def grids(self, image_size: int) -> list[tuple[int, int]]:
        """Return (h, w) of each level, coarse to fine.

        Raises:
            ValueError: a stride does not divide the image size.
        """
        for stride in self.strides:
            if image_size < stride or image_size % stride:
                raise ValueError(
                    f"strides must divide the image size, but {stride} does not divide {image_size}; "
                    "change tokenizer.model.strides or images.size"
                )
        return [(image_size // stride, image_size // stride) for stride in self.strides]


class Autoencoded(NamedTuple):
    """A reconstruction (B, C, H, W) and what each codebook made of its latents, coarse to fine."""

    reconstruction: Tensor
    levels: list[Quantized]


class HierarchicalVQVAE(Float32Module, PyTorchModelHubMixin, library_name="smalti"):
    """N encoders, N codebooks, one decoder: VQ-VAE for N = 1, VQ-VAE-2 for N = 2 or 3.

    Encoders chain fine to coarse, each on the features of the one below. Quantisation runs coarse to fine: the
    latents of a level are projected from its features beside what all coarser levels decode to, so that a finer
    level holds what the coarser ones lack. The decoder sees all levels at the finest grid.

    Source: Razavi et al. 2019, section 3.1 and appendix A.

    Args:
        config: levels and widths.
        image_size: height and width of the images in pixels.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: a stride does not divide the image size.
    """

    codebooks: Sequence[Codebook]

    def __init__(self, config: TokenizerConfig, image_size: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.channels = channels
        self.grids = config.grids(image_size)  # (h, w) a level, coarse to fine
        blocks = (config.width, config.residual_width, config.residual_blocks)
        dims, levels = config.code_dims, config.num_levels
        # Index l everywhere is the level, 0 the coarsest; a finer neighbour's stride is the next in the list.
        factors = [coarse // fine for coarse, fine in zip(config.strides, config.strides[1:], strict=False)]
        seen = [sum(dims[: level + 1]) for level in range(levels)]  # code channels of the levels up to this one
        self.encoders = nn.ModuleList(encoder(config.width, *blocks, factor) for factor in factors)
        self.encoders.append(encoder(channels, *blocks, config.strides[-1]))
        self.codebooks = nn.ModuleList(  # type: ignore[assignment]  # a ModuleList of codebooks
            Codebook(size, dim, config.normalize) for size, dim in zip(config.codebook_sizes, dims, strict=True)
        )
        contexts = [0] + [config.width] * (levels - 1)
        self.projections = nn.ModuleList(
            nn.Conv2d(config.width + context, dim, 1) for context, dim in zip(contexts, dims, strict=True)
        )
        self.context_decoders = nn.ModuleList(
            decoder(seen[level], config.width, *blocks, factor) for level, factor in enumerate(factors)
        )
        self.upsamplers = nn.ModuleList(upsampling(seen[level], factor) for level, factor in enumerate(factors))
        self.decoder = decoder(seen[-1], channels, *blocks, config.strides[-1])

    def forward(self, images: Tensor) -> Autoencoded:
        """Encode, quantise and decode. Pure: no buffer changes.

        Args:
            images: float of any precision, (B, C, H, W) in [-1, 1]; training goes through here, so that values are
                not read back to be judged.

        Returns:
            The reconstruction, in eval mode clamped to [-1, 1] as `decode` does, and each level's `Quantized`.

        Raises:
            ValueError: images are no floats, or channels or size are not the configured ones.
        """
        levels = self._quantize(self._checked(images))
        reconstruction = self._reconstruct([level.quantized for level in levels])
        return Autoencoded(reconstruction if self.training else reconstruction.clamp(-1, 1), levels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Turn images (B, C, H, W) in [-1, 1] into codes: int64 (B, h, w) a level, coarse to fine.

        Raises:
            ValueError: images are no floats or leave [-1, 1], or channels or size are not the configured ones.
        """
        images = self._checked(images)
        check_pixels(images)
        return [level.codes for level in self._quantize(images)]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor | np.ndarray]) -> Tensor:
        """Turn codes into images (B, C, H, W) in [-1, 1].

        Args:
            codes: (B, h, w) a level, coarse to fine, of any integer type, tensors or arrays. Finer levels may be left
                out: the mean code vector then stands for them, which shows what the coarser levels hold.

        Raises:
            ValueError: codes are no integers, a grid is not the configured one, levels hold unequally many, or a code
                is out of range.
        """
        if not 1 <= len(codes) <= self.config.num_levels:
            raise ValueError(f"codes must have 1 to {self.config.num_levels} levels, got {len(codes)}")
        device = self.codebooks[0].vectors.device
        codes = [code_grids(f"level {n} codes", c, device, self.grids[n]) for n, c in enumerate(codes)]
        if len({len(code) for code in codes}) > 1:
            raise ValueError(f"all levels must hold equally many grids, got {[len(code) for code in codes]}")
        quantized = [book.lookup(code) for book, code in zip(self.codebooks, codes, strict=False)]
        for book, grid in list(zip(self.codebooks, self.grids, strict=True))[len(codes) :]:
            quantized.append(book.table.mean(0)[None, :, None, None].expand(len(codes[0]), -1, *grid))
        return self._reconstruct(quantized).clamp(-1, 1)

    def _checked(self, images: Tensor) -> Tensor:
        """Return images as float32, if kind and shape are what this tokenizer reads."""
        return float_tensor("images", images, ("B", self.channels, self.image_size, self.image_size))

    def _quantize(self, images: Tensor) -> list[Quantized]:
        features = [images]
        for encode in reversed(self.encoders):
            features.insert(0, encode(features[0]))
        levels: list[Quantized] = []
        seen = None  # (B, sum of D, h, w) codes of all coarser levels on the grid of the last one
        for level, codebook in enumerate(self.codebooks):
            known = features[level]
            if seen is not None:
                known = torch.cat([self.context_decoders[level - 1](seen), known], 1)
            output = codebook(self.projections[level](known))
            levels.append(output)
            seen = self._stack(seen, output.quantized, level)
        return levels

    def _reconstruct(self, quantized: list[Tensor]) -> Tensor:
        seen = None
        for level, vectors in enumerate(quantized):
            seen = self._stack(seen, vectors, level)
        return self.decoder(seen)

    def _stack(self, seen: Tensor | None, vectors: Tensor, level: int) -> Tensor:
        """Lay a level's code vectors (B, D, h, w) on the coarser ones, upsampled to its grid."""
        return vectors if seen is None else torch.cat([self.upsamplers[level - 1](seen), vectors], 1)

    @property
    def settings(self) -> dict:
        """All that inference needs to know besides the tensors, as `config.json` holds it."""
        return {"image_size": self.image_size, "channels": self.channels, **asdict(self.config)}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write `model.safetensors` and `config.json`; called by `save_pretrained` and `push_to_hub`."""
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(json.dumps({"format": FORMAT, **self.settings}, indent=2) + "\n")

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card that `save_pretrained` puts beside the model: what it reads and gives, how to load it."""
        levels = ", ".join(
            f"{h}x{w} codes of {size}" for (h, w), size in zip(self.grids, self.config.codebook_sizes, strict=True)
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
        if not isinstance(settings, dict) or set(later | settings) - {"format"} != known:
            raise ValueError(f"{folder}/config.json must hold exactly the settings {sorted(known)}")
        settings = {name: value for name, value in (later | settings).items() if name != "format"}
        image_size, channels = settings.pop("image_size"), settings.pop("channels")
        try:
            with torch.device("meta"):  # sizes are believed when the tensors are there, not before memory is taken
                model = cls(TokenizerConfig(**settings), image_size, channels)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{folder}/config.json holds settings that cannot be: {error}") from error
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
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
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
        return model.requires_grad_(True).eval()


def upsampling(channels: int, factor: int) -> nn.Sequential:
    """Build log2(factor) 4x4 transposed convolutions that keep the channels and double the grid."""
    doublings = factor.bit_length() - 1
    return nn.Sequential(*[nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in range(doublings)])
