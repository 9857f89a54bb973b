"""Operations on tensors without values that repeat: what the first of them gave tells what the others give.

A network is a few blocks many times over. FakeTensorMode remembers operations, too, but looks each up by all that could
ever matter; in a trace shapes, strides and dtypes do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_META = torch.device("meta")


class _Unlike(Exception):
    """An argument does not tell by its shape what the result is."""


class _Made(NamedTuple):
    """A tensor that an operation has given."""

    like: dict[str, Any]  # what a FakeTensor has beside its memory
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    inside: int | None  # the place of the argument in whose storage it lies; None: it has one of its own


_Seen = tuple[type, list[_Made | None]]  # the kind of an output, and the tensors that it is or consists of
_NEW: Any = object()


class Repeats:
    """Calls operations inside one FakeTensorMode."""

    def __init__(self) -> None:
        # By calls; what lies inside an argument also by where those begin. None: to be done each time.
        self._seen: dict[Any, _Seen | dict[tuple[int, ...], _Seen] | None] = {}
        self._numbers: dict[Any, int] = {}

    def call(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """What operation(*args, **kwargs) gives."""
        try:
            key = _key_of(operation, args, kwargs)
        except _Unlike:
            return operation(*args, **kwargs)
        seen = self._seen.get(key, _NEW)
        if isinstance(seen, dict):
            seen = seen.get(_offsets(args), _NEW)
        if seen is _NEW or seen is None:
            output = operation(*args, **kwargs)
            if seen is _NEW:
                self._note(key, args, output, operation._schema.is_mutable)
            return output
        kind, made = seen
        again = (one and _again(one, args) for one in made)
        return next(again) if kind is FakeTensor else kind(again)

    def number(self, operation: Any, args: Any, kwargs: Any, count: Callable[..., int]) -> int:
        """What count(*args, **kwargs) gives, which follows from the operation and what tells its result."""
        try:
            key = _key_of(operation, args, kwargs)
        except _Unlike:
            return count(*args, **kwargs)
        if key not in self._numbers:
            self._numbers[key] = count(*args, **kwargs)
        return self._numbers[key]

    def _note(self, key: Any, args: Any, output: Any, is_mutable: bool) -> None:
        seen = None if is_mutable else _seen(output, args)
        if seen and any(made and made.inside is not None for made in seen[1]):
            views = self._seen.setdefault(key, {})
            assert isinstance(views, dict)
            views[_offsets(args)] = seen
        else:
            self._seen[key] = seen


def _key_of(operation: Any, args: Any, kwargs: Any) -> Any:
    return operation, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items()))


def _key(value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided:
            raise _Unlike
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind is tuple or kind is list:
        return kind, *map(_key, value)
    if isinstance(value, Tensor):
        raise _Unlike
    return kind, value  # 1, 1.0 and True are the same to a dictionary


def _offsets(args: Any) -> tuple[int, ...]:
    return tuple(int(arg.storage_offset()) for arg in args if type(arg) is FakeTensor)


def _seen(output: Any, args: Any) -> _Seen | None:
    """None where an output has other tensors than can be made again."""
    if type(output) not in (FakeTensor, tuple, list):
        return None
    tensors = [output] if type(output) is FakeTensor else output
    places = {arg.untyped_storage()._cdata: place for place, arg in enumerate(args) if type(arg) is FakeTensor}
    made: list[_Made | None] = []
    for tensor in tensors:
        if tensor is None:
            made.append(None)
            continue
        if type(tensor) is not FakeTensor:
            return None
        made.append(one := _described(tensor, places))
        if _again(one, args).untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
    return type(output), made


def _described(tensor: FakeTensor, places: dict[int, int]) -> _Made:
    with torch._C._DisableTorchDispatch():
        bare = FakeTensor(tensor.fake_mode, torch.empty(0, device=_META), tensor.fake_device)
    return _Made(
        vars(bare),
        tensor.fake_device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        int(tensor.storage_offset()),
        places.get(tensor.untyped_storage()._cdata),
    )


def _again(made: _Made, args: Any) -> FakeTensor:
    with torch._C._DisableTorchDispatch():
        if made.inside is None:
            tensor = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=_META)
        else:
            storage = args[made.inside].untyped_storage()
            tensor = torch.empty(0, dtype=made.dtype, device=_META).set_(storage, made.offset, made.shape, made.stride)
    # Its constructor gives the same in three times the time, a tenth of all that a trace takes.
    again: FakeTensor = Tensor._make_subclass(
        FakeTensor, tensor, False, dispatch_device=True, device_for_backend_keys=made.device
    )
    vars(again).update(made.like)
    return again
