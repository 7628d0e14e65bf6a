"""SIGKILL at random moments in every stage, then the same command again: does a run end as if nothing had happened?

    python tests/hard/kills.py [--kills 100] [--seed 0] [--folder F] [--report kills.json]

A small run on a CPU is made once undisturbed, and once with each stage killed again and again and started again at
once. After each kill nothing under a final name may be half-written and no process may be left ten seconds later; the
next start must go on from the last checkpoint or shard. A stage that ends before its share of kills is spent is
compared, removed and made again. Compared are bytes of shards, receipts, manifests and pictures, tensors of models bit
for bit, rows of metrics. Exit code 0 if all of it holds, else 1. About six minutes on two cores.

Most starts are forks of this process, which has imported everything already; every tenth is a command of its own.
"""

import argparse
import atexit
import csv
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset  # noqa: F401  # as are the stages below: so that forks need not import it
import yaml
from safetensors.torch import load_file

import pipelines.run
import pipelines.stages.train_prior
import pipelines.stages.train_tokenizer  # noqa: F401
from pipelines.cli import main as smalti
from pipelines.storage.receipts import read_receipt

PATIENCE_S, STEPS, CHECKPOINT_EVERY = 10.0, 200, 5
TRAINING = {"steps": STEPS, "batch_size": 32, "micro_batches": 2, "learning_rate": 1e-3, "weight_ema": 0.9} | {
    "val_every": 25, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1, "precision": "32-true"
}  # fmt: skip
NARROW = {"heads": 2, "conditioning_blocks": 1}
SETTINGS = {
    "images": {"source": "digits", "size": 32, "channels": 1, "upscale": True, "shard_size": 100},
    "tokenizer": {
        "model": {"strides": [8, 4], "codebook_size": [16, 32], "code_dim": 8, "width": 16, "residual_width": 8},
        "augment": {"flip": True, "shift": 2},
        "training": TRAINING,
    },
    "encode": {"views": ["image", "crop-flip"], "batch_size": 20},
    "prior": {
        "network": ["transformer", "pixelsnail"],
        "transformer": {"width": 16, "depth": 1, **NARROW},
        "pixelsnail": {"width": 8, "blocks": 1, "residual_blocks": 1, "attention_width": 8, **NARROW},
        "dropout": 0.1,
        "training": TRAINING,
    },
    "sample": {"count": 100, "batch_size": 5, "shard_size": 5},
    "compute": {"accelerator": "cpu", "threads": 1, "num_workers": 0},
}


class Stage(NamedTuple):
    """A stage: command, folder, share of a hundred kills, seconds from begin to kill at most, worker processes."""

    command: tuple[str, ...]
    folder: str
    share: int
    delay_s: float
    workers: int = 0

    @property
    def trains(self) -> bool:
        return self.command[0].startswith("train")


STAGES = (
    Stage(("pack",), "images", 14, 0.15, workers=2),  # in the second half of its kills
    Stage(("train-tokenizer",), "tokenizer", 21, 1.0, workers=1),
    Stage(("encode",), "codes", 14, 0.4),
    Stage(("train-prior", "--level", "0"), "prior/level0", 19, 0.6),
    Stage(("train-prior", "--level", "1"), "prior/level1", 19, 0.6),
    Stage(("sample",), "samples", 14, 0.15),
)


class State(NamedTuple):
    """What a stage has: the checkpoint's step, steps logged, shards done (which file, made when) and those in hand."""

    step: int
    logged: int
    done: dict[str, tuple[int, int]]
    in_hand: set[str]


def state_of(folder: Path) -> State:
    """Look at what a stage has left."""
    last, metrics = folder / "checkpoints" / "last.ckpt", folder / "metrics.csv"
    step = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    rows = list(csv.DictReader(metrics.open())) if metrics.exists() else []
    shards = {path: path.stat() for path in folder.glob("*.tar")}
    done = {path.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in shards.items() if read_receipt(path)}
    in_hand = {path.stem for path in shards if path.name not in done}
    in_hand |= {path.name.split(".")[1] for path in folder.glob(".*.tar.*.tmp")}
    return State(step, 1 + int(rows[-1]["step"]) if rows else 0, done, in_hand)


def signs(folder: Path) -> set[tuple[str, int]]:
    """Return what shows that a stage goes on: receipts, metrics, checkpoints, what is being written, by time."""
    patterns = ("*.json", ".*.tar.*.tmp", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/.*.tmp")
    found = set()
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed just now
            continue
    return found


def start(arguments: list[str], plain: bool, log: Path) -> int:
    """Start a command, as a fork of this process or from nothing; return its process."""
    if plain:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=files)
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = smalti(arguments)
        atexit._run_exitfuncs()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def begun(pid: int) -> str:
    """Return when a process started, which tells it from a later one of its number; nothing if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process has started, and theirs."""
    found: dict[int, str] = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child: begun(child)} | descendants(child)
    return found


def damage(*folders: Path) -> list[str]:
    """Return what is half-written under a final name."""

    def shard(path: Path) -> None:
        if receipt := read_receipt(path):
            assert receipt["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), "not what its receipt says"

    def ending(end: bytes) -> Callable[[Path], int]:
        return lambda path: path.read_bytes().rindex(end, path.stat().st_size - len(end))

    checks: dict[str, Callable[[Path], Any]] = {
        "json": lambda path: json.loads(path.read_text()),
        "tar": shard,
        "yaml": lambda path: yaml.safe_load(path.read_text())["seed"],
        "csv": ending(b"\n"),
        "png": ending(b"IEND\xaeB`\x82"),
        "npy": lambda path: np.load(path, mmap_mode="r"),
        "ckpt": lambda path: torch.load(path, weights_only=True),
        "safetensors": load_file,
    }
    found = []
    for path in (path for folder in folders for path in folder.rglob("*.*") if path.suffix[1:] in checks):
        try:
            checks[path.suffix[1:]](path)
        except Exception as error:
            found.append(f"{path}: {type(error).__name__} {str(error)[:200]}")
    return found


def differences(made: Path, reference: Path) -> list[str]:
    """Compare a finished stage with the undisturbed one; checkpoints, which name their folders, by their models."""
    both = [
        {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix not in (".ckpt", ".tmp")}
        for folder in (made, reference)
    ]
    found = [f"{made / name}: only in one of the two" for name in sorted(both[0] ^ both[1])]
    for name in sorted(both[0] & both[1]):
        ours, theirs = made / name, reference / name
        if name == "metrics.csv":
            rows = [{row["step"]: row for row in csv.DictReader(path.open())} for path in (ours, theirs)]
            unlike = [step for step in rows[0].keys() | rows[1].keys() if rows[0].get(step) != rows[1].get(step)]
            found += [f"{ours}: steps {sorted(unlike, key=int)}"] if unlike else []
        elif name.endswith(".safetensors"):
            tensors = [{key: one.numpy().tobytes() for key, one in load_file(path).items()} for path in (ours, theirs)]
            found += [] if tensors[0] == tensors[1] else [f"{ours}: other tensors"]
        elif ours.read_bytes() != theirs.read_bytes():
            found.append(f"{ours}: other bytes")
    return found


class Killing:
    """Kills the stages of a run, and keeps account of it.

    Args:
        config: of the run.
        run: its folder.
        reference: the undisturbed one.
        seed: of the moments.
    """

    def __init__(self, config: Path, run: Path, reference: Path, seed: int) -> None:
        self.config, self.run, self.reference = config, run, reference
        self.random = random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        # Pairs of a stage and what there is to tell: resumes, finished stages, and what must not be.
        self.resumes: list[tuple[str, str]] = []
        self.finished: list[tuple[str, str]] = []
        self.differences: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str]] = []
        self.survivors: list[tuple[float, str, dict[int, str]]] = []  # to be gone by then
        self.to_begin: dict[tuple[str, bool], float] = {}

    def stage(self, stage: Stage, share: int) -> None:
        """Kill a stage as often as its share says, and see it through to its end."""
        folder, spent, failed, near_end, killed = self.run / stage.folder, 0, 0, False, False
        before = state_of(folder)
        while True:
            how = "not" if spent == share else self.random.choices(("start", "progress", "write"), (12, 63, 25))[0]
            if share - 2 <= spent < share and not near_end:
                how, near_end = "end", True
            workers = stage.workers if stage.trains or 2 * spent >= share else 0
            kill, code, went_on = self.attempt(stage, how, workers)
            after = state_of(folder)
            if killed and (before.step or before.done) and (went_on or code == 0):
                self.resumes.append((stage.folder, how))
            self.judge(stage, before, after)
            if kill:
                lost = max(0, after.logged - after.step) if stage.trains else len(after.in_hand)
                allowed = CHECKPOINT_EVERY if stage.trains else max(1, workers)
                has = {"step": after.step, "logged": after.logged} if stage.trains else {"done": len(after.done)}
                self.kills.append(kill | {"lost": lost, "allowed": allowed, **has})
                print(f"{len(self.kills):4d}", *(f"{key} {value}" for key, value in self.kills[-1].items()), flush=True)
                self.fault(stage, f"lost {lost}" if lost > allowed else "")
                spent, failed = spent + 1, 0
            elif code:
                failed += 1
                self.fault(stage, f"ended with code {code}: {self.log(stage).read_text()[-300:].strip()}")
                if failed > 5:
                    raise SystemExit(f"{stage.folder} fails again and again")
                time.sleep(1)
            else:
                self.finish(stage)
                if spent == share:
                    return
                shutil.rmtree(folder)
                shutil.rmtree(self.run / "prior" / "codes", ignore_errors=True)
                after = state_of(folder)
            before, killed = after, bool(kill) or (killed and bool(code))

    def attempt(self, stage: Stage, how: str, workers: int) -> tuple[dict[str, Any] | None, int, bool]:
        """Start a stage and kill it: the kill, or None and the code that it ended with; whether it had begun."""
        folder, plain = self.run / stage.folder, len(self.kills) % 10 == 5
        arguments = [stage.command[0], str(self.config), *stage.command[1:], "--compute.num_workers", str(workers)]
        old, chance, at, begin, due = signs(folder), self.random.random(), time.monotonic(), 0.0, math.inf
        if how == "start":
            due = at + chance * self.to_begin.get((stage.folder, plain), 5.0 if plain else 2.0)
        pid = start(arguments, plain, self.log(stage))
        while (now := time.monotonic()) < due:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return None, os.waitstatus_to_exitcode(status), bool(begin)
            new = {name for name, _ in signs(folder) - old}
            if not begin and any(not name.endswith(".tmp") or ".tar." in name for name in new):
                begin = now
                self.to_begin[stage.folder, plain] = now - at
            if due == math.inf and begin:
                if how == "progress" or (how == "write" and not stage.trains):
                    due = now + chance * stage.delay_s
                elif how == "write" and any(".ckpt." in name for name in new):
                    due = now + chance * 0.02
                elif how == "end" and self.nearly_done(stage):
                    due = now + chance * stage.delay_s / 2
            time.sleep(0.002)
        children = descendants(pid)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            return None, os.waitstatus_to_exitcode(status), bool(begin)
        self.survivors.append((time.monotonic() + PATIENCE_S, stage.folder, children))
        phase, way = "begun" if begin else "before", "command" if plain else "fork"
        kill = {"stage": stage.folder, "phase": phase, "how": how, "way": way, "seconds": round(now - at, 3)}
        return kill, 0, bool(begin)

    def nearly_done(self, stage: Stage) -> bool:
        """Whether the last step, or all but one shard, is done."""
        made, reference = (len(list((run / stage.folder).glob("*.tar"))) for run in (self.run, self.reference))
        last = (self.run / stage.folder / "metrics.csv").read_text().splitlines()[-1] if stage.trains else ""
        return last.startswith(f"{STEPS - 1},") if stage.trains else made >= reference - 1

    def judge(self, stage: Stage, before: State, after: State) -> None:
        """Note what is damaged, was done and has been made again, or is left over of processes."""
        for one in damage(self.run / stage.folder, self.run / "prior" / "codes"):
            self.fault(stage, f"half-written: {one}")
        self.fault(stage, f"back from step {before.step} to {after.step}" if after.step < before.step else "")
        again = [name for name in before.done if after.done.get(name) != before.done[name]]
        self.fault(stage, f"done, and made again: {again}" if again else "")
        self.look_for_survivors()

    def finish(self, stage: Stage) -> None:
        """Compare a finished stage, and look for what is left of half-written files."""
        found = differences(self.run / stage.folder, self.reference / stage.folder)
        self.differences += [(stage.folder, one) for one in found]
        for path in (*(self.run / stage.folder).rglob(".*.tmp"), *(self.run / "prior").glob("codes/.*.tmp")):
            self.fault(stage, f"left over: {path}")
        self.finished.append((stage.folder, ""))
        print(f"  {stage.folder}: finished, {len(found)} differences {found[:2] or ''}", flush=True)

    def look_for_survivors(self) -> None:
        """Note processes that should be gone by now."""
        now = time.monotonic()
        left = [
            (due, stage, {p: s for p, s in group.items() if s and begun(p) == s})
            for due, stage, group in self.survivors
        ]
        self.faults += [
            (stage, f"{len(group)} left after {PATIENCE_S} s") for due, stage, group in left if group and due < now
        ]
        self.survivors = [one for one in left if one[2] and one[0] >= now]

    def fault(self, stage: Stage, what: str) -> None:
        """Note what must not be, if there is anything."""
        if what:
            self.faults.append((stage.folder, what))
            print(f"  {stage.folder}: FAULT {what}", flush=True)

    def log(self, stage: Stage) -> Path:
        return self.run.parent / f"{stage.folder.replace('/', '-')}.log"

    def report(self) -> bool:
        """Print the table; return whether all is well."""
        head = ("kills", "begun", "before", "commands", "resumes", "finished", "lost", "allowed", "differ", "faults")
        print(f"\n{'stage':13}" + "".join(f"{name:>9}" for name in head))
        lists = (self.resumes, self.finished, self.differences, self.faults)
        for stage in (*(stage.folder for stage in STAGES), ""):
            kills = [kill for kill in self.kills if stage in (kill["stage"], "")]
            after = sum(kill["phase"] == "begun" for kill in kills)
            resumes, finished, differ, faults = (sum(stage in (one, "") for one, _ in found) for found in lists)
            most = (
                [max((kill[name] for kill in kills), default=0) for name in ("lost", "allowed")] if stage else ["", ""]
            )
            commands = sum(kill["way"] == "command" for kill in kills)
            row = (len(kills), after, len(kills) - after, commands, resumes, finished, *most, differ, faults)
            print(f"{stage or 'total':13}" + "".join(f"{cell:>9}" for cell in row))
        for stage, what in [*self.differences, *self.faults]:
            print(f"  {stage}: {what[:200]}")
        print(f"{len(kills)} kills, {after / max(1, len(kills)):.0%} of them after the first step or shard began")
        return not differ and not faults and after >= 0.8 * len(kills)


def command(arguments: list[str], log: Path) -> str:
    """Run a command of its own; return what it said if it failed."""
    _, status = os.waitpid(start(arguments, True, log), 0)
    return f"{arguments[0]} failed: {log.read_text()[-500:]}" if status else ""


@contextmanager
def new_folder(named: Path | None) -> Iterator[Path]:
    """Yield the folder that was named, or a temporary one.

    A fork that comes to its end runs the finalizers that it inherits: a TemporaryDirectory would go with the first one.
    """
    folder = (named or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    yield folder
    if not named:
        shutil.rmtree(folder)


def main() -> int:
    """Make both runs and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="a new folder for both runs; a temporary one if none is named")
    parser.add_argument("--report", type=Path, help="JSON file for the list of kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with new_folder(options.folder) as folder:
        (folder / "tmp").mkdir(parents=True)
        os.environ |= {"TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        tempfile.tempdir = None
        for name in ("reference", "killed"):
            (folder / f"{name}.yaml").write_text(json.dumps({"run_dir": str(folder / name), "seed": 0, **SETTINGS}))
        if failure := command(["run", str(folder / "reference.yaml")], folder / "reference.log"):
            raise SystemExit(failure)
        print(f"the undisturbed run took {time.monotonic() - began:.0f} s", flush=True)
        killing = Killing(folder / "killed.yaml", folder / "killed", folder / "reference", options.seed)
        for stage in STAGES:
            killing.stage(stage, math.ceil(options.kills * stage.share / 100))
        killing.fault(STAGES[-1], command(["verify", str(folder / "killed.yaml")], folder / "verify.log"))
        while killing.survivors:
            time.sleep(0.5)
            killing.look_for_survivors()
        well = killing.report()
        print(f"{time.monotonic() - began:.0f} s in all")
    found = {"kills": killing.kills, "differences": killing.differences, "faults": killing.faults}
    if options.report:
        options.report.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
