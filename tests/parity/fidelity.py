"""Hold FID, KID, precision and recall to torch-fidelity, which needs torchvision and so has no place in .venv.

python -m tests.parity.fidelity                # of CIFAR-sized images made up here
python -m tests.parity.fidelity IMAGES_FOLDER  # of the val split of a run, first half beside second half
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.data.images import ImageShards, to_unit_range
from pipelines.metrics.distances import frechet_distance, kernel_distance, moments, squared_mmd, support
from pipelines.metrics.features import load_features
from pipelines.metrics.inception import Inception
from pipelines.storage.cache import Cache

# Images of either set, at most.
IMAGES = 1000


def declare_operators() -> torch.library.Library:
    """Name two operators of torchvision, without which it cannot be imported; to be held while it is in use.

    Its compiled ones want the very torch that they were built with. None of them is used here.
    """
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return operators


def made_up() -> tuple[Tensor, Tensor]:
    """Two sets of smooth uint8 images (N, 3, 32, 32), of which the second is rougher."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for side in (6, 7):
        coarse = torch.rand(300, 3, side, side, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
        sets.append((fine * 255).round().to(torch.uint8))
    return sets[0], sets[1]


def halves(folder: Path) -> tuple[Tensor, Tensor]:
    """The first images of the val split of a run, and as many that follow."""
    with tempfile.TemporaryDirectory() as place:
        shards = ImageShards(folder, "val", Cache(Path(place), 2**33))
        count = min(IMAGES, len(shards) // 2)
        pixels = torch.from_numpy(np.stack([shards.pixels(index) for index in range(2 * count)]))
    return pixels.split(count)  # type: ignore[return-value]


class Pictures(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def theirs(one: Tensor, other: Tensor, size: int) -> dict[str, float]:
    """Figures of torch-fidelity, from images, with our network as a feature extractor of its own."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    space = load_features("imagenet-lite", size, 3)

    class Lite(FeatureExtractorBase):
        """`imagenet-lite`, registered there."""

        def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
            super().__init__(name, features_list)
            self.space = space

        get_provided_features_list = staticmethod(lambda: ("1280",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "1280")
        can_be_compiled = staticmethod(lambda: False)

        def forward(self, pixels: Tensor) -> tuple[Tensor]:
            return (self.space(to_unit_range(pixels)),)

    torch_fidelity.register_feature_extractor("lite", Lite)
    found = torch_fidelity.calculate_metrics(
        **{"input1": Pictures(other), "input2": Pictures(one), "feature_extractor": "lite", "cuda": False},
        **{"fid": True, "kid": True, "prc": True, "verbose": False, "cache": False},
        **{"kid_subsets": 1, "kid_subset_size": len(one), "batch_size": 64, "save_cpu_ram": True},
    )
    return {
        "FID": found["frechet_inception_distance"],
        "KID of whole sets": found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


def ours(one: Tensor, other: Tensor, size: int) -> dict[str, float]:
    """The same, of smalti."""
    space = load_features("imagenet-lite", size, 3)
    real, drawn = space(to_unit_range(one)), space(to_unit_range(other))
    found = support(real, drawn)
    print(f"  smalti's KID in blocks: {kernel_distance(real, drawn)}")
    return {
        "FID": frechet_distance(moments(real), moments(drawn)),
        "KID of whole sets": squared_mmd(real, drawn),
        "precision": found.precision,
        "recall": found.recall,
    }


def check_inception(pixels: Tensor) -> float:
    """Return by how much, of the largest feature, our Inception is apart from theirs with the same random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    network = Inception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "weights.pth"
        torch.save(network.state_dict(), path)
        peer = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        (expected,) = peer(pixels)
        found = network(to_unit_range(pixels))
    return float((found - expected).abs().max() / expected.abs().max())


def main(arguments: list[str]) -> None:
    """Print both sides, and fail where they are apart."""
    warnings.simplefilter("ignore")
    operators = declare_operators()
    one, other = halves(Path(arguments[0])) if arguments else made_up()
    size = one.shape[-1]
    apart = check_inception(one[:4])
    print(f"Inception with the same random weights: {apart:.1e} of the largest feature apart")
    mine, peer = ours(one, other, size), theirs(one, other, size)
    for figure, value in mine.items():
        print(f"{figure:<18} smalti {value:.6f}   torch-fidelity {peer[figure]:.6f}")
    worst = max(abs(value - peer[figure]) / max(1, abs(value)) for figure, value in mine.items())
    assert apart < 1e-4 and worst < 1e-4, f"apart by {apart:.1e} (Inception) and {worst:.1e} (figures)"
    print(f"parity: {len(one)} beside {len(other)} images, all within 1e-4")
    del operators


if __name__ == "__main__":
    main(sys.argv[1:])
