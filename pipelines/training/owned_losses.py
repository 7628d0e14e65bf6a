"""Losses that own networks, beside a training that must not notice: kept, moved, saved and stepped here alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.compute.ranks import sum_over_ranks
from tokenizer.loss import OwnedLoss


class OwnedLosses:
    """Further losses of stage one. No module, so that neither averages nor DDP nor exports take them for the model's.

    Args:
        losses: modules too, each with a name of its own.
    """

    def __init__(self, losses: Sequence[OwnedLoss]) -> None:
        self.losses = list(losses)
        for parameter in self._parameters():
            parameter.requires_grad_(False)

    def _modules(self) -> list[nn.Module]:
        return [loss for loss in self.losses if isinstance(loss, nn.Module)]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self._modules() for parameter in module.parameters()]

    def __deepcopy__(self, memo: dict) -> "OwnedLosses":
        """An average of the tokenizer copies the whole training; these are not averaged."""
        return self

    def to(self, device: torch.device) -> None:
        """Move all that they own."""
        for module in self._modules():
            module.to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor, micro_batches: int) -> dict[str, Tensor]:
        """Return the named parts of a micro-batch, and add to the gradients of what is owned."""
        parts: dict[str, Tensor] = {}
        for loss in self.losses:
            parts |= loss(reconstruction, images)
            if loss.optimizer is not None:
                owned = [p for group in loss.optimizer.param_groups for p in group["params"]]
                for parameter in owned:
                    parameter.requires_grad_(True)
                with torch.enable_grad():
                    (loss.own(reconstruction.detach(), images) / micro_batches).backward()
                for parameter in owned:
                    parameter.requires_grad_(False)
        return parts

    def step(self, world_size: int) -> None:
        """Take one step of all that is owned, with the mean gradients of all ranks; once per step of the tokenizer."""
        for loss in self.losses:
            if loss.optimizer is None:
                continue
            for parameter in (p for group in loss.optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad = sum_over_ranks(parameter.grad) / world_size
            loss.optimizer.step()
            loss.optimizer.zero_grad()

    def state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint keeps of them."""
        return [
            {
                "module": loss.state_dict() if isinstance(loss, nn.Module) else {},
                "optimizer": loss.optimizer.state_dict() if loss.optimizer else {},
            }
            for loss in self.losses
        ]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from a checkpoint."""
        for loss, state in zip(self.losses, states, strict=True):
            if isinstance(loss, nn.Module):
                loss.load_state_dict(state["module"])
            if loss.optimizer is not None:
                loss.optimizer.load_state_dict(state["optimizer"])
