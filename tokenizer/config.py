"""What a tokenizer is, whatever the images and whatever its levels are made of."""

from dataclasses import dataclass, field

# Beyond these a setting is damage or malice, not a model.
MAX_WIDTH, MAX_BLOCKS, MAX_LEVELS, MAX_CODES = 2**16, 50, 8, 2**31


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What a tokenizer is, whatever the images. Defaults: VQ-VAE-2 at 256 pixels.

    Attributes:
        strides: image pixels per code along each side, one per level, coarse to fine; powers of two.
        codebook_size: K, one for all levels or a list of one each.
        code_dim: D, one for all levels or a list of one each.
        width: channels of encoders and decoders.
        residual_width: channels inside a residual block.
        residual_blocks: residual blocks in each encoder and decoder.
        normalize: l2-normalise latents and codes.
        conditional: encoder and decoder are given the class of each image, or that none is known.
        sigmoid: the decoder gives logits of values in [0, 1], as the loss "bernoulli" needs, and so can leave no range.
    """

    strides: list[int] = field(default_factory=lambda: [8, 4])
    codebook_size: int | list[int] = 512
    code_dim: int | list[int] = 64
    width: int = 128
    residual_width: int = 32
    residual_blocks: int = 2
    normalize: bool = False
    conditional: bool = field(default=False, metadata={"introduced": False})
    sigmoid: bool = field(default=False, metadata={"introduced": False})

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
