import hashlib
import os
from pathlib import Path
from typing import Any, cast

import pytest
from upath import UPath

from pipelines.storage.cache import Cache


@pytest.fixture
def store() -> Path:
    """Three files of 100 bytes that are not on disk."""
    folder = cast(Any, UPath("memory://store"))
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 100)
    return cast(Path, folder)


@pytest.mark.parametrize("kind", ["shards", "files"])
def test_what_was_not_used_for_longest_gives_way(kind: str, store: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 150)

    def use(name: str) -> Path:
        if kind == "files":
            return cache.files(store, [name]) / name
        return cache.shard(store / name, {"sha256": hashlib.sha256(name.encode() * 100).hexdigest()})

    first, second = use("a"), use("b")
    for used_s, path in ((100, first), (200, second)):
        os.utime(path, (used_s, used_s))
    assert use("a") == first
    use("c")
    assert first.exists()
    assert not second.exists()
    assert use("b").read_bytes() == b"b" * 100
