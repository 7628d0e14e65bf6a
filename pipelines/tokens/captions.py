"""Captions in records: put in before one place, and taken out again.

B batch, N tokens of a record without its caption.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipelines.errors import StageError


def insert_captions(bare: np.ndarray, captions: Sequence[np.ndarray], before: int) -> tuple[np.ndarray, np.ndarray]:
    """Return records with captions, one after the other (tokens,), and the length of each caption (B,).

    Args:
        bare: ids (B, N).
        captions: B arrays of ids.
        before: place before which they go.
    """
    count, size = bare.shape
    extra = np.array([len(caption) for caption in captions], np.int64)
    starts = np.cumsum(extra + size) - extra - size
    places = starts[:, None] + _places(size, before, extra)
    is_caption = np.ones(count * size + extra.sum(), bool)
    is_caption[places] = False
    ids = np.empty(len(is_caption), bare.dtype)
    ids[places] = bare
    ids[is_caption] = np.concatenate(captions) if count else 0
    return ids, extra


def remove_captions(
    records: Sequence[np.ndarray],
    size: int,
    before: int,
    pad: int | None,
    is_text: Callable[[np.ndarray], np.ndarray],
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return records without captions and padding (B, N), and the position (B, N) that each token had.

    Args:
        records: B arrays of ids, padded on either side or not.
        size: N.
        before: place before which captions stand.
        pad: id of <pad>.
        is_text: which ids may be in a caption.
        first: what errors call the first record.

    Raises:
        StageError: a record is too short, or its caption is none; names record and position.
    """
    bare, places = np.empty((len(records), size), np.int64), np.empty((len(records), size), np.int64)
    for number, record in enumerate(records):
        kept = np.flatnonzero(record != pad)
        start, stop = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
        extra = stop - start - size
        if record.ndim != 1 or extra < 0:
            raise StageError(f"record {first + number} must have {size} tokens beside its caption, has {stop - start}")
        caption = record[start + before : start + before + extra]
        strange = np.flatnonzero(~is_text(caption))
        if len(strange):
            raise StageError(
                f"record {first + number} has token {caption[strange[0]]} at position {start + before + strange[0]}, "
                "where text must stand"
            )
        places[number] = start + _places(size, before, np.array([extra]))[0]
        bare[number] = record[places[number]]
    return bare, places


def _places(size: int, before: int, extra: np.ndarray) -> np.ndarray:
    """Return where the N tokens of records stand (B, N) that have so many more (B,) before a place."""
    place = np.arange(size)
    return place + np.where(place >= before, extra[:, None], 0)
