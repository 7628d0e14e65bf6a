"""What stands between encoder features and decoder input at one level: a file per family."""

from tokenizer.bottlenecks.bottleneck import Settings
from tokenizer.bottlenecks.contractive import ContractiveConfig
from tokenizer.bottlenecks.ema import EMAConfig
from tokenizer.bottlenecks.fsq import FSQConfig
from tokenizer.bottlenecks.gaussian import GaussianConfig
from tokenizer.bottlenecks.gradient import GradientConfig
from tokenizer.bottlenecks.gumbel import GumbelConfig
from tokenizer.bottlenecks.identity import IdentityConfig
from tokenizer.bottlenecks.residual import ResidualConfig
from tokenizer.bottlenecks.sparse import SparseConfig

# What `tokenizer.bottleneck` and config.json call a family, and its settings.
KINDS: dict[str, type[Settings]] = {
    "ema": EMAConfig,
    "gradient": GradientConfig,
    "residual": ResidualConfig,
    "gumbel": GumbelConfig,
    "fsq": FSQConfig,
    "gaussian": GaussianConfig,
    "sparse": SparseConfig,
    "contractive": ContractiveConfig,
    "identity": IdentityConfig,
}


def kind_of(settings: Settings) -> str:
    """Return what the family of these settings is called."""
    return next(name for name, kind in KINDS.items() if type(settings) is kind)
