"""Tensors from a network's form into the file's, and back."""

import torch
from torch import Tensor

from lowvram_db.formats.names import THIRDS, Form, in_file, in_network


def to_network(tensor: Tensor, form: Form) -> Tensor:
    """A network's tensor out of the file's, a view of it."""
    if form in THIRDS:
        rows = len(tensor) // 3
        return tensor[THIRDS.index(form) * rows :][:rows]
    return tensor.T if form == Form.transposed else tensor.reshape(in_network(tuple(tensor.shape), form))


def to_file(tensors: dict[Form, Tensor]) -> Tensor:
    """The file's tensor out of the network's one or three."""
    if len(tensors) > 1:
        return torch.cat([tensors[third] for third in THIRDS])
    ((form, tensor),) = tensors.items()
    return tensor.T if form == Form.transposed else tensor.reshape(in_file(tuple(tensor.shape), form))
