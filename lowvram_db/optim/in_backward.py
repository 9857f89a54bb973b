"""An optimizer that steps when asked, or each parameter inside backward, to the same bits: all but the step itself.

Every rounding belongs to a step's number: a run that is stopped and resumed rounds as one that never was.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_db.kernels import bits
from lowvram_db.kernels.adam8 import SKIPPED, STEP
from lowvram_db.kernels.launch import Choice, Implementation, implementation
from lowvram_db.kernels.storage import flat
from lowvram_db.optim.layout import same_order
from lowvram_db.optim.placement import Placement
from lowvram_db.optim.storage import SMALLEST, Weights, refuse_shared_memory, shapes

STREAM = 16  # of the rounding bits, apart from the streams of train/objective.py
PATIENCE = 20  # steps in a row in which a tensor may be skipped


class Handle:
    """What attach() returns; remove() lets backward be as it was."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class InBackward(torch.optim.Optimizer, ABC):
    """The base of optimizers/kinds.py's StepsInBackward.

    params: parameters, (name, parameter) pairs, or groups of them, all on one device, as precise as there are.
    defaults: settings of groups, as torch has them.
    weights, device: how and where the parameters are stored from now on; they change in place, one after the other.
        "bf16+residual" keeps 8 more bits of every weight beside it. Tensors under 4,096 elements keep a float32 copy.
    seed: of the rounding.
    micro_batches: how many backwards, each followed by step(), make one step of the weights. What is skipped is told of
        the whole step.
    max_norm: scale a step's gradients by max_norm / (global norm of the step before) where that is below 1; the first
        step is not scaled. The norm of this very step would take all gradients at once, or each of them twice.

    A parameter's state may hold its exact value: `master`, float32, or `residual`, int8, see storage.py.
    Raises ValueError for parameters that share memory or have gaps in it.
    """

    numbers: int  # that a step has for all weights of a group: see _numbers_of
    moments: tuple[str, ...]  # names in the state of what is not needed any more when there is no further step

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        weights: Weights,
        seed: int,
        micro_batches: int,
        max_norm: float | None,
        kernels: Choice | Implementation,
        device: torch.device | None,
        placement: Placement,
    ) -> None:
        super().__init__(params, defaults)
        self._placement = placement
        self.calls = 0  # of step()
        self._micro_batches, self._max_norm = micro_batches, max_norm
        self._attached = False
        self.scaled = weights == "fp16"  # whether gradients may overflow, for the loss is scaled
        self._group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        self._places = {p: place for place, p in enumerate(self._group_of)}
        names = (group.get("param_names", [None] * len(group["params"])) for group in self.param_groups)
        self._names = [name or f"parameter {place}" for place, name in enumerate(chain.from_iterable(names))]
        refuse_shared_memory(list(self._places), self._names)

        device = device or next(iter(self._places)).device
        self._kernels = implementation(kernels, device)
        self._arrived: set[nn.Parameter] = set()  # had their gradient in this call
        self._moved: set[nn.Parameter] = set()  # in this call, before backward broke off
        self.loss_scale = torch.ones(1, device=device)  # what the loss is multiplied with before backward
        self._this_unscale: Tensor | None = None  # from a step's first gradient to its end
        self._squares = torch.zeros(len(self._places), device=device)  # of the gradients, unscaled
        self._norm = torch.zeros(1, device=device)  # of all gradients, what max_norm goes by; 0: not known yet
        self._in_a_row = torch.zeros(len(self._places), dtype=torch.int64, device=device)  # steps each was skipped in
        self.skipped = torch.zeros(4, dtype=torch.int32, device=device)  # of the last step: see check_skipped
        self._skipping = False
        # What kernels read of a step, for every group and for every tensor: on the device, so that launches which are
        # captured once and replayed find what is new.
        self._numbers = torch.zeros(len(self.param_groups), self.numbers, dtype=torch.float32, device=device)
        self._numbers_by_group = self._numbers.unbind()
        signed = (seed + 2**63) % 2**64 - 2**63
        records = [(signed, 0, place, 0) for place in range(len(self._places))]
        self._records = torch.tensor(records, dtype=torch.int64, device=device)
        self._record_by_place = self._records.unbind()
        self._written: tuple[list[tuple[float, ...]], int] | None = None  # of them, last
        self._large = [p for p in self._places if p.numel() >= SMALLEST]
        self._small = [[p for p in group["params"] if p.numel() < SMALLEST] for group in self.param_groups]
        self._make_state(weights, device)
        if max_norm is not None:
            self.state[next(iter(self._places))]["norm"] = self._norm
        self._note_calls(0)

    @abstractmethod
    def _make_state(self, weights: Weights, device: torch.device) -> None:
        """Bring the parameters to the device, as `weights` says, and make their state."""

    @abstractmethod
    def _numbers_of(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What of the step that begins is the same for all weights of a group."""

    @abstractmethod
    def _step_large(self, p: nn.Parameter, grad: Tensor, unscale: Tensor) -> None:
        """Step a parameter. grad: in the order of its elements. unscale: float32 [1], multiplies it; NaN: leave all."""

    def _step_each(self, parameters: list[nn.Parameter]) -> None:
        """_step_large of each, which has a gradient."""
        for p in parameters:
            self._step_one(p)

    def _step_one(self, p: nn.Parameter) -> None:
        (grad,), (unscale,) = self._prepared([p])
        self._step_large(p, grad, unscale)

    @abstractmethod
    def _step_small(self, number: int, unscale: Tensor) -> None:
        """Step the small parameters of a group that have a gradient, and leave their gradients."""

    def attach(self) -> Handle:
        """Update each parameter inside backward, and free its gradient there, until the handle is removed."""
        if self._attached:
            raise RuntimeError(f"{type(self).__name__} is attached already; remove that handle first")
        self._attached = True
        # A hook lives in its parameter, where the garbage collector does not see it: holding the optimizer, which holds
        # the parameters, it would keep all of them in memory for good.
        own = weakref.WeakMethod(self._on_gradient)

        def on_gradient(parameter: Tensor) -> None:
            update = own()
            if update is not None:
                update(parameter)

        hooks = [p.register_post_accumulate_grad_hook(on_gradient) for p in self._places]

        def remove() -> None:
            self._attached = False
            for hook in hooks:
                hook.remove()

        return Handle(remove)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """End a step: do what backward has not done. Gradients stay where they are unless attached."""
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure: it never evaluates the loss again")
        self._step_each([p for p in self._large if p.grad is not None])
        for number in range(len(self._small)):
            self._update_small(number)
        self._arrived.clear()
        self._moved.clear()
        self._note_norm()
        self._note_calls(self.calls + 1)
        if self.calls % self._micro_batches == 0:
            self._note_skipped()

    def write_numbers(self) -> None:
        """Bring learning rates and whatever else belongs to the step that begins to the device, where it is not there.

        A step's first gradient does so by itself. Before a captured step is replayed, the caller does it.
        """
        now = [self._numbers_of(group) for group in self.param_groups], self.calls
        if now == self._written:
            return
        # From memory that is not pinned CUDA takes its own copy before this returns and waits for no kernel; pinned
        # memory could be written anew while an earlier copy still reads it.
        self._numbers.copy_(torch.tensor(now[0], dtype=torch.float32), non_blocking=True)
        self._records[:, STEP].copy_(torch.tensor([self.calls]), non_blocking=True)
        self._written = now

    def break_off(self) -> int:
        """After a backward that ran out of memory halfway: let the next one make the rest of the same step.

        Returns how many parameters have moved already. Each keeps what it did, so that every parameter makes the step
        once, with the rounding bits that belong to it. Where none has moved the repeated step is exactly the first;
        otherwise its gradients are those of a network in which the parameters nearest the loss are one step ahead.
        Raises MemoryError where a parameter was left half stepped.
        """
        for p in self._arrived:
            if p.grad is not None and p.numel() >= SMALLEST and self._may_be_half_stepped():
                raise MemoryError(f"{self._names[self._places[p]]} was left in the middle of its step")
        self._moved |= {p for p in self._arrived if p.grad is None}
        self._arrived.clear()
        self._this_unscale = None
        for p in self._places:
            p.grad = None
        return len(self._moved)

    @abstractmethod
    def _may_be_half_stepped(self) -> bool:
        """Whether _step_large can fail after it has changed something, as a kernel's twin can."""

    def check_skipped(self, skipped: list[int]) -> int:
        """How many tensors a step left, at least in part, as they were because a gradient was not finite.

        skipped: what `skipped` held after the step, read from the device at any time since: how many, the place of the
        first of them, how many steps in a row it has been for the tensor that it was longest for, and that one's place.
        Warns when it begins; raises FloatingPointError, with the tensor's name, after PATIENCE steps in a row.
        """
        count, first, longest, place = skipped
        if count and not self._skipping:
            name = self._names[first]
            warnings.warn(f"a gradient of {name} is not finite: what it would have changed stays", stacklevel=2)
        self._skipping = count > 0
        if longest >= PATIENCE:
            raise FloatingPointError(f"the gradient of {self._names[place]} was not finite in {longest} steps in a row")
        return count

    @torch.no_grad()
    def place(self, placement: Placement) -> None:
        """Let larger tensors and their state live there from now on; nothing else changes."""
        self._let_go()
        self._placement.end()
        before, self._placement = self._placement, placement
        for p in self._places:
            if p.numel() >= SMALLEST:
                before.leave(p)
                self.state[p] = placement.keep(p, self.state[p])

    def at_rest(self) -> AbstractContextManager[None]:
        """While others than a step read or write state. Where that is streamed each entry waits for copies: one around
        all of them is faster."""
        return self._placement.at_rest()

    def state_dict(self) -> dict[str, Any]:
        """As torch's: its tensors are those that the next step will change."""
        with self.at_rest():
            return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy what state_dict() gave into the state that is there; the settings of groups stay as they are.

        Raises ValueError where it is of another optimizer, or of parameters of other shapes.
        """
        saved = state_dict["state"]
        with self.at_rest():
            self._take_up(saved)
        self._note_calls(saved[0]["calls"] if saved else 0)

    def _take_up(self, saved: Any) -> None:
        for place, (p, name) in enumerate(zip(self._places, self._names, strict=True)):
            own, theirs = self.state[p], saved.get(place, {})
            if shapes(own) != shapes(theirs):
                kind = type(self).__name__
                raise ValueError(f"{name}: this state is not {kind}'s for it: {shapes(theirs)}, not {shapes(own)}")
            if own.get("channels_last") != theirs.get("channels_last"):
                theirs = self._relaid(theirs, p.shape)
            for key, value in own.items():
                if isinstance(value, Tensor):
                    value.copy_(theirs[key])

    def _let_go(self) -> None:
        """Parameters or their state are about to move: forget where they are."""

    @abstractmethod
    def _relaid(self, state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        """The state of a 4-d parameter for the other order of its elements, channels last or not."""

    def kept(self, p: nn.Parameter) -> Tensor:
        """A parameter where it lives: good while at rest."""
        return self._placement.kept(p)

    @torch.no_grad()
    def exact(self, p: nn.Parameter) -> Tensor:
        """The most exact value that is known of a parameter, float32 where that is more than it holds itself. It may be
        the memory where the weight lives, good for as long as it is at rest, or the state's."""
        state = self.state[p]
        if "residual" not in state:
            return state.get("master", self._placement.kept(p))
        with self.at_rest():
            kept = self._placement.kept(p)
            exact = torch.empty_like(kept, dtype=torch.float32)
            flat(exact).copy_(bits.join_bf16(flat(kept), state["residual"].to(kept.device)))
        return exact

    @torch.no_grad()
    def finish(self) -> None:
        """Let every parameter be its exact value, and let the state go."""
        self._let_go()
        self._placement.end()
        for state in self.state.values():  # all of it before a weight grows
            for moment in self.moments:
                state.pop(moment, None)
        for p in self._places:
            state, exact = self.state[p], self.exact(p)
            self._placement.replace(p, exact.clone() if "master" in state else exact)
            state.clear()

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter in self._arrived:
            raise RuntimeError(
                f"{self._names[self._places[parameter]]} received a second gradient before step(): backward ran "
                "twice, or the parameter stands in two checkpointed parts. To accumulate, call step() after every "
                "backward, with micro_batches=N; to clip by the norm of all gradients, see max_norm"
            )
        if parameter in self._moved:
            parameter.grad = None
            return
        self._arrived.add(parameter)
        number = self._group_of[parameter]
        if parameter.numel() >= SMALLEST:
            self._step_one(parameter)
            parameter.grad = None
        elif self._arrived.issuperset(self._small[number]):
            self._update_small(number)

    def _prepared(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Of parameters that have a gradient, what _step_large asks for: gradients, and what multiplies each."""
        given = [p.grad for p in parameters if p.grad is not None]
        grads = [
            grad if same_order(grad, p) else torch.empty_like(p, dtype=grad.dtype).copy_(grad)
            for grad, p in zip(given, parameters, strict=True)
        ]
        unscales = [self._unscale()] * len(grads)
        if self.scaled:  # an overflow anywhere says that the loss scale was too large for all of it
            unscales = [torch.where(torch.isfinite(grad).all(), self._unscale(), math.nan) for grad in grads]
        if self._max_norm is not None:
            for p in parameters:
                self._measure(p)
        return grads, unscales

    def _update_small(self, number: int) -> None:
        small = self._small[number]
        if all(p.grad is None for p in small):
            return
        if self._max_norm is not None:
            for p in small:
                if p.grad is not None:
                    self._measure(p)
        self._step_small(number, self._unscale())
        if self._attached:
            for p in small:
                p.grad = None

    def _weight(self, p: Tensor) -> Tensor:
        """A parameter to be changed in place. Inside backward that is done behind autograd's back: its own complaint
        about a changed weight would come before ours, which names the parameter and the way out (see _on_gradient)."""
        return p.data if self._attached else p.detach()

    def _unscale(self) -> Tensor:
        """What turns a gradient as it comes into the one to step with: float32 [1]. The same for a whole step, which
        begins where it is asked for first."""
        if self._this_unscale is None:
            self.write_numbers()
            self._this_unscale = 1 / self.loss_scale
            if self._max_norm is not None:
                factor = torch.where(self._norm > 0, self._max_norm / self._norm, 1.0).clamp(max=1.0)
                self._this_unscale = factor * self._this_unscale
        return self._this_unscale

    def _measure(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        square = torch.linalg.vector_norm(p.grad, dtype=torch.float32).square() / self.loss_scale[0].square()
        self._squares[self._places[p]] = torch.where(torch.isfinite(square), square, 0.0)

    def _note_norm(self) -> None:
        self._norm.copy_(self._squares.sum().sqrt())
        self._this_unscale = None
        self._squares.zero_()

    def _note_skipped(self) -> None:
        skipped = self._records[:, SKIPPED]
        was = skipped > 0
        self._in_a_row.add_(1).mul_(was)
        longest, place = self._in_a_row.max(0)
        self.skipped = torch.stack([was.sum(), was.int().argmax(), longest, place]).int()
        skipped.zero_()

    def _note_calls(self, calls: int) -> None:
        self.calls = calls
        for state in self.state.values():
            state["calls"] = calls
