"""The configuration of a run: one YAML file and the overrides of the command line, as one dataclass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from pipelines.compute.devices import ComputeConfig
from pipelines.errors import ConfigError
from pipelines.metrics.opening import EvaluateConfig
from pipelines.stages.encode import EncodeConfig
from pipelines.stages.export import ExportConfig
from pipelines.stages.pack import ImagesConfig
from pipelines.stages.sample import SampleConfig
from pipelines.storage.fingerprint import hashed
from pipelines.storage.renamed import renamed, renamed_option
from pipelines.storage.yaml import read_yaml
from pipelines.training.sections import PriorConfig, TokenizerSection, at_level, prior_for, stored_sizes, unread_by


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    """Where the codes come from, when not from this run's `encode`.

    Attributes:
        from_: a `codes` folder of another run; empty for this run's own.
    """

    from_: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run.

    Attributes:
        run_dir: folder of the run; each stage has its own folder in it.
        seed: of everything that is drawn: splits, weights, batches, samples.
        images: stage pack.
        tokenizer: stage train-tokenizer.
        encode: stage encode.
        codes: use another run's codes.
        prior: stage train-prior.
        sample: stage sample.
        export: stage export.
        evaluate: stage evaluate.
        compute: where to run; never judged when a stage is compared with its config.
    """

    run_dir: str
    seed: int = 0
    images: ImagesConfig = field(default_factory=ImagesConfig)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig, metadata={"introduced": hashed(ExportConfig())})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"introduced": hashed(EvaluateConfig())})
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("run_dir must name a folder to write to; add --run_dir FOLDER")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")
        guidance = self.sample.guidance if isinstance(self.sample.guidance, list) else [self.sample.guidance]
        if self.prior.class_dropout == 0 and any(value != 1 for value in guidance):
            raise ValueError("sample.guidance needs a prior that knows no class too: set prior.class_dropout above 0")
        by_class = self.sample.classes or self.sample.reject > 1 or any(value != 1 for value in guidance)
        if not self.images.classes and by_class:
            raise ValueError("sample.classes, guidance and reject need classes; images.classes is false")
        if not self.tokenizer.from_ and not self.images.from_:
            self.tokenizer.model.grids(self.images.size)
        if not self.tokenizer.from_ and not self.codes.from_:
            self.check_levels(stored_sizes(self.tokenizer))
        if not self.tokenizer.from_:
            at_level(self.tokenizer.training, 0, 1, "tokenizer.training.")

    def check_levels(self, sizes: Sequence[int | None]) -> None:
        """Raise ConfigError unless settings per level fit these levels, and each one's prior can be built and drawn.

        Args:
            sizes: K of each level, None where it is continuous.
        """
        networks = set()
        for level, size in enumerate(sizes):
            drawn = at_level(self.sample, level, len(sizes), "sample.", ("temperature", "top_k", "top_p", "guidance"))
            networks.add(prior_for(self.prior, level, sizes).network)
            if size is None and (drawn.top_k or drawn.top_p != 1 or drawn.guidance != 1):
                raise ConfigError(
                    f"sample.top_k, top_p and guidance are of codes, and level {level} holds numbers; leave them out"
                )
        conditional = self.tokenizer.model.conditional or self.tokenizer.from_  # classes then count in the decoder
        if networks == {"normal"} and not conditional and (self.sample.classes or self.sample.reject > 1):
            raise ConfigError(
                "sample.classes and reject need a prior that knows classes, which normal does not; leave them out"
            )


# Files that stand on one another, at most.
MAX_BASES = 8


@cache  # commands on several runs read as many configs
def make_parser(stage: str = "STAGE") -> ArgumentParser:
    """Return the parser of all settings."""
    parser = _Parser(usage=f"smalti {stage} CONFIG.yaml [--section.key value ...]", exit_on_error=False)
    parser.add_class_arguments(Config, sub_configs=False)
    return parser


def load_config(path: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    A file's `base` names another file, from its own folder: what is said there holds where the file says nothing else.

    Args:
        path: the YAML file, plain data; or the name of one that smalti ships ("digits"); or what such a file holds.
        overrides: `--section.key value` of the command line.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type, or a value that cannot work; names the key.
    """
    settings = _named(path) if isinstance(path, dict) else _read(Path(path))
    overrides = [renamed_option(argument) for argument in overrides]
    _check_sections(settings, Config)
    _check_options(overrides)
    parser = make_parser()
    try:
        namespace = parser.parse_object(settings)
        arguments = parser.parse_args(_rename_options(overrides), namespace=namespace)
        _check_sections(arguments.as_dict(), Config)
        config = _built(Config, arguments.as_dict())
        _check_named(settings, config)
        _check_used(overrides, config)
        return config
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        message = " ".join(re.sub(r"\b(images|tokenizer|codes)\.from_(?!\w)", r"\1.from", str(error)).split())
        raise ConfigError(_readable(message.replace("Parser key", "setting"))) from error


def _built(section: Any, settings: dict[str, Any], path: str = "") -> Any:
    """Return a section with those in it; what one refuses bears its whole name."""
    kinds = get_type_hints(section)
    values = {
        name: _built(kinds[name], value, f"{path}{name}.") if is_dataclass(kinds[name]) else value
        for name, value in settings.items()
    }
    try:
        return section(**values)
    except ValueError as error:
        raise type(error)(f"{path}{error}" if str(error).split()[0] in kinds else str(error)) from error


def _read(path: Path, above: int = 0) -> dict[str, Any]:
    """Return the settings of a file, laid over those of its base."""
    if above > MAX_BASES:
        raise ConfigError(f"{path} stands on more than {MAX_BASES} files; does a base name a file that stands on it?")
    try:
        settings = read_yaml(_find(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"cannot use the config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, got {type(settings).__name__}")
    base = settings.pop("base", None)
    if base is None:
        return _named(settings)
    if not isinstance(base, str) or not base:
        raise ConfigError(f"base of {path} must name a file, got {base!r}")
    return _laid_over(_read(path.parent / base, above + 1), _named(settings))


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the names that they have now and here."""
    try:
        return renamed(_rename(settings, "from", "from_"))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _laid_over(below: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings beside those below that they do not name, section by section."""
    both = {
        name: _laid_over(below[name], value)
        for name, value in settings.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return below | settings | both


# What jsonargparse calls the kinds of values, and what people do.
KINDS = {
    "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "<class 'list'>": "a list",
    "<class 'bool'>": "true or false",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
}


def _readable(message: str) -> str:
    """Return jsonargparse's words on a value of the wrong kind as a sentence; any others as they are."""
    one = re.fullmatch(r'setting "([^"]+)": Expected an? (.+?)\. Got value: (.*)', message)
    union = re.fullmatch(r'setting "([^"]+)": Does not .*? Subtypes: \[(.+?)\] Errors: .* Given value: (.*)', message)
    if not (found := one or union):
        return message
    name, kinds, value = found.groups()
    kinds = kinds.replace(", ", " or ") if union else kinds
    for kind, called in KINDS.items():
        kinds = kinds.replace(kind, called)
    kinds = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds)
    return f"{name} takes {kinds}, got {value}"


def _find(path: Path) -> Traversable:
    shipped = files("smalti_configs") / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if len(path.parts) == 1 and not path.exists() and shipped.is_file() else path


FORBIDDEN = {"class_path", "init_args"}


def _check_sections(settings: dict, section: type, path: str = "") -> None:
    """Refuse what names code to run, and whatever stands where a section must, before anything is parsed.

    jsonargparse imports what a `class_path` names before it refuses it, and finds one in a string that holds YAML too.
    """
    for name in settings:
        if settings[name] is None and not is_dataclass(get_type_hints(section).get(name)):
            raise ConfigError(f"{path}{name.removesuffix('_')} must have a value; leave the line out for its default")
        if name in FORBIDDEN:
            raise ConfigError(f"{path}{name} is not allowed: a config is plain data and cannot name code to run")
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind) and name in settings:
            if not isinstance(settings[name], dict):
                raise ConfigError(f"{path}{name} must hold settings as `key: value`, got {settings[name]!r}")
            _check_sections(settings[name], kind, f"{path}{name}.")  # type: ignore[arg-type]


def _check_options(overrides: Sequence[str]) -> None:
    """Refuse, on the command line, the same; a section is overridden setting by setting."""
    for option in (argument.split("=")[0].removeprefix("--") for argument in overrides if argument.startswith("--")):
        if set(option.split(".")) & FORBIDDEN:
            raise ConfigError(f"--{option} is not allowed: a config is plain data and cannot name code to run")
        if option.rstrip("+") in _sections(Config):
            raise ConfigError(f"--{option} is a section; override its settings one by one, as --{option}.name value")


def _check_named(settings: dict, config: Config) -> None:
    """Refuse settings of a kind that neither the file nor the command line names, and that is not the default.

    A file that names its kind may hold those of others too, for whoever names another on the command line.
    """
    for section, name, own in (("tokenizer", "bottleneck", config.tokenizer), ("prior", "network", config.prior)):
        given, others = settings.get(section, {}), set(own.unused) & set(type(own)().unused)
        for kind in given if name not in given else ():
            if kind in others:
                raise ConfigError(
                    f"{section}.{kind} would change nothing: {section}.{name} is {getattr(own, name)}; "
                    f"add `{name}: {kind}` or leave it out"
                )


def _check_used(overrides: Sequence[str], config: Config) -> None:
    """Refuse, on the command line, what would not be used as it is meant.

    Settings of a kind that is not the one chosen, of which a file may hold several, and lists that are none.
    """
    networks = _networks(config)
    told = "normal, which has no sizes and learns nothing" if networks == {"normal"} else config.prior.network
    chosen = {
        "tokenizer": ("bottleneck", config.tokenizer.bottleneck, config.tokenizer.unused),
        "prior": ("network", told, unread_by(networks)),
    }
    for option in (argument.split("=")[0].removeprefix("--") for argument in overrides if argument.startswith("--")):
        section, _, rest = option.partition(".")
        unread = option.removeprefix("tokenizer.model.") in config.tokenizer.family.unread
        if unread or (section in chosen and rest.partition(".")[0] in chosen[section][2]):
            name, kind, _ = chosen[section]
            raise ConfigError(f"--{option} would change nothing: {section}.{name} is {kind}; leave it out")
    given = {*overrides, *(argument.partition("=")[2] for argument in overrides)}
    for one in config.sample.classes:
        if isinstance(one, str) and one.startswith("[") and one in given:  # read as one name, for it is no such list
            raise ConfigError(f"sample.classes takes a list of names and whole numbers, got {one}")


def _networks(config: Config) -> set[str]:
    """Return the networks of all levels' priors; "auto" stays where a config alone cannot tell."""
    networks = config.prior.network if isinstance(config.prior.network, list) else [config.prior.network]
    if "auto" in networks and not (config.tokenizer.from_ or config.codes.from_):
        sizes = stored_sizes(config.tokenizer)
        networks = [str(prior_for(config.prior, level, sizes).network) for level in range(len(sizes))]
    return set(networks)


def _sections(section: type, path: str = "") -> set[str]:
    found = set()
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            found |= {f"{path}{name}"} | _sections(kind, f"{path}{name}.")  # type: ignore[arg-type]
    return found


class _Parser(ArgumentParser):
    """`from` is no name for a Python field, so it is `from_` inside and `from` to the user."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help with `from` as the user writes it."""
        return super().format_help(*args, **kwargs).replace(".from_", ".from").replace("FROM_", "FROM")


def _rename_options(arguments: Sequence[str]) -> list[str]:
    return [a.replace(".from", ".from_", 1) if a.split("=")[0].endswith(".from") else a for a in arguments]


def _rename(settings: Any, old: str, new: str) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {new if key == old else key: _rename(value, old, new) for key, value in settings.items()}
