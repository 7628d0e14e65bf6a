"""A source by its name: one kind of source per file of this room."""

from pathlib import Path

from pipelines.errors import ConfigError, StageError
from pipelines.sources.digits import open_digits
from pipelines.sources.folder import open_folder
from pipelines.sources.shards import open_shards
from pipelines.sources.source import Source
from pipelines.storage.cache import Cache
from pipelines.storage.paths import is_local, lies_in, matches, place

# What `images.source` names beside digits: "folder:PATH" and so on.
KINDS = {
    "folder": "PATH",
    "parquet": "GLOB",
    "hf": "REPO[:SPLIT]",
    "shards": "URLS",
}
# What is said of a source of which nothing is there.
MISSING = {
    "folder": "must be a folder that exists",
    "parquet": "matches no file",
    "shards": "must name tars that exist, and there is none",
}


def open_source(
    source: str,
    cache: Cache,
    classes: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """Open a source by its name.

    Args:
        source: "digits", "folder:PATH", "parquet:GLOB", "hf:REPO[:SPLIT]" or "shards:URLS"; paths may be URLs.
        cache: for remote shards.
        classes: False leaves the classes out.
        image_column: column of parquet and hf sources; found by its type if not given.
        label_column: likewise; without one there are no classes.
        caption_column: likewise, never looked for; what lies beside the image as "txt".

    Raises:
        ConfigError: no such kind of source, or one without columns.
        StageError: nothing there.
    """
    check_name(source)
    kind, _, rest = source.partition(":")
    columns = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
    asked = next((name for name, column in columns.items() if column), None)
    if asked and kind not in ("parquet", "hf"):
        raise ConfigError(f"images.{asked} is of parquet: and hf: sources, but images.source is {source}; leave it out")
    if source == "digits":
        found = open_digits()
    elif kind == "folder":
        found = open_folder(rest, classes)
    elif kind in ("parquet", "hf"):
        from pipelines.sources.hub import open_dataset  # its library takes seconds to import

        found = open_dataset(kind, rest, cache, classes, image_column, label_column, caption_column)
    else:
        found = open_shards(rest, cache, classes)
    if not sum(len(split) for split in found.splits.values()):
        raise StageError(f"{source} holds no images")
    if not classes:
        for split in found.splits.values():
            split.labels = None
        found = found._replace(class_names=[])
    return found


def check_name(source: str) -> None:
    """Raise ConfigError unless a source is called by a kind that there is."""
    kind, _, rest = source.partition(":")
    if source != "digits" and not (kind in KINDS and rest):
        *names, last = (f"{kind}:{what}" for kind, what in KINDS.items())
        raise ConfigError(f"images.source must be digits, {', '.join(names)} or {last}, got {source!r}")


def check_source_outside(source: str, folder: Path) -> None:
    """Refuse, before anything is begun, a source that is not there or lies in the folder that it would be packed to.

    Raises:
        ConfigError: it lies there, by its name.
        StageError: there is no such folder or file.
    """
    kind, _, rest = source.partition(":")
    paths = [place(rest)] if kind == "folder" else matches(rest) if kind == "parquet" else []
    if kind == "hf":  # its library takes the name of a folder too
        paths = [Path(rest.partition(":")[0])]
    if kind == "shards":
        from webdataset.shardlists import expand_urls

        paths = [path for url in expand_urls(rest) for path in matches(url)]
    inside = next((path for path in paths if lies_in(path, folder)), None)
    if inside:
        raise ConfigError(
            f"images.source must lie outside {folder}, which pack writes to, but {inside} lies in it; "
            "move the source or choose another run_dir"
        )
    there = paths[0].is_dir() if kind == "folder" and is_local(paths[0]) else bool(paths)
    if kind in MISSING and not there:
        raise StageError(f"{source} {MISSING[kind]}")
