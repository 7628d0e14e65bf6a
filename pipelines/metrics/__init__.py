"""What is measured of models."""

from pipelines.metrics.bound import Bound
from pipelines.metrics.metric import Metric
from pipelines.metrics.rates import Rates
from pipelines.metrics.reconstruction import Reconstruction

# In the order in which `evaluate` prints them.
METRICS: tuple[type[Metric], ...] = (
    Reconstruction,
    Rates,
    Bound,
)
