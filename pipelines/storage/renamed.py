"""Names that settings once had: what was written under them reads on."""

from collections.abc import Mapping
from typing import Any

# Old name -> new name, each a section and a setting.
RENAMED = {
    "tokenizer.codebook.ema_decay": "tokenizer.ema.decay",
    "tokenizer.codebook.commitment_weight": "tokenizer.ema.commitment_weight",
    "tokenizer.codebook.kmeans_iterations": "tokenizer.ema.kmeans_iterations",
    "tokenizer.codebook.revival_threshold": "tokenizer.ema.revival_threshold",
}


def renamed(settings: Any) -> Any:
    """Return settings under the names that they have now; what is no settings is returned as it is."""
    if not isinstance(settings, dict):
        return settings
    settings = copied(settings)
    for old, new in RENAMED.items():
        *path, name = old.split(".")
        section = settings
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            *path, there = new.split(".")
            target = settings
            for part in path:
                target = target.setdefault(part, {})
            target[there] = section.pop(name)
    for old in RENAMED:
        outer, inner, _ = old.split(".")
        if isinstance(settings.get(outer), dict) and settings[outer].get(inner) == {}:
            del settings[outer][inner]
    return settings


def copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose sections can be changed without changing the given ones."""
    return {name: copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


def renamed_option(argument: str) -> str:
    """Return an argument of the command line, its setting under the name that it has now."""
    option, equals, value = argument.partition("=")
    new = RENAMED.get(option.removeprefix("--")) if option.startswith("--") else None
    return f"--{new}{equals}{value}" if new else argument
