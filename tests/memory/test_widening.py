"""Widened layer by layer, a network in half precision is the one whose weights were widened as a whole."""

import copy
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from lowvram_db.demo.miniature import MINIATURE_TEXT, MINIATURE_UNET
from lowvram_db.memory.trace import Trace
from lowvram_db.memory.widening import widen

HALVES = [torch.bfloat16, torch.float16]


class Shift(nn.Module):
    """A layer of nobody's, with a weight of its own, another layer inside and an input given by name."""

    def __init__(self):
        super().__init__()
        self.shift, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x, *, scale):
        return self.inner(x * scale + self.shift)


LAYERS = {
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 7)),
    "convolution that halves, without bias": (lambda: nn.Conv2d(6, 4, 3, stride=2, bias=False), (2, 6, 5, 7)),
    "convolution in groups, with gaps": (lambda: nn.Conv2d(6, 4, 3, dilation=(1, 2), groups=2), (2, 6, 5, 7)),
    "pointwise convolution": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 5, 7)),
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 7)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "norm without weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
}


def pair(build, dtype):
    """A network in half precision, widened layer by layer; and the same with its weights in float32."""
    torch.manual_seed(0)
    layered = build().to(dtype)
    whole = copy.deepcopy(layered).float()
    widen(layered)
    return layered, whole


def assert_same_gradients(layered, whole, dtype):
    """Those of the weights are float32 arithmetic's, rounded once."""
    once = torch.finfo(dtype).eps / 2 * 1.001
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-6  # below it fp16 has fewer bits
    for (name, one), other in zip(layered.named_parameters(), whole.parameters(), strict=True):
        assert one.dtype == one.grad.dtype == dtype, name
        floor = max(smallest * once, 1e-6 * other.grad.abs().max().item())
        torch.testing.assert_close(
            one.grad.float(), other.grad, rtol=once, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_computes_in_float32_and_its_gradients_are_rounded_once(layer, dtype):
    build, shape = LAYERS[layer]
    layered, whole = pair(build, dtype)
    one = torch.randn(shape).requires_grad_()
    other = one.detach().clone().requires_grad_()
    given, wanted = layered(one), whole(other)
    assert given.dtype == torch.float32 and torch.equal(given, wanted)
    weights = torch.randn(given.shape)
    for output in (given, wanted):
        (output * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert_same_gradients(layered, whole, dtype)


@given(tokens=st.lists(st.integers(0, 4), min_size=1, max_size=9), dtype=st.sampled_from(HALVES))
def test_tokens_that_come_again_add_up_in_float32(tokens, dtype):
    layered, whole = pair(lambda: nn.Embedding(5, 6), dtype)
    torch.manual_seed(1)
    weights = torch.randn(len(tokens), 6)
    for network in (layered, whole):
        (network(torch.tensor(tokens)) * weights).sum().backward()
    assert_same_gradients(layered, whole, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_layers_of_no_known_kind_and_inputs_in_half_precision_are_widened_too(dtype):
    layered, whole = pair(Shift, dtype)
    x, scale = torch.randn(2, 6).to(dtype), torch.randn(6).to(dtype)
    given, wanted = layered(x, scale=scale), whole(x.float(), scale=scale.float())
    assert torch.equal(given, wanted)
    for output in (given, wanted):
        output.square().sum().backward()
    assert_same_gradients(layered, whole, dtype)
    assert layered.state_dict().keys() == whole.state_dict().keys() and isinstance(layered, Shift)


@pytest.mark.parametrize("frozen", ["weight", "bias", "weight bias", "x weight", "x bias"])
@pytest.mark.parametrize("layer", ["convolution", "linear of tokens"])
def test_what_is_frozen_gets_no_gradient(layer, frozen):
    (build, shape), frozen = LAYERS[layer], set(frozen.split())
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for network in pair(build, torch.bfloat16):
        tensors = {"x": inputs.clone(), **dict(network.named_parameters())}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen)
        network(tensors["x"]).square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None})
    given, wanted = gradients
    assert given.keys() == wanted.keys() == {"x", "weight", "bias"} - frozen
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, wanted[name].to(gradient.dtype))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_text_encoder_and_unet_train_as_if_widened_as_a_whole(dtype, checkpointing):
    def build():
        text = CLIPTextModel(CLIPTextConfig(vocab_size=40, eos_token_id=2, **MINIATURE_TEXT))
        return nn.ModuleList([text, UNet2DConditionModel(in_channels=4, out_channels=4, **MINIATURE_UNET)]).train()

    networks = pair(build, dtype)
    torch.manual_seed(1)
    tokens, noisy, timesteps = torch.randint(3, 40, (2, 7)), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    losses = []
    for text, unet in networks:
        if checkpointing:
            text.gradient_checkpointing_enable({"use_reentrant": False})
            unet.enable_gradient_checkpointing()
        conditioning = text(tokens).last_hidden_state
        losses.append(unet(noisy, timesteps, encoder_hidden_states=conditioning).sample.square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    assert_same_gradients(*networks, dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_layer_at_a_time_is_widened(kind, checkpointing):
    """Of ten: what lives beside the weights at the worst moment is what one of them takes, and small activations."""
    build = {"linear": partial(nn.Linear, 64, 64), "convolution": partial(nn.Conv2d, 64, 64, 3, padding=1)}[kind]
    with FakeTensorMode(), Trace() as trace:
        network = nn.Sequential(*(build(dtype=torch.bfloat16) for _ in range(10)))
        widen(network)
        trace.label("weights", network.parameters())
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as an optimizer in backward does
        size = 4 * network[0].weight.numel()
        start = trace.mark()
        x = torch.empty(1, 64) if kind == "linear" else torch.empty(1, 64, 1, 1)
        output = checkpoint(network, x, use_reentrant=False) if checkpointing else network(x)
        output.sum().backward()
    small = 20 * 1024  # activations and biases
    assert size < trace.peak(start)[""] < 2.5 * size + small  # the weight, its gradient, and that in half precision
