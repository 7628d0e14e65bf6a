"""Made-up codes, layouts and text tokenizers for tests of exported tokens."""

import json
from pathlib import Path

import numpy as np

from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import Records
from pipelines.tokens.template import RecordConfig

CAPTION = "<bos> <text> <boi> <codes> <eoi> <eos>"


def manifest(grids: list[tuple[int, int]], sizes: list[int], num_classes: int = 3) -> dict:
    """What a manifest of codes says of these levels."""
    levels = [{"grid": list(grid), "codebook_size": size} for grid, size in zip(grids, sizes, strict=True)]
    names = [f"class {number}" for number in range(num_classes)]
    return {
        "format": 1,
        "kind": "codes",
        "tokenizer": "a" * 64,
        "image_size": 16,
        "levels": levels,
        "class_names": names,
        "splits": {},
    }


SMALL = manifest([(2, 2), (4, 4)], [256, 300])


def layout(codes: dict = SMALL, **settings: object) -> TokenLayout:
    """The layout of made-up codes."""
    return TokenLayout.from_codes(codes, RecordConfig(**settings))  # type: ignore[arg-type]


def draw(codes: dict, count: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Codes in the dtypes of shards, the last of each level among them, and classes."""
    generator = np.random.default_rng(seed)
    grids = []
    for level in codes["levels"]:
        size = level["codebook_size"]
        grid = generator.integers(0, size, (count, *level["grid"])).astype(np.min_scalar_type(size - 1))
        grid[0, 0, 0] = size - 1
        grids.append(grid)
    return grids, generator.integers(0, max(1, len(codes["class_names"])), count)


def text_tokenizer(folder: Path, kind: str = "BPE") -> Path:
    """A folder with the tokenizer.json of a few words: letters, and a special token outside the model's vocabulary."""
    letters = " abcdefghijklmnopqrstuvwxyz</>"
    if kind == "Unigram":
        model: dict = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *[[one, -2.0] for one in letters]]}
    else:
        vocab = {one: number for number, one in enumerate(["<unk>", *letters])}
        vocab["ab"] = len(vocab)
        model = {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": ["a b"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": len(model["vocab"]), "content": "</s>", **plain}],
        "model": model,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def shard(made: TokenLayout, codes: dict, count: int, captions: list[str] | None = None, seed: int = 0) -> Records:
    """The records of made-up codes; every other image has two views."""
    grids, classes = draw(codes, count, seed)
    laid = made.lay(grids, classes, captions)
    keys = [f"{seed}-{number:04d}" for number in range(count)]
    labelled = bool(codes["class_names"])
    members = None
    if captions is not None:
        members = [{"txt": text.encode()} if text else {} for text in captions]
        members[0]["json"] = b'{"width": 16}'
    return Records(
        ids=laid.ids,
        lengths=laid.lengths,
        prompts=laid.prompts,
        keys=keys,
        source_keys=[key.rpartition("-")[0] for key in keys],
        views=[number % 2 for number in range(count)],
        classes=classes.tolist() if labelled else None,
        captions=captions,
        members=members,
    )
