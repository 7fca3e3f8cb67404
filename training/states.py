"""States of a running training on disk, from which an interrupted one goes on, bit for bit on a processor."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .disk import read_safetensors, write_whole

log = logging.getLogger("concepts")


@dataclass(frozen=True)
class States:
    """The newest `keep` states of the training called `run` in `folder`, one every `every` steps (0: none).

    `run` must differ between trainings that differ in anything: it is all that ties a state to its training.
    """

    folder: Path
    run: str
    every: int
    keep: int = 2

    def save(self, losses: list[float], optimiser: torch.optim.Optimizer) -> None:
        """Writes the state after the last of `losses`, whole or not at all; a full disk only costs the state."""
        path = self.folder / f"{self.run}-step{len(losses):07d}.safetensors"
        try:
            write_whole(path, safetensors.torch.save(_tensors(optimiser), {"losses": json.dumps(losses)}))
            for old in self._paths()[self.keep:]:
                old.unlink()
        except (OSError, ValueError) as error:
            log.warning("The training goes on without this state: %s", error)

    def restore(self, optimiser: torch.optim.Optimizer) -> list[float]:
        """Puts the newest readable state into the optimiser and its parameters; the losses up to it, or [] for none."""
        for path in self._paths():
            try:
                metadata, tensors = read_safetensors(path)
                losses = json.loads(metadata["losses"])
                # of their own: those of the file stay mapped, and Windows does not let go of a mapped file
                _put(optimiser, {name: tensor.clone() for name, tensor in tensors.items()})
            except (KeyError, ValueError) as error:
                log.warning("%s cannot be resumed from: %s", path, error)
            else:
                return losses
        return []

    def clear(self) -> None:
        """Removes the states of a training that is done; one that the disk holds on to is only left over."""
        for path in self._paths():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("A state of a training that is done is left over: %s", error)

    def _paths(self) -> list[Path]:
        """The states there are, newest first."""
        name = re.compile(rf"{re.escape(self.run)}-step\d+\.safetensors")
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if name.fullmatch(path.name)), reverse=True)


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"{i}.parameter": p.detach() for i, p in enumerate(_parameters(optimiser))}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{i}.state.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _put(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(optimiser)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if ".state." in name:
            i, _, key = name.split(".", 2)
            state.setdefault(int(i), {})[key] = tensor
    values = [tensors[f"{i}.parameter"] for i in range(len(parameters))]
    if any(value.shape != parameter.shape for value, parameter in zip(values, parameters, strict=True)):
        raise ValueError("its tensors have other shapes")
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    for value, parameter in zip(values, parameters, strict=True):
        parameter.data = value.to(parameter)
