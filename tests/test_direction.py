import pytest

from pipelines.metrics import METRICS
from pipelines.metrics.direction import direction
from pipelines.report.figures import told


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("samples.kid", "less is better"),
        ("samples.frechet.fid", "less is better"),
        ("bound.bits_per_dim.given_class", "less is better"),
        ("prior.level1.right.without_class", "more is better"),
        ("codes.level0.total_variation", "less is better"),
        ("prior.level0.histogram_bits", ""),
        ("samples.kid_error", ""),
    ],
)
def test_metrics_say_whether_more_is_better(name: str, better: str) -> None:
    assert direction(name) == better
    assert all(better in one.meaning for one in told({name: 1.0}))


def test_no_figure_is_better_both_ways() -> None:
    assert not [metric for metric in METRICS if set(metric.more_is_better) & set(metric.less_is_better)]
