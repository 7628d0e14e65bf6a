"""What is measured of models."""

from pipelines.metrics.bound import Bound
from pipelines.metrics.classification import ClassificationScore
from pipelines.metrics.copies import Copies
from pipelines.metrics.histograms import CodeHistograms
from pipelines.metrics.importance import ImportanceBounds
from pipelines.metrics.metric import Metric
from pipelines.metrics.rates import Rates
from pipelines.metrics.realism import ReconstructionDistances, SampleDistances, SampleFID
from pipelines.metrics.reconstruction import Reconstruction
from pipelines.metrics.surgery import Surgery

# In the order in which `evaluate` prints them.
METRICS: tuple[type[Metric], ...] = (
    Reconstruction,
    Rates,
    Bound,
    Surgery,
    ImportanceBounds,
    CodeHistograms,
    ReconstructionDistances,
    SampleDistances,
    SampleFID,
    Copies,
    ClassificationScore,
)
