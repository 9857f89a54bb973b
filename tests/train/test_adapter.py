import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from lowvram_db.errors import UserError
from lowvram_db.memory.quantised import quantise
from lowvram_db.sections import MethodConfig
from lowvram_db.train.adapter import adapt, lora_of_networks, trainable

# What diffusers' and peft's users write for them.
THEIRS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "attention+mlp": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "all": [],  # every layer of these two kinds
}


def settings(**keys):
    return MethodConfig.model_validate({"name": "lora", "rank": 4, **keys})


def adapted(family, dtype=torch.float32, seed=0, **keys):
    unet = family.load_denoiser(lambda weight: weight.to(dtype))
    adapt(unet, "unet", settings(**keys), dict(unet.named_parameters()), seed)
    return unet


def shuffled(network):
    """Its LoRA as after training: by now it changes something."""
    own = trainable(network, dict(network.named_parameters()))
    torch.manual_seed(1)
    for weight in own.values():
        nn.init.normal_(weight, std=0.3)
    return own


def predicted(unet, family):
    torch.manual_seed(2)
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        return unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, width)).sample


@pytest.mark.parametrize("targets", THEIRS)
def test_it_is_what_peft_and_diffusers_make_by_themselves(family, targets):
    ours, theirs = adapted(family, targets=targets, alpha=6.0), family.load_denoiser()
    kinds = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=THEIRS[targets] or kinds))
    own, reference = shuffled(ours), dict(theirs.named_parameters())
    assert own.keys() == {name for name in reference if "lora_" in name}
    assert any("lora_A" in name and weight.dim() == 4 for name, weight in own.items()) == (targets == "all")
    before = predicted(ours, family)
    with torch.no_grad():
        for name, weight in own.items():
            reference[name].copy_(weight)
    torch.testing.assert_close(before, predicted(theirs, family), rtol=1e-6, atol=1e-6)
    assert (before - predicted(family.load_denoiser(), family)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_begins_without_a_change_exact_and_by_the_seed(family, dtype):
    one, same, other = (adapted(family, dtype, seed=seed) for seed in (3, 3, 4))
    learning = [trainable(unet, dict(unet.named_parameters())) for unet in (one, same, other)]
    assert {weight.dtype for weight in learning[0].values()} == {torch.float32}
    assert {p.dtype for name, p in one.named_parameters() if name not in learning[0]} == {dtype}
    drawn = {name: weight for name, weight in learning[0].items() if ".lora_A." in name}
    assert all(0 < weight.abs().max() <= weight[0].numel() ** -0.5 for weight in drawn.values())  # as peft has it
    assert all(torch.equal(weight, learning[1][name]) for name, weight in learning[0].items())
    assert not all(torch.equal(weight, learning[2][name]) for name, weight in learning[0].items())
    if dtype == torch.float32:
        assert torch.equal(predicted(one, family), predicted(family.load_denoiser(), family))


def test_pissa_begins_with_the_largest_directions_of_what_is_frozen(family):
    whole = dict(family.load_denoiser().named_parameters())
    unet = adapted(family, init="pissa", targets="all", alpha=8.0)
    matrices = 0
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and layer.base_layer.weight.dim() == 2:
            weight, matrices = whole[f"{name}.weight"], matrices + 1
            taken = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(layer.base_layer.weight + taken, weight, rtol=0, atol=1e-6)
            least = torch.linalg.svdvals(weight)[4:].norm()
            assert least * 0.999 <= layer.base_layer.weight.norm() <= least * 1.02
    assert matrices > 20
    torch.testing.assert_close(predicted(unet, family), predicted(family.load_denoiser(), family), rtol=0, atol=1e-5)


def test_what_is_told_of_pissa_is_the_change_of_the_weights_that_were_loaded(family):
    unet = adapted(family, init="pissa", targets="all", rank=24)
    assert all(low.change().norm() < 1e-4 for low in lora_of_networks({"unet": unet}).values())
    torch.manual_seed(1)
    for weight in trainable(unet, dict(unet.named_parameters())).values():
        weight.data += 1e-3 * torch.randn_like(weight)
    lora, trained = lora_of_networks({"unet": unet}), family.load_denoiser()
    wanted = predicted(unet, family)
    for (_, layer), low in lora.items():
        weight = trained.get_submodule(layer).weight
        halves = low._replace(down=low.down.half(), up=low.up.half())  # as the file has them
        assert (halves.change() - low.change()).norm() <= 2e-3 * low.change().norm()
        weight.data += low.change().reshape(weight.shape)
    torch.testing.assert_close(predicted(trained, family), wanted, rtol=0, atol=1e-5)
    assert (wanted - predicted(family.load_denoiser(), family)).abs().max() > 1e-3


def test_a_drawn_number_more_or_less_elsewhere_changes_nothing(family):
    before = torch.random.get_rng_state()
    adapted(family)
    assert torch.equal(before, torch.random.get_rng_state())


def test_smaller_layers_get_what_they_have_and_the_same_scale(family):
    lora = lora_of_networks({"unet": adapted(family, targets="all", rank=40, alpha=20.0)})
    assert {low.rank for low in lora.values()} == {4, 32, 40}
    assert {low.alpha / low.rank for low in lora.values()} == {0.5}
    assert lora["unet", "conv_out"].rank == 4


def test_only_layers_that_are_listened_to_have_one(family):
    unet = family.load_denoiser()
    heard = [name for name in dict(unet.named_parameters()) if "mid_block" not in name]
    adapt(unet, "unet", settings(targets="all"), heard, 0)
    lora = lora_of_networks({"unet": unet})
    assert lora and not any("mid_block" in name for _, name in lora)


def test_a_rank_that_no_layer_has_is_refused(family):
    with pytest.raises(UserError, match=r"method.rank: 65 is more than any layer of unet has, which is 64; lower it"):
        adapted(family, rank=65)


def test_targets_that_a_network_has_not_are_refused(family):
    unet = family.load_denoiser()
    with pytest.raises(UserError, match=r'method.targets: unet has no layers of "attention"; choose "all"'):
        adapt(unet, "unet", settings(), ["conv_in.weight"], 0)


@pytest.mark.parametrize(("base", "error"), [("int8", 0.05), ("nf4", 0.3)])
def test_frozen_matrices_in_few_bits_carry_one_too(family, base, error):
    unet = family.load_denoiser()
    exact = copy.deepcopy(unet)
    quantise(unet, base, torch.float32)
    for network in (unet, exact):
        adapt(network, "unet", settings(), [f"{name}.weight" for name, _ in exact.named_modules()], 0)
    own, same = shuffled(unet), shuffled(exact)
    assert own.keys() == same.keys()
    got, wanted = predicted(unet, family), predicted(exact, family)
    assert 0 < (got - wanted).norm() / wanted.norm() < error
    assert sum(p.numel() for p in unet.parameters() if p.dtype in (torch.uint8, torch.int8)) > 0
    for weight in own.values():
        weight.requires_grad_()
    unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 77, 32)).sample.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in own.values())
