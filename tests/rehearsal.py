"""A GPU rehearsed where there is none: whole jobs run on a device without numbers, and may not wait for it.

    python -m tests.rehearsal_jobs [JOB …]    # in a process of its own, since a device is registered for good

Its tensors are fake: they have shape, type and place, and no values. So mixed devices raise. So does whatever makes the
host wait for the device, but in the functions of `BY_DESIGN`: reading a value, copying between host and device, a
barrier. So does a collective on tensors of a device that the group has no backend for, as with NCCL. The Trainer, its
loops and strategy are Lightning's own, as the first of two processes; the rest of the job is smalti's, from `fit`,
`encode` and `sample` on.

It cannot follow what has no values and no clock: Triton, CUDA graphs (the decoders draw one position after another),
compiled code, autocast (all is float32 here), DDP's reduction of gradients, which is C++, FSDP, NCCL itself, memory,
streams, what other ranks do, and values that decide what is done (a number reads as 1, a truth value as False).
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from pipelines.stages import encode, sample

NAME, RANKS = "rehearsed", 2
DEVICE = torch.device("privateuseone", 0)  # as torch calls it until it has its name
ROOMS = ("/lightning/", "/pipelines/", "/prior/", "/tokenizer/")
aten, c10d = torch.ops.aten, torch.ops.c10d

# Where the host may wait for the device, by the innermost function of smalti or Lightning that is named here.
BY_DESIGN = {
    # once a job
    "has_len_all_ranks": "Lightning compares the loaders of all ranks",
    "_DeviceDtypeModuleMixin.to": "the model goes to the device",
    "Trainer._teardown": "and back",
    "OwnedLosses.to": "what losses own goes there too",
    "CodebookEMA.start": "where k-means begins is drawn on the host",
    "TokenizerTraining._start_learners": "images of the start come from the host, once",
    "_CheckpointConnector.restore_training_state": "what was saved goes to the device",
    "_CheckpointConnector._restore_modules_and_callbacks": "likewise",
    "OwnedLosses.load": "likewise",
    # at a row of metrics.csv, a checkpoint or a validation
    "_LoggerConnector.log_metrics": "metrics.csv holds numbers",
    "StopOnNonFinite.check": "nothing that is not finite may be saved",
    "WholeCheckpoints.save_checkpoint": "checkpoints are files",
    "TokenizerTraining.on_validation_epoch_end": "figures and pictures of a validation",
    "PriorTraining.on_validation_epoch_end": "figures of a validation",
    "_EvaluationLoop._on_evaluation_end": "callbacks judge those figures",
    "check_codes": "codes are checked before they are decoded",
    "check_finite": "so are numbers",
    "BesideClass.forward": "and classes, where nothing is trained",
    "_check_ranges": "codes and classes are judged before their likelihood, once per batch",
    # in stages that do not train
    "encode": "the model goes to the device",
    "sample": "likewise",
    "_encoded": "images come from files, and codes go to files",
    "HierarchicalPrior.sample": "classes and uniforms come from the host",
    "_drawn": "images and codes go to files",
}


class WaitsError(Exception):
    """The host would wait for the device."""


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class FakeValues(FakeTensorMode):
    """Fake tensors, of which none is ever made on the device itself."""

    avoid_device_init = True  # type: ignore[assignment]


class Strict(TorchDispatchMode):
    """Refuses what makes the host wait, and collectives that the group has no backend for."""

    def __init__(self, fake: FakeValues) -> None:
        super().__init__()
        self.fake = fake
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].device == DEVICE:
                self.wait("a value is read")
            if args[0].constant is None:
                return False if args[0].dtype == torch.bool else torch.tensor(1, dtype=args[0].dtype).item()
        elif func in (aten._to_copy.default, aten.copy_.default):
            args = tree_map(self.known, args)
            target = kwargs.get("device") or args[0].device
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            if args[-1 if func is aten._to_copy.default else 1].device.type != torch.device(target).type and waits:
                self.wait("values are copied")
        elif func.namespace == "c10d":
            self._check_collective(func, tree_leaves((args, kwargs)))
        return func(*args, **kwargs)

    def known(self, leaf: Any) -> Any:
        real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf) if real else leaf

    def _check_collective(self, func: Any, leaves: list) -> None:
        if func is c10d.barrier.default:
            self.wait("a barrier stands")
            return
        group = next(c10d_group(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject))
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                group._get_backend(tensor.device)  # RuntimeError: there is none for this type of device

    def wait(self, what: str) -> None:
        """Note a wait that is by design; raise for any other."""
        frame, names = sys._getframe(2), []
        while frame is not None:
            path = frame.f_code.co_filename
            if any(room in path for room in ROOMS):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back  # type: ignore[assignment]
        found = next((name for name in names if name in BY_DESIGN), None)
        if found is None:
            raise WaitsError(f"{what} in {' < '.join(names[:6])}")
        self.waits[found] += 1


def c10d_group(boxed: torch.ScriptObject) -> Any:
    """Return the process group that a collective was called with."""
    return torch.distributed.ProcessGroup.unbox(boxed)


def moved(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `nn.Module._apply` does, which would swap the insides of fake tensors and cannot."""
    for child in module.children():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (new := fn(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        module._buffers.update({name: fn(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


class Accelerator(CPUAccelerator):
    """The device, as Lightning sees it."""

    def setup_device(self, device: torch.device) -> None: ...

    @staticmethod
    def get_parallel_devices(devices: int | str) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def name() -> str:
        return NAME


class Ranks(LightningEnvironment):
    """The first of several processes, of which nobody starts the others."""

    creates_processes_externally = True  # type: ignore[assignment]

    def world_size(self) -> int:
        return RANKS


class Strategy(DDPStrategy):
    """DDP without its reducer, which looks at the memory of gradients; Python's objects are not sent as bytes."""

    world_size = RANKS  # type: ignore[assignment]

    def set_world_ranks(self) -> None: ...

    def configure_ddp(self) -> None: ...

    def barrier(self, *args: Any, **kwargs: Any) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Ask the others as Lightning does; what they say is not known, so they agree."""
        super().reduce_boolean_decision(decision, all)
        return decision


@contextlib.contextmanager
def rehearsal() -> Iterator[Strict]:
    """Make the device the one that jobs run on."""
    fake = FakeValues(allow_non_fake_inputs=True)
    strict = Strict(fake)
    trainer, group, numpy, save, load = pl.Trainer, torch.distributed.new_group, Tensor.numpy, torch.save, torch.load

    def make_trainer(**options: Any) -> pl.Trainer:
        strategy = Strategy(parallel_devices=[DEVICE], cluster_environment=Ranks(), broadcast_buffers=False)
        return trainer(**options | {"accelerator": Accelerator(), "devices": 1, "strategy": strategy})

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, FakeTensor):
            return leaf
        if leaf.device == DEVICE:
            strict.wait("a tensor is saved")
        with _disable_current_modes():
            return torch.zeros(leaf.shape, dtype=leaf.dtype)

    def zeros_to_numpy(tensor: Tensor) -> np.ndarray:
        tensor = zeros(tensor)
        with _disable_current_modes():
            return numpy(tensor)

    def save_zeros(contents: Any, file: Any) -> None:
        contents = tree_map(zeros, contents)
        with _disable_current_modes():
            save(contents, file)

    def load_real(*given: Any, **options: Any) -> Any:
        with _disable_current_modes():
            contents = load(*given, **options)
        return tree_map(strict.known, contents)

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (pl, "Trainer", make_trainer),
            (torch, "save", save_zeros),
            (torch, "load", load_real),
            (torch.distributed, "new_group", lambda backend: group(backend="cpu:fake")),  # gloo's
            (nn.Module, "_apply", moved),
            (Tensor, "numpy", zeros_to_numpy),
            (FakeTensor, "__deepcopy__", lambda tensor, memo: tensor.clone()),
            (FakeTensor, "__format__", lambda tensor, form: format(tensor.item(), form)),
            (encode, "inference_device", lambda *given, **options: DEVICE),
            (sample, "inference_device", lambda *given, **options: DEVICE),
        ):
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        stack.enter_context(fake)
        yield stack.enter_context(strict)
