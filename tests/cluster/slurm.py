"""The job scripts of `configs/slurm` on a real Slurm of one machine, interrupted in every way that Slurm knows.

    python tests/cluster/slurm.py [--keep]

Needs slurmctld, slurmd and munged (Debian: `apt-get install slurm-wlm munge`), and `smalti` on the path or in `.venv`;
neither accounting nor cgroups nor root. It starts its own Slurm on loopback in a temporary folder, and takes some
minutes. `run.sh` submits a tiny run, of which

- the tokenizer's job is preempted and has a grace time: SIGTERM, then its script asks to be requeued;
- the jobs of the priors, which run at the same time, are preempted without one: Slurm requeues, then sends SIGTERM;
- the sampling job, of several tasks, gets SIGUSR1;
- a prior of a run of its own, trained by two tasks, comes to its time limit: SIGUSR1 from Slurm.

All must leave in time, come back, go on from where they were, and end with the very bytes of undisturbed runs outside
Slurm. The exit code is 0 if they do. `--keep` leaves the folder with all logs.
"""

import contextlib
import getpass
import hashlib
import json
import os
import pickletools
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "configs" / "slurm"
# What an interrupted job may take to leave, in seconds; a step of the tiny models takes hundredths of one.
LEAVES_WITHIN_S = 10
TRAINING = {"batch_size": 32, "learning_rate": 1e-3, "val_every": 500, "checkpoint_every": 100}
CONFIG = {
    "images": {"source": "digits", "size": 16, "channels": 1, "upscale": True, "shard_size": 400},
    "tokenizer": {
        "model": {"strides": [8, 4], "codebook_size": [16, 32], "code_dim": 8, "width": 16, "residual_width": 8},
        "augment": {"flip": False, "shift": 1},
        "training": {"steps": 1000, **TRAINING},
    },
    "prior": {
        "network": ["transformer", "pixelsnail"],
        "transformer": {"width": 16, "depth": 1, "heads": 2, "conditioning_blocks": 1},
        "pixelsnail": {"width": 8, "blocks": 1, "residual_blocks": 1, "heads": 2, "attention_width": 8},
        "training": {"steps": [2000, 1000], **TRAINING},
    },
    "sample": {"count": 400, "batch_size": 4, "shard_size": 8},
    "compute": {"accelerator": "cpu", "threads": 1, "num_workers": 0},
}
FAILED = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
# Two partitions whose jobs make way for those of `urgent`, with a grace time and without.
# A requeued job waits for cred_expire to pass, two minutes by default. More CPUs than there are let several jobs run.
SLURM_CONF = """\
ClusterName=smalti
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
MinJobAge=3600
KillWait=30
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=32 State=UNKNOWN
PartitionName=patient Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=hasty Nodes=ALL PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Failure(Exception):
    """Something did not go as it must."""


class Interruption(NamedTuple):
    """What an interruption came to."""

    job: str
    how: str
    seconds: float  # until the job had left the node, from the order on: Slurm's own part, about a second, is in it

    def __str__(self) -> str:
        return f"{self.job:<22} {self.how:<36} requeued, left after {self.seconds:.1f} s"


class Cluster:
    """A running Slurm.

    Args:
        folder: with its slurm.conf; jobs leave their logs there.
        environment: of commands and jobs.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, *command: str | Path) -> str:
        """Return what a command prints."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        return dict(
            word.split("=", 1) for word in self.run("scontrol", "show", "job", "-o", job).split() if "=" in word
        )

    def state(self, job: str) -> str:
        """Return a job's state, which for one of these jobs must be no failure."""
        shown = self.show(job)
        if shown["JobState"] in FAILED:
            raise Failure(f"job {job} ({shown['JobName']}) is {shown['JobState']}, Reason {shown['Reason']}")
        return shown["JobState"]

    def wait(self, what: str, ready: Callable[[], bool], jobs: list[str], timeout_s: float = 240) -> None:
        """Wait for something that jobs shall do, none of which may fail."""
        print(f"{time.strftime('%H:%M:%S')} waiting for {what}", flush=True)
        end = time.monotonic() + timeout_s
        while not ready():
            ended = [job for job in jobs if self.state(job) == "COMPLETED"]
            if len(ended) == len(jobs) and not ready():
                raise Failure(f"the jobs {', '.join(jobs)} ended before {what}")
            if time.monotonic() > end:
                raise Failure(f"waited {timeout_s:.0f} s in vain for {what}: {self.run('squeue')}")
            time.sleep(0.1)

    def finish(self, jobs: list[str]) -> None:
        """Wait for the end of jobs."""
        self.wait(
            "the end of jobs " + ", ".join(jobs), lambda: all(self.state(job) == "COMPLETED" for job in jobs), jobs, 400
        )

    def preempt(self) -> None:
        """Submit a short job that wants the whole node and outranks the others."""
        self.run("sbatch", "--partition=urgent", "--exclusive", "--output=urgent-%j.log", "--wrap=sleep 1")

    def interrupt(self, jobs: list[str], how: str, act: Callable[[], object]) -> list[Interruption]:
        """Interrupt running jobs and wait until they are back in the queue."""
        before = {job: int(self.show(job)["Restarts"]) for job in jobs}
        ordered = time.monotonic()
        act()
        found: dict[str, Interruption] = {}

        def requeued() -> bool:
            for job in jobs:
                shown = self.show(job)
                if job not in found and shown["JobState"] == "PENDING" and int(shown["Restarts"]) > before[job]:
                    found[job] = Interruption(f"{shown['JobName']} ({job})", how, time.monotonic() - ordered)
            return len(found) == len(jobs)

        self.wait("the requeue of the jobs", requeued, jobs, timeout_s=60)
        return [found[job] for job in jobs]


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run a Slurm, and leave no process behind."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment["PATH"] = f"{ROOT / '.venv/bin'}:{environment['PATH']}:/usr/sbin:/sbin"
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "smalti"):
        if not shutil.which(name, path=environment["PATH"]):
            raise Failure(f"there is no {name}: apt-get install slurm-wlm munge, and make or pip install for smalti")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, ports=free_ports(2), user=getpass.getuser()))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munged = ["munged", "--foreground", *(f"--{option}={folder / name}" for option, name in files.items())]
    slurm = Cluster(folder, environment)
    daemons: list[subprocess.Popen] = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"]):
            with (folder / f"{command[0]}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
            time.sleep(1)
        until = time.monotonic() + 30
        while slurm.run("sinfo", "--noheader", "--format=%T", "--partition=urgent") != "idle":
            if time.monotonic() > until:
                raise Failure(f"the node does not come up: {slurm.run('scontrol', 'show', 'node')}")
            time.sleep(0.2)
        yield slurm
    finally:
        stop(slurm, daemons)


def stop(slurm: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Cancel all jobs, whose processes are not children of these daemons, then end the daemons."""
    with contextlib.suppress(Failure):
        slurm.run("scancel", "--user", getpass.getuser())
        until = time.monotonic() + 40
        while slurm.run("squeue", "--noheader") and time.monotonic() < until:
            time.sleep(0.5)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def free_ports(number: int) -> list[int]:
    """Return ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def write_config(path: Path, **changes: object) -> Path:
    """Write the tiny config, which as JSON is YAML too, for a run folder beside it."""
    path.write_text(json.dumps({"run_dir": str(path.with_suffix("")), **CONFIG, **changes}))
    return path


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step of a checkpoint, read from its pickle without torch; 0 when there is none."""
    if not path.exists():
        return 0
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        operations = pickletools.genops(archive.read(name))
        next(None for _, value, _ in operations if value == "global_step")
        return next(value for operation, value, _ in operations if operation.name.startswith("BININT"))


def interrupt_training(
    slurm: Cluster, jobs: dict[str, Path], how: str, act: Callable[[], object]
) -> list[Interruption]:
    """Interrupt running training jobs, which must save a checkpoint and go on from there.

    Args:
        slurm: where they run.
        jobs: and their `last.ckpt`, which they write every 100 steps.
        how: for the report.
        act: that interrupts them.
    """
    names = list(jobs)
    slurm.wait(
        "checkpoints of jobs " + ", ".join(names),
        lambda: all(checkpoint_step(path) >= 300 for path in jobs.values()),
        names,
    )
    interruptions = slurm.interrupt(names, how, act)
    left = {path: checkpoint_step(path) for path in jobs.values()}
    slurm.wait("further checkpoints", lambda: all(checkpoint_step(path) != left[path] for path in left), names)
    for path, step in left.items():
        if checkpoint_step(path) < step:
            raise Failure(f"{path} was at step {step} and is at {checkpoint_step(path)} after the requeue")
    return [one._replace(how=f"{how}, at step {step}") for one, step in zip(interruptions, left.values(), strict=True)]


def chain(slurm: Cluster, config: Path) -> tuple[list[str], list[Interruption]]:
    """Submit all stages of a run, interrupt some, and return the jobs and the interruptions."""
    run = config.with_suffix("")
    submitted = slurm.run(SCRIPTS / "run.sh", config)
    print(submitted, flush=True)
    pack, tokenizer, codes, levels, samples, figures = (part.split()[1] for part in submitted.split(", "))
    priors = levels.split(":")
    last = Path("checkpoints/last.ckpt")
    for job in priors:
        slurm.run("scontrol", "update", f"JobId={job}", "Partition=hasty")
    found = interrupt_training(slurm, {tokenizer: run / "tokenizer" / last}, "SIGTERM, grace time", slurm.preempt)
    checkpoints = {job: run / "prior" / f"level{level}" / last for level, job in enumerate(priors)}
    found += interrupt_training(slurm, checkpoints, "SIGTERM, no grace time", slurm.preempt)
    slurm.wait("samples", lambda: (run / "samples" / "000000.json").exists(), [samples])
    found += slurm.interrupt(
        [samples], "SIGUSR1 to several tasks", lambda: slurm.run("scancel", "--signal=USR1", samples)
    )
    jobs = [pack, tokenizer, codes, *priors, samples, figures]
    slurm.finish(jobs)
    return jobs, found


def distributed_prior(slurm: Cluster, config: Path) -> tuple[str, int]:
    """Train a prior by two tasks in jobs that end before it does; return the job and how often it came back."""
    # Slurm looks at the clock every half minute, and half a minute ahead: the signal comes 25 to 55 s after a start.
    options = ["--ntasks-per-node=2", "--time=1", "--signal=USR1@5"]
    job = slurm.run("sbatch", "--parsable", *options, SCRIPTS / "train-prior.sbatch", config, "--level", "0")
    slurm.finish([job])
    return job, int(slurm.show(job)["Restarts"])


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of data, models and figures that two runs do not share byte by byte."""

    def digests(run: Path) -> dict[str, str]:
        paths = [p for suffix in ("tar", "safetensors", "json") for p in run.rglob(f"*.{suffix}")]
        return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    ours, theirs = digests(one), digests(other)
    if not ours:
        raise Failure(f"{one} is empty")
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))


def check(folder: Path) -> None:
    """Do all of it and print the report; raise Failure where something is not as it must be."""
    config = write_config(folder / "jobs.yaml")
    plain = write_config(folder / "plain.yaml")
    codes = {"from": str(folder / "jobs" / "codes")}
    training = {**CONFIG["prior"]["training"], "steps": 6000}
    pair = {"codes": codes, "prior": {**CONFIG["prior"], "network": "transformer", "training": training}}
    with cluster(folder) as slurm:
        jobs, interruptions = chain(slurm, config)
        job, restarts = distributed_prior(slurm, write_config(folder / "pair.yaml", **pair))
        shown = [slurm.show(job) for job in (*jobs, job)]
        print(f"{time.strftime('%H:%M:%S')} the same without Slurm", flush=True)
        slurm.run("smalti", "run", plain)
        plain_pair = write_config(folder / "plain-pair.yaml", **pair)
        slurm.run("smalti", "train-prior", plain_pair, "--level", "0", "--compute.devices", "2")
    print("\njob  stage            tasks  restarts  state")
    for job in shown:
        row = (job["JobId"], job["JobName"], job["NumTasks"], job["Restarts"], job["JobState"])
        print("{:<4} {:<16} {:>5} {:>9}  {}".format(*row))
    print("", *interruptions, f"{'train-prior (' + shown[-1]['JobId'] + ')':<22} SIGUSR1 at the time limit", sep="\n")
    changed = differences(folder / "jobs", folder / "plain") + differences(folder / "pair", folder / "plain-pair")
    print(f"\nfiles that differ from undisturbed runs: {', '.join(changed) or 'none'}")
    slow = [str(one) for one in interruptions if one.seconds > LEAVES_WITHIN_S]
    if changed or slow or not restarts:
        raise Failure(f"differences: {changed}; slow to leave: {slow}; restarts at the time limit: {restarts}")


def main() -> int:
    """Run the check in a temporary folder; 0 when all is as it must be."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons end too
    folder = Path(tempfile.mkdtemp(prefix="smalti-slurm-"))
    folder.chmod(0o755)  # munged wants its socket reachable for all
    try:
        check(folder)
    except Failure as failure:
        for log in sorted(folder.glob("*.log")):
            print(f"==> {log.name} <==", *log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        print(f"slurm.py: {failure}", file=sys.stderr)
        return 1
    finally:
        if "--keep" in sys.argv:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
