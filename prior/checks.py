"""What callers give, judged where it comes in: kind, shape, number and range, each refusal one sentence.

Values are read back from the device once a call, in `checked`; the training step calls none of this.

B batch, h w code grid, K codebook_size.
"""

import json
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

# What callers may give: grids of codes of any integer type, and rows of whole numbers.
Codes = Tensor | np.ndarray
Numbers = Sequence[int] | Tensor | np.ndarray
# What a level is saved as.
FILES = {"config.json", "model.safetensors"}


class Float32Module(nn.Module):
    """A module that stays in float32, whatever moves it.

    Half precision would round positions and the logits' small differences. Products are taken in it under
    `torch.autocast`, which knows what to leave in float32; decoders lay their weights out in it then.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `to`, `half`, `double` and all others that change every tensor.

        Raises:
            ValueError: they would not be float32 any more.
        """
        if (dtype := fn(torch.zeros(1)).dtype) != torch.float32:
            raise ValueError(
                f"a {type(self).__name__} computes in float32 and cannot be made {dtype}; "
                "for half precision leave it as it is and call it under torch.autocast"
            )
        return super()._apply(fn, recurse)


def checked(
    codes: Sequence[Codes],
    classes: Numbers | None,
    levels: Sequence[tuple[tuple[int, int], int | None, int]],
    num_classes: int,
    device: torch.device,
    batch_size: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Return codes and classes as int64 on a device, once they are what a prior can use.

    Args:
        codes: (B, h, w) per level, coarse to fine, of any integer type, tensors or arrays; of continuous levels float
            (B, d, h, w).
        classes: B whole numbers, a list, a tensor or an array; None where no class is given.
        levels: (h, w), K and channels of each; K None where it is continuous.
        num_classes: classes lie below it.
        device: where they go.
        batch_size: B; that of the codes if None.

    Raises:
        ValueError: the first thing that is not so.
    """
    if len(codes) != len(levels):
        raise ValueError(f"codes must have {len(levels)} levels, coarse to fine, got {len(codes)}")
    found = []
    for number, (one, (grid, size, channels)) in enumerate(zip(codes, levels, strict=True)):
        name, shape = f"level {number} {'codes' if size else 'values'}", grid if size else (channels, *grid)
        found.append(integers(name, one, 3, device) if size else numbers(name, one, 4, device))
        if tuple(found[-1].shape[1:]) != tuple(shape):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be (B, {wanted}), got {tuple(found[-1].shape)}")
    batch_size = len(found[0]) if batch_size is None else batch_size
    if any(len(one) != batch_size for one in found):
        raise ValueError(f"all levels must hold {batch_size} grids, got {[len(one) for one in found]}")
    ranges = [
        (f"level {number} codes", one, size)
        for number, (one, (_, size, _)) in enumerate(zip(found, levels, strict=True))
        if size
    ]
    labels = None if classes is None else integers("classes", classes, 1, device)
    if labels is not None:
        if len(labels) != batch_size:
            raise ValueError(f"classes must be one for each of {batch_size} grids, got {len(labels)}")
        ranges.append(("classes", labels, num_classes))
    _check_ranges(ranges)
    return found, labels


def integers(name: str, values: Codes | Numbers, ndim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return whole numbers of any kind as int64 on a device.

    Args:
        name: of the values, for the message.
        values: a tensor, an array or a sequence, of any integer type; truth values are none.
        ndim: how many dimensions they must have.
        device: where they go.

    Raises:
        ValueError: they are no integers, or have another number of dimensions.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iu" and not (array.size == 0 and isinstance(values, Sequence)):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
        values = torch.from_numpy(array.astype(np.int64))  # a copy: torch warns of arrays that it may not write to
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {tuple(values.shape)}")
    return values.to(device, torch.int64)


def numbers(name: str, values: Tensor | np.ndarray, ndim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return finite floats of any precision as float32 on a device.

    Args:
        name: of the values, for the message.
        values: a tensor or an array.
        ndim: how many dimensions they must have.
        device: where they go.

    Raises:
        ValueError: they are no floats, are not finite, or have another number of dimensions.
    """
    found = torch.as_tensor(values)
    if not found.is_floating_point() or found.ndim != ndim:
        raise ValueError(f"{name} must be finite floats of {ndim} dimensions, got {found.dtype} {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} must be finite floats, and some are NaN or infinite")
    return found.to(device, torch.float32)


def _check_ranges(ranges: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raise ValueError unless all values of each named tensor lie in [0, size); one reading back for all."""
    ranges = [(name, values, size) for name, values, size in ranges if values.numel()]
    if not ranges:
        return
    ends = torch.stack([torch.stack(values.aminmax()) for _, values, _ in ranges]).tolist()
    for (name, values, size), (low, high) in zip(ranges, ends, strict=True):
        if not 0 <= low <= high < size:
            shown = values.tolist() if values.ndim == 1 and len(values) <= 10 else f"{low} to {high}"
            hint = "" if name == "classes" else "; were they made by another tokenizer?"
            raise ValueError(f"{name} must lie in [0, {size}), got {shown}{hint}")


def whole_number(name: str, value: Any, below: int) -> int:
    """Return a whole number in [0, below), of Python, numpy or torch.

    Raises:
        ValueError: it is none.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < below:
        raise ValueError(f"{name} must be a whole number from 0 to {below - 1}, got {value!r}")
    return number


def check_replaceable(folder: Path) -> None:
    """Raise ValueError unless a folder is absent or empty, or holds a level saved there and nothing else."""
    found = {path.name for path in folder.glob("[!.]*")}
    saved: object = None
    with suppress(OSError, ValueError, RecursionError):
        saved = json.loads((folder / "config.json").read_text())
    if found and not (found == FILES and isinstance(saved, dict) and "codebook_sizes" in saved):
        raise ValueError(
            f"{folder} must be empty or hold a saved prior and nothing else, but holds {', '.join(sorted(found))}; "
            "choose another folder"
        )
