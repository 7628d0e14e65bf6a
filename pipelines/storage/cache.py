"""The cache: shards on local disk, known by their checksum to be what a manifest says."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import StageError
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import exists, is_local, retried, store_of, whole, write_text


class Cache(NamedTuple):
    """Remote shards, fetched whole and kept as long as there is room; and which local ones have been checked.

    Attributes:
        folder: on local disk; many processes may share it.
        limit_bytes: fetched shards, and features of images, beyond this give way, those first that were not used for
            longest.
    """

    folder: Path
    limit_bytes: int

    def shard(self, path: Path, receipt: Mapping[str, Any]) -> Path:
        """Return a local file with the content that a receipt vouches for.

        Args:
            path: of the shard, local or remote.
            receipt: with its sha256 and bytes.

        Raises:
            StageError: it is missing or not what the receipt says; names it.
        """
        if is_local(path):
            found = self._local_sha256(path)
        else:
            kept = self.folder / "shards" / receipt["sha256"]
            if _used(kept):
                return kept
            found = self._fetch(path, kept, receipt["sha256"])
            path = kept if found == receipt["sha256"] else path
        if found is None:
            raise StageError(f"{path} is missing; put it back, or make it again with the command that wrote it")
        if found != receipt["sha256"]:
            raise StageError(
                f"{path} is not the file that its receipt tells of: its sha256 is {found[:12]}, "
                f"not {receipt['sha256'][:12]}; put the right one back, or make it again with the command that wrote it"
            )
        return path

    def holds(self, path: Path, receipt: Mapping[str, Any]) -> bool:
        """Whether a shard is what its receipt says; a remote one, which is written whole, is judged by its size."""
        if is_local(path):
            return path.is_file() and self._local_sha256(path) == receipt.get("sha256")
        return exists(path) and path.stat().st_size == receipt.get("bytes")

    def files(self, folder: Path, names: list[str]) -> Path:
        """Return a local folder that holds some files of a folder, fetched together if it is remote."""
        if is_local(folder):
            return folder
        versions = [_version(folder / name) for name in names]
        kept = self.folder / "files" / digest([str(folder), names, versions])
        for name in names:
            if not _used(kept / name):
                self._fetch(folder / name, kept / name, None)
        return kept

    def _local_sha256(self, path: Path) -> str | None:
        """The sha256 of a local file, None if there is none; computed once as long as the file stays untouched."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        seen = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
        note = self.folder / "checked" / digest(seen)
        with suppress(OSError):
            return note.read_text()
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        with suppress(OSError, StageError):  # a cache that cannot be written is no error, only slower
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, found)
        return found

    def _fetch(self, path: Path, kept: Path, sha256: str | None) -> str | None:
        """Copy a remote file to the cache if its checksum is the wanted one; return the checksum that it has."""
        kept.parent.mkdir(parents=True, exist_ok=True)
        self.make_room()
        store, name = store_of(path)
        try:
            with whole(kept) as temporary:
                retried(lambda: store.get_file(name, str(temporary)), f"fetch {path}")
                with temporary.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if sha256 not in (None, found):
                    raise _Refused
        except _Refused:
            return found
        except FileNotFoundError:
            return None
        return found

    def make_room(self) -> None:
        """Remove what was not used for longest, as far as the rest is more than the limit."""
        files = []
        for path in (path for kind in ("shards", "files", "features") for path in (self.folder / kind).rglob("*")):
            with suppress(FileNotFoundError):  # another process makes room too
                if path.is_file():
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size


def _used(path: Path) -> bool:
    """Whether a file is kept; if it is, it gives way after those that were not used for longer."""
    with suppress(OSError):  # it may not be there, or the cache be another user's
        os.utime(path)
    return path.exists()


def _version(path: Path) -> str:
    """What a store says of a file that changes with its content."""
    store, name = store_of(path)
    return retried(lambda: str(store.ukey(name)), f"read {path}")


class _Refused(Exception):
    """The content is not the wanted one."""


def default_cache_folder() -> Path:
    """Return the user's cache folder, or one among temporary files where the home cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smalti"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"smalti-{os.getuid()}"
