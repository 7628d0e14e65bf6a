"""The command line: `smalti STAGE CONFIG.yaml [--section.key value ...]`."""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from pipelines.stages import ORDER

logger = logging.getLogger(__name__)

USAGE = """\
smalti STAGE CONFIG.yaml [--section.key value ...]

From images to new images in two stages; one YAML file describes a run.

stages, in the order of a run:
  pack             images of any source become image shards
  train-tokenizer  image shards become a tokenizer: a VQ-VAE, a VAE or a relative
  encode           image shards become code shards
  train-prior      code shards become a prior per level
  sample           priors and tokenizer make new images
  evaluate         how good tokenizer, priors and samples are

on a run:
  run              all of these stages; what is complete is skipped
  report           one page, RUN_DIR/report.html, of what the run holds so far
  verify           whether its files are what they were written as; names the first that is not
  export           code shards become tokens that other trainers read; no part of run

with arguments of their own:
  smalti report A.yaml B.yaml ...                    one page of several runs, side by side
  smalti compare A.yaml B.yaml ... [--out FILE.csv]  a table of evaluated runs
  smalti explore WHAT CONFIG.yaml --out DIR          what latents hold, as a picture and a table;
                                                     interpolate, vary, complete, edit or score
  smalti decode TOKENS --layout FILE --out DIR       tokens drawn elsewhere become images
  smalti sample MODEL --run_dir DIR                  from a published folder or hub id

options:
  --section.key value   override a setting of CONFIG.yaml
  --redo STAGE[,STAGE]  empty a stage's folder and make it again; with run, what follows it too.
                        The same command, given again before it is done, goes on
  --level N             train-prior: this level only
  --traceback           show where an error comes from
  -h, --help            this text; after a stage, all settings with their defaults
"""
SAME_COMMAND = "the same command goes on from there"
# Packages whose errors tell of a store that does not answer or does not let us in.
STORES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "s3fs")
STAGES = (*ORDER, "run", "export", "report", "verify")
# What has options of its own, of no run or of several, and the module that reads them; imported when it is asked for.
COMMANDS = {
    "decode": "pipelines.stages.decode",
    "compare": "pipelines.compare",
    "explore": "pipelines.explore.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 2 wrong usage or config, 1 anything else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    show_traceback = "--traceback" in arguments
    from pipelines.compute.memory import keep_freed_memory
    from pipelines.compute.signals import PARENT, Interrupted, end_with_parent, leave, requeue, signals_handled_by
    from pipelines.errors import ConfigError, UserError

    keep_freed_memory()
    end_with_parent()
    code = 1
    try:
        with signals_handled_by(leave):
            code = _command([argument for argument in arguments if argument != "--traceback"])
    except KeyboardInterrupt:
        print("\nsmalti: interrupted; the same command goes on from what is done", file=sys.stderr)
    except Interrupted as stop:
        asked = signal.Signals(stop.signum).name
        print(f"\nsmalti: stopped by {asked}{stop.done and ', '}{stop.done}; {SAME_COMMAND}", file=sys.stderr)
        if stop.signum == signal.SIGUSR1 and not stop.requeued:  # the time is up; who is preempted is put back by Slurm
            requeue()
    except ConfigError as error:
        _report(error, show_traceback)
        code = 2
    except Exception as error:
        told = isinstance(error, UserError | OSError) or type(error).__module__.split(".")[0] in STORES
        _report(error, show_traceback or not told)
        if not told:
            print(
                "smalti: this is a fault of smalti, not of yours; please report it with the lines above",
                file=sys.stderr,
            )
    if code and any(name in os.environ for name in (PARENT, "TORCHELASTIC_RUN_ID", "SLURM_NTASKS")):
        # The libraries' own way out waits for the other processes, of which some may never answer again.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _command(arguments: list[str]) -> int:
    from pipelines.errors import ConfigError

    stage, rest = arguments[0], arguments[1:]
    if stage in COMMANDS:
        own_command = import_module(COMMANDS[stage]).command
        set_up_console()
        own_command(rest)
        return 0
    if stage not in STAGES:
        raise ConfigError(f"there is no stage {stage!r}; the stages are {', '.join([*STAGES, *COMMANDS])}")
    if any(argument in ("-h", "--help") for argument in rest):
        from pipelines.config import make_parser

        print(make_parser(stage).format_help())
        return 0
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"name a config: smalti {stage} CONFIG.yaml")
    own = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    own.add_argument("--redo", default="")
    own.add_argument("--level", type=int)
    try:
        options, overrides = own.parse_known_args(rest[1:])
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    redo = [name for name in options.redo.split(",") if name]
    for name in redo:
        known = (*ORDER, "export")
        if name not in known:
            raise ConfigError(f"--redo must name a stage, got {name!r}; the stages are {', '.join(known)}")
        if stage != name and not (stage == "run" and name in ORDER):
            raise ConfigError(f"--redo {name} goes with {name}{' or run' * (name in ORDER)}, not with {stage}")
    if options.level is not None and stage != "train-prior":
        raise ConfigError(f"--level goes with train-prior, not with {stage}")
    if stage == "report":
        set_up_console()
        print(f"look at {_page(rest)}")
        return 0
    from pipelines.compute.devices import several_processes
    from pipelines.config import load_config
    from pipelines.generator import Generator, names_models
    from pipelines.run import Run

    set_up_console()
    published = stage == "sample" and names_models(rest[0])
    settings = {"run_dir": "", "tokenizer": {"from": rest[0]}}
    config = load_config(settings if published else rest[0], overrides)

    run = Run(config, redo, Generator.from_pretrained(rest[0]) if published else None)
    if stage != "run":
        run.stage(stage, options.level)
        return 0
    if several_processes(config.compute):
        run.check_order()
        if code := _one_by_one(rest[0], overrides, redo, run.redo.note.name):
            return code
        run.redo.done()
    else:
        run.all()
    page_after_run([rest[0], *overrides])
    return 0


def _page(arguments: list[str]) -> Path:
    """Write the page of one or several runs: configs first, then what overrides settings of all of them."""
    from pipelines.config import load_config
    from pipelines.report.make import Source, report

    configs = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    overrides = arguments[len(configs) :]
    sources = [Source(shlex.join([config, *overrides]), load_config(config, overrides)) for config in configs]
    return report(sources)


def page_after_run(arguments: list[str]) -> None:
    """Write the page of a run that is done. What goes wrong with it takes nothing away from that, and is told."""
    try:
        logger.info("report: look at %s", _page(arguments))
    except Exception as error:
        reason = " ".join(str(error).split())
        logger.warning("the run is complete, but its report is not (%s); `smalti report` says more", reason)


def _one_by_one(config: str, overrides: list[str], redo: list[str], note: str) -> int:
    """Do the stages as commands of their own, each of which starts its processes and ends with them.

    What they empty for --redo stands in one note, whose name they are given.
    """
    from pipelines.compute.launching import end
    from pipelines.redo import NOTE

    first = min((ORDER.index(stage) for stage in redo), default=len(ORDER))
    for number, stage in enumerate(ORDER):
        again = ["--redo", stage] if number >= first and stage != "evaluate" else []
        command = [sys.executable, "-m", "pipelines.cli", stage, config, *overrides, *again]
        child = subprocess.Popen(command, env=os.environ | {NOTE: note})
        try:
            code = child.wait()
        finally:
            end([child])
        if code:
            return code if code > 0 else 1
    return 0


def set_up_console() -> None:
    """Say what smalti says; leave out the libraries' chatter about themselves."""
    from pipelines.compute.devices import this_worker
    from pipelines.progress import Console

    root = logging.getLogger()
    root.setLevel(logging.INFO if this_worker().rank == 0 else logging.WARNING)
    if not any(isinstance(handler, Console) for handler in root.handlers):
        root.addHandler(Console())
    for name in ("wandb", "datasets", "httpx", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # Odd metadata of pictures, and networks that are built before their weights are known.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    # DDP's advice on channels-last weights of 1x1 convolutions, whose two layouts are the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def _report(error: BaseException, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exception(error)
    print(f"smalti: error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
