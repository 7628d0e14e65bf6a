"""Codes alone: how likely a grid of codes is, and new ones."""

from prior.flow import FlowConfig
from prior.hierarchy import Completed, HierarchicalPrior
from prior.known import Known, prefix
from prior.level import LevelConfig, LevelPrior
from prior.mixture import MixtureConfig
from prior.normal import NormalConfig
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig
from prior.sampling import filtered_probabilities, inverse_cdf, uniforms
from prior.transformer import CodeTransformer, TransformerConfig

__all__ = [
    "CodeTransformer",
    "Completed",
    "FlowConfig",
    "HierarchicalPrior",
    "Known",
    "LevelConfig",
    "LevelPrior",
    "MixtureConfig",
    "NormalConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "TransformerConfig",
    "filtered_probabilities",
    "inverse_cdf",
    "prefix",
    "uniforms",
]
