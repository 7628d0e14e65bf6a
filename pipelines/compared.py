"""A run as it is compared with others: the settings it was made with, and its figures."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.finished import Finished
from pipelines.metrics.metric import figures_of
from pipelines.stages import ORDER
from pipelines.storage.paths import read_bytes
from pipelines.storage.record import recorded_seconds
from pipelines.storage.yaml import read_yaml

# What decides how likely samples are.
DRAWN = ("classes", "temperature", "top_k", "top_p", "guidance", "reject")
# Settings that say where, not what; and the one in which runs of a group may differ.
WHERE, SEED = ("run_dir", "compute"), "seed"


class Compared(NamedTuple):
    """A run as far as it is compared.

    Attributes:
        config: of the run, which may have been overridden on the command line.
        figures: what its `metrics.json` holds.
        others: figures that are not of that.
        recorded: settings that its stages' folders were made with, by name.
    """

    config: Config
    figures: dict[str, Any]
    others: dict[str, float | None]
    recorded: Mapping[str, str] = MappingProxyType({})

    @property
    def settings(self) -> dict[str, str]:
        """All settings by name but those that say where: those that stages were made with, of others the config's."""
        made = {name.split(".")[0] for name in self.recorded} | set(WHERE)
        told = {name: value for name, value in flat(asdict(self.config)).items() if name.split(".")[0] not in made}
        return told | dict(self.recorded)

    @property
    def seed(self) -> int:
        """The seed that the run was made with."""
        return int(self.settings[SEED])


def read_run(config: Config) -> Compared:
    """Read a run as it is compared.

    Raises:
        StageError: it has not been evaluated, or what `evaluate` wrote cannot be read.
    """
    finished = Finished(config)
    path = finished.root / "metrics.json"
    try:
        figures = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise StageError(f"{finished.root} has not been evaluated; run `smalti evaluate` with its config") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); run `smalti evaluate` again") from error
    if not isinstance(figures, dict):
        raise StageError(f"{path} must hold figures by name, and does not; run `smalti evaluate` again")
    models: list[nn.Module] = [finished.tokenizer()] if finished.has_tokenizer() else []
    models += [finished.prior()] if finished.has_priors() else []
    return as_compared(finished, figures, models)


def as_compared(finished: Finished, figures: dict[str, Any], models: Sequence[nn.Module]) -> Compared:
    """Return a run as it is compared.

    Args:
        finished: its folders.
        figures: what its `metrics.json` holds.
        models: tokenizer and priors, as far as they are there.
    """
    parameters = sum(one.numel() for model in models for one in model.parameters()) if models else None
    others = {"seconds": recorded_seconds(finished.root, ORDER[:-1]), "parameters": parameters}
    return Compared(finished.config, figures, others, _recorded(finished) | _drawn_with(figures))


def flat(settings: dict[str, Any], path: str = "") -> dict[str, str]:
    """Return nested settings as text, by their names with dots."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        name = f"{path}{name.removesuffix('_')}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return found


def _recorded(finished: Finished) -> dict[str, str]:
    """Return the settings that the stages' folders say they were made with, those of priors by level."""
    root = finished.root
    found: dict[str, str] = {}
    for folder in ("images", "tokenizer", "codes", finished.config.sample.folder):
        found |= _settings_of(root / folder)
    for level in sorted(path for path in (root / "prior").glob("level*") if path.is_dir()):
        own = _settings_of(level)
        found |= {name.replace("prior.", f"prior.{level.name}.", 1): value for name, value in own.items()}
    return found


def _drawn_with(figures: dict[str, Any]) -> dict[str, str]:
    """Return the settings of the samples that were measured, which may be another set than the config names."""
    drawn = figures_of(figures, "samples").get("made", {}).get("splits", {}).get("samples", {}).get("settings", {})
    return {f"sample.{name}": str(drawn[name]) for name in DRAWN if name in drawn}


def _settings_of(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        settings = read_yaml(read_bytes(folder / "config.yaml"))
        if isinstance(settings, dict):
            return {name: value for name, value in flat(settings).items() if not name.startswith("made")}
    return {}
