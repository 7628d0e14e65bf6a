"""Stage folders: what makes a stage complete, and whether it still fits its config."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pipelines.errors import ConfigError, StageError
from pipelines.storage.fingerprint import hashed
from pipelines.storage.paths import exists, is_local, lies_in, make_folder, place, read_bytes, sweep, whole, write_text
from pipelines.storage.receipts import remove_shards
from pipelines.storage.renamed import renamed
from pipelines.storage.yaml import read_yaml
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)

# What stages write besides shards; first what makes them complete, so that a folder half emptied is not.
OF_SHARDS = ("manifest.json", "config.yaml")
OF_TRAINING = (
    *("model.safetensors", "config.json", "README.md", "config.yaml", "metrics.csv", "metrics.json"),
    *(
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "tensorboard/events.out.tfevents.*",
        "tensorboard/hparams.yaml",
    ),
)
FILES = {
    "pack": (*OF_SHARDS, "skipped.txt"),
    "train-tokenizer": (*OF_TRAINING, "reconstructions.png"),
    "encode": OF_SHARDS,
    "train-prior": OF_TRAINING,
    "sample": (*OF_SHARDS, "grid.png"),
    "export": ("layout.json", "config.yaml"),  # receipts name all else
}
# Folders of a run that no set of samples or tokens may lie in.
OTHER_STAGES = ("images", "tokenizer", "codes", "prior", "classifier")
# Folders inside a stage's own, removed when they are empty.
INNER = ("checkpoints", "tensorboard", "litdata/*", "litdata", "mds/*", "mds")


def plain_data(settings: Any) -> Any:
    """Return dataclasses as plain data for YAML, with `from` for `from_`."""
    settings = hashed(settings)
    if isinstance(settings, dict):
        return {("from" if key == "from_" else key): plain_data(value) for key, value in settings.items()}
    return settings


def differences(old: Any, new: Any, path: str = "", unsaid: Any = None) -> list[str]:
    """Return what differs between two trees of plain data, as "key: old -> new".

    Args:
        old: one tree.
        new: the other.
        path: of both, for messages.
        unsaid: tree of the values that stand for what a tree lacks; see `fingerprint.introduced`.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found, unsaid = [], unsaid if isinstance(unsaid, dict) else {}
        for key in [*old, *(key for key in new if key not in old)]:
            then = unsaid.get(key)
            found += differences(old.get(key, then), new.get(key, then), f"{path}.{key}" if path else str(key), then)
        return found
    if (isinstance(old, dict) and new is None) or (isinstance(new, dict) and old is None):
        return [f"{path}: {'new' if old is None else 'gone'}"]  # settings of a kind that is not the other's
    return [] if old == new else [f"{path}: {old} -> {new}"]


def open_stage(folder: Path, stage: str, settings: dict[str, Any], unsaid: dict[str, Any] | None = None) -> None:
    """Make a stage's folder ready for its settings, which it keeps as `config.yaml`.

    Args:
        folder: of the stage.
        stage: its command.
        settings: its own resolved sections and what it is made from; `compute` is none of them.
        unsaid: values of what settings lack; see `differences`.

    Raises:
        StageError: the folder holds finished work or checkpoints of other settings, or cannot be written.
    """
    settings = plain_data(settings)
    try:
        make_folder(folder)
        for part in [folder, *(found for pattern in INNER for found in folder.glob(pattern) if is_local(folder))]:
            sweep(part)
        path = folder / "config.yaml"
        # Shards without a manifest are judged one by one by their receipts; weights have nothing but their config.
        if path.exists() and (is_complete(folder) or (folder / "checkpoints").exists()):
            check_made_with(folder, stage, settings, unsaid)
        else:
            write_text(path, yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        raise StageError(f"cannot write to {folder}: {error.strerror}; choose a run_dir that can be written") from error


def check_made_with(folder: Path, stage: str, settings: dict[str, Any], unsaid: dict[str, Any] | None = None) -> None:
    """Raise StageError, naming each, where a stage's folder was made with other settings; see `open_stage`."""
    if found := differences(_kept_settings(folder / "config.yaml", stage), plain_data(settings), unsaid=unsaid):
        raise StageError(
            f"{folder} was made with other settings ({'; '.join(found)}); set them back, choose another run_dir, "
            f"or add --redo {stage} to make it again"
        )


def check_settings_stay(folder: Path, stage: str, settings: dict[str, Any]) -> None:
    """Raise StageError where another command has opened a stage's folder meanwhile, with other settings."""
    path = folder / "config.yaml"
    if exists(path) and (found := differences(plain_data(settings), _kept_settings(path, stage))):
        raise StageError(
            f"another command works in {folder} with other settings ({'; '.join(found)}), "
            "so what this one has done counts for nothing; choose another run_dir or folder for one of them"
        )


def empty_stage(folder: Path, stage: str) -> None:
    """Remove from a stage's folder what the stage writes, and nothing else that lies there."""
    for path in [path for pattern in FILES[stage] for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)
    remove_shards(folder)
    for path in [path for pattern in INNER for path in folder.glob(pattern)] if is_local(folder) else ():
        with suppress(OSError):  # not empty, or no folder
            path.rmdir()
    left = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp"))
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        logger.info("%s: %s stays in %s, smalti did not write it", stage, ", ".join(left[:5]) + more, folder)


def named_folder(name: str, setting: str) -> Path | None:
    """Return the stage folder of another run that a setting names, None where it names none.

    Raises:
        StageError: there is no such folder.
    """
    if not name:
        return None
    folder = place(name)
    if is_local(folder) and not folder.is_dir():
        raise StageError(f"{setting} must name a stage folder that exists, there is no {name}")
    return folder


def check_set_name(name: str, setting: str, usual: str) -> None:
    """Raise ValueError unless a set of samples or tokens has a folder of its own inside the run folder."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or parts[0] in OTHER_STAGES:
        raise ValueError(
            f"{setting} must name a folder of its own inside the run folder, got {name!r}; {usual} is the usual one"
        )


def folder_of_set(root: Path, name: str, stage: str) -> Path:
    """Return the folder of a set of samples or tokens in a run folder.

    Raises:
        ConfigError: it is inside another set's, or that of a set of another kind.
    """
    for parent in list(Path(name).parents)[:-1]:
        if exists(root / parent / "config.yaml") and not exists(root / name / "config.yaml"):
            raise ConfigError(
                f"{stage}.folder must not lie in another set's folder, got {name}, and {parent} holds a set; "
                "choose a folder beside it"
            )
    folder, kept = root / name, None
    with suppress(OSError, ValueError):  # what cannot be read is judged elsewhere
        kept = read_yaml(read_bytes(folder / "config.yaml"))
    others = ("model.safetensors", *(["manifest.json"] if stage == "export" else []))
    if (isinstance(kept, dict) and stage not in kept) or any(exists(folder / one) for one in others):
        raise ConfigError(
            f"{stage}.folder must name a folder of its own, but {folder} holds other work; choose another"
        )
    return folder


def check_outside(folder: Path, stage: str, inputs: Mapping[str, str]) -> None:
    """Raise ConfigError where what a stage reads lies in the folder that it writes to.

    Args:
        folder: of the stage.
        stage: its command.
        inputs: folders, URLs or hub ids by the setting that names them; empty ones name nothing.
    """
    for setting, name in inputs.items():
        if name and lies_in(place(name), folder):
            raise ConfigError(
                f"{setting} must lie outside {folder}, which {stage} writes to, got {name}; choose another run_dir"
            )


def _kept_settings(path: Path, stage: str) -> Any:
    try:
        return renamed(read_yaml(read_bytes(path)))
    except ValueError as error:
        mend = f"add --redo {stage} to make it again"
        raise StageError(f"{path} is not what smalti wrote there: {error}; {mend}") from error


def completes(folder: Path) -> bool:
    """Whether a folder is complete within ten seconds: the same command, given twice, may be at its last shard."""
    for _ in range(20):
        if is_complete(folder):
            return True
        time.sleep(0.5)
    return False


def is_complete(folder: Path) -> bool:
    """Whether a stage's manifest, exported model or layout of tokens is there; each is written last."""
    return any(exists(folder / name) for name in ("manifest.json", "model.safetensors", "layout.json"))


def publish_model(model: HierarchicalVQVAE | LevelPrior, folder: Path) -> None:
    """Write a model's files into a stage's folder; `model.safetensors`, the last, completes the stage."""
    with tempfile.TemporaryDirectory() as staging:
        try:
            model.save_pretrained(staging)
        except SafetensorError as error:
            raise StageError(f"cannot write {staging}: {error}; make room there or set TMPDIR") from error
        for source in sorted(Path(staging).iterdir(), key=lambda path: path.name == "model.safetensors"):
            with whole(folder / source.name) as temporary:
                shutil.copyfile(source, temporary)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes of this command out of a folder where they would write the same files.

    Raises:
        StageError: one is at work there.
    """
    if not is_local(folder):  # stores have no locks; what both write there is the same
        yield
        return
    make_folder(folder.parent)
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StageError(f"another process is at work in {folder}; wait until it is done, or stop it") from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()
