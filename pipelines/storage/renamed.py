"""Names that settings once had: what was written under them reads on."""

from collections.abc import Mapping
from typing import Any

# Old name -> new name, each a section, a part of it and a setting.
RENAMED = {
    "tokenizer.codebook.ema_decay": "tokenizer.ema.decay",
    "tokenizer.codebook.commitment_weight": "tokenizer.ema.commitment_weight",
    "tokenizer.codebook.kmeans_iterations": "tokenizer.ema.kmeans_iterations",
    "tokenizer.codebook.revival_threshold": "tokenizer.ema.revival_threshold",
}


def renamed(settings: Any) -> Any:
    """Return settings under the names that they have now; what is no settings is returned as it is."""
    return _moved(settings, RENAMED)


def first_named(settings: Any) -> Any:
    """Return settings under the names that they had first: what digests hold for ever."""
    return _moved(settings, {new: old for old, new in RENAMED.items()})


def renamed_option(argument: str) -> str:
    """Return an argument of the command line, its setting under the name that it has now."""
    option, equals, value = argument.partition("=")
    new = RENAMED.get(option.removeprefix("--")) if option.startswith("--") else None
    return f"--{new}{equals}{value}" if new else argument


def _moved(settings: Any, names: Mapping[str, str]) -> Any:
    """Return settings with those that names holds under their other name, without the sections left empty."""
    if not isinstance(settings, dict):
        return settings
    settings = _copied(settings)
    for name, other in names.items():
        (section, part, setting), (_, to, new) = name.split("."), other.split(".")
        outer = settings.get(section)
        if isinstance(outer, dict) and isinstance(outer.get(part), dict) and setting in outer[part]:
            there = outer.setdefault(to, {})
            if not isinstance(there, dict) or new in there:
                raise ValueError(f"{name} is called {other} now; give it once, by that name")
            there[new] = outer[part].pop(setting)
    for section, part, _ in (name.split(".") for name in names):
        if isinstance(settings.get(section), dict) and settings[section].get(part) == {}:
            del settings[section][part]
    return settings


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose sections can be changed without changing the given ones."""
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
