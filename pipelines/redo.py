"""--redo: a folder is emptied once for one command, however often that is stopped and given again."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from pipelines.config import Config
from pipelines.storage.fingerprint import digest, hashed
from pipelines.storage.folders import empty_stage
from pipelines.storage.paths import make_folder, read_bytes, write_text
from pipelines.storage.renamed import first_named

logger = logging.getLogger(__name__)

# Names, in the environment, the note of the `run` that started this stage as a command of its own.
NOTE = "SMALTI_REDO"


class Redo:
    """What a command makes again, and which folders it has emptied for that.

    The latter stand in a note in the run folder until the command is done, so that the same one goes on when it is
    given again. A note ends, too, when another command empties or completes a folder that stands in it.

    Args:
        root: of the run.
        stages: to make again.
        config: of the command; other settings make it another command, but for where it runs.
        command: "run", or the stage.
        level: the only one whose prior is trained.
    """

    def __init__(
        self, root: Path, stages: Collection[str], config: Config, command: str = "run", level: int | None = None
    ) -> None:
        self.root, self.stages, self.command = root, set(stages), command
        settings = first_named({k: v for k, v in hashed(config).items() if k not in ("run_dir", "compute")})
        # What is left open says nothing, as before it could be said.
        settings["images"] = {name: value for name, value in settings["images"].items() if value != "auto"}
        if settings["prior"]["network"] == "auto":
            settings["prior"]["network"] = "transformer"
        own = f".redo-{digest([command, sorted(stages), level, settings])[:16]}"
        self.started_by_run = NOTE in os.environ
        self.note = root / os.environ.get(NOTE, own)
        self.seen: set[Path] = set()

    def due(self, stage: str, folder: Path) -> bool:
        """Whether a stage's folder is still to be emptied."""
        return stage in self.stages and self._name(folder) not in _emptied(self.note)

    def empty(self, stage: str, folder: Path) -> None:
        """Empty a stage's folder and note that, if it is due."""
        if self.due(stage, folder):
            make_folder(folder)
            empty_stage(folder, stage)
            self.settled(folder)
            write_text(self.note, "".join(f"{name}\n" for name in [*_emptied(self.note), self._name(folder)]))
        elif stage in self.stages and folder not in self.seen:
            logger.info(
                "%s: goes on in %s, which --redo has emptied; remove %s to begin again", stage, folder, self.note
            )
        self.seen.add(folder)

    def settled(self, folder: Path) -> None:
        """End what other commands began with a folder that this one has emptied or completed."""
        for note in list(self.root.glob(".redo-*")):
            if note.name != self.note.name and self._name(folder) in _emptied(note):
                note.unlink(missing_ok=True)

    def done(self) -> None:
        """End the note of this command; a whole run leaves nothing to go on with for any other either."""
        if self.started_by_run:
            return
        for note in list(self.root.glob(".redo-*")) if self.command == "run" else [self.note] if self.stages else []:
            note.unlink(missing_ok=True)

    def _name(self, folder: Path) -> str:
        return str(folder).removeprefix(f"{self.root}/")


def _emptied(note: Path) -> list[str]:
    try:
        return read_bytes(note).decode().splitlines()
    except FileNotFoundError:
        return []
