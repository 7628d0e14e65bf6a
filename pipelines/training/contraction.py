"""The Jacobian of an encoder: how much the numbers that stand for an image change with the image.

B batch, C channels, H W pixels, n numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.data.noise import PROBES, BatchNoise
from tokenizer import Bottled, HierarchicalVQVAE


def squared_jacobian(numbers: Tensor, images: Tensor, directions: Tensor | None, keep: bool) -> Tensor:
    """Return ||d numbers / d images||_F^2 of each image, (B,), where no image has a part in another's numbers.

    Args:
        numbers: (B, n), of the images.
        images: (B, C, H, W), which require gradients.
        directions: (B, p, n) of independent entries of mean 0 and variance 1. The mean over p of the squared length of
            J^T v is then an estimate of the norm without bias (Hutchinson 1990). None takes all n numbers one by one.
        keep: whether gradients are to go through the result.
    """
    scalars = numbers if directions is None else torch.einsum("bn,bpn->bp", numbers, directions)
    total = numbers.new_zeros(len(numbers))
    for column in scalars.unbind(1):
        (gradient,) = torch.autograd.grad(column.sum(), images, retain_graph=True, create_graph=keep)
        total = total + gradient.float().square().flatten(1).sum(1)
    return total if directions is None else total / directions.shape[1]


def contraction(
    levels: Sequence[Bottled], images: Tensor, probes: int, noise: BatchNoise, keep: bool = True
) -> list[dict[str, Tensor]]:
    """Return the loss "contraction" (B,) of each level.

    Args:
        levels: what bottlenecks made of the images.
        images: (B, C, H, W), which require gradients.
        probes: backward passes that a level may take, see `ContractiveConfig`; with 0 there is no such loss.
        noise: beside these images; the signs of it are the directions.
        keep: whether gradients are to go through the result.
    """
    losses: list[dict[str, Tensor]] = []
    for level, output in enumerate(levels if probes else ()):
        assert output.contracted is not None
        numbers = output.contracted.float().flatten(1)
        exact = numbers.shape[1] <= probes
        directions = None if exact else noise.normals(PROBES + level, (probes, numbers.shape[1])).sign()
        losses.append({"contraction": squared_jacobian(numbers, images, directions, keep)})
    return losses or [{} for _ in levels]


def contraction_of(
    model: HierarchicalVQVAE, images: Tensor, probes: int, noise: BatchNoise, classes: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """Return the same of images by themselves, in validation, where nothing else needs gradients."""
    if not probes:
        return [{} for _ in model.bottlenecks]
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return contraction(model(images, classes=classes).levels, images, probes, noise, keep=False)
