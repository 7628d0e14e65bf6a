"""What the command shows of each thing that can be done with latents: pictures, a table, and a line.

N images, C channels, H W pixels, h w grid.
"""

from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.images import to_uint8
from pipelines.data.noise import stored_place
from pipelines.errors import ConfigError, StageError
from pipelines.explore.complete import complete
from pipelines.explore.edit import direction, edit
from pipelines.explore.interpolate import interpolate
from pipelines.explore.opened import Opened
from pipelines.explore.score import Scores, area_under_roc, score
from pipelines.explore.vary import vary
from pipelines.metrics.bound import OF, fitted_scales
from pipelines.progress import counted, progress_bar
from pipelines.report.pictures import heat
from prior import Known, NormalConfig

# Images that pass the models at once, and those of the highest score that are shown.
BATCH, HIGHEST = 64, 8
GREY = 128


class Shown(NamedTuple):
    """What comes of a command.

    Attributes:
        pictures: rows of uint8 (C, H, W); None leaves a cell white.
        labels: what stands above each, row by row.
        table: rows by column, all of the same columns.
        line: the result.
    """

    pictures: list[list[np.ndarray | None]]
    labels: list[list[str]]
    table: list[dict[str, Any]]
    line: str


def interpolation(run: Opened, asked: Namespace) -> Shown:
    """Two val images, or two classes, and what lies between them."""
    if (asked.keys and asked.classes) or len(asked.keys or asked.classes or "12") != 2:
        raise ConfigError("interpolate takes two images by --keys or two classes by --classes, not both")
    if asked.classes:
        labels = [run.label_of(name) for name in asked.classes]
        ends, names = _of_classes(run, labels, asked.index), [run.class_names[label] for label in labels]
    else:
        rows = run.rows(asked.keys, [], 2)
        ends = [run.tokenizer.encode(run.images([row])) for row in rows]
        labels, names = [run.val.read(row).label for row in rows], [run.val.key(row) for row in rows]
    given = None
    if run.holds_codes and not run.knows_no_class:
        given = labels[0]
        if labels[0] != labels[1]:
            raise StageError(
                "the prior never learned codes without their class (prior.class_dropout was 0), so a path is one of "
                "images of one class; name such"
            )
    prior = run.prior if run.holds_codes else None
    found = interpolate(run.tokenizer, prior, ends[0], ends[1], asked.steps, given, asked.beam)
    nats = [""] * len(found.images) if found.nats is None else [f"{value:.6g}" for value in found.nats.tolist()]
    table = [
        {"step": step, "from": names[0], "to": names[1], "share": share, "nats": value}
        for step, (share, value) in enumerate(zip(found.shares.tolist(), nats, strict=True))
    ]
    shown = [
        f"{float(value):.0f} nats" if value else f"{share:.0%}" for value, share in zip(nats, found.shares, strict=True)
    ]
    line = f"{names[0]} to {names[1]} in {counted(len(found.images), 'image')}"
    if found.nats is not None:
        line += f", on a path that costs at most {float(found.nats.max()):.1f} nats where it is shown"
    return Shown([[*to_uint8(found.images)]], [shown], table, line)


def _of_classes(run: Opened, labels: list[int], index: int) -> list[list[Tensor]]:
    """Return what stands for classes: codes drawn with the same uniforms, or the means of numbers over val images."""
    if run.holds_codes:
        if not run.prior.class_names:
            raise StageError("this prior was trained without classes, of which it can draw none; name images by --keys")
        drawn = run.prior.sample(labels, run.seed, indices=[index] * len(labels))
        return [[level[number : number + 1] for level in drawn] for number in range(len(labels))]
    stored = [run.tokenizer.encode(run.images(run.rows_of(label))) for label in labels]
    return [[level.mean(0, keepdim=True) for level in levels] for levels in stored]


def variants(run: Opened, asked: Namespace) -> Shown:
    """Val images, each beside its variants."""
    pictures, labels, table = [], [], []
    draws = any(part.noise_channels for part in run.tokenizer.bottlenecks) and asked.keep is None
    for row in run.rows(asked.keys, asked.classes, 4):
        image = run.images([row])
        given = run.given(row) if not draws else run.val.read(row).label if run.val.class_names else None
        found = vary(run.tokenizer, None if draws else run.prior, image, asked.count, asked.keep, given, run.seed)
        told = None if given is None else [given]
        stored = run.tokenizer.encode(image, classes=told)
        decoded = torch.cat([run.tokenizer.decode(stored, told), found.images])
        pictures.append([run.val.pixels(row), *to_uint8(decoded)])
        labels.append([run.val.key(row), "decoded", *(f"variant {number}" for number in range(asked.count))])
        for number, variant in enumerate(found.images):
            apart = _changed(stored, [level[number : number + 1] for level in found.stored])
            table.append({**run.named(row), "variant": number, "changed": apart, "mse": _mse(variant, image)})
    how = "q(z | x) drawn again" if draws else "finer levels drawn again"
    line = f"{counted(asked.count, 'variant')} of each of {counted(len(pictures), 'image')}, {how}"
    return Shown(pictures, labels, table, line)


def completions(run: Opened, asked: Namespace) -> Shown:
    """Val images of which a part is known, completed by keeping these cells alone, and by particles."""
    masks = known_cells(asked.known, run.tokenizer.grids)
    in_order = torch.cat([mask.flatten() for mask in masks]).int()
    prefix = bool((in_order.diff() <= 0).all())  # nothing known comes after anything drawn
    exact = not run.holds_codes or prefix
    pictures, labels, table, sizes = [], [], [], []
    for row in run.rows(asked.keys, asked.classes, 4):
        image, given = run.images([row]), run.given(row)
        stored = run.tokenizer.encode(image, classes=None if given is None else [given])
        known = [Known(level, mask[None]) for level, mask in zip(stored, masks, strict=True)]
        found = complete(run.prior, known, given, asked.count, asked.particles, run.seed)
        sizes.append(found.ess)
        classes = None if given is None else [given] * asked.count
        ways = {"exact" if exact else "particles": found.stored}
        if not exact:
            each = [Known(*(part.expand(asked.count, *part.shape[1:]) for part in one)) for one in known]
            ways["raster"] = run.prior.sample(classes, run.seed, indices=range(asked.count), known=each)
        for way, stored in ways.items():
            decoded, nats = run.tokenizer.decode(stored, classes), run.prior.nll(stored, classes).tolist()
            pictures.append([run.val.pixels(row), _masked(run.val.pixels(row), masks[-1]), *to_uint8(decoded)])
            labels.append([run.val.key(row), "known", *[way] * asked.count])
            for draw, one in enumerate(decoded):
                told = (
                    {"ess": found.ess, "distinct": found.distinct} if way != "raster" else {"ess": "", "distinct": ""}
                )
                mse = _mse(one, image)
                table.append({**run.named(row), "how": way, "draw": draw, "nats": nats[draw], "mse": mse, **told})
    line = (
        f"{counted(len(sizes), 'image')}, known: {asked.known}; effective sample size {min(sizes):.1f} to "
        f"{max(sizes):.1f} of {counted(asked.particles, 'particle')}; "
    )
    normal = not run.holds_codes and all(isinstance(level.config.size, NormalConfig) for level in run.prior.levels)
    why = "numbers are independent" if normal else "Gaussians given a part of their numbers are Gaussians"
    line += (
        f"exact, as {'nothing known comes after anything drawn' if prefix and not normal else why}"
        if exact
        else "rows called raster only keep the known cells: a raster prior does not condition on later ones"
    )
    return Shown(pictures, labels, table, line)


def known_cells(known: str, grids: list[tuple[int, int]]) -> list[Tensor]:
    """Return which cells are known, bool (h, w) per level.

    Args:
        known: top, bottom, left or right half of every level; fine, all levels but the coarsest; or a number, so many
            cells from the first on, coarse to fine and in raster order.
        grids: (h, w) per level.

    Raises:
        ConfigError: it is none of these, or leaves nothing known or nothing to be drawn.
    """
    sizes = [h * w for h, w in grids]
    down = [((torch.arange(h) + 0.5) / h)[:, None].expand(h, w) for h, w in grids]
    right = [((torch.arange(w) + 0.5) / w).expand(h, w) for h, w in grids]
    if known.isdecimal():
        flat = (torch.arange(sum(sizes)) < int(known)).split(sizes)
        masks = [mask.view(grid) for mask, grid in zip(flat, grids, strict=True)]
    elif known == "fine":
        masks = [torch.full(grid, level > 0) for level, grid in enumerate(grids)]
    elif known in ("top", "left"):
        masks = [place < 0.5 for place in (down if known == "top" else right)]
    elif known in ("bottom", "right"):
        masks = [place > 0.5 for place in (down if known == "bottom" else right)]
    else:
        raise ConfigError(f"--known takes top, bottom, left, right, fine or a number of cells, got {known}")
    number = sum(int(mask.sum()) for mask in masks)
    if not 0 < number < sum(sizes):
        raise ConfigError(f"--known {known} is {number} of {sum(sizes)} cells; choose some of them and not all")
    return masks


def edits(run: Opened, asked: Namespace) -> Shown:
    """Val images moved from the mean of one class towards that of another."""
    source, target = run.label_of(asked.source), run.label_of(asked.target)
    if source == target:
        raise ConfigError(f"--from and --to must be two classes, got {run.class_names[source]} twice")
    towards = direction(run.tokenizer, run.training_images(source), run.training_images(target))
    names = run.class_names[source], run.class_names[target]
    pictures, labels, table = [], [], []
    for row in run.rows(asked.keys, [], 0) or run.rows_of(source)[:4]:
        image = run.images([row])
        moved = edit(run.tokenizer, image, towards, asked.strengths)
        still = run.tokenizer.decode(run.tokenizer.encode(image))
        pictures.append([run.val.pixels(row), *to_uint8(moved)])
        labels.append([run.val.key(row), *(f"{strength:g}" for strength in asked.strengths)])
        for strength, one in zip(asked.strengths, moved, strict=True):
            about = {**run.named(row), "from": names[0], "to": names[1], "strength": strength}
            table.append({**about, "changed": _mse(one, still) ** 0.5})
    apart = sum(float(level.double().square().sum()) for level in towards) ** 0.5
    line = f"{counted(len(pictures), 'image')} from {names[0]} to {names[1]}, whose means are {apart:.4g} apart"
    return Shown(pictures, labels, table, line)


def scores(run: Opened, asked: Namespace) -> Shown:
    """Every image of a split scored, and maps of those that are named, or of the highest."""
    images = run.split(asked.split)
    anomalous = None if asked.anomalous is None else run.label_of(asked.anomalous)
    prior = run.prior if run.holds_codes or run.finished.has_priors() else None
    # As `evaluate` has it: a tokenizer that is told classes is told them, unless its prior knows none.
    conditional = bool(run.tokenizer.num_classes and run.class_names) and (prior is None or bool(prior.class_names))
    by_class = conditional or (prior is not None and not run.knows_no_class)
    scales = fitted_scales(run.tokenizer, run.split("train"), run.seed)

    def scored(rows: list[int]) -> Scores:
        pixels = torch.from_numpy(np.stack([images.pixels(row) for row in rows]))
        given = torch.tensor([images.read(row).label for row in rows]) if by_class else None
        places = [stored_place(run.seed, asked.split, images.key(row)) for row in rows]
        return score(run.tokenizer, prior, pixels, scales, given, places)

    parts: dict[str, list[Tensor]] = {"mse": [], "distortion_nats": [], "rate_nats": [], "bound_nats": []}
    with progress_bar(len(images), "score", "images") as bar:
        for first in range(0, len(images), BATCH):
            found = scored(list(range(first, min(first + BATCH, len(images)))))
            for part, one in zip(parts.values(), (found.mse, found.distortion, found.rate, found.bound), strict=True):
                part += [] if one is None else [one.cpu()]
            bar.update(len(found.mse))
    figures = {name: torch.cat(part) for name, part in parts.items() if part}
    labels = torch.tensor([images.read(row).label for row in range(len(images))])
    table = [
        {"key": images.key(row), "class": run.class_names[labels[row]] if run.class_names else ""}
        | {name: float(values[row]) for name, values in figures.items()}
        | ({} if anomalous is None else {"anomalous": int(labels[row] == anomalous)})
        for row in range(len(images))
    ]
    which = "bound_nats" if "bound_nats" in figures else "distortion_nats"
    highest = figures[which].argsort(descending=True, stable=True)[:HIGHEST].tolist()
    rows = run.rows(asked.keys, [], 0) if asked.keys and asked.split == "val" else highest
    pictures, titles = _maps(scored(rows), [images.pixels(row) for row in rows])
    above = [f"{figures[which][row]:.0f} nats" for row in rows]
    shown = [[images.key(row) for row in rows], above, *([title] * len(rows) for title in titles)]
    bound = f"bound of -log {OF['given_class' if by_class else 'without_class']}"
    line = f"{counted(len(images), f'{asked.split} image')}, mean {bound if which == 'bound_nats' else 'distortion'} "
    line += f"{float(figures[which].mean()):.1f} nats"
    if which != "bound_nats":
        line += ", and no bound, as nothing is drawn around these numbers"
    if anomalous is not None:
        areas = {name: area_under_roc(values, labels == anomalous) for name, values in figures.items()}
        told = ", ".join(f"{name.removesuffix('_nats')} {area:.3f}" for name, area in areas.items())
        number = int((labels == anomalous).sum())
        line += f"; area under the ROC curve of {number} of class {run.class_names[anomalous]}: {told}"
    return Shown(pictures, shown, table, line)


def _maps(found: Scores, pixels: list[np.ndarray]) -> tuple[list[list[np.ndarray | None]], list[str]]:
    """Return images above reconstructions, maps of the distortion, and of the rate of each level of codes."""
    side = pixels[0].shape[-1]
    maps = {"pixels": found.pixel_nats} | {f"level {level}": nats for level, nats in enumerate(found.code_nats)}
    rows: list[list[np.ndarray | None]] = [[*pixels], [*to_uint8(found.images)]]
    for nats in maps.values():
        values = nats.double().cpu().numpy()
        most = max(1e-9, float(np.quantile(values, 0.99)))
        rows.append([heat(np.kron(one, np.ones((side // len(one),) * 2)), 0, most) for one in values])
    return rows, list(maps)


def _masked(pixels: np.ndarray, mask: Tensor) -> np.ndarray:
    """Return an image (C, H, W) grey where a cell of the finest level (h, w) is not known."""
    factor = pixels.shape[-1] // len(mask)
    return np.where(np.kron(mask.numpy(), np.ones((factor, factor), bool)), pixels, np.uint8(GREY))


def _changed(stored: list[Tensor], other: list[Tensor]) -> float:
    """Return the share of codes that differ, or the root of the mean squared difference of numbers."""
    if stored[0].is_floating_point():
        squares = torch.cat([(a - b).double().square().flatten() for a, b in zip(stored, other, strict=True)])
        return float(squares.mean().sqrt())
    return float(torch.cat([(a != b).flatten() for a, b in zip(stored, other, strict=True)]).double().mean())


def _mse(image: Tensor, other: Tensor) -> float:
    return float((image - other).double().square().mean())
