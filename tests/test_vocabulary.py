import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import ConfigError
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, SMALL, draw, layout, manifest, text_tokenizer


def named(made: TokenLayout, folder: Path) -> dict[int, str]:
    """Save a layout; return what transformers calls each id, and check added_tokens.txt by it."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    made.save(folder, {})
    ids = sorted(made.vocabulary.ids.tolist())
    names = (folder / "added_tokens.txt").read_text().splitlines()
    loaded = [PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))]
    if len(ids) < 1000:  # it takes seconds for many
        loaded.append(PreTrainedTokenizerFast.from_pretrained(folder))
    for found in loaded:
        assert found.convert_ids_to_tokens(ids) == names
        assert found.convert_tokens_to_ids(names) == ids
        assert found("".join(names[-600:]), add_special_tokens=False)["input_ids"] == ids[-600:]
    return dict(zip(ids, names, strict=True))


@pytest.mark.parametrize("base", [0, 70_000])
def test_transformers_knows_every_token_by_name(base: int, tmp_path: Path) -> None:
    names = named(layout(vocab=VocabConfig(base=base)), tmp_path / "tokens")
    assert [names[base + n] for n in range(8)] == [
        *("<bos>", "<boi>", "<eoi>", "<eos>", "<class:0>", "<class:1>", "<class:2>", "<|image:0:00000|>")
    ]
    assert names[base + 562] == "<|image:1:00299|>"


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize("base", [0, 7])
def test_text_keeps_its_ids_where_image_tokens_are_added(kind: str, base: int, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    text = text_tokenizer(tmp_path / "text", kind)
    before = PreTrainedTokenizerFast(tokenizer_file=str(text / "tokenizer.json"))
    settings = {"text": TextConfig(tokenizer=str(text)), "vocab": VocabConfig(base=len(before) + base)}
    made = layout(template=CAPTION, **settings)
    names = named(made, tmp_path / "tokens")
    assert names[len(before) + base] == "<bos>"
    after = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokens" / "tokenizer.json"))
    for words in ("a cab", "ab</s>abba", "A!", ""):
        assert after(words)["input_ids"] == before(words)["input_ids"]
    assert after.convert_ids_to_tokens(range(len(before))) == before.convert_ids_to_tokens(range(len(before)))


def test_more_tokens_than_uint16_holds_have_names_too(tmp_path: Path) -> None:
    made = layout(manifest([(4, 4)], [70_000], 0), template="<bos> <codes>")
    assert len(named(made, tmp_path / "tokens")) == 70_001


def test_chameleon_reads_the_codes_by_its_own_names(tmp_path: Path) -> None:
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    letters = [
        "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"
        for code in np.random.default_rng(0).permutation(1024)
    ]
    mapping = ChameleonImageVocabularyMapping({name: 4 + number for number, name in enumerate(letters)})
    ids = {str(code): token for code, token in mapping.img2bpe.items()} | {"<boi>": 8197, "<eoi>": 8196}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    codes = manifest([(4, 4)], [1024], 0)
    made = layout(codes, template="<boi> <codes> <eoi>", vocab=VocabConfig(ids=str(tmp_path / "ids.json")))
    grids, _ = draw(codes, 5)
    found = made.encode(grids)
    wanted = mapping.convert_img2bpe(torch.from_numpy(grids[0].astype(np.int64)))
    assert torch.equal(found[:, 1:-1], wanted.flatten(1).long())
    assert found[0, [0, -1]].tolist() == [8197, 8196]
    assert [mapping.bpe2img[token] for token in found[0, 1:-1].tolist()] == grids[0][0].flatten().tolist()
    assert torch.equal(made.decode(found)[0], torch.from_numpy(grids[0].astype(np.int64)))
    assert made.describe()["levels"][0]["offset"] is None
    assert made.describe()["vocabulary"]["rows"] == 8198


def test_tokens_that_text_has_keep_the_name_they_have_there(tmp_path: Path) -> None:
    text = text_tokenizer(tmp_path / "text")
    vocab = VocabConfig(ids=str(tmp_path / "ids.json"))
    ids = {"<bos>": 40, "<eos>": 32, **{str(code): code + 41 for code in range(4)}}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    codes = manifest([(2, 2)], [4], 0)
    made = layout(codes, template="<bos> <codes> <eos>", text=TextConfig(tokenizer=str(text)), vocab=vocab)
    assert made.vocabulary.names()[32] == "</s>"
    assert made.vocabulary.names()[40] == "<bos>"
    named(made, tmp_path / "tokens")


def test_a_name_that_text_has_elsewhere_is_refused(tmp_path: Path) -> None:
    text = TextConfig(tokenizer=str(text_tokenizer(tmp_path / "text")))
    made = layout(
        manifest([(2, 2)], [4], 0), template="<codes>", text=text, vocab=VocabConfig(base=40, names="a{code}")
    )
    made.text.ids["a0"] = 7
    with pytest.raises(ConfigError, match="the text tokenizer has a0 as token 7 already"):
        made.vocabulary.names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3": 5}, r"ids must be one to one, but 2 and 3 both have 5"),
        ({"<bos>": 6}, r"ids must be one to one, but <bos> and 3 both have 6"),
        ({"<class:0>": 4}, r"ids must be one to one, but <class:0> and 1 both have 4"),
        ({"2": -1}, r"must have an id in \[0, 2\*\*31\)"),
        ({"2": 2**31}, r"must have an id in \[0, 2\*\*31\)"),
        ({"2": None}, r"ids\.json lacks 1 of 6, first '2'"),
        ({"<class:0>": None}, r"ids\.json lacks 1 of 6, first '<class:0>'"),
        ({"2": "5"}, "an id is no whole number"),
        ({"2": True}, "an id is no whole number"),
    ],
)
def test_ids_that_are_not_one_to_one_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    ids = {"<bos>": 0, "<class:0>": 1, "0": 3, "1": 4, "2": 5, "3": 6} | change
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({name: number for name, number in ids.items() if number is not None}))
    with pytest.raises(ConfigError, match=message):
        layout(manifest([(2, 2)], [4], 1), template="<bos> <class> <codes>", vocab=VocabConfig(ids=str(path)))


def test_a_file_of_ids_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    for content in ("[1, 2]", '{"0": 1, "0": 2}', "{", "3"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"vocab\.ids must name a JSON file of an object name -> id"):
            layout(vocab=VocabConfig(ids=str(path)))
    with pytest.raises(ConfigError, match=r"vocab\.ids must name a JSON file"):
        layout(vocab=VocabConfig(ids=str(tmp_path / "none.json")))


def test_levels_that_are_left_out_keep_their_numbers_in_the_file_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({str(code): 1000 + code for code in range(556)}))
    made = layout(template="<codes>", levels=[1], vocab=VocabConfig(ids=str(path)))
    grids, _ = draw(SMALL, 2)
    assert torch.equal(made.encode(grids).view(2, 4, 4), torch.from_numpy(grids[1].astype(np.int64)) + 1256)


def test_image_tokens_stand_behind_the_text(tmp_path: Path) -> None:
    text = TextConfig(tokenizer=str(text_tokenizer(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"vocab\.base must be at least the length of the text tokenizer \(33\), got 32"
    ):
        layout(text=text, vocab=VocabConfig(base=32))
    assert layout(text=text, vocab=VocabConfig(base=33)).vocabulary.base == 33


def test_a_folder_without_a_text_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.tokenizer must name a folder with a tokenizer\.json"):
        layout(text=TextConfig(tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"text\.tokenizer must name a folder with a tokenizer\.json"):
        layout(text=TextConfig(tokenizer=str(tmp_path)))


@pytest.mark.parametrize("names", ["", "a b", "{code", "{other}", "{code.__class__}", "{code:0999d}", "{}", "{0}"])
def test_names_that_cannot_be_are_refused(names: str) -> None:
    with pytest.raises(ValueError, match=r"vocab\.names must hold no blanks and no fields but"):
        VocabConfig(names=names)


def test_names_differ() -> None:
    with pytest.raises(
        ConfigError, match=r"vocab\.names must give each code a name of its own, image \{code\} does not|image"
    ):
        layout(vocab=VocabConfig(names="image{code}")).vocabulary.names()
    assert len(set(layout(vocab=VocabConfig(names="i{level}.{code:x}")).vocabulary.names().values())) == 563
