"""metrics.csv, the other loggers, and pictures sent to them."""

import csv
import io
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import exists, is_local, read_bytes, write_text


class MetricsCSV(Logger):
    """One row a step in a CSV file that a resumed run goes on with.

    Rows after the first step that this process logs belong to a life that was cut short, and give way.

    Args:
        path: of metrics.csv.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] | None = None
        self.names: list[str] = []  # columns of the file, once this process has written it

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step: a line more, or the file anew where a column or a row changes."""
        step = int(step or 0)
        if self.rows is None:
            self.rows = {number: row for number, row in self._read().items() if number <= step}
        values = {name: f"{float(value):.6g}" for name, value in metrics.items() if name != "epoch"}
        if self.names and values.items() <= self.rows.get(step, {}).items():
            return
        fresh = step not in self.rows and set(values) <= set(self.names)
        self.rows.setdefault(step, {}).update(values)
        if fresh and is_local(self.path):
            with self.path.open("a") as file:
                self._writer(file).writerow({"step": step, **values})
            return
        self.names = sorted({name for row in self.rows.values() for name in row})
        text = io.StringIO()
        self._writer(text).writeheader()
        self._writer(text).writerows({"step": number, **row} for number, row in sorted(self.rows.items()))
        write_text(self.path, text.getvalue())

    def _writer(self, file: Any) -> csv.DictWriter:
        return csv.DictWriter(file, ["step", *self.names], restval="", lineterminator="\n")

    def _read(self) -> dict[int, dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open() as file:
            rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
        return {step: {name: value for name, value in row.items() if value} for step, row in rows.items()}


def make_loggers(kind: str, folder: Path) -> list[Logger]:
    """Return metrics.csv and, when asked, wandb or TensorBoard.

    Args:
        kind: "csv", "wandb" or "tensorboard".
        folder: of the stage; a resumed stage goes on in the same wandb run, also where the folder has moved.
    """
    loggers: list[Logger] = [MetricsCSV(folder / "metrics.csv")]
    if kind == "tensorboard":
        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    if kind == "wandb":
        place = folder.resolve() if is_local(folder) else folder
        name = "-".join(str(place).split("/")[-3:])
        identity = folder / "wandb-run"
        if not exists(identity):
            begun = (folder / "config.yaml").stat().st_mtime  # a stage made again is another run
            write_text(identity, digest([str(place), begun])[:16])
        run = read_bytes(identity).decode()
        save_dir = str(folder) if is_local(folder) else tempfile.gettempdir()
        loggers.append(WandbLogger(name=name, id=run, project="smalti", save_dir=save_dir, resume="allow"))
    return loggers


def log_picture(loggers: list[Logger], name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every logger that shows pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
