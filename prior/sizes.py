"""Sizes of networks that may be one for all levels or a list of one each."""

from dataclasses import fields
from typing import Any

# Beyond these a size is damage or malice, not a network.
MAX_WIDTH, MAX_LAYERS, MAX_CODES = 2**16, 200, 2**31
# Sizes that count layers.
LAYERS = ("depth", "blocks", "residual_blocks", "conditioning_blocks", "couplings")


def check_sizes(config: Any, at_least: dict[str, int]) -> None:
    """Refuse a size below 1, or below what `at_least` says of it, or that no network has.

    Args:
        config: a dataclass of whole numbers, switches and lists of them.
        at_least: by name, the least value of those that may be 0.

    Raises:
        ValueError: names the field.
    """
    for name in (field.name for field in fields(config)):
        values = getattr(config, name)
        lowest = at_least.get(name, 1)
        for value in values if isinstance(values, list) else [values]:
            most = MAX_LAYERS if name in LAYERS else MAX_WIDTH
            if not isinstance(value, int) or (not isinstance(value, bool) and value < lowest):
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
