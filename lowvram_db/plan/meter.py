"""What a run takes, phase by phase, beside what its plan said; kept in the run's plan.json."""

import json

import torch

from lowvram_db.atomic import replacing_file
from lowvram_db.memory.device import peak_bytes, reset_peak
from lowvram_db.memory.size import gib
from lowvram_db.plan.result import Phase, Plan
from lowvram_db.progress import say
from lowvram_db.run import Run


class Meter:
    """Told when a phase begins, it says what the one before has come to. A context manager."""

    def __init__(self, plan: Plan, run: Run, device: torch.device):
        self._plan, self._run, self._device = plan, run, device
        self._now: Phase | None = None
        self._write()

    def begins(self, name: str) -> None:
        """End the phase before, and begin another; one that the plan does not know counts for none."""
        self._end()
        self._now = next((phase for phase in self._plan.phases if phase.name == name), None)
        reset_peak(self._device)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()

    def _end(self) -> None:
        phase, self._now = self._now, None
        if phase is None:
            return
        measured, first = peak_bytes(self._device), phase.measured_bytes is None
        phase.measured_bytes = max(measured, phase.measured_bytes or 0)
        self._write()
        if not first:
            return
        if self._device.type == "cuda":
            predicted, more = gib(phase.allocated_bytes), " (it makes batches of what is free)" if phase.least else ""
            say(f"{phase.name}: predicted {'at least ' * phase.least}{predicted}, measured {gib(measured)}{more}")
        else:
            tensors = phase.components["weights"] + phase.components["optimizer"]
            tensors += phase.components["gradients"] + phase.components["activations"]
            say(f"{phase.name}: predicted {gib(tensors)} of tensors, the whole process has reached {gib(measured)}")

    def _write(self) -> None:
        with replacing_file(self._run.plan) as temporary:
            temporary.write_text(json.dumps(self._plan.to_json(), indent=1), encoding="utf-8")
