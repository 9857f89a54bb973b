"""When checkpoints are written: beside training, from a copy in host memory, wherever that can be had."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import psutil
import torch

from lowvram_db.errors import UserError
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.train import checkpoint
from lowvram_db.train.checkpoint import Contents, Files

_SPARE = 2**30  # bytes of host memory that a copy leaves free, for writing it and for other programs


class Saver:
    """Saves a run's checkpoints, one at a time. A context manager, after which none is being written."""

    def __init__(self, run: Run, keep: int, device: torch.device):
        """keep: how many checkpoints to keep. device: of what is saved."""
        self._run, self._keep, self._device = run, keep, device
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._copy: Files = {}

    def save(self, contents: Contents, beside: bool = True) -> None:
        """Save a checkpoint and let go of the oldest; `beside` training, which may change the tensors then. Raises as
        wait(), also for the one before."""
        self.wait()
        if not (beside and self._can_copy(contents.files)):
            self._write(contents)
            return
        self._copy_of(contents.files)
        self._written = self._pool.submit(self._write, replace(contents, files=self._copy))

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises UserError where it failed, naming the one that is still good."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            say(str(failure))  # what ended the training is said by itself
        finally:
            self._pool.shutdown()

    def _can_copy(self, files: Files) -> bool:
        """On a CPU the copy would double what a run takes, and the cores are busy anyway."""
        wanted = 0 if self._copy else sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        return self._device.type == "cuda" and psutil.virtual_memory().available >= wanted + _SPARE

    def _copy_of(self, files: Files) -> None:
        """Into the memory of the last copy, whose tensors are the same. Complete on return: it is not pinned."""
        for file, tensors in files.items():
            copies = self._copy.setdefault(file, {})
            for name, tensor in tensors.items():
                if name not in copies:
                    copies[name] = torch.empty_like(tensor, device="cpu", requires_grad=False)
                copies[name].copy_(tensor.detach())

    def _write(self, contents: Contents) -> None:
        good = checkpoint.latest(self._run.checkpoints)
        try:
            checkpoint.save(self._run.checkpoint(contents.state.step), contents)
        except UserError as error:
            raise UserError(f"{error}; the last good checkpoint is {good}" if good else str(error)) from error
        checkpoint.keep_last(self._run.checkpoints, self._keep)
