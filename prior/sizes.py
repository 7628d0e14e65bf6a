"""Sizes of networks that may be one for all levels or a list of one each."""

from dataclasses import fields
from typing import Any


def check_sizes(config: Any, at_least: dict[str, int]) -> None:
    """Refuse a size below 1, or below what `at_least` says of it, in a dataclass of numbers and lists of them.

    Raises:
        ValueError: names the field.
    """
    for name in (field.name for field in fields(config)):
        values = getattr(config, name)
        lowest = at_least.get(name, 1)
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, bool) and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
