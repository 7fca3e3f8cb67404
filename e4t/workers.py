"""Pretraining on several GPUs and machines: what `torch.distributed.run` starts, one process to each GPU."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")


class Workers:
    """The processes of one job. Each takes its share of every batch; gradients are averaged, so all stay equal.

    The launcher has given each a card of its own. What they exchange raises RuntimeError when one of them is gone.
    """

    def __init__(self) -> None:
        self.count, self.rank, self.place = (int(os.environ.get(name, default)) for name, default in (
            ("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
        if self.count > 1:
            cards = torch.cuda.is_available() and distributed.is_nccl_available()
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo")
            self.patient = distributed.new_group(timeout=timedelta(days=7), backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this process is the first of its machine, whose disk others may not see."""
        return self.place == 0

    def share(self) -> slice:
        """Which samples of a batch are this process's."""
        return slice(self.rank, None, self.count)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor, on the card or not, by its mean over all processes."""
        if self.count > 1:
            with _told():
                for tensor in tensors:
                    distributed.all_reduce(tensor)
                    tensor /= self.count

    def of_first(self, value: Value) -> Value:
        """The first process's value, in all; its tensors are those of the CPU."""
        held = [value]
        if self.count > 1:
            with _told():
                distributed.broadcast_object_list(held, 0, self.patient)
        return held[0]

    def wait(self) -> None:
        """Until all processes are here, however long one of them works."""
        if self.count > 1:
            with _told():
                distributed.barrier(self.patient)

    def close(self) -> None:
        """Ends the job's connections."""
        if self.count > 1:
            distributed.destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError("Another process of this job is gone. Start the job again; it goes on from its newest "
                           "state.") from error
