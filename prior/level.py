"""One level's prior: p(codes of this level | codes of coarser levels, class).

B batch, h w code grid, K codebook_size.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prior.checks import Codes, Float32Module, Numbers, check_replaceable, checked, whole_number
from prior.conditioning import Conditioning
from prior.continuous import Continuous, ContinuousConfig
from prior.decoder import UNKNOWN, Decoder, Decoders, working_dtype
from prior.flow import FlowConfig
from prior.known import Known
from prior.mixture import MixtureConfig
from prior.normal import NormalConfig
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig
from prior.pixelsnail_decoder import PixelSNAILDecoder
from prior.sampling import LevelSampling
from prior.sizes import MAX_CODES
from prior.transformer import CodeTransformer, TransformerConfig

# Of config.json. A field that came later has metadata={"introduced": value}: what it is where a file lacks it.
FORMAT = 1
# What weights may be stored as.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Codes in one grid; more is damage or malice.
MAX_POSITIONS = 2**22
# What config.json calls the network that a size is of.
NETWORKS = {
    "transformer": TransformerConfig,
    "pixelsnail": PixelSNAILConfig,
    "normal": NormalConfig,
    "mixture": MixtureConfig,
    "flow": FlowConfig,
}


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """What one level's prior is, as far as likelihood and sampling are concerned.

    Attributes:
        level: 0 for the coarsest.
        grids: (h, w) of this and all coarser levels, coarse to fine.
        codebook_sizes: K of the same levels; None where they are continuous.
        class_names: empty when the data has no classes.
        network: its name in `NETWORKS`, as the size says; in files since format 1.
        size: that of a Transformer or of a PixelSNAIL; of a `Continuous` network for a continuous level. No lists.
        tokenizer: fingerprint of the tokenizer whose codes it learned; empty when made by hand.
        unconditional: whether it learned samples without their class too, so that the class may be left out, and
            guidance has something to move away from.
        num_levels: of the tokenizer; 0 where a file does not say.
        channels: numbers of a cell of each continuous level, 1 of the others; may be left out where there are none.
    """

    level: int
    grids: list[tuple[int, int]]
    codebook_sizes: list[int | None]
    class_names: list[str]
    network: str = field(init=False)
    size: TransformerConfig | PixelSNAILConfig | ContinuousConfig
    tokenizer: str = ""
    unconditional: bool = field(default=True, metadata={"introduced": True})
    num_levels: int = field(default=0, metadata={"introduced": 0})
    channels: list[int] = field(default_factory=list, metadata={"introduced": []})

    def __post_init__(self) -> None:
        network = next((name for name, size in NETWORKS.items() if isinstance(self.size, size)), "")
        if not network:
            kinds = ", ".join(kind.__name__ for kind in NETWORKS.values())
            raise ValueError(f"size must be one of {kinds}, got {self.size!r}")
        object.__setattr__(self, "network", network)
        if self.num_levels and not self.level < self.num_levels:
            raise ValueError(f"level {self.level} cannot be one of {self.num_levels}")
        if not len(self.grids) == len(self.codebook_sizes) == self.level + 1:
            raise ValueError(f"level {self.level} must know the grids and codebook sizes of {self.level + 1} levels")
        if len(self.channels) not in (0, len(self.grids)):
            raise ValueError(f"channels must be one number per level, got {self.channels}")
        for (h, w), size, channels in self.levels:
            if not (h >= 1 and w >= 1 and h * w * channels <= MAX_POSITIONS and 2 <= (size or 2) <= MAX_CODES):
                raise ValueError(f"a level of {h}x{w} codes of {size} cannot be")
        if (self.codebook_sizes[-1] is None) != isinstance(self.size, ContinuousConfig):
            kind = "continuous" if self.codebook_sizes[-1] is None else "of codes"
            raise ValueError(f"level {self.level} is {kind}, which {network} is no prior for")

    @property
    def levels(self) -> list[tuple[tuple[int, int], int | None, int]]:
        """(h, w), K and channels of this and all coarser levels."""
        channels = self.channels or [1] * len(self.grids)
        return list(zip([(h, w) for h, w in self.grids], self.codebook_sizes, channels, strict=True))

    @property
    def knows_classes(self) -> bool:
        """Whether it is told a class: N(0, I) only where the decoder is, and else holds no names of them."""
        return not isinstance(self.size, NormalConfig) or bool(self.class_names)

    def check_unconditional(self) -> None:
        """Raise ValueError where there are classes and none may be left out."""
        if self.class_names and not self.unconditional:
            raise ValueError(
                f"level {self.level} never learned samples without their class (prior.class_dropout was 0): "
                "give classes and leave guidance at 1, or train it again with class_dropout above 0"
            )


class LevelPrior(Float32Module):
    """One level's model, behind one interface: how likely what is stored is, and how it is drawn.

    A Transformer or a PixelSNAIL over codes, conditioned on class and coarser levels; a `Continuous` one over numbers.

    Args:
        config: sizes and what it is conditioned on.
        dropout: of all its parts, in training.
    """

    def __init__(self, config: LevelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        size, (grid, codebook_size, _) = config.size, config.levels[-1]
        self.network: CodeTransformer | PixelSNAIL | Continuous
        if isinstance(size, ContinuousConfig):
            self.network = size.build(config.levels, len(config.class_names), dropout)
            self.num_uniforms = self.network.num_uniforms  # of each sample
            return
        assert codebook_size
        self.num_uniforms = grid[0] * grid[1]
        assert isinstance(size.width, int) and isinstance(size.conditioning_blocks, int)
        self.conditioning = Conditioning(
            size.width, grid, config.levels[:-1], len(config.class_names), size.conditioning_blocks, dropout
        )
        if isinstance(size, TransformerConfig):
            self.network = CodeTransformer(codebook_size, grid, size, dropout)
        else:
            self.network = PixelSNAIL(codebook_size, size, dropout)

    def forward(self, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return what `logits` does, of a continuous level nats (B, d, h, w): training's way, without checks."""
        if isinstance(self.network, Continuous):
            return self.network.nats(codes, coarser, classes)
        return self.network(codes, self.conditioning(coarser, classes, len(codes)))

    def logits(self, codes: Codes, coarser: Sequence[Codes], classes: Numbers | None) -> Tensor:
        """Return the logits of every code given those before it in raster order.

        Args:
            codes: (B, h, w) in [0, K), of any integer type, a tensor or an array.
            coarser: the same of each coarser level, coarse to fine.
            classes: B whole numbers in [0, num_classes], the last for "no class given"; None for all of them so. Not
                looked at where the data has no classes.

        Returns:
            float (B, h, w, K).

        Raises:
            ValueError: the first of these that is not so, or a class is missing that the prior cannot do without.
        """
        (*grids, own), labels = self._checked([*coarser, codes], classes, self.config.level + 1)
        return self.forward(own, grids, labels)

    def nll(self, codes: Codes, coarser: Sequence[Codes], classes: Numbers | None) -> Tensor:
        """Return the exact negative log-likelihood in nats, float64 (B,), summed over the grid.

        Arguments and errors are those of `logits`; of a continuous level values, float (B, d, h, w), and a density.
        """
        (*grids, own), labels = self._checked([*coarser, codes], classes, self.config.level + 1)
        return self.nll_unchecked(own, grids, labels)

    def nll_unchecked(self, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return what `nll` does, of what has been checked already."""
        return self.nats_unchecked(codes, coarser, classes).flatten(1).sum(1)

    def nats_unchecked(self, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return the nats of each code given those before it, float64 (B, h, w); of each number (B, d, h, w)."""
        found = self.forward(codes, coarser, classes)
        if isinstance(self.network, Continuous):
            return found
        logits = found.float().flatten(0, 2)
        return F.cross_entropy(logits, codes.flatten(), reduction="none").view(codes.shape).double()

    def draw(
        self,
        coarser: list[Tensor],
        classes: Tensor | None,
        uniforms: Tensor,
        settings: LevelSampling,
        decoders: Decoders | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Draw what is stored of this level: codes int64 (B, h, w), or values float32 (B, d, h, w).

        Args:
            coarser: what is stored of the coarser levels, coarse to fine.
            classes: int64 (B,); None for none.
            uniforms: float64 (B, num_uniforms), each sample's own; those of known positions are left unread.
            settings: how.
            decoders: see `decoder`.
            known: values that stand as they are; see `Known` for what is conditioned on them.
        """
        if isinstance(self.network, Continuous):
            settings.check_continuous()
            drawn = self.network.draw(uniforms, coarser, classes, settings.temperature, known)
            return drawn if known is None else torch.where(known.mask[:, None], known.values, drawn)
        if known is not None and bool(known.mask.all()):
            return known.values
        batch = len(uniforms)
        given = None if known is None else torch.where(known.mask, known.values, UNKNOWN).flatten(1)
        if settings.guidance != 1:
            assert classes is not None
            classes = torch.cat([classes, torch.full_like(classes, len(self.config.class_names))])
            coarser = [torch.cat([codes, codes]) for codes in coarser]
            uniforms = torch.cat([uniforms, uniforms])
            given = None if given is None else torch.cat([given, given])
        drawn = self.decoder(coarser, classes, len(uniforms), decoders).draw(settings, uniforms, given)
        return drawn[:batch].reshape(batch, *self.config.grids[-1])

    def decoder(
        self, coarser: Sequence[Codes], classes: Numbers | None, batch_size: int, kept: Decoders | None = None
    ) -> Decoder:
        """Return a decoder that yields one position's logits after another; arguments and errors as for `logits`.

        Where `kept` holds one that fits, that is started anew: what it laid out and captured serves many batches. A
        new one is added to it.
        """
        if not whole_number("batch_size", batch_size, 2**31):
            raise ValueError("batch_size must be at least 1, got 0")
        assert not isinstance(self.network, Continuous)
        condition = self.conditioning(*self._checked(coarser, classes, self.config.level, batch_size), batch_size)
        if kept is None:
            return decoder_of(self.network, condition)
        key = (self.config.level, condition.shape, working_dtype(condition))
        if key in kept:
            kept[key].restart(condition)
        else:
            kept[key] = decoder_of(self.network, condition)
        return kept[key]

    def _checked(
        self, codes: Sequence[Codes], classes: Numbers | None, levels: int, batch_size: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the codes of so many levels, from the coarsest on, and classes; see `prior.checks.checked`."""
        config = self.config
        if not config.class_names:
            classes = None
        elif classes is None:
            config.check_unconditional()
        num_classes = len(config.class_names) + config.unconditional
        return checked(codes, classes, config.levels[:levels], num_classes, self.device, batch_size)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(chain(self.parameters(), self.buffers())).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`, in place of a level saved there before.

        Raises:
            ValueError: the folder holds anything else, such as a stage's work.
        """
        folder = Path(folder)
        check_replaceable(folder)
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
            tensors = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} holds no readable prior ({error}); run `smalti train-prior`") from error
        if isinstance(settings, dict) and (found := settings.pop("format", FORMAT)) != FORMAT:
            raise ValueError(f"{folder}/config.json is of format {found}, not {FORMAT}; update smalti")
        settings = _with_later(LevelConfig, settings, f"{folder}/config.json")
        try:
            config = _level_config(settings)
            with torch.device("meta"):  # sizes are believed when the tensors are there, not before memory is taken
                expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        except SETTINGS_ERRORS as error:
            raise ValueError(f"{folder}/config.json holds settings that cannot be: {error}") from error
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


def decoder_of(network: CodeTransformer | PixelSNAIL, condition: Tensor) -> Decoder:
    """Return the decoder of a network that computes each position once.

    Args:
        network: in eval mode; its weights are copied, laid out anew.
        condition: (B, C, h, w), from `Conditioning`.
    """
    if isinstance(network, PixelSNAIL):
        return PixelSNAILDecoder(network, condition)
    from prior.transformer_decoder import TransformerDecoder  # its library takes a second to import

    return TransformerDecoder(network, condition)


# What settings that lie about a prior can raise on the way to one.
SETTINGS_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError, AssertionError)


def _level_config(settings: dict) -> LevelConfig:
    if (network := settings.pop("network")) not in NETWORKS:
        raise ValueError(f"network must be {' or '.join(NETWORKS)}, got {network}")
    size = NETWORKS[network]
    grids = [(h, w) for h, w in settings["grids"]]
    return LevelConfig(**settings | {"grids": grids, "size": size(**_with_later(size, settings["size"], "size"))})


def _with_later(config: type, settings: Any, name: str) -> dict[str, Any]:
    """Add the settings that came after a file was written, and refuse what is missing or too much."""
    known = {field.name: field.metadata for field in fields(config)}
    later = {name: metadata["introduced"] for name, metadata in known.items() if "introduced" in metadata}
    if not isinstance(settings, dict) or set(later | settings) != set(known):
        raise ValueError(f"{name} must hold exactly the settings {sorted(known)}")
    return later | settings
