"""The generator: a tokenizer and its priors as one, for whoever only wants images.

B batch, C channels, H W pixels, h w code grid.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from pipelines.card import files_about, is_run, model_card
from pipelines.errors import StageError, told_to_user
from pipelines.stages.sample import Drawn, SampleConfig, drawn_batches
from pipelines.storage.fingerprint import check_belong_together, tokenizer_fingerprint
from pipelines.storage.folders import publish_model
from pipelines.storage.paths import make_folder, place, whole
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE
from tokenizer.hub import can_be_repository, model_folder

# Files of a model, and all that a published generator may have.
OF_MODEL = ("config.json", "model.safetensors")
PUBLISHED = [
    *("README.md", "grid.png", "metrics.json", "tokenizer/README.md"),
    *(f"{model}/{name}" for model in ("tokenizer", "prior/level*") for name in (*OF_MODEL, "metrics.json")),
]
# Samples drawn at once when nobody says how many: as many as the stage does.
BATCH_SIZE = SampleConfig().batch_size


class Generator(nn.Module):
    """Draws images: the priors draw codes, the tokenizer decodes them.

    A module like any other: `to` moves it to a GPU.

    Args:
        tokenizer: whose codes the priors learned.
        prior: of all its levels.
        about: files that go with it when it is saved, by path: its card README.md, grid.png, metrics.json.

    Raises:
        StageError: the models do not belong together.
    """

    def __init__(
        self, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior, about: Mapping[str, bytes] | None = None
    ) -> None:
        super().__init__()
        check_belong_together(prior, tokenizer_fingerprint(tokenizer))
        config = prior.levels[-1].config
        if config.levels != tokenizer.levels:
            raise StageError(
                f"the tokenizer has levels of {tokenizer.grids} codes of {tokenizer.codebook_sizes} but "
                f"the priors draw {config.grids} of {config.codebook_sizes}; run `smalti train-prior`"
            )
        self.tokenizer, self.prior = tokenizer, prior
        self.about = dict(about or {})
        self.eval()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty when there are none."""
        return self.prior.class_names

    def sample(
        self,
        classes: Sequence[int | str] | Tensor | int | str | None = None,
        seed: int = 0,
        temperature: float | list[float] = 1.0,
        top_k: int | list[int] = 0,
        top_p: float | list[float] = 1.0,
        guidance: float | list[float] = 1.0,
        count: int | None = None,
        batch_size: int | None = None,
        precision: str = "float32",
    ) -> Drawn:
        """Draw images and their codes: what `smalti sample` draws with the same classes, seed and settings.

        The codes of sample i are a function of the weights, its class, the settings, the seed and i, but for codes
        whose uniform lies within rounding of an edge of the distribution. On one kind of device with one thread count,
        the stage's batch_size gives the stage's codes to the last one.

        Args:
            classes: integers are indices, strings are names; taken in turn. None takes all classes in turn.
            seed: of all that is drawn.
            temperature: one for all levels or a list of one per level, as for the three that follow.
            top_k: keep the k likeliest codes; 0 keeps all.
            top_p: keep the likeliest codes that together reach this probability; 1 keeps all.
            guidance: s of uncond + s (cond - uncond); 1 is the model as it is.
            count: how many images; one of each of the classes if not given.
            batch_size: images drawn at once, the last batch filled up; if not given all, or at most the stage's 50.
            precision: "float32" (TF32 off) or "bfloat16".

        Returns:
            images, float (B, C, H, W) in [-1, 1]; codes, int64 (B, h, w) per level, coarse to fine.

        Raises:
            ValueError: a class does not exist, a setting is out of range, or guidance is asked of no class.
        """
        labels = self._class_indices(classes)
        count = max(1, len(labels)) if count is None else count
        config = SampleConfig(
            count=count,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            batch_size=min(count, BATCH_SIZE) if batch_size is None else batch_size,
            precision=precision,
        )
        with _tf32_off(precision == "float32"):
            batches = list(drawn_batches(config, seed, labels, self.tokenizer, self.prior, {}, 0, count))
        levels = zip(*(batch.codes for batch in batches), strict=True)
        images = torch.cat([batch.images for batch in batches])[:count]
        return Drawn(images, [torch.cat(codes)[:count] for codes in levels])

    def _class_indices(self, wanted: Any) -> list[int]:
        """Return class indices from names and indices; all of them when none are wanted."""
        names = self.class_names
        if isinstance(wanted, str) or not hasattr(wanted, "__len__") or getattr(wanted, "ndim", 1) == 0:
            wanted = [] if wanted is None else [wanted]
        indices = []
        for one in wanted:
            number = names.index(one) if isinstance(one, str) and one in names else _integer(one)
            if not 0 <= number < len(names):
                shown = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
                known = (
                    f"names or indices of the {len(names)} classes ({shown})" if names else "left out: there are none"
                )
                raise ValueError(f"classes must be {known}, got {one!r}")
            indices.append(number)
        return indices or list(range(len(names)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write models, model card, figures and sample grid; a card that the generator came with stays as it is.

        A generator that was published in the folder is replaced.

        Raises:
            StageError: the folder cannot be written, or holds a run or anything else that is no published generator.
        """
        if not str(folder):
            raise StageError("folder must name a folder to publish in, got an empty name")
        root = place(folder, writable=True)
        before = _published_in(root)
        models: dict[str, HierarchicalVQVAE | LevelPrior] = {"tokenizer": self.tokenizer}
        models |= {f"prior/level{number}": level for number, level in enumerate(self.prior.levels)}
        for name, model in models.items():
            make_folder(root / name)
            publish_model(model, root / name)
        card = model_card(self.tokenizer, self.prior, self.about).encode()
        about = {"README.md": card} | self.about
        for name, data in about.items():
            with whole(root / name) as temporary:
                temporary.write_bytes(data)
        written = {*about, "tokenizer/README.md", *(f"{name}/{file}" for name in models for file in OF_MODEL)}
        for path in before - {root / name for name in written}:
            path.unlink()
            with suppress(OSError):  # not empty, or a store, which has no folders
                path.parent.rmdir()

    def push_to_hub(self, name: str, private: bool | None = None, commit_message: str = "Generator of smalti") -> str:
        """Publish on the hub what `save_pretrained` writes, over what is there; return the URL of the commit.

        Args:
            name: of the repository, "user/model"; made if there is none.
            private: whether a new repository can be seen by others; None leaves it to the account's settings.
            commit_message: of the upload.
        """
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=commit_message, delete_patterns=PUBLISHED
            )
        return done.commit_url

    @classmethod
    def from_pretrained(cls, name: str | Path, tokenizer: str | Path = "", revision: str | None = None) -> Self:
        """Load a generator in eval mode.

        Args:
            name: a run folder or a published one; what cannot be a folder here is a hub id.
            tokenizer: folder or hub id of the tokenizer of a run that took it from elsewhere (`tokenizer.from`).
            revision: branch, tag or commit on the hub.

        Raises:
            StageError: no such folder, something is missing in it, or the models do not belong together.
        """
        with told_to_user():
            folder = model_folder(name, "generator", PUBLISHED, revision)
            model = HierarchicalVQVAE.from_pretrained(tokenizer or folder / "tokenizer")
            if is_run(folder):  # it may hold levels that an earlier tokenizer had
                folders = [folder / "prior" / f"level{level}" for level in range(len(model.levels))]
                prior = HierarchicalPrior([LevelPrior.from_pretrained(path) for path in folders])
            else:
                prior = HierarchicalPrior.from_pretrained(folder / "prior")
        return cls(model, prior, files_about(folder, model, prior))


def _integer(value: object) -> int:
    """Return what is given as an index, -1 where it is none."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.bool_):
        return -1
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1


def _published_in(root: Path) -> set[Path]:
    """Return the files of the generator that is published in a folder; none where it is empty.

    Raises:
        StageError: it holds a run or anything else.
    """
    ours = {path for pattern in PUBLISHED for path in root.glob(pattern)}
    whole_one = {root / name for name in ("README.md", "tokenizer/model.safetensors", "prior/level0/model.safetensors")}
    beside = {path for part in ("tokenizer", "prior") for path in (root / part).rglob("*") if path.is_file()} - ours
    if next(root.glob("[!.]*"), None) and (beside or not whole_one <= ours):
        raise StageError(
            f"{root} must be empty or hold a published generator, but holds other work; choose another folder"
        )
    return ours


def names_models(name: str) -> bool:
    """Whether a name on the command line is that of a folder or a repository of models, and not of a config."""
    return Path(name).expanduser().is_dir() or (can_be_repository(name) and Path(name).suffix not in (".yaml", ".yml"))


@contextmanager
def _tf32_off(off: bool) -> Iterator[None]:
    """Draw as precisely as the stages do, and leave the process as it was."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not off
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
