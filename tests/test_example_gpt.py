"""The example, on the run of format 1: two levels, classes "0", "1" and "7"."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from examples import gpt
from pipelines.data.codes import Codes
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import read_manifest
from pipelines.tokens.dataset import TokenDataset
from pipelines.tokens.records import Records, write_bin
from tests.layouts import layout

FORMAT1 = Path(__file__).parent / "data" / "format1" / "run"
SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose codes are exported."""
    folder = shutil.copytree(FORMAT1, tmp_path_factory.mktemp("gpt") / "run")
    made = layout(read_manifest(folder / "codes", "codes", "encode"))
    (folder / "tokens").mkdir()
    shards = {}
    for split in ("train", "val"):
        codes = Codes(folder / "codes", split, folder / "unpacked", Cache(folder / "cache", 2**20))
        laid = made.lay(*codes.batch(list(range(len(codes)))))
        keys = [str(number) for number in range(len(codes))]
        files = write_bin(folder / "tokens", split, Records(*laid, keys, keys, [0] * len(keys)))
        sums = {name: hashlib.sha256((folder / "tokens" / name).read_bytes()).hexdigest() for name in files}
        shards[split] = [{"shard": split, "records": len(keys), "tokens": len(laid.ids), "sha256": sums}]
    made.save(folder / "tokens", shards)
    return folder


def test_the_whole_example_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = gpt.main(run, steps=2, samples=6, **SIZES)
    assert 0 <= figures["recognised"] <= 1 and 0 <= figures["repeats"] <= 1
    said = capsys.readouterr().out
    assert "6 samples" in said and "val nats per image" in said
    assert len(Path(gpt.__file__).read_text().splitlines()) < 120


def test_only_what_is_allowed_is_drawn(run: Path) -> None:
    data = TokenDataset(run / "tokens", "train")
    made, mask = data.layout, gpt.forbidden(data.layout)
    classes = torch.tensor([0, 2, 1])
    blank = [torch.zeros(3, *level.grid, dtype=torch.int64) for level in made.levels]
    prompts = made.encode(blank, classes)[:, : made.slots.prompt]
    model = gpt.small_gpt(made, **SIZES).eval()
    drawn = gpt.draw(model, prompts, mask, seed=0)
    made.decode(drawn)  # raises where a token cannot stand
    assert torch.equal(drawn[:, : made.slots.prompt], prompts)
    assert torch.equal(gpt.classes_of(drawn, made), classes)
    assert torch.equal(gpt.draw(model, prompts, mask, seed=0), drawn)
    assert not torch.equal(gpt.draw(model, prompts, mask, seed=1), drawn)


def test_nats_are_of_the_codes_given_the_class(run: Path) -> None:
    made = TokenDataset(run / "tokens", "train").layout
    mask, model = gpt.forbidden(made), gpt.small_gpt(made, **SIZES).eval()
    for weight in model.parameters():
        weight.data.zero_()
    ids = gpt.read(run / "tokens", "val")
    uniform = sum(level.grid[0] * level.grid[1] * torch.tensor(level.codebook_size).log() for level in made.levels)
    assert torch.allclose(gpt.nats(model, ids, mask, made.slots.prompt), uniform.expand(len(ids)))


def test_training_learns_a_record(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "BATCH", 4)
    monkeypatch.setattr(gpt, "LEARNING_RATE", 2e-2)
    ids = gpt.read(run / "tokens", "train")[:1]
    made = TokenDataset(run / "tokens", "train").layout
    mask, prompt = gpt.forbidden(made), made.slots.prompt
    model = gpt.small_gpt(made, **SIZES)
    with torch.no_grad():
        before = gpt.nats(model.eval(), ids, mask, prompt).mean()
    after = gpt.nats(gpt.train(model, ids, mask, prompt, steps=40), ids, mask, prompt).mean()
    assert after < 0.85 * before  # 0.70 of it, whatever the seed
