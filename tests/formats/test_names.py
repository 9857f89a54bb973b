from collections import Counter

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_reader
from torch.testing import assert_close

from lowvram_db.formats.forms import to_network
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.names import FORMERLY, in_file, in_network

COUNTS = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 280},  # projections of queries, keys and values are one
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_key_and_shape_of_the_family_s_file_and_no_other(kind, networks, listed, file_of):
    held, others = listed(kind)
    file = {key: tuple(tensor.shape) for key, tensor in file_of(kind, networks(kind, small=False)).items()}
    assert file == held and not held.keys() & others.keys()
    parts = Counter(part for key in held for part, (prefix, _) in LAYOUTS[kind].items() if key.startswith(prefix))
    assert parts == COUNTS[kind]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_table_goes_both_ways(kind, small, networks):
    for part, network in networks(kind, small).items():
        names = LAYOUTS[kind][part].names
        places = names.places(network.state_dict())
        assert places.keys() == network.state_dict().keys()
        found = names.names([place.key for place in places.values()])
        plain = {name.removeprefix("text_model."): place for name, place in places.items()}
        assert {name.removeprefix("text_model."): place for name, place in found.items()} == plain
        for name, tensor in network.state_dict().items():
            assert in_network(in_file(tuple(tensor.shape), places[name].form), places[name].form) == tensor.shape


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_reader_finds_every_tensor_as_it_was(kind, networks, file_of):
    parts = networks(kind)
    file = file_of(kind, parts)
    read = {
        "unet": diffusers_reader.convert_ldm_unet_checkpoint(dict(file), parts["unet"].config),
        "vae": diffusers_reader.convert_ldm_vae_checkpoint(dict(file), parts["vae"].config),
    }
    for part in parts.keys() - read.keys():
        prefix = LAYOUTS[kind][part].prefix
        if prefix.endswith("transformer."):
            own = {key: tensor for key, tensor in file.items() if key.startswith(prefix)}
            read[part] = diffusers_reader.convert_ldm_clip_checkpoint(own)
        else:  # which takes the size of a third from the projection, or else from the config
            read[part] = diffusers_reader.convert_open_clip_checkpoint(parts[part], dict(file), prefix)
    for part, network in parts.items():
        theirs = {name.removeprefix("text_model."): tensor for name, tensor in read[part].items()}
        ours = {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()), part


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_tensor_comes_back_out_of_the_file_as_it_was(kind, networks, file_of):
    parts = networks(kind)
    file = file_of(kind, parts)
    for part, (prefix, names) in LAYOUTS[kind].items():
        state = parts[part].state_dict()
        for name, (key, form) in names.places(state).items():
            assert_close(to_network(file[prefix + key], form), state[name], rtol=0, atol=0)


def test_names_of_a_vae_before_diffusers_0_17(networks):
    state = networks("sd1")["vae"].state_dict()
    former = {now: before for before, now in FORMERLY.items()}
    old = {}
    for name in state:
        changed = name
        for now, before in former.items():
            changed = changed.replace(now, before)
        old[changed] = name
    assert sum(name not in state for name in old) == 16
    places, now = LAYOUTS["sd1"]["vae"].names.places(old), LAYOUTS["sd1"]["vae"].names.places(state)
    assert {old[name]: place for name, place in places.items()} == now
