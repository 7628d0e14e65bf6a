import pytest

from pipelines.errors import StageError
from pipelines.metrics.provenance import check_alike, unlike


def made(count: int = 100, features: str = "pixels", images: str = "a", seed: int = 0, **settings: object) -> dict:
    splits = {
        "real": {"count": 500, "split": "train", "images": images},
        "samples": {"count": count, "samples": str(seed), "settings": settings},
    }
    return {"splits": splits, "features": {"features": features, "resize": "none"}, "models": {}, "seed": seed}


def test_figures_of_other_models_and_samples_stand_side_by_side() -> None:
    assert unlike(made(), made(seed=1, temperature=0.9)) == ""


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (made(count=50), "samples.count: 100 -> 50"),
        (made(features="inception"), "features.features: pixels -> inception"),
        (made(images="b"), "real.images: a -> b"),
        (made(images="0123456789ab" + 52 * "c"), "real.images: a -> 0123456789ab"),
        ({}, "features: gone"),
    ],
)
def test_figures_that_were_not_made_alike_do_not(other: dict, told: str) -> None:
    assert told in unlike(made(), other) and "cc" not in unlike(made(), other)
    with pytest.raises(StageError, match="samples of one and of two were not made alike"):
        check_alike("samples", {"one": {"kid": 1, "made": made()}, "two": {"kid": 2, "made": other}})


def test_images_split_by_another_seed_count_as_the_same_where_that_is_known() -> None:
    assert unlike(made(), made(images="b"), other_split=True) == ""
    assert unlike(made(), made(count=50, images="b"), other_split=True) != ""
