"""The optimizers there are, and what each can do: asked wherever something depends on which one it is.

Imports nothing heavy: the settings ask, before torch is there. train/optimizer.py builds them.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Name = Literal["adam8", "adafactor", "bnb-adam8", "adamw"]


@dataclass(frozen=True)
class Kind:
    """What one optimizer can do."""

    steps_in_backward: bool  # no gradient waits for another; but a batch cannot be split, for it has stepped by then
    stores_weights: bool  # brings them to the device in half precision, and loses no update in rounding; else float32
    keeps_layout: bool  # steps weights as they lie in memory, channels last or not; else makes them contiguous
    streams: bool = False  # its state may live in RAM and pass through the card
    packages: tuple[str, ...] = ()  # that it needs
    lacks: tuple[str, ...] = ()  # settings that mean nothing to it


KINDS: dict[Name, Kind] = {
    "adam8": Kind(steps_in_backward=True, stores_weights=True, keeps_layout=True, streams=True),
    "adafactor": Kind(
        steps_in_backward=True,
        stores_weights=True,
        keeps_layout=True,
        lacks=("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "train.accumulate"),
    ),
    "bnb-adam8": Kind(steps_in_backward=False, stores_weights=False, keeps_layout=False, packages=("bitsandbytes",)),
    "adamw": Kind(steps_in_backward=False, stores_weights=False, keeps_layout=True),
}


@runtime_checkable
class StepsInBackward(Protocol):
    """What an optimizer offers beside torch's own methods when its kind steps in backward."""

    loss_scale: Any  # float32 [1]: what the loss is multiplied with before backward
    skipped: Any  # int32 [4], on the device: what a step has skipped
    scaled: bool  # whether it may be other than 1; an overflow then leaves the whole tensor as it was

    def attach(self) -> Any:
        """Step each parameter inside backward from now on, and free its gradient there."""

    def break_off(self) -> int:
        """After a backward that failed halfway: let the next one make the rest of the same step. Returns how many
        parameters have moved. Raises MemoryError where one was left half stepped."""

    def check_skipped(self, skipped: list[int]) -> int:
        """How many tensors a step left as they were, for a gradient was not finite: by what `skipped` held after it.
        Raises FloatingPointError where that goes on."""

    def place(self, placement: Any) -> None:
        """Let state and weights live elsewhere from now on, where the kind streams: see optim/placement.py."""

    def at_rest(self) -> Any:
        """While state and kept weights are read or written, between two steps: a context manager."""

    def kept(self, p: Any) -> Any:
        """A parameter where it lives."""

    def exact(self, p: Any) -> Any:
        """What is known of a parameter at best, in whichever precision that has."""

    def finish(self) -> None:
        """Let the weights be what is known of them at best, in whichever precision that has; let the state go."""
