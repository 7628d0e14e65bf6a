"""What a stage that writes shards does: which of them are to be written, and which of those by this worker."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.compute.devices import this_worker
from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.receipts import made_with, read_receipt, receipt_fits, taken_by_others


class ShardJob(NamedTuple):
    """A shard to be written.

    Attributes:
        path: of it; of one of several files, their common name.
        samples: how many it will hold.
        provenance: what it is made from and with.
        files: names of the several files that it may have, relative to the folder.
    """

    path: Path
    samples: int
    provenance: dict[str, Any]
    files: Sequence[str] = ()


def outstanding(jobs: Sequence[ShardJob], cache: Cache) -> list[int]:
    """Return which jobs have no shard that fits; the others stay as they are."""
    return [number for number, job in enumerate(jobs) if not receipt_fits(job.path, job.provenance, cache)]


class Share(NamedTuple):
    """The jobs that a worker has to do, and, of all that were outstanding when it began, the receipts there were."""

    todo: list[int]
    before: Mapping[int, dict | None]


def check_free(job: ShardJob) -> None:
    """Raise StageError where somebody else's file lies where a shard or its receipt would be written."""
    if taken := taken_by_others(job.path, job.files):
        raise StageError(f"{taken} must be free for a shard, but smalti did not write what lies there; move it away")


def this_workers(jobs: Sequence[ShardJob], folder: Path, cache: Cache, completing: str = "manifest.json") -> Share:
    """Return this worker's share. A folder where something is to be done is not complete any more.

    Which worker a shard belongs to depends on its place alone: others may be at work already.

    Args:
        jobs: all shards of the stage.
        folder: of the stage.
        cache: for the shards.
        completing: the file that makes the folder complete.

    Raises:
        StageError: as of `check_free`.
    """
    missing = outstanding(jobs, cache)
    for number in missing:
        check_free(jobs[number])
    before = {number: read_receipt(jobs[number].path) for number in missing}
    if missing:
        (folder / completing).unlink(missing_ok=True)
    return Share([number for number in this_worker().share(list(range(len(jobs)))) if number in before], before)


def all_done(jobs: Sequence[ShardJob], share: Share, cache: Cache) -> bool:
    """Whether every shard is done, this worker's share and the others'.

    Raises:
        StageError: another worker has meanwhile written a shard that does not fit here, and so will all of its own.
    """
    left = outstanding(jobs, cache)
    for number in left:
        path, _, provenance, _ = jobs[number]
        receipt = read_receipt(path)
        if receipt and receipt != share.before.get(number) and not made_with(receipt, provenance):
            raise StageError(
                f"{path} was written by another process, made otherwise than this one makes shards; all must have the "
                "same settings, models, kind of device and, on CPUs, compute.threads: set it"
            )
    return not left
