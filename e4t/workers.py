"""Pretraining on several GPUs and machines: what `torchrun` and `accelerate launch` start, one process to each GPU."""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor, distributed


class Workers:
    """The processes of one job. Each takes its share of every batch; gradients are averaged, so all stay equal."""

    def __init__(self) -> None:
        self.count, self.rank = (int(os.environ.get(name, default))
                                 for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        if self.count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            self.patient = distributed.new_group(timeout=timedelta(days=7), backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self) -> slice:
        """Which samples of a batch are this process's."""
        return slice(self.rank, None, self.count)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over all processes. Raises RuntimeError when one of them is gone."""
        if self.count == 1:
            return
        try:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.count
        except RuntimeError as error:
            raise RuntimeError("Another process of this job is gone. Start the job again; it goes on from its newest "
                               "state.") from error

    def wait(self) -> None:
        """Until all processes are here, however long one of them works."""
        if self.count > 1:
            distributed.barrier(self.patient)

    def close(self) -> None:
        """Ends the job's connections."""
        if self.count > 1:
            distributed.destroy_process_group()
