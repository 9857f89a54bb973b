"""What would be in a GPU's memory, operation by operation, found with tensors that have shapes but no values.

A Trace watches every operation that runs inside it and keeps a log of the storages that come and go. It knows nothing
of training: whoever runs it says what a storage is for (`label`) and which stretch of the log is meant (`mark`).

    with FakeTensorMode(), Trace() as trace:
        network = build()
        trace.label("weights", network.parameters())
        start = trace.mark()
        network(x).sum().backward()
    trace.peak(start)  # {"weights": bytes, "": bytes of everything without a label}

What stands for the computer's own memory, beside the GPU, is fake tensors on the device "meta".
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lowvram_db.memory.repeats import Repeats

GRANULE = 512  # bytes: CUDACachingAllocator hands out multiples of kMinBlockSize
TEMPORARY = "temporary"  # label of what an operation needs only while it runs

_RAM = torch.device("meta")

_aten = torch.ops.aten
# The flop counter knows the GPU's names for the fused attention that a trace on CPU tensors meets.
_ARITHMETIC = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}

# Backward operations and the arguments whose gradients they give. Shapes are all a trace wants of these gradients, and
# torch finds them by way of a decomposition into dozens of operations, a fifth of the time that a trace takes.
_GRADIENTS_OF = {
    _aten.native_group_norm_backward.default: (1, 4, 4),  # input, weight and bias, which is like weight
    _aten.native_layer_norm_backward.default: (1, 5, 6),
    _aten.silu_backward.default: (1,),
    _aten.gelu_backward.default: (1,),
}


class OverLimit(Exception):
    """The traced work needs more than Trace.limit; `reached` bytes were in use when that was seen."""

    def __init__(self, reached: int) -> None:
        super().__init__(f"more than the limit: {reached} bytes")
        self.reached = reached


class Trace(TorchDispatchMode):
    """Log of live storages, rounded up as the allocator does, and of the arithmetic done.

    temporaries(operation, arguments, outputs): bytes an operation needs beside its arguments and outputs while it
        runs. Nothing in a trace can see those.
    stopping(): raise KeyboardInterrupt as soon as it says so. No signal handler may raise while a trace runs: PyTorch
        also calls Python from C++ that lets no exception through, and then the process aborts.
    limit: raise OverLimit as soon as more bytes are in use; may be set on the way.
    live: bytes in use now. in_ram: of the computer's memory.
    flops: floating point operations in matrix products, convolutions and attention so far.
    """

    def __init__(
        self,
        temporaries: Callable[[Any, Any, Any], int] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.limit: int | None = None
        self.flops = 0
        self._temporaries, self._stopping = temporaries, stopping
        self.live = self.in_ram = 0
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storages by address: their number
        self._labels: list[str] = []  # by number
        self._log: list[tuple[int, int]] = []  # (number, bytes that come or go)
        self._temporary = self._new_number(TEMPORARY)
        self._repeats = Repeats()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a trace, and to keep the compiler out of each operation takes time

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are for, from their beginning on."""
        for tensor in tensors:
            self._labels[self._note(tensor)] = name

    def mark(self) -> int:
        """This moment."""
        return len(self._log)

    def peak(self, start: int = 0, end: int | None = None) -> Counter[str]:
        """Bytes by label at the moment between two marks at which most are in use."""
        live: Counter[str] = Counter()
        total = most = 0
        at_most: Counter[str] = Counter()
        for place, (number, size) in enumerate(self._log[:end]):
            live[self._labels[number]] += size
            total += size
            if place >= start - 1 and total > most:
                most, at_most = total, live.copy()
        return +at_most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all that comes here; the long way takes a tenth of the whole time
        if func in _GRADIENTS_OF:
            output = self._gradients(args, _GRADIENTS_OF[func])
        else:
            output = self._repeats.call(func, args, kwargs or {})
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func._overloadpacket in _ARITHMETIC:
            count = partial(_ARITHMETIC[func._overloadpacket], out_val=output)
            self.flops += self._repeats.number(func, args, kwargs or {}, count)
        if self._temporaries is not None:
            size = self._temporaries(func._overloadpacket, args, outputs)
            if size:
                try:
                    self._add(self._temporary, size)
                finally:
                    self._add(self._temporary, -size)
        return output

    def _note(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; a new one is logged."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            add = self._add_in_ram if type(tensor) is FakeTensor and tensor.fake_device == _RAM else self._add
            number, size = self._new_number(""), -(-storage.nbytes() // GRANULE) * GRANULE
            self._alive[address] = number, weakref.ref(storage, partial(self._free, address, number, size, add))
            add(number, size)
        return self._alive[address][0]

    def _new_number(self, label: str) -> int:
        self._labels.append(label)
        return len(self._labels) - 1

    def _free(self, address: int, number: int, size: int, add: Callable[[int, int], None], _: Any) -> None:
        del self._alive[address]
        add(number, -size)

    def _add_in_ram(self, number: int, size: int) -> None:
        self.in_ram += size

    def _add(self, number: int, size: int) -> None:
        self.live += size
        self._log.append((number, size))
        if self.limit is not None and size > 0 and self.live > self.limit:
            raise OverLimit(self.live)
        if size > 0 and self._stopping():
            raise KeyboardInterrupt

    def _gradients(self, args: Any, places: tuple[int, ...]) -> Any:
        """What a backward operation gives: of several gradients only those that its last argument asks for."""
        wanted = [True] if len(places) == 1 else args[-1]
        gradients = tuple(
            self._repeats.call(_aten.empty_like.default, (args[at],), {}) if one else None
            for at, one in zip(places, wanted, strict=True)
        )
        return gradients if len(places) > 1 else gradients[0]
