"""What callers give a tokenizer is used or refused in a sentence, never believed."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from tests.test_hierarchy import tiny
from tokenizer import Codebook, HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks import GaussianConfig, SparseConfig
from tokenizer.bottlenecks.bottleneck import Settings

INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]


@pytest.fixture(scope="module")
def model() -> HierarchicalVQVAE:
    torch.manual_seed(0)
    return tiny([8, 4]).eval()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"images must be a tensor of floats, got torch\.uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.bool), r"a tensor of floats, got torch\.bool"),
        (np.zeros((2, 3, 16, 16), np.float32), "a tensor of floats, got ndarray"),
        (torch.zeros(3, 16, 16), r"images must be \(B, 3, 16, 16\), got \(3, 16, 16\)"),
        (torch.zeros(2, 16, 16, 3), r"must be \(B, 3, 16, 16\), got \(2, 16, 16, 3\)"),
    ],
)
def test_images_of_another_kind_or_shape_are_refused(model: HierarchicalVQVAE, images: object, message: str) -> None:
    for entry in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            entry(images)


@pytest.mark.parametrize("value", [255.0, -1.1, float("nan"), float("inf")])
def test_images_outside_of_the_range_are_not_encoded(model: HierarchicalVQVAE, value: float) -> None:
    images = torch.zeros(2, 3, 16, 16)
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\], got"):
        model.encode(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_precision_are_read_in_float32(model: HierarchicalVQVAE, dtype: torch.dtype) -> None:
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    codes = model.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(codes, model.encode(images.float()), strict=True))
    assert model(images).reconstruction.dtype == torch.float32


def test_no_images_give_no_codes_and_no_codes_no_images(model: HierarchicalVQVAE) -> None:
    images = torch.zeros(0, 3, 16, 16)
    codes = model.encode(images)
    assert [tuple(grid.shape) for grid in codes] == [(0, 2, 2), (0, 4, 4)]
    assert model.decode(codes).shape == model(images).reconstruction.shape == images.shape


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_of_any_integer_type_decode_alike(model: HierarchicalVQVAE, dtype: str) -> None:
    codes = model.encode(torch.rand(2, 3, 16, 16))
    images = model.decode(codes)
    arrays = [grid.numpy().astype(dtype) for grid in codes]
    for array in arrays:
        array.flags.writeable = False  # as those of shards are
    assert torch.equal(model.decode(arrays), images)
    assert torch.equal(model.decode([grid.to(getattr(torch, dtype)) for grid in codes]), images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([torch.zeros(1, 2, 2)], r"level 0 codes must be integers in a tensor or an array, got torch\.float32"),
        ([torch.zeros(1, 2, 2, dtype=torch.bool)], r"got torch\.bool"),
        ([np.zeros((1, 2, 2))], "got float64"),
        ([[[[0, 0], [0, 0]]]], "got list"),
        ([np.full((1, 2, 2), 16, np.uint16)], r"codes must lie in \[0, 16\), got 16 to 16"),
        ([np.full((1, 2, 2), 2**64 - 1, np.uint64)], r"codes must lie in \[0, 16\), got -1"),
        ([np.zeros((2, 2), np.int64)], r"must be \(B, 2, 2\), got \(2, 2\)"),
        ([np.zeros((2, 2, 2), np.int64), np.zeros((3, 4, 4), np.int64)], r"equally many grids, got \[2, 3\]"),
        ([], "codes must be a list of 1 to 2 levels, got 0"),
    ],
)
def test_codes_that_cannot_be_are_refused(model: HierarchicalVQVAE, codes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


@pytest.mark.parametrize("family", [GaussianConfig(), SparseConfig()])
def test_numbers_that_cannot_be_are_refused(family: Settings) -> None:
    model = HierarchicalVQVAE(tiny([8, 4]).config, 16, 3, family).eval()
    values = model.encode(torch.rand(2, 3, 16, 16))
    assert torch.equal(model.decode([one.numpy() for one in values]), model.decode(values))
    for bad, message in (
        ([values[0] * float("nan"), values[1]], "level 0 values must be finite"),
        ([values[0], values[1] / 0], "level 1 values must be finite"),
        ([values[0].long()], r"level 0 values must be a tensor of floats, got torch\.int64"),
        ([values[1]], r"level 0 values must be \(B, 4, 2, 2\), got \(2, 4, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(bad)


def test_noise_of_another_number_or_shape_is_refused() -> None:
    model = HierarchicalVQVAE(tiny([8, 4]).config, 16, 3, GaussianConfig()).eval()
    noise = [torch.randn(2, 4, 2, 2), torch.randn(2, 4, 4, 4)]
    model.encode(torch.zeros(2, 3, 16, 16), noise)
    for bad, message in (
        (noise[:1], "noise must be one for each of 2 levels, got 1"),
        ([], "noise must be one for each of 2 levels, got 0"),
        ([noise[0][:1], noise[1]], r"noise of level 0 must be \(2, 4, 2, 2\), got \(1, 4, 2, 2\)"),
        ([noise[0], noise[0]], r"noise of level 1 must be \(2, 4, 4, 4\), got \(2, 4, 2, 2\)"),
        ([one.numpy() for one in noise], "noise of level 0 must be a tensor of floats, got ndarray"),
    ):
        for entry in (model, model.encode):
            with pytest.raises(ValueError, match=message):
                entry(torch.zeros(2, 3, 16, 16), bad)


def test_a_codebook_judges_what_it_is_given() -> None:
    codebook = Codebook(16, 4)
    with pytest.raises(ValueError, match=r"latents must be a tensor of floats, got torch\.int64"):
        codebook(torch.zeros(1, 4, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"latents must be \(B, D, h, w\), got \(4, 2, 2\)"):
        codebook(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"codes must be \(B, h, w\), got \(2, 2\)"):
        codebook.lookup([torch.zeros(2, 2, dtype=torch.int64)])
    assert codebook.lookup([np.zeros((1, 2, 3), np.uint8)]).shape == (1, 4, 2, 3)
    assert codebook(torch.zeros(0, 4, 2, 3)).seen.shape == (0, 4, 2, 3)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_tokenizer_stays_in_float32(change: str) -> None:
    for module in (tiny([8, 4]), Codebook(16, 4), torch.nn.ModuleList([tiny([8, 4])])):
        with pytest.raises(ValueError, match=r"computes in float32 and cannot be made torch\..*; for half precision"):
            getattr(module, change)()
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
        module.float().to("cpu", memory_format=torch.channels_last)


def test_copies_of_a_tokenizer_find_the_same_codes(model: HierarchicalVQVAE) -> None:
    images, file = torch.rand(2, 3, 16, 16), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(model.encode(images), copied.encode(images), strict=True))


def test_one_that_looks_at_no_class_takes_none_that_are_not_classes_of_its_images() -> None:
    model = HierarchicalVQVAE(TokenizerConfig(strides=[4], width=8, codebook_size=8, code_dim=4), 8, 1).eval()
    images = torch.zeros(2, 1, 8, 8)
    codes = model.encode(images, classes=[3, -1])
    for wrong in ([1, 2, 3], [0.5, 1.5]):
        for call in (lambda: model.encode(images, classes=wrong), lambda: model.decode(codes, wrong)):  # noqa: B023
            with pytest.raises(ValueError, match="classes must be 2 integers, one per image, got"):
                call()
    with pytest.raises(ValueError, match="codes must be a list of 1 level, got 2"):
        model.decode(codes[0])  # type: ignore[arg-type]
