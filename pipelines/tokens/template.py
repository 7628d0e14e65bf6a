"""The template of a record: which tokens may stand at each of its places.

h w code grid, T codes of an image, N tokens of a record without its caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np

from pipelines.errors import ConfigError
from pipelines.tokens.vocabulary import TextConfig, VocabConfig, Vocabulary

WORDS = ("<bos>", "<eos>", "<boi>", "<eoi>", "<class>", "<size>", "<text>", "<level>", "<codes>", "<eol>")
# Columns of a record's values: nothing to choose, its class, and from here on its codes, level by level.
FIXED, CLASS, CODES = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a record is.

    Attributes:
        order: of codes: "levels", "nested" (each coarse cell, then its finer cells) or a .npy file with a permutation.
        levels: "all", or the numbers of those that are exported.
        template: what a record holds, words with blanks between them: <codes>, and of <bos> <eos> <boi> <eoi> <class>
            <size> <text> <level> <eol> what is wanted.
        vocab: which ids the tokens have.
        text: how captions become tokens.
        dtype: of token files: "auto" is uint16 while the vocabulary fits, else uint32.
        max_tokens: captions are cut so that no record has more; 0 cuts none.
    """

    order: str = "levels"
    levels: str | list[int] = "all"
    template: str = "<bos> <class> <boi> <codes> <eoi> <eos>"
    vocab: VocabConfig = field(default_factory=VocabConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dtype: str = "auto"
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "uint16", "uint32"):
            raise ValueError(f"dtype must be auto, uint16 or uint32, got {self.dtype}")
        if isinstance(self.levels, str) and self.levels != "all":
            raise ValueError(f"levels must be all or a list of their numbers, got {self.levels}")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")
        check_template(self.template, self.order)


class Level(NamedTuple):
    """A level that is exported: its number in the tokenizer, (h, w), K."""

    level: int
    grid: tuple[int, int]
    codebook_size: int


class Slots(NamedTuple):
    """The places of a record without its caption.

    Attributes:
        low: int32 (N,), first index of the vocabulary that may stand there.
        high: int32 (N,), the index after the last.
        columns: int64 (N,), of the record's values, what is added to low.
        positions: int64 (T,), where each code stands, level by level.
        text: place before which captions stand; None where there are none.
        prompt: places before the last of <codes> and <text>: given, not to be learned.
    """

    low: np.ndarray
    high: np.ndarray
    columns: np.ndarray
    positions: np.ndarray
    text: int | None
    prompt: int


def check_template(template: str, order: str) -> None:
    """Refuse a template that says nothing, or nothing of a codes' order.

    Raises:
        ConfigError: a word is unknown, missing, twice there or where it cannot be.
    """
    words = template.split()
    if "<codes>" not in words or any(word not in WORDS or words.count(word) > 1 for word in words):
        raise ConfigError(
            f"template must hold <codes>, and each of {' '.join(WORDS)} at most once, with blanks between; "
            f"got {template!r}"
        )
    at = words.index("<codes>")
    around = (words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else "")
    if ("<level>" in words and around[0] != "<level>") or ("<eol>" in words and around[1] != "<eol>"):
        raise ConfigError(f"template must have <level> just before <codes> and <eol> just after it, got {template!r}")
    if order != "levels" and {"<level>", "<eol>"} & set(words):
        raise ConfigError(f"template may have <level> and <eol> where order is levels, not {order}; leave them out")


def special_names(words: Sequence[str], levels: Sequence[Level], image_size: int) -> list[str]:
    """Return the names of the special tokens that a template uses; records that differ in length need <pad>."""
    names = []
    for word in words:
        if word == "<size>":
            names.append(f"<size:{image_size}x{image_size}>")
        elif word == "<level>":
            names += [f"<level:{level.level}>" for level in levels]
        elif word not in ("<codes>", "<class>", "<text>"):
            names.append(word)
    return names + ["<pad>"] * ("<text>" in words)


def make_slots(
    words: Sequence[str], vocabulary: Vocabulary, levels: Sequence[Level], image_size: int, scan: np.ndarray
) -> Slots:
    """Return the places of a record.

    Args:
        words: of the template.
        vocabulary: of the layout.
        levels: of the layout.
        image_size: pixels of either side.
        scan: int64 (T,), which code comes at each place.
    """
    slots: list[tuple[int, int, int]] = []
    begins: dict[str, int] = {}
    for word in words:
        begins[word] = len(slots)
        if word == "<codes>":
            slots += _codes(words, vocabulary, levels, scan)
        elif word == "<class>":
            first = len(vocabulary.specials)
            slots.append((first, first + vocabulary.num_classes, CLASS))
        elif word not in ("<text>", "<level>", "<eol>"):
            slots.append(_fixed(vocabulary, f"<size:{image_size}x{image_size}>" if word == "<size>" else word))
    low, high, columns = np.array(slots, np.int64).T
    positions = np.empty(len(scan), np.int64)
    places = np.flatnonzero(columns >= CODES)
    positions[columns[places] - CODES] = places
    prompt = max(begins["<codes>"], begins.get("<text>", 0))
    return Slots(low.astype(np.int32), high.astype(np.int32), columns, positions, begins.get("<text>"), prompt)


def _fixed(vocabulary: Vocabulary, name: str) -> tuple[int, int, int]:
    index = vocabulary.specials.index(name)
    return index, index + 1, FIXED


def _codes(
    words: Sequence[str], vocabulary: Vocabulary, levels: Sequence[Level], scan: np.ndarray
) -> list[tuple[int, int, int]]:
    """Return the places of the codes, with <level> before each level and <eol> after each row where wanted."""
    starts = list(accumulate((prod(level.grid) for level in levels), initial=0))
    of_code = np.repeat(np.arange(len(levels)), np.diff(starts))  # (T,) level of each code
    slots: list[tuple[int, int, int]] = []
    for place, code in enumerate(scan.tolist()):
        number = of_code[code]
        if "<level>" in words and place == starts[number]:
            slots.append(_fixed(vocabulary, f"<level:{levels[number].level}>"))
        slots.append((vocabulary.starts[number], vocabulary.starts[number + 1], CODES + code))
        if "<eol>" in words and (place + 1 - starts[number]) % levels[number].grid[1] == 0:
            slots.append(_fixed(vocabulary, "<eol>"))
    return slots
