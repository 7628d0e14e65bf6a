import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ConfigError, StageError
from pipelines.storage.fingerprint import tokenizer_fingerprint
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, SMALL, draw, layout, manifest, text_tokenizer
from tests.test_hierarchy import tiny

TEMPLATES = [
    "<codes>",
    "<bos> <class> <boi> <codes> <eoi> <eos>",
    "<size> <level> <codes> <eol> <class> <eos>",
    "<codes> <eol>",
]


def naive(made: TokenLayout, grids: list[np.ndarray], label: int) -> list[int]:
    """The record of one image, token by token."""
    told = made.describe()
    ids: list[int] = []
    for word in told["template"].split():
        if word == "<codes>":
            for number, (level, grid) in enumerate(zip(told["levels"], grids, strict=True)):
                ids += [told["specials"][f"<level:{number}>"]] if "<level>" in told["template"] else []
                for row in grid.tolist():
                    ids += [level["offset"] + code for code in row]
                    ids += [told["specials"]["<eol>"]] if "<eol>" in told["template"] else []
        elif word == "<class>":
            ids.append(told["classes"][label])
        elif word not in ("<level>", "<eol>"):
            ids.append(told["specials"]["<size:16x16>" if word == "<size>" else word])
    return ids


@pytest.mark.parametrize("codes", [SMALL, manifest([(1, 3), (2, 4), (3, 5)], [2, 256, 300])])
@pytest.mark.parametrize("template", TEMPLATES)
def test_records_are_what_a_loop_makes_of_the_template(template: str, codes: dict) -> None:
    made = layout(codes, template=template, vocab=VocabConfig(base=1000))
    grids, classes = draw(codes, 70)
    ids = made.encode(grids, classes)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [naive(made, [grid[n] for grid in grids], classes[n]) for n in range(70)]


@pytest.mark.parametrize("order", ["levels", "nested", "file"])
@pytest.mark.parametrize("sizes", [[256, 300], [256, 256], [2, 70_000]])
def test_codes_come_back(order: str, sizes: list[int], tmp_path: Path) -> None:
    codes = manifest([(2, 2), (4, 4)], sizes)
    if order == "file":
        order = str(tmp_path / "order.npy")
        np.save(order, np.random.default_rng(0).permutation(20))
    made = layout(codes, order=order, vocab=VocabConfig(base=200))
    grids, classes = draw(codes, 9)
    ids = made.encode(grids, classes)
    assert int(ids.max()) == made.vocabulary.rows - 1 == 206 + sum(sizes)  # no offset wraps
    assert made.dtype == (np.uint32 if sizes[1] > 65536 else np.uint16)
    assert made.lay(grids, classes).ids.dtype == made.dtype
    for given_ids in (ids, ids.numpy(), ids.tolist(), ids.numpy().astype(made.dtype)):
        for found, grid in zip(made.decode(given_ids), grids, strict=True):
            assert found.dtype == torch.int64
            assert np.array_equal(found, grid)
    as_tensors = [torch.from_numpy(grid.astype(np.int64)) for grid in grids]
    assert torch.equal(made.encode(as_tensors, torch.from_numpy(classes)), ids)


def test_positions_say_where_each_code_stands(tmp_path: Path) -> None:
    for order in ("levels", "nested"):
        made = layout(order=order, template="<bos> <codes> <eos>")
        grids, _ = draw(SMALL, 2)
        ids = made.encode(grids).numpy()
        told = made.describe()
        for level, positions, grid in zip(told["levels"], told["positions"], grids, strict=True):
            assert np.array_equal(ids[:, positions] - level["offset"], grid.reshape(2, -1))
        assert told["segments"] == ([[1, 5], [5, 21]] if order == "levels" else None)


def test_levels_may_be_left_out() -> None:
    made = layout(levels=[1], template="<codes>")
    grids, _ = draw(SMALL, 3)
    assert torch.equal(made.encode(grids), made.encode(grids[1:]))
    assert np.array_equal(made.decode(made.encode(grids))[0], grids[1])
    with pytest.raises(ConfigError, match=r"levels must be some of 0 to 1, coarse to fine, got \[1, 0\]"):
        layout(levels=[1, 0])


@given(st.integers(0, 26), st.integers(0, 600))
def test_a_token_that_cannot_stand_where_it_does_is_named(position: int, token: int) -> None:
    made = layout(template="<bos> <class> <codes> <eol> <eos>")
    ids = made.encode(*draw(SMALL, 3))
    told = made.describe()
    level = 0 if 2 <= position < 8 else 1
    ranges = {0: "<bos>", 1: "a class", 28: "<eos>"}
    before = ids[1, position].item()
    ids[1, position] = token
    low, high = made.slots.low[position], made.slots.high[position]
    if low <= token < high:
        made.decode(ids)
        return
    what = ranges.get(position, f"a code of level {level}" if before >= told["levels"][0]["offset"] else "<eol>")
    with pytest.raises(StageError, match=f"record 1 has token {token} at position {position}, where {what}"):
        made.decode(ids)


def test_records_of_another_length_and_ids_that_are_none_are_refused() -> None:
    made = layout()
    ids = made.encode(*draw(SMALL, 2))
    with pytest.raises(StageError, match=r"records must be \(B, 25\), got \(2, 24\)"):
        made.decode(ids[:, :-1])
    with pytest.raises(StageError, match="ids must be integers, got float32"):
        made.decode(ids.float())
    with pytest.raises(StageError, match="records, codes and classes must be arrays, got lists of several lengths"):
        made.decode([ids[0].tolist(), ids[1, 1:].tolist()])
    with pytest.raises(StageError, match=r"record 0 has token -1 at position 0, where <bos> \(0\) must stand"):
        made.decode(torch.full_like(ids, -1))


def test_captions_without_a_place_in_the_template_are_refused() -> None:
    grids, classes = draw(SMALL, 1)
    with pytest.raises(ValueError, match=r"captions have no place in the template '<bos> .*'; leave them out"):
        layout().encode(grids, classes, captions=["a cab"])


@pytest.mark.parametrize("order", ["levels", "nested"])
def test_only_what_is_allowed_next_is_a_record(order: str) -> None:
    made = layout(order=order)
    ids = made.encode(*draw(SMALL, 2))
    for length in range(ids.shape[1]):
        allowed = made.allowed(ids[1, :length])
        changed = ids[1:].clone()
        for token in (0, 2, 5, 100, 260, 300, 561, 562):
            changed[0, length] = token
            if token in allowed:
                made.decode(changed)
            else:
                with pytest.raises(StageError):
                    made.decode(changed)
    assert made.allowed(ids[1]) == []


def test_images_are_decoded_by_no_other_tokenizer() -> None:
    model, other = tiny([8, 4]), tiny([8, 4])
    other.bottlenecks[0].vectors[0, 0] += 1
    levels = [
        {"grid": list(grid), "codebook_size": size}
        for grid, size in zip(model.grids, model.config.codebook_sizes, strict=True)
    ]
    codes = SMALL | {"levels": levels, "tokenizer": tokenizer_fingerprint(model), "image_size": model.image_size}
    made = layout(codes)
    grids, classes = draw(codes, 2)
    ids = made.encode(grids, classes)
    expected = model.decode([torch.from_numpy(grid.astype(np.int64)) for grid in grids])
    assert torch.equal(made.images(ids, model), expected)
    with pytest.raises(StageError, match=r"these tokens are of tokenizer .* but this one is"):
        made.images(ids, other)
    with pytest.raises(StageError, match=r"images need every level from 0 on, but levels \[1\] were exported"):
        layout(codes, levels=[1]).images(ids, model)


@pytest.mark.parametrize("settings", [{}, {"order": "nested"}, {"levels": [1]}, {"template": TEMPLATES[2]}])
def test_a_layout_is_what_was_saved(settings: dict, tmp_path: Path) -> None:
    made = layout(**settings)
    shards = {"train": [{"shard": "train-000000", "records": 3, "tokens": 75, "sha256": {"train-000000.bin": "0"}}]}
    made.save(tmp_path, shards)
    loaded = TokenLayout.load(tmp_path)
    assert loaded.describe() == made.describe()
    assert loaded.shards == shards
    grids, classes = draw(SMALL, 2)
    assert torch.equal(loaded.encode(grids, classes), made.encode(grids, classes))


def test_layouts_of_files_are_saved_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "order.npy", np.arange(20)[::-1])
    ids = {"<bos>": 7, "<eos>": 900, **{str(code): 2 * code + 10 for code in range(556) if code != 445}, "445": 3}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    settings = {"order": str(tmp_path / "order.npy"), "vocab": VocabConfig(ids=str(tmp_path / "ids.json"))}
    made = layout(template="<bos> <codes> <eos>", **settings)
    (tmp_path / "x").mkdir()
    made.save(tmp_path / "x", {})
    loaded = TokenLayout.load(tmp_path / "x")
    grids, _ = draw(SMALL, 4)
    assert torch.equal(loaded.encode(grids), made.encode(grids))
    assert all(np.array_equal(*pair) for pair in zip(loaded.decode(made.encode(grids)), grids, strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("kind", "codes"),
        ("order", "nested"),
        ("order", "file"),
        ("prompt", 4),
        ("record_length", 24),
        ("template", "<codes>"),
        ("template", "<codes> <codes>"),
        ("positions", None),
        ("levels", [{"level": 0, "grid": [2**20, 2**20], "codebook_size": 5}]),
        ("levels", [{"level": 0, "grid": ["a", 2], "codebook_size": 5}]),
        ("vocabulary", {"base": 0, "ids": [1, 1], "names": "{code}", "size": 2, "rows": 2}),
        ("vocabulary", {"base": 0, "ids": None, "names": "{code:0999999999d}"}),
        ("shards", {"train": [{"shard": "../x", "records": 1, "tokens": 1, "sha256": {}}]}),
        ("shards", {"train": [{"shard": "x", "records": -1, "tokens": 1, "sha256": {}}]}),
        ("shards", 3),
        ("dtype", "float"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(key: str, value: object, tmp_path: Path) -> None:
    layout().save(tmp_path, {})
    contents = json.loads((tmp_path / "layout.json").read_text())
    (tmp_path / "layout.json").write_text(json.dumps(contents | {key: value}))
    with pytest.raises(StageError, match=r"layout\.json cannot be (used|right)"):
        TokenLayout.load(tmp_path)


def test_a_folder_without_a_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"layout\.json is missing; run `smalti export` first"):
        TokenLayout.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "<bos> <eos>"}, "template must hold <codes>"),
        ({"template": "<codes> <codes>"}, "each of .* at most once"),
        ({"template": "<start> <codes>"}, "each of .* at most once"),
        ({"template": "<codes> <eos> <eol>"}, "<eol> just after it"),
        ({"template": "<level> <bos> <codes>"}, "<level> just before <codes>"),
        ({"template": "<codes> <eol>", "order": "nested"}, "where order is levels, not nested"),
        ({"template": "<text> <codes>"}, r"template names <text>; set text\.tokenizer"),
        ({"dtype": "int64"}, "dtype must be auto, uint16 or uint32"),
        ({"levels": "some"}, "levels must be all or a list"),
        ({"max_tokens": -1}, "max_tokens must not be negative"),
        ({"max_tokens": 24}, "records have 25 tokens without their captions, more than max_tokens 24"),
        ({"dtype": "uint16", "vocab": VocabConfig(base=65536)}, "uint16 holds ids below 65536, but .* up to 66098"),
        ({"vocab": VocabConfig(base=2**31 - 5)}, r"ids must stay below 2\*\*31"),
    ],
)
def test_what_cannot_be_exported_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**settings)


def test_uint16_is_used_up_to_its_last_id() -> None:
    assert layout(vocab=VocabConfig(base=65536 - 563)).dtype == np.uint16
    assert layout(vocab=VocabConfig(base=65536 - 562)).dtype == np.uint32
    assert layout(dtype="uint32").dtype == np.uint32


def test_classes_need_classes() -> None:
    with pytest.raises(ConfigError, match="codes have no classes; set it to '<bos> <boi> <codes> <eoi> <eos>'"):
        layout(SMALL | {"class_names": []})
    made = layout(SMALL | {"class_names": []}, template="<codes>")
    assert made.encode(draw(SMALL, 2)[0]).shape == (2, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grids, classes: (grids[:1], classes), "codes must have 2 levels, got 1"),
        (lambda grids, classes: (grids[::-1], classes), "codes of level 0 must be integers of .3, 2, 2., got uint16"),
        (lambda grids, classes: ([grids[0], grids[1][:2]], classes), r"codes of level 1 .* got uint16 of \(2, 4, 4\)"),
        (lambda grids, classes: ([grids[0] / 1, grids[1]], classes), "codes of level 0 must be integers .* float64"),
        (lambda grids, classes: ([grids[0], grids[1] + 1], classes), r"codes of level 1 must lie in \[0, 300\)"),
        (lambda grids, classes: ([grids[0], grids[1].astype(int) - 300], classes), r"codes of level 1 must lie in"),
        (lambda grids, classes: (grids, None), "classes must be 3 indices below 3, got None"),
        (lambda grids, classes: (grids, classes + 3), "classes must be 3 indices below 3"),
        (lambda grids, classes: (grids, classes[:2]), "classes must be 3 indices below 3"),
    ],
)
def test_codes_and_classes_that_are_none_are_refused(change, message: str) -> None:
    with pytest.raises(StageError, match=message):
        layout().encode(*change(*draw(SMALL, 3)))


@pytest.mark.parametrize("text", [False, True])
def test_transformers_generates_records_and_nothing_else(text: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = with_text(tmp_path, max_tokens=40) if text else layout()
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 40, "vocab_size": made.vocabulary.rows}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    drawn = model.generate(
        torch.tensor([made.allowed([])] * 3),
        do_sample=True,
        max_length=made.length or 40,
        eos_token_id=made.describe()["specials"]["<eos>"],
        pad_token_id=made.pad or 0,
        prefix_allowed_tokens_fn=lambda batch, ids: made.allowed(ids),
    )
    assert [grid.shape for grid in made.decode(drawn)] == [(3, 2, 2), (3, 4, 4)]


def with_text(folder: Path, template: str = CAPTION, **settings: object) -> TokenLayout:
    text = TextConfig(tokenizer=str(text_tokenizer(folder)))
    return layout(template=template, text=text, vocab=VocabConfig(base=33), **settings)


@pytest.mark.parametrize("template", [CAPTION, "<text> <codes>", "<bos> <codes> <text> <eos>", "<codes> <text>"])
def test_captions_make_records_of_their_length(template: str, tmp_path: Path) -> None:
    made = with_text(tmp_path, template)
    grids, _ = draw(SMALL, 4)
    captions = ["a cab", "", "ab" * 40, "bee"]
    ids = made.encode(grids, captions=captions)
    words = [made.text.tokenizer.encode(text, add_special_tokens=False).ids for text in captions]
    bare = made.encode(grids, captions=[""] * 4)
    place = made.slots.text
    for record, plain, text in zip(ids, bare, words, strict=True):
        assert record.tolist() == plain[:place].tolist() + text + plain[place:].tolist()
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=made.pad)
    left = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=made.pad, padding_side="left")
    for found in (ids, padded, left):
        assert all(np.array_equal(*pair) for pair in zip(made.decode(found), grids, strict=True))


def test_what_is_learned_begins_behind_the_first_of_codes_and_caption(tmp_path: Path) -> None:
    grids, _ = draw(SMALL, 2)
    captions = ["abc", "d"]
    assert with_text(tmp_path).lay(grids, captions=captions).prompts.tolist() == [4, 3]
    captioning = with_text(tmp_path, "<bos> <codes> <text> <eos>")
    assert captioning.lay(grids, captions=captions).prompts.tolist() == [21, 21]
    assert layout().lay(*draw(SMALL, 2)).prompts.tolist() == [3, 3]


def test_captions_are_cut_and_images_never(tmp_path: Path) -> None:
    made = with_text(tmp_path, max_tokens=30)
    grids, _ = draw(SMALL, 3)
    ids = made.encode(grids, captions=["c" * 99, "cde", "c" * 6])
    assert [len(record) for record in ids] == [30, 27, 30]
    assert all(np.array_equal(*pair) for pair in zip(made.decode(ids), grids, strict=True))
    with pytest.raises(ConfigError, match="records have 24 tokens without their captions, more than max_tokens 23"):
        with_text(tmp_path, max_tokens=23)


def test_text_without_captions_is_refused(tmp_path: Path) -> None:
    made = with_text(tmp_path)
    for captions, found in ((None, "none"), (["a"], "1")):
        with pytest.raises(StageError, match=f"template has <text>: there must be 2 captions, got {found}"):
            made.encode(draw(SMALL, 2)[0], captions=captions)


def test_a_caption_is_text_whatever_it_says(tmp_path: Path) -> None:
    made = with_text(tmp_path)
    (ids,) = made.encode(draw(SMALL, 1)[0], captions=["</s>"])
    assert made.text.ids["</s>"] not in ids
    assert len(ids) == 24 + len("</s>")


def test_what_may_follow_a_caption_is_more_of_it_or_what_comes_behind(tmp_path: Path) -> None:
    made = with_text(tmp_path, max_tokens=27)
    (ids,) = made.encode(draw(SMALL, 1)[0], captions=["abe"])
    specials = made.describe()["specials"]
    text = list(range(made.text.length))
    assert made.allowed([]) == [specials["<bos>"]]
    assert made.allowed(ids[:1]) == made.allowed(ids[:2]) == [*text, specials["<boi>"]]
    assert made.allowed([specials["<pad>"]] * 4 + ids[:2].tolist()) == [*text, specials["<boi>"]]
    assert made.allowed([*ids[:3].tolist(), 5]) == [specials["<boi>"]]
    for length in range(3, len(ids)):
        assert ids[length] in made.allowed(ids[:length])
    assert made.allowed(ids) == made.allowed([*ids.tolist(), specials["<pad>"]]) == [specials["<pad>"]]


def test_a_strange_token_in_a_caption_is_named(tmp_path: Path) -> None:
    made = with_text(tmp_path)
    (ids,) = made.encode(draw(SMALL, 1)[0], captions=["abc"])
    for token in (made.describe()["specials"]["<pad>"], 10**6, -1):
        ids[2] = token
        with pytest.raises(StageError, match=f"record 0 has token {token} at position 2, where text must stand"):
            made.decode([ids])
    with pytest.raises(StageError, match="record 0 must have 24 tokens beside its caption, has 20"):
        made.decode([ids[:20]])
    ids[2], ids[5] = 5, 5
    with pytest.raises(StageError, match="record 0 has token 5 at position 5, where a code of level 0 must stand"):
        made.decode([ids])


def test_a_layout_with_text_needs_its_tokenizer(tmp_path: Path) -> None:
    made = with_text(tmp_path / "text")
    (tmp_path / "tokens").mkdir()
    made.save(tmp_path / "tokens", {})
    grids, _ = draw(SMALL, 2)
    loaded = TokenLayout.load(tmp_path / "tokens")
    for one, other in zip(*(each.encode(grids, captions=["abc", "<bos>"]) for each in (made, loaded)), strict=True):
        assert torch.equal(one, other)
    file = tmp_path / "tokens" / "text_tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(StageError, match=r"text_tokenizer\.json is not the one that it tells of"):
        TokenLayout.load(tmp_path / "tokens")
    file.unlink()
    with pytest.raises(StageError, match=r"text_tokenizer\.json is missing"):
        TokenLayout.load(tmp_path / "tokens")


def test_the_length_that_readers_must_be_given_is_told() -> None:
    told = layout().describe()
    assert told["sequence_length"] == {"megatron": 25, "litdata": 25, "datatrove": 24, "nanogpt": 24}
    assert told["record_length"] == 25
