"""Places: local folders and object stores behind one pathlib-like path, where a file is either whole or not there."""

import errno
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

from pipelines.errors import ConfigError, StageError

if TYPE_CHECKING:
    from upath import UPath

# Where files may lie besides local paths. Never "pipe:", which webdataset hands to a shell.
READABLE = ("s3", "gs", "https")
WRITABLE = ("s3", "gs")
# Seconds between tries of a transfer that broke off; after the last it is an error.
RETRIES_S = (0.5, 1.0, 2.0, 4.0)
# Receipts, manifests and settings are small; whoever says otherwise is not believed.
MAX_TEXT_BYTES = 2**28
# Of errors while a file is made, those that are about writing it.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PROCESS = socket.gethostname().replace(".", "_") + "-{}"
T = TypeVar("T")


def place(name: str | Path, writable: bool = False) -> Path:
    """Return the path of a file or folder: a local one, or that of a URL, with pathlib's methods.

    Args:
        name: a local path, "file:" before it or not, or a URL of an allowed scheme.
        writable: whether something will be written there.

    Raises:
        ConfigError: a scheme that is not allowed.
    """
    text = str(name)
    scheme, colon, rest = text.partition(":")
    if scheme == "file" and colon:
        return Path("/" + rest.lstrip("/") if rest.startswith("/") else rest)
    if not colon or "/" in scheme:
        return Path(text).expanduser()
    allowed = WRITABLE if writable else READABLE
    if scheme not in allowed or not rest.startswith("//"):
        raise ConfigError(f"{text} must be a local path or a URL of {', '.join(f'{one}://' for one in allowed)}")
    from upath import UPath  # what a local run does not need

    # Listings are not cached: other processes write there too.
    return cast(Path, UPath(text.rstrip("/"), use_listings_cache=False))


def is_local(path: Path) -> bool:
    """Whether a path lies in this machine's file system."""
    return isinstance(path, Path)


def store_of(path: Path) -> tuple[Any, str]:
    """Return the file system of a remote place and the place's name in it.

    A place of a store has pathlib's methods, and so passes for a `Path`; only here it is known to be none.
    """
    remote = cast("UPath", path)
    return remote.fs, remote.path


def retried(action: Callable[[], T], what: str) -> T:
    """Do something with a remote place, again where it breaks off.

    Raises:
        OSError: it is not there or not allowed.
        StageError: it failed every time.
    """
    for wait_s in (*RETRIES_S, None):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, StageError):
            raise
        except Exception as error:  # the stores' libraries raise kinds of their own
            if wait_s is None:
                raise StageError(f"cannot {what}: {' '.join(str(error).split())}; try again later") from error
            time.sleep(wait_s)
    raise AssertionError


def exists(path: Path) -> bool:
    """Whether a file is there; a store that does not answer is an error, not a no."""
    if is_local(path):
        return path.exists()
    store, name = store_of(path)
    try:
        retried(lambda: store.info(name), f"read {path}")
    except FileNotFoundError:
        return False
    return True


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a small file.

    Raises:
        OSError: it cannot be read.
        StageError: it is larger than limit.
    """

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(limit + 1)

    data = read() if is_local(path) else retried(read, f"read {path}")
    if len(data) > limit:
        raise StageError(f"{path} is larger than {limit} bytes; is it the right file?")
    return data


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a local path to write to; when the block ends well, its file is under the final name, else nothing is.

    A local file is written beside its final name, synced and renamed. A remote one is uploaded in one piece, which
    stores show only once it is complete.

    Raises:
        StageError: there is no room, no permission, no folder.
    """
    beside = path.parent if is_local(path) else Path(tempfile.gettempdir())
    temporary = beside / f".{path.name}.{_PROCESS.format(os.getpid())}.{uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        if is_local(path):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        else:
            store, name = store_of(path)
            retried(lambda: store.put_file(str(temporary), name), f"write {path}")
    except OSError as error:
        if error.errno in NO_ROOM or str(temporary) in (error.filename, error.filename2):
            raise cannot_write(path, error) from error
        raise
    finally:
        with suppress(OSError):  # the folder itself may be gone
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are gone have left half-written in a folder."""
    if not is_local(folder):
        return
    for path in folder.glob(f".*.{_PROCESS.format('*')}.*.tmp"):
        process = int(path.name.split(".")[-3].rpartition("-")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # somebody else's, and alive
            pass


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old or the new one."""
    with whole(path) as temporary:
        temporary.write_text(text)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; stores have none to make."""
    if is_local(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a place is a folder, or lies in it, whatever links and `..` lead there."""
    if is_local(path) and is_local(folder):
        return any(one.resolve().is_relative_to(folder.resolve()) for one in (path, path.parent))
    return f"{path}/".startswith(f"{folder}/")


def cannot_write(path: Path, error: OSError) -> StageError:
    """Return the sentence about a file or folder that cannot be written."""
    reason = error.strerror or str(error)
    return StageError(f"cannot write {path}: {reason}; mend that and give the same command again, it goes on from here")


def matches(pattern: str) -> list[Path]:
    """Return the places that a path or URL with wildcards matches, sorted; "**" matches any folders."""
    if not re.search(r"[*?\[]", pattern):
        found = place(pattern)
        return [found] if exists(found) else []
    root = place(pattern)
    if is_local(root):
        import glob

        return [Path(name) for name in sorted(glob.glob(str(root), recursive=True))]
    scheme = pattern.partition("://")[0]
    store, wanted = store_of(root)
    names = retried(lambda: store.glob(wanted), f"list {pattern}")
    return [place(f"{scheme}://{name.removeprefix(f'{scheme}://')}") for name in sorted(names)]


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(contents, indent=1, sort_keys=True) + "\n")
