"""The sections of a config that train: they are read by every stage, also by those that do without Lightning."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from pipelines.data.images import AugmentConfig
from pipelines.errors import ConfigError
from pipelines.storage.fingerprint import hashed
from prior import FlowConfig, MixtureConfig, PixelSNAILConfig, TransformerConfig
from prior.continuous import ContinuousConfig
from prior.level import NETWORKS
from tokenizer import EMAConfig, TokenizerConfig
from tokenizer.bottlenecks import KINDS, FSQConfig, GaussianConfig, GradientConfig, Settings
from tokenizer.bottlenecks.bottleneck import Bottleneck, VectorSizes
from tokenizer.bottlenecks.contractive import ContractiveConfig
from tokenizer.bottlenecks.gumbel import GumbelConfig
from tokenizer.bottlenecks.residual import ResidualConfig
from tokenizer.bottlenecks.sparse import SparseConfig
from tokenizer.loss import Reconstruction

# What these settings were when they came, for ever.
GRADIENT_THEN = {"codebook_weight": 1.0, "commitment_weight": 0.25, "kmeans_iterations": 10}
GUMBEL_THEN = {
    "beta": 0.02,
    "temperature": 1.0,
    "final_temperature": 0.5,
    "anneal_steps": 10000,
    "straight_through": True,
}
EMA_THEN = {"decay": 0.99, "commitment_weight": 0.25, "kmeans_iterations": 10, "revival_threshold": 0.05}
RESIDUAL_THEN = {"depth": 2, "ema": EMA_THEN}
FLOW_THEN = {"couplings": 8, "width": 64, "conditioning_blocks": 1}
MIXTURE_THEN = {"components": 32, "at": "clusters", "covariance": "diagonal"}
SPARSE_THEN = {"penalty": "kl", "rho": 0.05, "weight": 0.1}
CONTRACTIVE_THEN = {"weight": 0.1, "probes": 4}
# What `prior.network` may name; a network's settings stand under its name.
PRIORS = ("auto", *NETWORKS)
# Those over numbers, and those that no gradients train.
CONTINUOUS = tuple(name for name, size in NETWORKS.items() if issubclass(size, ContinuousConfig))
UNTRAINED = ("normal", "mixture")
# Those with settings.
SIZED = ("transformer", "pixelsnail", "mixture", "flow")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained; `steps`, `batch_size` and `learning_rate` may be lists of one value per level.

    Attributes:
        steps: optimizer steps.
        batch_size: global, over all processes and micro-batches.
        micro_batches: parts of a batch that a process takes one after the other, to save memory.
        learning_rate: the peak, reached after warm-up; a cosine takes it to zero.
        warmup_steps: of linear warm-up.
        weight_decay: of AdamW; 0 makes it Adam.
        beta2: of Adam.
        gradient_clip: largest norm of the gradient; 0 turns clipping off.
        weight_ema: decay of the averaged weights, which are the ones evaluated and exported; 0 turns averaging off.
        val_every: steps between validations; a validation ends training too.
        checkpoint_every: steps between checkpoints to go on from.
        patience: validations without improvement after which training stops; 0 never stops early.
        log_every: steps between rows of metrics.csv.
        activation_checkpointing: compute activations anew in the backward pass instead of keeping them; saves memory.
        precision: "auto" (bf16 where the hardware has it), "32-true" or "bf16-mixed". Float16 would need a
            gradient scaler, and codebooks would move on the steps that it skips.
        compile: torch.compile the model; "auto" does on a GPU. On a CPU it makes Transformers a sixth faster in long
            jobs, tokenizers hardly.
    """

    steps: int | list[int] = 100000
    batch_size: int | list[int] = 128
    micro_batches: int = 1
    learning_rate: float | list[float] = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    gradient_clip: float = 0.0
    weight_ema: float = 0.0
    val_every: int = 5000
    checkpoint_every: int = 1000
    patience: int = 0
    log_every: int = 50
    activation_checkpointing: bool = False
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "val_every", "checkpoint_every", "log_every"):
            values = getattr(self, name)
            if min(values if isinstance(values, list) else [values]) < 1:
                raise ValueError(f"{name} must be at least 1, got {values}")
        rates = self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
        if not min(rates) > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {self.beta2}")
        if not 0 <= self.weight_ema < 1:
            raise ValueError(f"weight_ema must lie in [0, 1), got {self.weight_ema}")
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for steps in self.steps if isinstance(self.steps, list) else [self.steps]:
            if steps > self.val_every and steps % self.val_every:
                raise ValueError(f"steps must be a multiple of val_every ({self.val_every}), got {steps}")
        for batch in self.batch_size if isinstance(self.batch_size, list) else [self.batch_size]:
            if batch % self.micro_batches:
                raise ValueError(f"batch_size must be a multiple of micro_batches ({self.micro_batches}), got {batch}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """Which tokenizer, and how it is trained.

    Attributes:
        from_: a tokenizer folder or hub id to use instead of training one.
        bottleneck: what its levels are made of: "ema" (codebooks that are moving averages), "gradient" (codebooks
            moved by gradients), "residual" (several EMA codebooks, each of what the others leave), "gumbel" (codes
            drawn from a relaxed distribution), "fsq" (rounded channels), "gaussian" (a VAE), "sparse" (units few
            of which are active), "contractive" (numbers that change little with the image) or "identity" (a plain
            autoencoder).
        model: its levels and widths; codebook_size, code_dim and normalize are those of codebooks, code_dim also that
            of "gaussian", "sparse", "contractive" and "identity".
        ema: settings of the bottleneck "ema".
        gradient: settings of the bottleneck "gradient".
        fsq: settings of the bottleneck "fsq".
        gaussian: settings of the bottleneck "gaussian".
        residual: settings of the bottleneck "residual".
        gumbel: settings of the bottleneck "gumbel".
        sparse: settings of the bottleneck "sparse".
        contractive: settings of the bottleneck "contractive".
        class_dropout: share of training images whose class a conditional tokenizer is not told, so that it knows what
            to make of images without.
        shuffle_shards: shards mixed with one another at a time, in a random order, where the data is larger than the
            disk that it is fetched to; 0 mixes all.
        loss: of the reconstruction: "mse", "l1", or a likelihood in nats per value, beside which a bottleneck's KL
            divergence makes the ELBO: "gaussian", or "bernoulli", for which `model.sigmoid` must be true.
        loss_scale: standard deviation of "gaussian", of values in [-1, 1]; 0 learns it.
        augment: what is done to training images at random.
        training: optimizer and schedule.
    """

    from_: str = ""
    bottleneck: str = field(default="ema", metadata={"introduced": "ema"})
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig, metadata={"introduced": GRADIENT_THEN})
    fsq: FSQConfig = field(default_factory=FSQConfig, metadata={"introduced": {"levels": [8, 5, 5, 5]}})
    gaussian: GaussianConfig = field(default_factory=GaussianConfig, metadata={"introduced": {"beta": 0.02}})
    residual: ResidualConfig = field(default_factory=ResidualConfig, metadata={"introduced": RESIDUAL_THEN})
    gumbel: GumbelConfig = field(default_factory=GumbelConfig, metadata={"introduced": GUMBEL_THEN})
    sparse: SparseConfig = field(default_factory=SparseConfig, metadata={"introduced": SPARSE_THEN})
    contractive: ContractiveConfig = field(default_factory=ContractiveConfig, metadata={"introduced": CONTRACTIVE_THEN})
    loss: Reconstruction = "mse"
    loss_scale: float = field(default=0.0, metadata={"introduced": 0.0})
    class_dropout: float = field(default=0.1, metadata={"introduced": 0.1})
    shuffle_shards: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.bottleneck not in KINDS:
            raise ValueError(f"tokenizer.bottleneck must be one of {', '.join(KINDS)}, got {self.bottleneck}")
        if self.loss == "bernoulli" and not self.model.sigmoid:
            raise ValueError("tokenizer.loss bernoulli needs a decoder of logits; set tokenizer.model.sigmoid to true")
        if not self.loss_scale >= 0:
            raise ValueError(f"tokenizer.loss_scale must not be negative, got {self.loss_scale}")
        if self.loss_scale and self.loss != "gaussian":
            raise ValueError(
                f"tokenizer.loss_scale is of the loss gaussian, and the loss is {self.loss}; leave it at 0"
            )
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"tokenizer.class_dropout must lie in [0, 1), got {self.class_dropout}")
        if self.shuffle_shards < 0:
            raise ValueError(f"tokenizer.shuffle_shards must not be negative, got {self.shuffle_shards}")

    @property
    def family(self) -> Settings:
        """The settings of the bottleneck that is used; one that has none has no section."""
        return getattr(self, self.bottleneck, None) or KINDS[self.bottleneck]()

    @property
    def unused(self) -> list[str]:
        """Names of the settings of the bottlenecks that are not used."""
        return [kind for kind in KINDS if kind != self.bottleneck]


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which priors, and how they are trained; a list is one value per level, coarse to fine.

    Attributes:
        network: "transformer" or "pixelsnail" over codes; over numbers "normal", N(0, I), "mixture", of Gaussians, or
            "flow"; "auto" is a Transformer over codes, normal over numbers.
        transformer: sizes of Transformers.
        pixelsnail: sizes of PixelSNAILs.
        mixture: number and kind of Gaussians.
        flow: sizes of normalising flows.
        dropout: of all parts of the network.
        class_dropout: share of training samples whose class is hidden, so that guidance has a model without class.
        training: optimizer and schedule.
    """

    network: str | list[str] = "auto"
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    pixelsnail: PixelSNAILConfig = field(default_factory=PixelSNAILConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig, metadata={"introduced": MIXTURE_THEN})
    flow: FlowConfig = field(default_factory=FlowConfig, metadata={"introduced": FLOW_THEN})
    dropout: float | list[float] = 0.1
    class_dropout: float = 0.1
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for network in self.network if isinstance(self.network, list) else [self.network]:
            if network not in PRIORS:
                raise ValueError(f"prior.network must be one of {', '.join(PRIORS)}, got {network}")
        for dropout in self.dropout if isinstance(self.dropout, list) else [self.dropout]:
            if not 0 <= dropout < 1:
                raise ValueError(f"prior.dropout must lie in [0, 1), got {dropout}")
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"prior.class_dropout must lie in [0, 1), got {self.class_dropout}")

    @property
    def unused(self) -> list[str]:
        """Names of the settings of networks that no level has."""
        networks = [self.network] if isinstance(self.network, str) else self.network
        used = {"transformer" if network == "auto" else network for network in networks}
        return [name for name in SIZED if name not in used]


def unread_by(networks: Collection[str]) -> list[str]:
    """Return names of the settings of `prior` that none of some networks reads."""
    trained = ["dropout", "class_dropout", "training"] if set(networks) - set(UNTRAINED) else []
    read = {"network", *trained, *("transformer" if network == "auto" else network for network in networks)}
    return [one.name for one in fields(PriorConfig) if one.name not in read]


def _bottlenecks(section: TokenizerSection) -> list[Bottleneck]:
    model = section.model
    with torch.device("meta"):  # nothing is computed
        return [
            section.family.build(VectorSizes(codebook_size=size, code_dim=dim, normalize=model.normalize))
            for size, dim in zip(model.codebook_sizes, model.code_dims, strict=True)
        ]


def stored_sizes(section: TokenizerSection) -> list[int | None]:
    """Return K of each grid that a tokenizer of this section stores, coarse to fine; None where it is continuous."""
    return [size for part in _bottlenecks(section) for size in part.sizes]


def stored_numbers(section: TokenizerSection, image_size: int) -> list[int]:
    """Return how many codes or numbers each grid holds that a tokenizer of this section stores, coarse to fine."""
    parts = zip(_bottlenecks(section), section.model.grids(image_size), strict=True)
    return [h * w * (1 if size else part.channels) for part, (h, w) in parts for size in part.sizes]


def used(section: TokenizerSection | PriorConfig) -> dict[str, Any]:
    """Return a section as plain data: of several kinds the settings of the one that is used, all of them."""
    family = hashed(section.family) if isinstance(section, TokenizerSection) else {}
    own = {section.bottleneck: family} if isinstance(section, TokenizerSection) and family else {}
    return {name: value for name, value in hashed(section).items() if name not in section.unused} | own


T = TypeVar("T")


def at_level(settings: T, level: int, num_levels: int, section: str = "", names: Sequence[str] = ()) -> T:
    """Return a section with each list of one value per level replaced by this level's.

    Args:
        settings: the section.
        level: 0 for the coarsest.
        num_levels: how long such a list must be.
        section: its name with a dot, for messages.
        names: the settings that may be such lists, where others may be lists too; all if empty.

    Raises:
        ConfigError: a list has another length, or a level's values do not go together; names the level.
    """
    assert is_dataclass(settings) and not isinstance(settings, type)
    changes: dict[str, Any] = {}
    for name in names or [one.name for one in fields(settings)]:
        value = getattr(settings, name)
        if isinstance(value, list):
            if len(value) != num_levels:
                raise ConfigError(
                    f"{section}{name} must be one value or a list of {num_levels}, one per level, got {value}"
                )
            changes[name] = value[level]
    try:
        return replace(settings, **changes)
    except ValueError as error:
        raise ConfigError(f"{section}level {level}: {error}") from error


def prior_at_level(config: PriorConfig, level: int, num_levels: int) -> PriorConfig:
    """Return the section for one level: every list replaced by this level's value."""
    section = at_level(config, level, num_levels, "prior.")
    sizes = {
        name: at_level(getattr(config, name), level, num_levels, f"prior.{name}.") for name in (*SIZED, "training")
    }
    return replace(section, **sizes)


def prior_for(config: PriorConfig, level: int, sizes: Sequence[int | None]) -> PriorConfig:
    """Return the section for one level, its network chosen.

    Args:
        config: the section.
        level: 0 for the coarsest.
        sizes: K of each level, None where it is continuous.

    Raises:
        ConfigError: the network is no prior for what that level holds.
    """
    section = prior_at_level(config, level, len(sizes))
    continuous = sizes[level] is None
    network = {"auto": "normal" if continuous else "transformer"}.get(str(section.network), section.network)
    if (network in CONTINUOUS) != continuous:
        *others, last = (name for name in NETWORKS if (name in CONTINUOUS) == continuous)
        holds = "numbers" if continuous else "codes"
        fits = f"{', '.join(others)} or {last}"
        raise ConfigError(f"prior.network must be {fits} where level {level} holds {holds}, got {network}")
    return replace(section, network=network)
