"""What ids mean: special tokens, classes and codes, one after the other, and the text vocabulary they stand behind.

K codebook_size. A token of ours has an index, 0 to V - 1 in this order, whatever its id.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import ConfigError
from pipelines.storage.paths import place, read_bytes

# Beyond these nothing is believed: .idx holds ids as int32, and every token has a name in memory.
MAX_ID, MAX_TOKENS = 2**31, 2**24
# What a name may be made of: no blanks, at which text is split, and nothing that a format string could reach for.
NAMES = re.compile(r"([^\s{}]|\{(level|code)(:0?\d{0,2}[dx])?\})+")


@dataclass(frozen=True, kw_only=True)
class VocabConfig:
    """Which ids the tokens of images have.

    Attributes:
        base: first id; the length of the text tokenizer's vocabulary puts image tokens behind it.
        ids: JSON file of an object name -> id, for ids that do not follow one another. Names are "<bos>", "<class:3>"
            and so on, and codes by number: "0", "1", …, the levels of the tokenizer one after the other.
        names: how codes are called in tokenizer.json and added_tokens.txt.
    """

    base: int = 0
    ids: str = ""
    names: str = "<|image:{level}:{code:05d}|>"

    def __post_init__(self) -> None:
        if not 0 <= self.base < MAX_ID:
            raise ValueError(f"vocab.base must lie in [0, 2**31), got {self.base}")
        if not NAMES.fullmatch(self.names):
            raise ValueError(
                f"vocab.names must hold no blanks and no fields but {{level}} and {{code}}, got {self.names!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions become tokens.

    Attributes:
        column: member of a sample that holds its caption.
        tokenizer: folder with the text tokenizer's tokenizer.json (Hugging Face).
    """

    column: str = "txt"
    tokenizer: str = ""


class TextTokenizer:
    """A Hugging Face tokenizer of text.

    Args:
        data: content of a tokenizer.json.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer  # only who has text needs it

        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # "</s>" in a caption is text
        self.ids: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.length = max(self.ids.values()) + 1

    @classmethod
    def read(cls, folder: str | Path) -> "TextTokenizer":
        """Read the tokenizer.json of a folder.

        Raises:
            ConfigError: there is none that can be read.
        """
        path = place(folder) / "tokenizer.json"
        try:
            return cls(read_bytes(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"text.tokenizer must name a folder with a tokenizer.json; {path}: {error}") from error

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return the int64 ids of each caption, without special tokens."""
        found = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in found]


class Vocabulary:
    """The tokens of a layout.

    Args:
        specials: their names.
        num_classes: how many classes have a token.
        levels: (number, K) of each level.
        base: first id.
        ids: id of each token where they do not follow one another.
        names: how codes are called.
        text: tokenizer of the vocabulary that stands before.

    Attributes:
        ids: int64 (V,), id of each index.
        starts: first index of each level, and V.
        rows: one more than the largest id, text included; what a model's embedding must have.

    Raises:
        ConfigError: ids are not one to one or not ids, or text has them or their names.
    """

    def __init__(
        self,
        specials: Sequence[str],
        num_classes: int,
        levels: Sequence[tuple[int, int]],
        base: int,
        ids: Sequence[int] | None,
        names: str,
        text: TextTokenizer | None,
    ) -> None:
        self.specials, self.num_classes, self.levels = list(specials), num_classes, list(levels)
        self.format, self.text = names, text
        self.starts = list(accumulate((size for _, size in levels), initial=len(specials) + num_classes))
        count = self.starts[-1]
        if count > MAX_TOKENS or base + count > MAX_ID:
            raise ConfigError(f"ids must stay below 2**31 and tokens below 2**24, but {count} tokens start at {base}")
        self.consecutive = ids is None
        self.ids = np.arange(base, base + count) if ids is None else np.array(ids, np.int64)
        self.order = np.argsort(self.ids)
        self._check(base)
        self.base = int(self.ids.min())
        self.size = int(self.ids.max()) + 1 - self.base
        self.rows = max(self.base + self.size, text.length if text else 0)

    def _check(self, base: int) -> None:
        if len(self.ids) != self.starts[-1] or self.ids.min() < 0 or self.ids.max() >= MAX_ID:
            raise ConfigError(f"each of the {self.starts[-1]} tokens must have an id in [0, 2**31)")
        ranked = self.ids[self.order]
        twice = np.flatnonzero(ranked[1:] == ranked[:-1])
        if len(twice):
            first, second = sorted(self.order[twice[0] : twice[0] + 2])
            raise ConfigError(
                f"ids must be one to one, but {self.key(int(first))} and {self.key(int(second))} both have "
                f"{ranked[twice[0]]}; give each token its own id in vocab.ids"
            )
        if self.text and self.consecutive and base < self.text.length:
            raise ConfigError(
                f"vocab.base must be at least the length of the text tokenizer ({self.text.length}), got {base}; "
                f"set it to {self.text.length}, or name the tokens that both have in vocab.ids"
            )

    def key(self, index: int) -> str:
        """Return what the file `vocab.ids` calls a token; codes are numbered from the first level here."""
        first = len(self.specials)
        if index < first:
            return self.specials[index]
        return f"<class:{index - first}>" if index < self.starts[0] else str(index - self.starts[0])

    def ids_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the ids of indices."""
        return indices + indices.dtype.type(self.base) if self.consecutive else self.ids[indices]

    def indices_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices of ids, int64; -1 for those that are not ours."""
        if self.consecutive:
            return np.where((ids >= self.base) & (ids < self.base + self.size), ids - self.base, -1)
        found = np.searchsorted(self.ids, ids, sorter=self.order).clip(max=len(self.ids) - 1)
        indices = self.order[found]
        return np.where(self.ids[indices] == ids, indices, -1)

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids are of text alone, bool."""
        assert self.text is not None
        return (ids >= 0) & (ids < self.text.length) & (self.indices_of(ids) < 0)

    def names(self) -> dict[int, str]:
        """Return id -> name of our tokens in the order of ids; a token that text has too keeps the name it has there.

        Raises:
            ConfigError: a name comes twice.
        """
        of_text = {number: name for name, number in self.text.ids.items()} if self.text else {}
        ours = [self.key(index) for index in range(self.starts[0])]
        for level, size in self.levels:
            ours += [self.format.format(level=level, code=code) for code in range(size)]
        found = {int(self.ids[index]): of_text.get(int(self.ids[index]), ours[index]) for index in self.order}
        elsewhere = {name: number for name, number in self.text.ids.items() if number not in found} if self.text else {}
        for name in found.values():
            if name in elsewhere:
                raise ConfigError(
                    f"the text tokenizer has {name} as token {elsewhere[name]} already; "
                    "give it that id in vocab.ids, or other codes another vocab.names"
                )
        if len(set(found.values())) < len(found):
            raise ConfigError(f"vocab.names must give each code a name of its own, {self.format} does not")
        return found

    def tokenizer_json(self) -> dict:
        """Return the tokenizer.json of text and images: the text tokenizer's, or one of words, with all names added.

        Ids of added tokens are not what a tokenizer.json says but counted on from its model's vocabulary, so every
        name is put into that as well, the text's own added tokens too.
        """
        found = self.names()
        spec = json.loads(self.text.data) if self.text else _words()
        named = {token["content"] for token in spec["added_tokens"]}
        special = set(self.ids[: self.starts[0]].tolist())
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        spec["added_tokens"] += [
            {"id": number, "content": name, "special": number in special, **plain}
            for number, name in found.items()
            if name not in named
        ]
        every = found | ({number: name for name, number in self.text.ids.items()} if self.text else {})
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab.update({name: number for number, name in sorted(every.items())})
        else:  # Unigram's list, whose places are the ids; a score of 0 changes nothing for other pieces
            vocab += [[every.get(n, f"<|unused:{n}|>"), 0.0] for n in range(len(vocab), max(every) + 1)]
        return spec


def _words() -> dict[str, Any]:
    """Return a tokenizer.json that knows no words yet."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"},
    }


def read_ids(path: str, names: Sequence[str]) -> list[int]:
    """Return the ids that a JSON file gives to names.

    Raises:
        ConfigError: it cannot be read, lacks a name or has one twice.
    """
    try:
        pairs = json.loads(read_bytes(place(path)), object_pairs_hook=list)
        table = dict(pairs)
        if len(table) < len(pairs) or not all(type(number) is int for number in table.values()):
            raise ValueError("a name comes twice, or an id is no whole number")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"vocab.ids must name a JSON file of an object name -> id; {path}: {error}") from error
    missing = [name for name in names if name not in table]
    if missing:
        raise ConfigError(
            f"vocab.ids must give an id to every token that can occur, but {path} lacks {len(missing)} "
            f"of {len(names)}, first {missing[0]!r}"
        )
    return [table[name] for name in names]
