"""Listing what a source holds: pictures below a folder, files by a pattern, and names in a message."""

import logging
import os
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipelines.errors import StageError
from pipelines.storage.paths import is_local, matches, retried, store_of
from pipelines.storage.shards import CARRIED

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Names that are listed in a message.
LISTED = 5

logger = logging.getLogger(__name__)


def pictures_below(root: Path) -> tuple[list[str], set[str], list[str]]:
    """List a folder, local or remote.

    Returns:
        The pictures in it and below it, relative to it; the folders, each with a slash at its end; and the other files.
        Hidden ones are left out.
    """
    found, folders = (_local_tree if is_local(root) else _remote_tree)(root)
    others = [path for path in found if not _is_picture(path)]
    return [path for path in found if _is_picture(path)] if others else found, folders, others


def beside_pictures(pictures: Iterable[str], others: Iterable[str]) -> tuple[dict[str, list[str]], set[str]]:
    """Sort out which files go with pictures, NAME.txt with NAME.jpg.

    Returns:
        NAME -> the extensions of what lies beside it and can be carried; and patterns of all else.
    """
    names = {os.path.splitext(path)[0] for path in pictures}
    beside: dict[str, list[str]] = {}
    left: set[str] = set()
    for path in sorted(others):
        name, extension = os.path.splitext(path)
        if extension[1:] not in CARRIED:
            left.add(f"*{extension}" if extension else os.path.basename(path))
        elif name in names:
            beside.setdefault(name, []).append(extension[1:])
        else:
            left.add(f"*{extension} of no image")
    return beside, left


def files_of(pattern: str) -> list[Path]:
    """Return the files that a path or URL with wildcards matches, each once however many links lead to it.

    Raises:
        StageError: one is a folder.
    """
    found: dict[Path, Path] = {}
    for path in sorted(matches(pattern), key=lambda path: len(path.parts)):
        if is_local(path) and path.is_dir():
            raise StageError(
                f"images.source must name files, but {path} is a folder; name what lies in it, as {path}/*"
            )
        found.setdefault(path.resolve() if is_local(path) else path, path)
    return sorted(found.values())


def shortly(names: Iterable[str]) -> str:
    """The first few of some names, which may be long."""
    names = list(names)
    shown = [textwrap.shorten(name, 40, placeholder="…") for name in names[:LISTED]]
    return ", ".join(shown + ["…"] * (len(names) > LISTED))


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _local_tree(root: Path) -> tuple[list[str], set[str]]:
    """The files below a folder, and the folders; hidden ones are left out.

    Links are followed, but for those of a loop, which would give their files again and again.
    """

    @cache
    def listing(folder: str) -> tuple[dict[str, str], list[str]]:
        """What lies in a real folder: its folders, each with its real path, and the files."""
        _, folders, names = next(os.walk(folder), ("", [], []))
        paths = {name: os.path.join(folder, name) for name in folders if not name.startswith(".")}
        real = {name: os.path.realpath(path) if os.path.islink(path) else path for name, path in paths.items()}
        return real, [name for name in names if not name.startswith(".")]

    def leads_to(start: str, folder: str) -> bool:
        waiting, met = [start], {start}
        while waiting:
            here = waiting.pop()
            if Path(folder).is_relative_to(here):
                return True
            new = set(listing(here)[0].values()) - met
            met |= new
            waiting += new
        return False

    found, below, loops = [], set(), []
    waiting = [(os.path.realpath(root), "")]
    while waiting:
        here, prefix = waiting.pop()
        folders, names = listing(here)
        found += [prefix + name for name in names]
        for name, target in folders.items():
            if target != os.path.join(here, name) and leads_to(target, here):
                loops.append(prefix + name)
            else:
                below.add(f"{prefix}{name}/")
                waiting.append((target, f"{prefix}{name}/"))
    if loops:
        logger.warning("folder:%s: links that lead back to where they lie are not followed: %s", root, shortly(loops))
    return found, below


def _remote_tree(root: Path) -> tuple[list[str], set[str]]:
    """The same of a store, which knows no empty folders."""
    store, top = store_of(root)
    base = top.rstrip("/") + "/"
    paths = [name.removeprefix(base) for name in retried(lambda: store.find(top), f"list {root}")]
    found = [path for path in paths if "/." not in f"/{path}"]
    return found, {path.rpartition("/")[0] + "/" for path in found if "/" in path and _is_picture(path)}


def span(paths: list[Path]) -> str:
    """Name some files by the first and the last of them."""
    return " to ".join(dict.fromkeys((paths[0].name, paths[-1].name)))


def safe_key(text: str) -> str:
    """Return a shard key: no dots, which would end it, and nothing that tar or a shell would stumble over."""
    return "".join(c if c.isalnum() or c in "_-/" else "_" for c in text)
