"""A bottleneck that stores several grids of one stride: from there on they are levels like any other."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines import Generator
from pipelines.training.sections import TokenizerSection
from tokenizer.bottlenecks import KINDS
from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes
from tokenizer.bottlenecks.codebook import Codebook
from tokenizer.bottlenecks.usage import CodeUsage


@dataclass(frozen=True, kw_only=True)
class TwiceConfig(Settings):
    """A codebook, and another for what the first leaves (Zeghidour et al. 2021, algorithm 1, of depth 2)."""

    def build(self, sizes: VectorSizes) -> "Twice":
        return Twice(sizes)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        return {"commitment": 0.25, "codebook": 1.0}


class Twice(nn.Module):
    noise_channels = 0

    def __init__(self, sizes: VectorSizes) -> None:
        super().__init__()
        self.features = self.channels = sizes.code_dim
        self.sizes = (sizes.codebook_size, sizes.codebook_size)
        self.books = nn.ModuleList(Codebook(sizes.codebook_size, sizes.code_dim, learned=True) for _ in range(2))

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        first = self.books[0](features)
        second = self.books[1](features - first.seen.detach())
        losses = {name: value + second.losses[name] for name, value in first.losses.items()}
        return Bottled(first.seen + second.seen.detach(), first.stored + second.stored, losses, first.observed)

    def lookup(self, stored: list[Tensor]) -> Tensor:
        return sum(book.lookup([codes]) for book, codes in zip(self.books, stored, strict=True))

    def blank(self) -> Tensor:
        return sum(book.blank() for book in self.books)

    def figures(self) -> CodeUsage:
        return CodeUsage(self.sizes, self.books[0].vectors.device)


def test_they_are_levels_of_shards_priors_samples_and_figures(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "twice", TwiceConfig)
    monkeypatch.setattr(TokenizerSection, "family", property(lambda section: TwiceConfig()))
    few = {"training": {"steps": 2, "val_every": 2}}
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": few,
        "prior": {"network": "auto", "dropout": [0.1, 0.1, 0.0, 0.0], **few},
        "sample": {"temperature": [1.0, 1.0, 0.9, 0.9]},
    }
    config = write_config(tmp_path, changes)
    code, said = smalti("run", config, "--traceback")
    assert code == 0, said
    assert "report: look at" in said
    run = tmp_path / "run"
    levels = json.loads((run / "codes" / "manifest.json").read_text())["levels"]
    assert [(level["grid"], level["codebook_size"]) for level in levels] == [
        ([2, 2], 16),
        ([2, 2], 16),
        ([4, 4], 32),
        ([4, 4], 32),
    ]
    figures = json.loads((run / "metrics.json").read_text())
    assert {f"level{level}_usage" for level in range(4)} < set(figures["tokenizer"])
    assert {f"level{level}" for level in range(4)} < set(figures["prior"])
    assert smalti("verify", config)[0] == 0
    images, codes = Generator.from_pretrained(run).sample([3, 7], seed=1)
    assert len(codes) == 4 and images.shape == (2, 1, 16, 16) and bool(torch.isfinite(images).all())
    code, said = smalti("run", config, "--sample.temperature=[1,1]")
    assert code == 2 and "list of 4, one per level" in said
