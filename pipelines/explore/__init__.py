"""What can be done with latents: a function a file, and the command that writes pictures and tables of them."""

from pipelines.explore.complete import Completions, complete
from pipelines.explore.edit import direction, edit
from pipelines.explore.interpolate import Interpolated, interpolate, likely_path, slerp
from pipelines.explore.score import Scores, area_under_roc, score
from pipelines.explore.vary import Varied, vary

__all__ = [
    "Completions",
    "Interpolated",
    "Scores",
    "Varied",
    "area_under_roc",
    "complete",
    "direction",
    "edit",
    "interpolate",
    "likely_path",
    "score",
    "slerp",
    "vary",
]
