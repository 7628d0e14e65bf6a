"""What callers give a prior is used or refused in a sentence, never believed."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prior import (
    HierarchicalPrior,
    LevelConfig,
    LevelPrior,
    PixelSNAILConfig,
    filtered_probabilities,
    inverse_cdf,
    uniforms,
)
from tests.priors import NETWORKS, SIZES, draw_codes, tiny_level, tiny_prior

GRIDS, KS = [(1, 2), (2, 4)], [5, 6]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def prior() -> HierarchicalPrior:
    torch.manual_seed(0)
    return tiny_prior("transformer", GRIDS, KS)


def made(grids: list[tuple[int, int]], **changes: object) -> HierarchicalPrior:
    """A prior whose levels' configs say something else."""
    levels = tiny_prior("transformer", grids, KS[: len(grids)]).levels
    return HierarchicalPrior([LevelPrior(replace(level.config, **changes)).eval() for level in levels])  # type: ignore[arg-type]


CODES = [torch.zeros(2, 1, 2, dtype=torch.int64), torch.zeros(2, 2, 4, dtype=torch.int64)]
WRONG = [
    (CODES, [0], r"classes must be one for each of 2 grids, got 1"),
    ([code[:1] for code in CODES], [0, 1], r"classes must be one for each of 1 grids, got 2"),
    (CODES, 1, r"classes must have 1 dimension, got shape \(\)"),
    (CODES, [0.0, 1.0], "classes must be integers, got float64"),
    (CODES, torch.tensor([0.0, 1.0]), r"classes must be integers, got torch\.float32"),
    (CODES, [True, False], "classes must be integers, got bool"),
    (CODES, ["0", "1"], "classes must be integers"),
    (CODES, [0, 3], r"classes must lie in \[0, 3\), got \[0, 3\]"),
    (CODES, [0, -1], r"classes must lie in \[0, 3\), got \[0, -1\]"),
    ([code.transpose(1, 2) for code in CODES], [0, 1], r"level 0 codes must be \(B, 1, 2\), got \(2, 2, 1\)"),
    ([CODES[0], CODES[1].transpose(1, 2)], [0, 1], r"level 1 codes must be \(B, 2, 4\), got \(2, 4, 2\)"),
    (CODES[:1], [0, 1], "codes must have 2 levels, coarse to fine, got 1"),
    ([*CODES, CODES[1]], [0, 1], "codes must have 2 levels, coarse to fine, got 3"),
    ([CODES[0], CODES[1][:1]], [0, 1], r"all levels must hold 2 grids, got \[2, 1\]"),
    ([CODES[0], CODES[1] + 6], [0, 1], r"level 1 codes must lie in \[0, 6\), got 6 to 6; were they made by another"),
    ([CODES[0] - 1, CODES[1]], [0, 1], r"level 0 codes must lie in \[0, 5\), got -1 to -1"),
    ([CODES[0].float(), CODES[1]], [0, 1], r"level 0 codes must be integers, got torch\.float32"),
    ([CODES[0], CODES[1].bool()], [0, 1], r"level 1 codes must be integers, got torch\.bool"),
    ([CODES[0], np.zeros((2, 2, 4))], [0, 1], "level 1 codes must be integers, got float64"),
    ([CODES[0][0], CODES[1]], [0, 1], r"level 0 codes must have 3 dimensions, got shape \(1, 2\)"),
]


@pytest.mark.parametrize(("codes", "classes", "message"), WRONG)
def test_what_a_prior_cannot_use_is_refused(
    prior: HierarchicalPrior, codes: list, classes: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prior.nll(codes, classes)
    level = prior.levels[1]
    for entry in (level.nll, level.logits):
        if classes != [0, 3]:  # to one level the class after the last is "no class given"
            with pytest.raises(ValueError, match=message.replace("[0, 3", "[0, 4")):
                entry(codes[-1], codes[:-1], classes)


def test_a_decoder_judges_what_it_is_told() -> None:
    level = tiny_level("transformer", GRIDS, KS)
    for coarser, classes, batch, message in (
        ([], [0, 1], 2, "codes must have 1 levels"),
        (CODES[:1], [0], 2, "one for each of 2 grids, got 1"),
        (CODES[:1], [0, 1], 3, r"all levels must hold 3 grids, got \[2\]"),
        (CODES[:1], [0, 1], 0, "batch_size must be at least 1"),
        (CODES[:1], [0, 4], 2, r"classes must lie in \[0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            level.decoder(coarser, classes, batch)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_codes_and_classes_of_any_integer_type_count_alike(prior: HierarchicalPrior, dtype: str) -> None:
    codes = draw_codes(GRIDS, KS)
    nats = prior.nll(codes, [0, 2])
    arrays = [code.numpy().astype(dtype) for code in codes]
    for array in arrays:
        array.flags.writeable = False  # as those of shards are
    assert torch.equal(prior.nll(arrays, np.array([0, 2], dtype)), nats)
    kind = getattr(torch, dtype)
    assert torch.equal(prior.nll([code.to(kind) for code in codes], torch.tensor([0, 2]).to(kind)), nats)


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_given_gives_nothing(network: str) -> None:
    prior = tiny_prior(network, GRIDS, KS)
    assert prior.nll([code[:0] for code in CODES], []).shape == (0,)
    assert prior.levels[1].logits(CODES[1][:0], [CODES[0][:0]], None).shape == (0, 2, 4, 6)
    assert [tuple(code.shape) for code in prior.sample([])] == [(0, 1, 2), (0, 2, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": INF}, "guidance must be 0 or more and finite, got inf"),
        ({"guidance": [1.0, NAN]}, "guidance must be 0 or more and finite, got nan"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"guidance": "high"}, r"one value or one per level \(2\)"),
        ({"temperature": INF}, "temperature must be above 0 and finite, got inf"),
        ({"temperature": 1e-310}, "temperature must be above 0 and finite"),
        ({"temperature": None}, "temperature must be above 0 and finite, got None"),
        ({"temperature": [1.0, True]}, "temperature must be above 0 and finite, got True"),
        ({"top_k": 2.0}, "top_k must be 0 .* or a whole number above, got 2.0"),
        ({"top_k": True}, "top_k must be 0 .* got True"),
        ({"top_p": NAN}, r"top_p must lie in \(0, 1\], got nan"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"seed": 1.0}, r"seed must be a whole number .* got 1\.0"),
        ({"indices": [0, -1]}, "index must be a whole number .* got -1"),
        ({"indices": [0.0, 1.0]}, "indices must be integers, got float64"),
        ({"indices": [False, True]}, "indices must be integers, got bool"),
        ({"indices": 2}, "indices must have 1 dimension"),
    ],
)
def test_settings_that_cannot_be_are_refused(prior: HierarchicalPrior, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.sample([0, 1], **settings)


def test_settings_may_be_numbers_of_numpy_and_indices_may_repeat(prior: HierarchicalPrior) -> None:
    plain = prior.sample([0, 0], seed=3, temperature=0.5, top_k=2, indices=[7, 7])
    numbers = {"seed": np.int64(3), "temperature": np.float32(0.5), "top_k": np.int32(2)}
    again = prior.sample(np.array([0, 0], np.uint8), indices=torch.tensor([7, 7]), **numbers)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(code[0], code[1]) for code in plain)


def test_pieces_of_sampling_judge_what_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"logits must be floats \(B, K\), got torch\.int64 \(1, 4\)"):
        filtered_probabilities(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits must be floats \(B, K\), got torch\.float32 \(4,\)"):
        filtered_probabilities(torch.zeros(4))
    even = torch.full((2, 4), 0.25, dtype=torch.float64)
    for uniform in (torch.zeros(3).double(), torch.zeros(2), torch.zeros(2, 1).double()):
        with pytest.raises(ValueError, match=r"must be float64 \(B, K\) and \(B,\), got"):
            inverse_cdf(even, uniform)
    for arguments in ((0.5, 0, 1), (0, True, 1), (0, 0, -1), (0, 2**64, 1), ("0", 0, 1)):
        with pytest.raises(ValueError, match="must be a whole number from 0 to"):
            uniforms(*arguments)  # type: ignore[arg-type]


def test_a_prior_without_classes_takes_none() -> None:
    prior = tiny_prior("transformer", GRIDS, KS, num_classes=0)
    for refused in (lambda: prior.nll(CODES, [0, 0]), lambda: prior.sample([0])):
        with pytest.raises(ValueError, match="trained without classes; leave classes out"):
            refused()
    assert torch.equal(prior.levels[0].nll(CODES[0], [], [0, 0]), prior.levels[0].nll(CODES[0], [], None))


def test_the_row_of_no_class_is_not_used_where_it_was_never_trained() -> None:
    prior = made(GRIDS, unconditional=False)
    level = prior.levels[1]
    refused: list[Callable[[], object]] = [
        lambda: prior.nll(CODES),
        lambda: prior.sample(),
        lambda: prior.sample([0], guidance=2.0),
        lambda: prior.sample([0], guidance=[1.0, 0.0]),
        lambda: level.nll(CODES[1], CODES[:1], None),
        lambda: level.logits(CODES[1], CODES[:1], None),
        lambda: level.decoder(CODES[:1], None, 2),
    ]
    for use in refused:
        with pytest.raises(ValueError, match=r"level \d never learned samples without their class"):
            use()
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\), got \[0, 3\]"):
        level.nll(CODES[1], CODES[:1], [0, 3])
    assert len(prior.sample([0, 1])) == 2
    made(GRIDS, unconditional=False, class_names=[]).sample()


def test_part_of_a_prior_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    made(GRIDS, num_levels=2).save_pretrained(tmp_path)
    assert len(HierarchicalPrior.from_pretrained(tmp_path).levels) == 2
    (tmp_path / "level1").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="level 0 is one of 2, which must all be there, but 1 are"):
        HierarchicalPrior.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="levels must be one prior or more, got none"):
        HierarchicalPrior([])
    with pytest.raises(ValueError, match="level 1 cannot be one of 1"):
        made(GRIDS, num_levels=1)


@pytest.mark.parametrize("stray", ["level0-old", "levels.txt", "level00", "level3"])
def test_what_only_bears_the_name_of_a_level_is_named(stray: str, tmp_path: Path) -> None:
    made(GRIDS).save_pretrained(tmp_path)
    for name in (".level0.lock", "codes", "config.yaml"):  # what training leaves there
        (tmp_path / name).touch()
    assert len(HierarchicalPrior.from_pretrained(tmp_path).levels) == 2
    (tmp_path / stray).mkdir()
    with pytest.raises(ValueError, match=rf"without a gap and nothing else called level, but holds {stray};"):
        HierarchicalPrior.from_pretrained(tmp_path)


def test_a_network_is_what_its_size_says(tmp_path: Path) -> None:
    place = {"level": 0, "grids": GRIDS[:1], "codebook_sizes": KS[:1], "class_names": []}
    for name, size in SIZES.items():
        assert LevelConfig(**place, size=size).network == name  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network"):
        LevelConfig(**place, network="pixelsnail", size=SIZES["transformer"])  # type: ignore[arg-type,call-arg]
    with pytest.raises(ValueError, match="size must be a TransformerConfig or a PixelSNAILConfig, got None"):
        LevelConfig(**place, size=None)  # type: ignore[arg-type]
    level = tiny_level("pixelsnail", GRIDS, KS)
    level.save_pretrained(tmp_path)
    assert isinstance(LevelPrior.from_pretrained(tmp_path).config.size, PixelSNAILConfig)
    path = tmp_path / "config.json"
    whole = path.read_text()
    for name, message in (
        ("transformer", "exactly the settings"),
        ("lstm", "network must be transformer or pixelsnail"),
    ):
        path.write_text(whole.replace('"pixelsnail"', f'"{name}"'))
        with pytest.raises(ValueError, match=message):
            LevelPrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("network", NETWORKS)
def test_copies_of_a_prior_are_as_sure_of_the_same_codes(network: str) -> None:
    prior, codes, file = tiny_prior(network, GRIDS, KS), draw_codes(GRIDS, KS), io.BytesIO()
    torch.save(prior, file)
    file.seek(0)
    for copied in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), torch.load(file, weights_only=False)):
        assert torch.equal(copied.nll(codes, [0, 1]), prior.nll(codes, [0, 1]))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_prior_stays_in_float32(network: str, change: str) -> None:
    prior = tiny_prior(network, GRIDS, KS)
    for module in (prior, prior.levels[0], prior.levels[0].network):
        with pytest.raises(ValueError, match=r"computes in float32 and cannot be made torch\..*; for half precision"):
            getattr(module, change)()
    assert {tensor.dtype for tensor in prior.state_dict().values()} == {torch.float32}
    prior.float().to("cpu")
