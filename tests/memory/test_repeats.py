import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_db.memory.repeats import Repeats

_aten = torch.ops.aten


class Counted:
    """An operation that notes how often it is called."""

    def __init__(self, operation):
        self._schema, self.operation, self.count = operation._schema, operation, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.operation(*args, **kwargs)


def described(output, args):
    """All that a trace sees of a result: how it lies, and in the storage of which argument."""
    if isinstance(output, (tuple, list)):
        return type(output), [described(one, args) for one in output]
    if not isinstance(output, Tensor):
        return output
    storage = output.untyped_storage()
    inside = [isinstance(arg, Tensor) and arg.untyped_storage()._cdata == storage._cdata for arg in args]
    how = output.shape, output.stride(), output.storage_offset(), output.dtype, output.device, storage.nbytes()
    return type(output), how, inside, vars(output)


def image(*shape):
    return torch.empty(shape or (2, 8, 6, 6)).to(memory_format=torch.channels_last)


REPEATED = {
    "a new tensor": lambda: (_aten.mm.default, torch.empty(3, 4), torch.empty(4, 5)),
    "as the input lies": lambda: (_aten.silu.default, image()),
    "several": lambda: (_aten.native_layer_norm.default, torch.empty(3, 4), [4], None, None, 1e-5),
    "a view": lambda: (_aten.t.default, torch.empty(3, 4)),
    "a view of a view": lambda: (_aten.slice.Tensor, torch.empty(9)[2:], 0, 1, 3),
    "a view that does not say so": lambda: (_aten._unsafe_view.default, torch.empty(3, 4), [12]),
    "several views": lambda: (_aten.split.Tensor, torch.empty(6, 2), 2),
    "some that are nothing": lambda: (
        _aten.convolution_backward.default, image(), image(), image(8, 8, 1, 1), [8], [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1, [True, False, False],
    ),
    "of a list": lambda: (_aten.cat.default, [torch.empty(2), torch.empty(3)]),
    "of nothing": lambda: (_aten.zeros.default, [3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("what", REPEATED)
def test_what_is_made_again_is_what_the_operation_gives(what):
    with FakeTensorMode():
        operation, *args = REPEATED[what]()
        repeats, counted = Repeats(), Counted(operation)
        first, again = (repeats.call(counted, args, {}) for _ in range(2))
        assert counted.count == 1 and again is not first
        assert described(again, args) == described(first, args) == described(operation(*args), args)


WHOLE = torch.int64
DIFFERENT = {
    "shapes": (_aten.silu.default, lambda: [torch.empty(3)], lambda: [torch.empty(4)]),
    "strides": (_aten.silu.default, lambda: [image()], lambda: [torch.empty(2, 8, 6, 6)]),
    "dtypes": (_aten.silu.default, lambda: [torch.empty(3)], lambda: [torch.empty(3, dtype=torch.bfloat16)]),
    "offsets": (_aten.t.default, lambda: [torch.empty(4)[:3]], lambda: [torch.empty(4)[1:]]),
    "numbers of two kinds": (
        _aten.mul.Scalar, lambda: [torch.empty(3, dtype=WHOLE), 1], lambda: [torch.empty(3, dtype=WHOLE), 1.0],
    ),
    "numbers in a list": (_aten.sum.dim_IntList, lambda: [torch.empty(3, 4), [0]], lambda: [torch.empty(3, 4), [1]]),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_calls_that_differ_are_not_taken_for_one_another(what):
    operation, *both = DIFFERENT[what]
    with FakeTensorMode():
        repeats = Repeats()
        for args in [make() for make in both] * 2:
            assert described(repeats.call(operation, args, {}), args) == described(operation(*args), args)


def test_where_an_argument_begins_matters_to_views_alone():
    with FakeTensorMode():
        repeats, whole = Repeats(), torch.empty(9)
        for operation, times in ((_aten.clone.default, 1), (_aten.alias.default, 3)):
            counted = Counted(operation)
            for args in [(whole[start:][:3],) for start in (0, 2, 5)] * 2:
                assert described(repeats.call(counted, args, {}), args) == described(operation(*args), args)
            assert counted.count == times


def test_a_number_that_follows_from_shapes_is_asked_for_once():
    with FakeTensorMode():
        repeats, asked = Repeats(), []

        def elements(*tensors):
            asked.append(tensors)
            return sum(tensor.numel() for tensor in tensors)

        for shape in [(3, 4), (3, 5)] * 2:
            a, b = torch.empty(shape), torch.tensor(2.0)
            assert repeats.number(_aten.mm.default, (a,), {}, elements) == a.numel()
            assert repeats.number(_aten.mm.default, (a, b), {}, elements) == a.numel() + 1
    assert [len(tensors) for tensors in asked] == [1, 2, 1, 2, 2, 2], "again only of what has values"


@pytest.fixture
def restored_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_what_follows_from_the_default_dtype_changes_with_it(restored_dtype):
    with FakeTensorMode():
        repeats = Repeats()
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert repeats.call(_aten.zeros.default, ([3],), {}).dtype == dtype


def test_what_changes_its_input_or_has_values_is_done_each_time():
    """Values that FakeTensorMode keeps beside a tensor: a number that the code goes by, as a clamp or a count."""
    with FakeTensorMode():
        x, number = torch.empty(3), torch.tensor(3.0)
        repeats, counted = Repeats(), Counted(_aten.add_.Tensor)
        assert all(repeats.call(counted, (x, x), {}) is x for _ in range(2)) and counted.count == 2
        outputs = [repeats.call(_aten.mul.Tensor, (number, torch.tensor(value)), {}) for value in (3.0, 4.0)]
        assert [output.item() for output in outputs] == [9, 12]
