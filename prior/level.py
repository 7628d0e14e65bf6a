"""One level's prior: p(codes of this level | codes of coarser levels, class).

B batch, h w code grid, K codebook_size.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prior.conditioning import Conditioning
from prior.decoding import Decoder, Decoders, working_dtype
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig
from prior.sizes import MAX_CODES
from prior.transformer import CodeTransformer, TransformerConfig

# Of config.json. A field that came later has metadata={"introduced": value}: what it is where a file lacks it.
FORMAT = 1
# What weights may be stored as.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Codes in one grid; more is damage or malice.
MAX_POSITIONS = 2**22


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """What one level's prior is, as far as likelihood and sampling are concerned.

    Attributes:
        level: 0 for the coarsest.
        grids: (h, w) of this and all coarser levels, coarse to fine.
        codebook_sizes: K of the same levels.
        class_names: empty when the data has no classes.
        network: "transformer" or "pixelsnail".
        size: the sizes of that network, no lists.
        tokenizer: fingerprint of the tokenizer whose codes it learned; empty when made by hand.
    """

    level: int
    grids: list[tuple[int, int]]
    codebook_sizes: list[int]
    class_names: list[str]
    network: Literal["transformer", "pixelsnail"]
    size: TransformerConfig | PixelSNAILConfig
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if not len(self.grids) == len(self.codebook_sizes) == self.level + 1:
            raise ValueError(f"level {self.level} must know the grids and codebook sizes of {self.level + 1} levels")
        for (h, w), size in zip(self.grids, self.codebook_sizes, strict=True):
            if not (h >= 1 and w >= 1 and h * w <= MAX_POSITIONS and 2 <= size <= MAX_CODES):
                raise ValueError(f"a level of {h}x{w} codes of {size} cannot be")


class LevelPrior(nn.Module):
    """A Transformer or a PixelSNAIL with its conditioning, behind one interface.

    Args:
        config: sizes and what it is conditioned on.
        dropout: of all its parts, in training.
    """

    def __init__(self, config: LevelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        size, grid, codebook_size = config.size, config.grids[-1], config.codebook_sizes[-1]
        coarser = [(h, w, k) for (h, w), k in zip(config.grids[:-1], config.codebook_sizes[:-1], strict=True)]
        assert isinstance(size.width, int) and isinstance(size.conditioning_blocks, int)
        self.conditioning = Conditioning(
            size.width, grid, coarser, len(config.class_names), size.conditioning_blocks, dropout
        )
        self.network: CodeTransformer | PixelSNAIL
        if isinstance(size, TransformerConfig):
            self.network = CodeTransformer(codebook_size, grid, size, dropout)
        else:
            self.network = PixelSNAIL(codebook_size, size, dropout)

    def logits(self, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return the logits of every code given those before it in raster order.

        Args:
            codes: int64 (B, h, w).
            coarser: int64 (B, h, w) of each coarser level, coarse to fine.
            classes: int64 (B,) in [0, num_classes], the last for "no class given"; None for all of them so.

        Returns:
            float (B, h, w, K).
        """
        return self.network(codes, self.conditioning(coarser, classes, len(codes)))

    forward = logits

    def nll(self, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return the exact negative log-likelihood in nats, float64 (B,), summed over the grid."""
        logits = self.logits(codes, coarser, classes).float()
        nats = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
        return nats.view(len(codes), -1).double().sum(1)

    def decoder(
        self, coarser: list[Tensor], classes: Tensor | None, batch_size: int, kept: Decoders | None = None
    ) -> Decoder:
        """Return a decoder that yields one position's logits after another; arguments as for `logits`.

        Where `kept` holds one that fits, that is started anew: what it laid out and captured serves many batches. A
        new one is added to it.
        """
        condition = self.conditioning(coarser, classes, batch_size)
        if kept is None:
            return self.network.decoder(condition)
        key = (self.config.level, condition.shape, working_dtype(condition))
        if key in kept:
            kept[key].restart(condition)
        else:
            kept[key] = self.network.decoder(condition)
        return kept[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a level's prior in eval mode.

        Raises:
            ValueError: no such folder, or the files lack or add a tensor or a setting.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / "config.json").read_text())
            if (found := settings.pop("format", FORMAT)) != FORMAT:
                raise OtherFormatError(f"{folder}/config.json is of format {found}, not {FORMAT}; update smalti")
            config = _level_config(settings)
            tensors = load_file(folder / "model.safetensors")
            with torch.device("meta"):  # sizes are believed when the tensors are there, not before memory is taken
                expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        except OtherFormatError:
            raise
        except LOADING_ERRORS as error:
            raise ValueError(f"{folder} holds no readable prior ({error}); run `smalti train-prior`") from error
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
        model = cls(config)
        with torch.no_grad():
            model.load_state_dict(tensors)
        return model.eval()


class OtherFormatError(ValueError):
    """Written by a later version."""


# What a file that lies about a prior can raise on its way to one.
LOADING_ERRORS = (
    *(OSError, SafetensorError, ValueError, TypeError, KeyError),
    *(RuntimeError, OverflowError, AttributeError, AssertionError, RecursionError),
)


def _level_config(settings: dict) -> LevelConfig:
    settings = _with_later(LevelConfig, settings)
    size = TransformerConfig if settings["network"] == "transformer" else PixelSNAILConfig
    grids = [(h, w) for h, w in settings["grids"]]
    return LevelConfig(**settings | {"grids": grids, "size": size(**_with_later(size, settings["size"]))})


def _with_later(config: type, settings: dict) -> dict:
    """Add the settings that came after a file was written, and refuse what is missing or too much."""
    known = {field.name: field.metadata for field in fields(config)}
    later = {name: metadata["introduced"] for name, metadata in known.items() if "introduced" in metadata}
    if set(later | settings) != set(known):
        raise ValueError(f"config.json must hold exactly the settings {sorted(known)}")
    return later | settings
