"""How far samples and reconstructions are from real images, in the feature space of the evaluation."""

import logging
from typing import Any

from pipelines.metrics.distances import (
    DENSITY_NEIGHBOURS,
    FID_IMAGES,
    frechet_distance,
    kernel_distance,
    moments,
    support,
)
from pipelines.metrics.metric import Metric

logger = logging.getLogger(__name__)

# Images of either set without which these figures cannot be had.
LEAST = DENSITY_NEIGHBOURS + 1
# KID is printed times this, as papers do.
THOUSAND = 1000


class SampleDistances(Metric):
    """KID with its standard error, precision, recall, density and coverage of samples; see `distances`."""

    name = "samples"
    needs = ("real.features", "samples.features")
    more_is_better = ("precision", "recall", "density", "coverage")
    less_is_better = ("kid",)

    def compute(self) -> dict[str, Any]:
        real, drawn = (self.subject.gathered[need] for need in self.needs)
        if len(drawn) < LEAST:
            logger.warning("evaluate: samples need %d images or more to be judged, there are %d", LEAST, len(drawn))
            return {}
        kid = kernel_distance(real, drawn, self.subject.seed)
        counts = {"images": len(drawn), "real_images": len(real)}
        return {**counts, "kid": kid.value, "kid_error": kid.error, **support(real, drawn)._asdict()}

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        names = ("precision", "recall", "density", "coverage")
        return [
            f"samples: {figures['images']} beside {figures['real_images']} real images, {_space(figures)}",
            f"  KID x 1000  {_kid(figures, 'kid')}",
            "  " + "   ".join(f"{name} {figures[name]:z.4f}" for name in names),
        ]


class SampleFID(Metric):
    """FID of samples."""

    name = "samples.frechet"
    needs = ("real.moments", "samples.features")
    less_is_better = ("fid",)

    def compute(self) -> dict[str, Any]:
        real, drawn = self.subject.real_moments(), self.subject.gathered["samples.features"]
        if len(drawn) < LEAST:
            return {}
        return {"images": len(drawn), "fid": frechet_distance(real, moments(drawn))}

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        real = figures["made"]["splits"]["real"]["count"] or FID_IMAGES  # of a reference's moments nobody knows
        return [f"samples: {_fid('FID', figures['fid'], min(figures['images'], real)).strip()}"]


class ReconstructionDistances(Metric):
    """rKID and rFID: KID and FID of the reconstructions of the val split, beside the same images."""

    name = "reconstructions"
    needs = ("val.features", "val.reconstruction_features")
    less_is_better = ("rkid", "rfid")

    def compute(self) -> dict[str, Any]:
        real, drawn = (self.subject.gathered[need] for need in self.needs)
        if len(drawn) < LEAST:
            return {}
        kid = kernel_distance(real, drawn, self.subject.seed, paired=True)
        rfid = frechet_distance(moments(real), moments(drawn))
        return {"images": len(drawn), "rkid": kid.value, "rkid_error": kid.error, "rfid": rfid}

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        return [
            f"reconstructions: of {figures['images']} val images, {_space(figures)}",
            f"  rKID x 1000 {_kid(figures, 'rkid')}",
            _fid("rFID", figures["rfid"], figures["images"]),
        ]


def _space(figures: dict[str, Any]) -> str:
    return f"in features of {figures['made']['features']['features']}"


def _kid(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name] * THOUSAND:z.3f} +- {figures[f'{name}_error'] * THOUSAND:.3f} (standard error)"


def _fid(name: str, value: float, images: int) -> str:
    doubt = f"   mostly bias below {FID_IMAGES:,} images: read KID" if images < FID_IMAGES else ""
    return f"  {name:<11} {value:.3f}{doubt}"
