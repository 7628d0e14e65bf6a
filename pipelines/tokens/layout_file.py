"""layout.json: all that a reader of tokens must know, and the tokenizer.json that goes with it."""

import json
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import ConfigError, StageError
from pipelines.storage.fingerprint import manifest_digest
from pipelines.storage.manifest import CodesManifest
from pipelines.storage.paths import read_bytes, whole, write_text
from pipelines.tokens.scan import ORDERS, scan
from pipelines.tokens.template import Level, RecordConfig, Slots, special_names
from pipelines.tokens.vocabulary import MAX_TOKENS, TextTokenizer, VocabConfig, Vocabulary, read_ids

FORMAT = 1
TEXT_TOKENIZER = "text_tokenizer.json"
# What shards may be called: nothing that leads out of their folder.
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What layout.json states; all else in it follows from this.

    Attributes:
        tokenizer: fingerprint of the tokenizer of the codes.
        codes: digest of the codes' manifest.
        image_size: pixels of either side.
        levels: what is exported, coarse to fine.
        class_names: in the order of their indices.
        template: as in `RecordConfig`, and so dtype, "auto" too, and max_tokens.
        order: "levels", "nested" or "file".
        permutation: which code comes at each place, for order "file".
        base: first id; where `ids` are given, nothing.
        ids: of all tokens, where they do not follow one another.
        names: how codes are called.
        text_column: member of a sample that holds its caption.
        dtype: of token files.
        max_tokens: that a record may have; 0 for any number.
    """

    tokenizer: str
    codes: str
    image_size: int
    levels: list[Level]
    class_names: list[str]
    template: str
    order: str
    permutation: list[int] | None
    base: int
    ids: list[int] | None
    names: str
    text_column: str
    dtype: str
    max_tokens: int


def state(manifest: CodesManifest, config: RecordConfig) -> Stated:
    """Return what the settings make of a code manifest; files that they name are read, the text tokenizer apart.

    Raises:
        ConfigError: the settings cannot be together, or not with these codes.
    """
    known = []
    for number, level in enumerate(manifest["levels"]):
        if (size := level["codebook_size"]) is None:
            raise ConfigError(
                "tokens are made of codes, and these levels hold numbers; export needs a bottleneck of codes"
            )
        known.append(Level(number, (level["grid"][0], level["grid"][1]), size))
    wanted = list(range(len(known))) if isinstance(config.levels, str) else config.levels
    if not wanted or sorted(set(wanted)) != wanted or not 0 <= wanted[0] <= wanted[-1] < len(known):
        raise ConfigError(f"levels must be some of 0 to {len(known) - 1}, coarse to fine, got {wanted}")
    levels = [known[number] for number in wanted]
    from_file = config.order not in ORDERS
    return Stated(
        tokenizer=manifest["tokenizer"],
        codes=manifest_digest(manifest),
        image_size=manifest["image_size"],
        levels=levels,
        class_names=manifest["class_names"],
        template=config.template,
        order="file" if from_file else config.order,
        permutation=scan(config.order, [level.grid for level in levels]).tolist() if from_file else None,
        base=config.vocab.base,
        ids=_ids(manifest, config, known, levels) if config.vocab.ids else None,
        names=config.vocab.names,
        text_column=config.text.column,
        dtype=config.dtype,
        max_tokens=config.max_tokens,
    )


def _ids(manifest: CodesManifest, config: RecordConfig, known: list[Level], levels: list[Level]) -> list[int]:
    words = config.template.split()
    names = special_names(words, levels, manifest["image_size"])
    names += [f"<class:{number}>" for number in range(len(manifest["class_names"])) if "<class>" in words]
    before = list(accumulate((level.codebook_size for level in known), initial=0))
    names += [str(before[level.level] + code) for level in levels for code in range(level.codebook_size)]
    return read_ids(config.vocab.ids, names)


def described(stated: Stated, vocabulary: Vocabulary, slots: Slots, dtype: np.dtype) -> dict[str, Any]:
    """Return what layout.json says, shards apart; places are counted as if captions had no tokens."""
    size, text = len(slots.low), vocabulary.text
    starts = list(accumulate((prod(level.grid) for level in stated.levels), initial=0))
    positions = [slots.positions[start:stop] for start, stop in pairwise(starts)]
    segments = [[int(places.min()), int(places.max()) + 1] for places in positions]
    apart = all(before[1] <= after[0] for before, after in pairwise(segments))
    fixed = None if "<text>" in stated.template.split() else size
    return {
        "format": FORMAT,
        "kind": "tokens",
        "tokenizer": stated.tokenizer,
        "codes": stated.codes,
        "image_size": stated.image_size,
        "dtype": dtype.name,
        "vocabulary": {
            "base": vocabulary.base,
            "size": vocabulary.size,
            "rows": vocabulary.rows,
            "ids": stated.ids,
            "names": stated.names,
        },
        "specials": {name: int(vocabulary.ids[index]) for index, name in enumerate(vocabulary.specials)},
        "classes": [int(vocabulary.ids[len(vocabulary.specials) + n]) for n in range(vocabulary.num_classes)],
        "class_names": stated.class_names,
        "levels": [
            {**level._asdict(), "grid": list(level.grid), "offset": _offset(vocabulary.ids[low:high])}
            for level, (low, high) in zip(stated.levels, pairwise(vocabulary.starts), strict=True)
        ],
        "template": stated.template,
        "order": stated.order,
        "permutation": stated.permutation,
        "positions": [places.tolist() for places in positions],
        "segments": segments if apart else None,
        "prompt": slots.prompt,
        "text_position": slots.text,
        "record_length": fixed,
        "max_tokens": stated.max_tokens,
        # Readers of windows of T + 1 tokens that step by T + 1 are given T; Megatron's windows step by T.
        "sequence_length": fixed and {"megatron": size, "litdata": size, "datatrove": size - 1, "nanogpt": size - 1},
        "text": text and {"length": text.length, "sha256": text.sha256},
        "text_column": stated.text_column,
    }


def _offset(ids: np.ndarray) -> int | None:
    """Return the id of code 0 where the id of code k is k more, else None."""
    return int(ids[0]) if (np.diff(ids) == 1).all() else None


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json, added_tokens.txt and, where there is one, the text tokenizer as it was."""
    if vocabulary.text:
        with whole(folder / TEXT_TOKENIZER) as temporary:
            temporary.write_bytes(vocabulary.text.data)
    write_text(folder / "tokenizer.json", json.dumps(vocabulary.tokenizer_json(), ensure_ascii=False))
    write_text(folder / "added_tokens.txt", "".join(f"{name}\n" for name in vocabulary.names().values()))


def read_layout(folder: Path) -> tuple[Stated, TextTokenizer | None, dict[str, Any]]:
    """Read layout.json: what is stated, the text tokenizer where there is one, and the whole content.

    Raises:
        StageError: there is none, or not one of this format, or the text tokenizer is not the one it tells of.
    """
    path = folder / "layout.json"
    try:
        contents = json.loads(read_bytes(path))
        if not isinstance(contents, dict) or contents["kind"] != "tokens" or contents["format"] != FORMAT:
            raise ValueError(f"it must be a layout of format {FORMAT}")
        stated = _stated(contents)
        _check_shards(contents["shards"])
        text = TextTokenizer(read_bytes(folder / TEXT_TOKENIZER)) if contents["text"] else None
        if text and text.sha256 != contents["text"]["sha256"]:
            raise ValueError(f"{TEXT_TOKENIZER} is not the one that it tells of")
    except FileNotFoundError as error:
        raise StageError(f"{error.filename or path} is missing; run `smalti export` first, or copy it too") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StageError(f"{path} cannot be used: {error!r}; copy it again or run `smalti export` again") from error
    return stated, text, contents


def _stated(contents: dict[str, Any]) -> Stated:
    vocabulary = contents["vocabulary"]
    here = {name: contents[name] for name in ("tokenizer", "codes", "image_size", "class_names", "template", "order")}
    here |= {name: contents[name] for name in ("permutation", "dtype", "max_tokens", "text_column")}
    levels = [Level(one["level"], (one["grid"][0], one["grid"][1]), one["codebook_size"]) for one in contents["levels"]]
    if not levels or min(min(level.grid) for level in levels) < 1 or sum(prod(one.grid) for one in levels) > MAX_TOKENS:
        raise ValueError(f"levels are {levels!r:.80}")
    VocabConfig(base=vocabulary["base"], names=vocabulary["names"])
    return Stated(levels=levels, base=vocabulary["base"], ids=vocabulary["ids"], names=vocabulary["names"], **here)


def _check_shards(shards: dict[str, list[dict]]) -> None:
    for split, found in shards.items():
        for shard in found:
            counts = [shard["records"], shard["tokens"]]
            if (
                not isinstance(shard["sha256"], dict)
                or not NAME.fullmatch(shard["shard"])
                or not all(type(count) is int and count >= 0 for count in counts)
            ):
                raise ValueError(f"split {split} lists {shard!r:.80}")
