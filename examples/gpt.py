"""A transformer of Hugging Face draws new digits: trained on exported tokens, with nothing of smalti but the layout.

    smalti run configs/digits.yaml && smalti export configs/digits.yaml --export.views all
    python examples/gpt.py runs/digits

B batch, N tokens of a record, V ids.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks are not installed
from benchmarks.digits import fit_judge, reduced
from pipelines.tokens.dataset import TokenDataset
from pipelines.tokens.layout import TokenLayout
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE

STEPS, BATCH, LEARNING_RATE, SAMPLES = 1000, 64, 1e-3, 500


def read(folder: Path, split: str) -> Tensor:
    """Return all records of a split, int64 (B, N)."""
    data = TokenDataset(folder, split)
    return torch.stack([data[number] for number in range(len(data))])


def forbidden(layout: TokenLayout) -> Tensor:
    """Return what cannot stand at each place, bool (N, V): all but `allowed`, the same for every record."""
    assert layout.length, "records must have one length: leave <text> out"
    mask = torch.ones(layout.length, layout.vocabulary.rows, dtype=torch.bool)
    for place in range(layout.length):
        mask[place, layout.allowed(range(place))] = False
    return mask


def small_gpt(layout: TokenLayout, **changes: int) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 for a layout's records."""
    sizes: dict = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": layout.length} | changes
    sizes |= {"vocab_size": layout.vocabulary.rows, "bos_token_id": None, "eos_token_id": None}
    # torch has a kernel of its own for attention without dropout, and for this gelu.
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(activation_function="gelu", **sizes, **dropout))


def nats(model: torch.nn.Module, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Return the negative log-likelihood (B,) of what follows the prompt, among what may stand there."""
    logits = model(ids[:, :-1]).logits.masked_fill(mask[1:], -torch.inf)  # (B, N - 1, V)
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")[:, prompt - 1 :].sum(1)


def train(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, prompt: int, steps: int) -> GPT2LMHeadModel:
    """Return the model that training leaves, its weights averaged over the last steps."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        loss = nats(model, ids[torch.randint(len(ids), (BATCH,))], mask, prompt).mean()
        optimizer.zero_grad()
        (loss / ids.shape[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    return averaged.module.eval()


@torch.no_grad()
def draw(model: GPT2LMHeadModel, prompts: Tensor, mask: Tensor, seed: int) -> Tensor:
    """Return records (B, N) that begin with the prompts: temperature 1, no filter but what may stand at each place."""
    ids, generator = prompts, torch.Generator().manual_seed(seed)
    while ids.shape[1] < len(mask):
        logits = model(ids).logits[:, -1].masked_fill(mask[ids.shape[1]], -torch.inf)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(1), 1, generator=generator)], 1)
    return ids


def classes_of(ids: Tensor, layout: TokenLayout) -> Tensor:
    """Return the class index (B,) of each record."""
    return (ids[:, :, None] == torch.tensor(layout.describe()["classes"])).nonzero()[:, 2]


def main(run: Path, steps: int = STEPS, samples: int = SAMPLES, **sizes: int) -> dict[str, float]:
    """Train, draw, judge; print the figures and return them."""
    torch.manual_seed(0)
    layout, tokenizer = TokenLayout.load(run / "tokens"), HierarchicalVQVAE.from_pretrained(run / "tokenizer")
    training, held_out = read(run / "tokens", "train"), read(run / "tokens", "val")
    mask, prompt, begun = forbidden(layout), layout.slots.prompt, time.monotonic()
    model = train(small_gpt(layout, **sizes), training, mask, prompt, steps)
    print(f"trained on {len(training)} records in {time.monotonic() - begun:.0f} s")
    wanted = torch.arange(samples) % len(layout.stated.class_names)
    blank = [torch.zeros(samples, *level.grid, dtype=torch.int64) for level in layout.levels]
    drawn = draw(model, layout.encode(blank, wanted)[:, :prompt], mask, seed=1)
    judged = fit_judge().predict(reduced((layout.images(drawn, tokenizer)[:, 0].numpy() + 1) / 2))
    asked = torch.tensor([int(name) for name in layout.stated.class_names])[wanted].numpy()
    known = {codes.numpy().tobytes() for codes in training[:, prompt:]}
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    with torch.inference_mode():
        ours = prior.nll(layout.decode(held_out), classes_of(held_out, layout))
        theirs = nats(model, held_out, mask, prompt)
    repeats = sum(codes.numpy().tobytes() in known for codes in drawn[:, prompt:]) / samples
    figures = {"recognised": float((judged == asked).mean()), "repeats": repeats}
    figures |= {"val_nats": float(theirs.mean()), "val_nats_of_prior": float(ours.mean())}
    print(f"{samples} samples: {figures['recognised']:.1%} recognised", end=", ")
    print(f"{figures['repeats']:.1%} repeat a training image's codes")
    print(f"val nats per image: {figures['val_nats']:.2f}, of smalti's own prior {figures['val_nats_of_prior']:.2f}")
    return figures


if __name__ == "__main__":
    main(Path(sys.argv[1]))
