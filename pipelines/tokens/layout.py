"""Token layouts: what a record is, there and back, codes, class and caption of an image as one sequence of ids.

B batch, h w code grid, K codebook_size, T codes of an image, N tokens of a record without its caption.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import ConfigError, StageError
from pipelines.storage.fingerprint import tokenizer_fingerprint
from pipelines.storage.manifest import CodesManifest
from pipelines.storage.paths import place, write_json
from pipelines.tokens.captions import insert_captions, remove_captions
from pipelines.tokens.layout_file import Stated, described, read_layout, state, write_vocabulary
from pipelines.tokens.scan import ORDERS, permutation, scan
from pipelines.tokens.template import CLASS, CODES, RecordConfig, check_template, make_slots, special_names
from pipelines.tokens.values import checked_classes, checked_codes, checked_ids
from pipelines.tokens.vocabulary import MAX_ID, TextTokenizer, Vocabulary
from tokenizer import HierarchicalVQVAE

# Records laid at once, so that what they pass through stays in the processor's cache.
BLOCK = 64


class Laid(NamedTuple):
    """Records one after the other: ids in the layout's dtype (tokens,), and each one's length and prompt, int64 (B,).

    The prompt is what stands before the last of <codes> and <text>: given, not to be learned.
    """

    ids: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray


class TokenLayout:
    """What a record of tokens is.

    Args:
        stated: all that is not derived.
        text: the text tokenizer, where there is one.

    Attributes:
        vocabulary: which id means what.
        slots: what may stand at each place of a record.
        dtype: of token files.
        shards: split -> [{"shard", "records", "tokens", "sha256": {file: sha256}}], where they were loaded.

    Raises:
        ConfigError: what is stated cannot be together; says which and why.
    """

    def __init__(self, stated: Stated, text: TextTokenizer | None = None) -> None:
        check_template(stated.template, stated.order)
        self.stated, self.text, self.words = stated, text, stated.template.split()
        self.shards: dict[str, list[dict]] = {}
        self.levels = stated.levels
        if "<class>" in self.words and not stated.class_names:
            left = " ".join(word for word in self.words if word != "<class>")
            raise ConfigError(f"template names <class> but the codes have no classes; set it to {left!r}")
        if "<text>" in self.words and text is None:
            raise ConfigError(
                "template names <text>; set text.tokenizer to a folder with a tokenizer.json, or leave it out"
            )
        self.vocabulary = Vocabulary(
            special_names(self.words, self.levels, stated.image_size),
            len(stated.class_names) if "<class>" in self.words else 0,
            [(level.level, level.codebook_size) for level in self.levels],
            stated.base,
            stated.ids,
            stated.names,
            text,
        )
        grids = [level.grid for level in self.levels]
        self.starts = list(accumulate(map(prod, grids), initial=0))  # first code of each level, and T
        known = stated.order in ORDERS
        order = scan(stated.order, grids) if known else permutation(stated.permutation, self.starts[-1])
        self.slots = make_slots(self.words, self.vocabulary, self.levels, stated.image_size, order)
        self.dtype = self._fitting(stated.dtype)
        if 0 < stated.max_tokens < len(self.slots.low):
            raise ConfigError(
                f"records have {len(self.slots.low)} tokens without their captions, more than max_tokens "
                f"{stated.max_tokens}; raise it or export fewer levels"
            )
        self._lists: dict[tuple[int, int], list[int]] = {}  # of `allowed`, which is asked at every position

    @property
    def length(self) -> int | None:
        """N, where all records have the same length."""
        return len(self.slots.low) if self.slots.text is None else None

    @property
    def pad(self) -> int | None:
        """The id of <pad>, where records differ in length."""
        specials = self.vocabulary.specials
        return int(self.vocabulary.ids[specials.index("<pad>")]) if "<pad>" in specials else None

    def _fitting(self, dtype: str) -> np.dtype:
        rows = self.vocabulary.rows
        if dtype == "uint16" and rows > 2**16:
            raise ConfigError(
                f"dtype uint16 holds ids below 65536, but the vocabulary goes up to {rows - 1}; set uint32"
            )
        return np.dtype(np.uint32 if dtype == "uint32" or rows > 2**16 else np.uint16)

    @classmethod
    def from_codes(cls, manifest: CodesManifest, config: RecordConfig) -> Self:
        """Return the layout of the records of a code manifest; files that the settings name are read.

        Raises:
            ConfigError: the settings cannot be together, or not with these codes.
        """
        text = TextTokenizer.read(config.text.tokenizer) if config.text.tokenizer else None
        return cls(state(manifest, config), text)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the layout.json of a folder.

        Raises:
            StageError: there is none, or not one that can be right.
        """
        stated, text, contents = read_layout(place(folder))
        try:
            layout = cls(stated, text)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise StageError(f"{folder}/layout.json cannot be right: {error}") from error
        told = layout.describe()
        wrong = [name for name in told if contents.get(name) != told[name]]
        if wrong:
            raise StageError(
                f"{folder}/layout.json cannot be right: {wrong[0]} does not follow from the rest; copy it again"
            )
        layout.shards = contents["shards"]
        return layout

    def save(self, folder: Path, shards: dict[str, list[dict]]) -> None:
        """Write layout.json, the last, and beside it tokenizer.json, added_tokens.txt and the text tokenizer.

        Args:
            folder: of the tokens.
            shards: split -> [{"shard": name without extension, "records", "tokens", "sha256": {file: sha256}}].
        """
        write_vocabulary(folder, self.vocabulary)
        write_json(folder / "layout.json", {**self.describe(), "shards": shards})

    def describe(self) -> dict[str, Any]:
        """Return what layout.json says, shards apart."""
        return described(self.stated, self.vocabulary, self.slots, self.dtype)

    def encode(
        self,
        codes: Sequence[np.ndarray | Tensor],
        classes: Sequence[int] | np.ndarray | Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> Tensor | list[Tensor]:
        """Return the records of images.

        Args:
            codes: integer (B, h, w) of each level of the tokenizer, or of each that is exported, coarse to fine.
            classes: (B,) indices, where the template has <class>.
            captions: B of them, where it has <text>; cut so that no record has more than max_tokens.

        Returns:
            int64 (B, N); where the template has <text>, a list of B tensors.

        Raises:
            StageError: something is missing, of another shape or out of range, or captions have no place.
        """
        if captions is not None and "<text>" not in self.words:
            raise StageError(f"captions have no place in the template {self.stated.template!r}; leave them out")
        laid = self.lay(codes, classes, captions)
        ids = torch.from_numpy(laid.ids.astype(np.int64))
        return ids.view(len(laid.lengths), self.length) if self.length else list(ids.split(laid.lengths.tolist()))

    def lay(self, codes: Sequence[Any], classes: Any = None, captions: Sequence[str] | None = None) -> Laid:
        """Return the same as an array, for files."""
        grids = checked_codes(codes, self.levels)
        count, size = len(grids[0]), len(self.slots.low)
        labels = checked_classes(classes, count, self.vocabulary.num_classes)
        bare = np.empty((count, size), self.dtype)
        values = np.zeros((min(count, BLOCK), CODES + self.starts[-1]), np.int32)
        for first in range(0, count, BLOCK):
            rows = slice(first, min(first + BLOCK, count))
            block = values[: rows.stop - first]
            block[:, CLASS] = labels[rows]
            for grid, start, stop in zip(grids, self.starts, self.starts[1:], strict=False):
                block[:, CODES + start : CODES + stop] = grid[rows].reshape(len(block), -1)
            # "clip" spares numpy a check of every column, three quarters of the time.
            indices = block.take(self.slots.columns, axis=1, mode="clip")
            indices += self.slots.low
            bare[rows] = self.vocabulary.ids_of(indices)
        if self.slots.text is None:
            return Laid(bare.reshape(-1), np.full(count, size, np.int64), np.full(count, self.slots.prompt, np.int64))
        ids, extra = insert_captions(bare, self._texts(captions, count), self.slots.text)
        text_first = self.words.index("<text>") < self.words.index("<codes>")
        return Laid(ids, size + extra, self.slots.prompt + extra * text_first)

    def _texts(self, captions: Sequence[str] | None, count: int) -> list[np.ndarray]:
        """Return the ids of captions, cut; what a caption says of the tokens of images is left out."""
        if self.text is None or captions is None or len(captions) != count:
            found = "none" if captions is None else len(captions)
            raise StageError(f"template has <text>: there must be {count} captions, got {found}; give each image one")
        room = self.stated.max_tokens - len(self.slots.low) if self.stated.max_tokens else MAX_ID
        return [ids[self.vocabulary.indices_of(ids) < 0][:room] for ids in self.text.encode(captions)]

    def decode(self, ids: Tensor | np.ndarray | Sequence[Any], first: int = 0) -> list[Tensor]:
        """Return the codes of records: int64 (B, h, w) of each exported level, coarse to fine.

        Args:
            ids: integer (B, N); where the template has <text>, B records that may have <pad> around them.
            first: what errors call the first of these records.

        Raises:
            StageError: a record has another length, or a token stands where it cannot; names record and position.
        """
        codes = self._values(ids, first)[:, self.slots.positions]
        # In memory as encoders leave them: a decoder's last bits depend on it.
        return [
            torch.from_numpy(np.ascontiguousarray(codes[:, start:stop]).reshape(-1, *level.grid))
            for level, start, stop in zip(self.levels, self.starts, self.starts[1:], strict=False)
        ]

    def classes(self, ids: Tensor | np.ndarray | Sequence[Any]) -> Tensor | None:
        """Return the class index (B,) of each record, int64; None where the template has no <class>.

        Arguments and errors are those of `decode`.
        """
        (places,) = np.nonzero(self.slots.columns == CLASS)
        return torch.from_numpy(self._values(ids, 0)[:, places[0]].astype(np.int64)) if len(places) else None

    def _values(self, ids: Any, first: int) -> np.ndarray:
        """Return what stands at each place of a record, counted from the lowest that may stand there, (B, N)."""
        bare, places = self._without_captions(ids, first)
        indices = self.vocabulary.indices_of(bare)
        wrong = (indices < self.slots.low) | (indices >= self.slots.high)
        if wrong.any():
            record, place = map(int, np.argwhere(wrong)[0])
            found, position = bare[record, place], places[record, place]
            raise StageError(
                f"record {first + record} has token {found} at position {position}, {self._instead(place)}"
            )
        return indices - self.slots.low

    def _instead(self, place: int) -> str:
        low, high = int(self.slots.low[place]), int(self.slots.high[place])
        if high == low + 1:
            return f"where {self.vocabulary.key(low)} ({self.vocabulary.ids[low]}) must stand"
        column = self.slots.columns[place]
        level = self.levels[int(np.searchsorted(self.starts, column - CODES, side="right")) - 1]
        what = "a class" if column == CLASS else f"a code of level {level.level}"
        return f"where {what} must stand, {self.vocabulary.ids[low]} to {self.vocabulary.ids[high - 1]}"

    def _without_captions(self, ids: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return records (B, N) without captions and <pad>, and the position (B, N) that each token had."""
        size = len(self.slots.low)
        if self.slots.text is not None:
            records = [checked_ids(record) for record in ids]
            return remove_captions(records, size, self.slots.text, self.pad, self.vocabulary.is_text, first)
        bare = checked_ids(ids)
        if bare.ndim != 2 or bare.shape[1] != size:
            raise StageError(f"records must be (B, {size}), got {bare.shape}; were they made with this layout?")
        return bare, np.broadcast_to(np.arange(size), bare.shape)

    def allowed(self, ids_so_far: Tensor | np.ndarray | Sequence[int]) -> list[int]:
        """Return the ids that may come next in a record.

        For transformers: `model.generate(..., prefix_allowed_tokens_fn=lambda batch, ids: layout.allowed(ids))`. What
        stands there already is not judged; see `decode`.

        Args:
            ids_so_far: (n,), from the start of the record; <pad> may come before it.

        Returns:
            Not to be changed. Empty after the end of a record of fixed length; after that of others, <pad>.
        """
        place, text = len(ids_so_far), self.slots.text
        if text is not None:
            ids = checked_ids(ids_so_far)
            started = np.flatnonzero(ids != self.pad)
            ids = ids[started[0] :] if len(started) else ids[:0]
            ended = np.flatnonzero(self.vocabulary.indices_of(ids[text:]) >= 0)
            extra = int(ended[0]) if len(ended) else max(len(ids) - text, 0)
            place = len(ids) - extra
            if place == text:
                full = 0 < self.stated.max_tokens <= len(self.slots.low) + extra
                return [*([] if full else self._text_ids()), *self._ids_at(place)]
        return self._ids_at(place)

    def _ids_at(self, place: int) -> list[int]:
        if place >= len(self.slots.low):
            return [] if self.pad is None else [self.pad]
        low, high = int(self.slots.low[place]), int(self.slots.high[place])
        if (low, high) not in self._lists:
            self._lists[low, high] = self.vocabulary.ids[low:high].tolist()
        return self._lists[low, high]

    def _text_ids(self) -> list[int]:
        if (-1, -1) not in self._lists:
            assert self.text is not None
            every = np.array(sorted(self.text.ids.values()))
            self._lists[-1, -1] = every[self.vocabulary.indices_of(every) < 0].tolist()
        return self._lists[-1, -1]

    def images(self, ids: Tensor | np.ndarray | Sequence[Any], tokenizer: HierarchicalVQVAE) -> Tensor:
        """Return the images of records, float (B, C, H, W) in [-1, 1].

        Args:
            ids: as for `decode`.
            tokenizer: the one whose codes these are.

        Raises:
            StageError: it is another one, coarse levels are not exported, or as of `decode`.
        """
        self.check_tokenizer(tokenizer)
        device = next(tokenizer.parameters()).device
        classes = self.classes(ids) if tokenizer.num_classes else None
        return tokenizer.decode([codes.to(device) for codes in self.decode(ids)], classes)

    def check_tokenizer(self, tokenizer: HierarchicalVQVAE) -> None:
        """Refuse a tokenizer that cannot make images of these tokens.

        Raises:
            StageError: it is another one, or coarse levels are not exported.
        """
        mark = tokenizer_fingerprint(tokenizer)
        if mark != self.stated.tokenizer:
            raise StageError(
                f"these tokens are of tokenizer {self.stated.tokenizer[:12]} but this one is {mark[:12]}; "
                "load the one that encoded the images"
            )
        if [level.level for level in self.levels] != list(range(len(self.levels))):
            found = [level.level for level in self.levels]
            raise StageError(f"images need every level from 0 on, but levels {found} were exported; export all")
