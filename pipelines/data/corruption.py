"""What a denoising autoencoder sees: images that are spoilt at random, of which it is to give the clean ones.

B batch, C channels, H W pixels.
"""

import torch
from torch import Tensor

from pipelines.data.images import AugmentConfig
from pipelines.data.noise import CORRUPTION, BatchNoise


def corrupted(images: Tensor, augment: AugmentConfig, noise: BatchNoise) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] as `augment.corrupt` spoils them; noise carries them out of that range.

    What hides a pixel hides all its channels. Masked patches are of the middle of the range, 0.

    Source: Vincent et al. 2008, section 2.3 (masking); Vincent et al. 2010, section 3.3 (noise, salt and pepper).
    """
    _, channels, height, width = images.shape
    strength, side = augment.corrupt_strength, augment.corrupt_patch
    if augment.corrupt == "noise":
        images = images + strength * noise.normals(CORRUPTION, (channels, height, width))
    if augment.corrupt == "mask":
        drawn = noise.uniforms(CORRUPTION, (1, -(-height // side), -(-width // side)))  # of each patch
        hidden = (drawn < strength).repeat_interleave(side, 2).repeat_interleave(side, 3)
        images = images.masked_fill(hidden[:, :, :height, :width], 0)
    if augment.corrupt == "salt":
        drawn = noise.uniforms(CORRUPTION, (1, height, width))
        images = torch.where(drawn < strength, torch.where(drawn < strength / 2, 1.0, -1.0), images)
    return images.contiguous(memory_format=torch.channels_last)
