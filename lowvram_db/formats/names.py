"""The names of a network's tensors in diffusers' format and in the single files of the original code, both ways.

A table of modules for each network, made for its number of blocks. diffusers reads such files
(loaders/single_file_utils.py), out of a dict that holds every tensor, and has nothing that writes them; of what is not
in the table it says nothing. One table that goes both ways does either, key by key; the tests hold it against
diffusers' reader. By hand is also what diffusers and transformers would get wrong: the prefix of CLIP's names, which
transformers 5.6 left out, and the projection, which OpenCLIP multiplies from the other side.
"""

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple


class Form(StrEnum):
    """What a network's tensor is in the file."""

    same = "same"
    convolution = "a convolution of one pixel"  # where the network has a matrix
    transposed = "transposed"
    query = "first third"  # of rows
    key = "second third"
    value = "last third"


THIRDS = (Form.query, Form.key, Form.value)


class Place(NamedTuple):
    """Where a network's tensor is in a file."""

    key: str
    form: Form = Form.same


Table = dict[str, str]  # modules, or single tensors: diffusers' name -> the file's

# What the attention of a VAE was called before diffusers 0.17; files of Stable Diffusion 1.x and 2.x have these names.
FORMERLY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
CLIP_PREFIX = "text_model."  # of every name in a text encoder's file, up to transformers 5
CLIP_COUNT = "embeddings.position_ids"  # 0, 1, 2 ...: was kept in files then

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"} | {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_FUSED = dict(zip(("q_proj", "k_proj", "v_proj"), THIRDS, strict=True))


def unet_places(names: Iterable[str]) -> dict[str, Place]:
    """Where the file has the tensors of a UNet, by diffusers' names; a name that is in no table is left out."""
    names = list(names)
    blocks, layers = count(names, r"down_blocks\.(\d+)\."), count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    attended = {int(found[1]) for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return _translated(names, _unet_modules(blocks, layers, attended))


def unet_names(keys: Iterable[str]) -> dict[str, Place]:
    """As unet_places, from the keys of a file."""
    keys = list(keys)
    blocks = 1 + len([key for key in keys if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key)])
    each = max(1, count(keys, r"input_blocks\.(\d+)\.") // blocks)
    attended = {int(found[1]) // each for key in keys if (found := re.match(r"output_blocks\.(\d+)\.1\.norm\.", key))}
    return _inverted(keys, _unet_modules(blocks, each - 1, attended))


def _unet_modules(blocks: int, layers: int, attended: set[int]) -> Table:
    """layers: residual layers of a block on the way down, one less than on the way up. attended: the blocks on the way
    up that have attention, which the file counts before what makes a picture larger."""
    table, each = dict(_UNET_ENDS), layers + 1
    for block in range(blocks):
        for layer in range(layers):
            place = f"input_blocks.{1 + block * each + layer}"
            table |= _within(f"down_blocks.{block}.resnets.{layer}", f"{place}.0", _UNET_RESNET)
            table[f"down_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(block + 1) * each}.0.op"
        for layer in range(each):
            place = f"output_blocks.{block * each + layer}"
            table |= _within(f"up_blocks.{block}.resnets.{layer}", f"{place}.0", _UNET_RESNET)
            if block in attended:
                table[f"up_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"{place}.{2 if block in attended else 1}.conv"
    for layer in range(2):
        table |= _within(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}", _UNET_RESNET)
    return table | {"mid_block.attentions.0": "middle_block.1"}


def vae_places(names: Iterable[str]) -> dict[str, Place]:
    """Where the file has the tensors of a KL autoencoder, by diffusers' names of today or before 0.17."""
    now = {vae_name_now(name): name for name in names}
    blocks, layers = count(now, r"encoder\.down_blocks\.(\d+)\."), count(now, r"decoder.*\.resnets\.(\d+)\.")
    places = _translated(now, _vae_modules(blocks, layers))
    return {now[name]: _as_convolution(place) for name, place in places.items()}


def vae_names(keys: Iterable[str]) -> dict[str, Place]:
    """As vae_places, from the keys of a file."""
    keys = list(keys)
    blocks, layers = count(keys, r"encoder\.down\.(\d+)\."), count(keys, r"decoder\.up\.\d+\.block\.(\d+)\.")
    return {name: _as_convolution(place) for name, place in _inverted(keys, _vae_modules(blocks, layers)).items()}


def vae_name_now(name: str) -> str:
    """diffusers' name of today."""
    for former, now in FORMERLY.items():
        name = name.replace(former, now)
    return name


def _as_convolution(place: Place) -> Place:
    is_matrix = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", place.key)
    return Place(place.key, Form.convolution) if is_matrix else place


def _vae_modules(blocks: int, layers: int) -> Table:
    table: Table = {}
    for way, theirs, resized in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for block in range(blocks):
            ours = f"{way}.{theirs}_blocks.{block if way == 'encoder' else blocks - 1 - block}"
            for layer in range(layers):
                table |= _within(f"{ours}.resnets.{layer}", f"{way}.{theirs}.{block}.block.{layer}", _VAE_RESNET)
            table[f"{ours}.{resized}rs.0.conv"] = f"{way}.{theirs}.{block}.{resized}.conv"
        for layer in range(2):
            table |= _within(f"{way}.mid_block.resnets.{layer}", f"{way}.mid.block_{layer + 1}", _VAE_RESNET)
        table |= _within(f"{way}.mid_block.attentions.0", f"{way}.mid.attn_1", _VAE_ATTENTION)
        table |= {f"{way}.{end}": f"{way}.{end}" for end in ("conv_in", "conv_out")}
        table[f"{way}.conv_norm_out"] = f"{way}.norm_out"
    return table | {end: end for end in ("quant_conv", "post_quant_conv")}


def clip_places(names: Iterable[str]) -> dict[str, Place]:
    """Where the file has the tensors of OpenAI's CLIP: transformers' names, with the prefix that they had up to 5.6."""
    return {name: Place(_with_prefix(name)) for name in names if not name.endswith(CLIP_COUNT)}


def clip_names(keys: Iterable[str]) -> dict[str, Place]:
    """As clip_places, from the keys of a file; old merges are without the prefix there, too."""
    return {_with_prefix(key): Place(key) for key in keys if not key.endswith(CLIP_COUNT)}


def openclip_places(names: Iterable[str]) -> dict[str, Place]:
    """Where the file has the tensors of an OpenCLIP text encoder, by transformers' names."""
    full = {_with_prefix(name): name for name in names}
    table = _openclip_modules(count(full, r"text_model\.encoder\.layers\.(\d+)\."))
    places = {full[name]: _as_openclip(place) for name, place in _translated(full, table).items()}
    for name in full:
        if found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", name):
            layer, projection, kind = found.groups()
            places[full[name]] = Place(f"transformer.resblocks.{layer}.attn.in_proj_{kind}", _FUSED[projection])
    return places


def openclip_names(keys: Iterable[str]) -> dict[str, Place]:
    """As openclip_places, from the keys of a file."""
    keys = list(keys)
    table = _openclip_modules(count(keys, r"transformer\.resblocks\.(\d+)\."))
    names = {name: _as_openclip(place) for name, place in _inverted(keys, table).items()}
    for key in keys:
        if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
            layer, kind = found.groups()
            for projection, third in _FUSED.items():
                names[f"text_model.encoder.layers.{layer}.self_attn.{projection}.{kind}"] = Place(key, third)
    return names


def _openclip_modules(layers: int) -> Table:
    table = dict(_OPENCLIP_ENDS)
    for layer in range(layers):
        table |= _within(f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}", _OPENCLIP_LAYER)
    return table


def _as_openclip(place: Place) -> Place:
    """OpenCLIP computes x @ projection, transformers' Linear x @ weight.T. Square, so no shape tells."""
    return Place(place.key, Form.transposed) if place.key == "text_projection" else place


def _with_prefix(name: str) -> str:
    return name if name.startswith((CLIP_PREFIX, "text_projection.")) else CLIP_PREFIX + name


def name_now(part: str, name: str) -> str:
    """Of a part's tensor in the diffusers of today; of a text encoder's the one that every transformers knows."""
    if part == "vae":
        return vae_name_now(name)
    return _with_prefix(name) if part.startswith("text_encoder") else name


def in_file(shape: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """The shape that a network's tensor has in the file; of thirds that of the whole."""
    if form == Form.convolution:
        return (*shape, 1, 1)
    if form == Form.transposed:
        return shape[::-1]
    return (3 * shape[0], *shape[1:]) if form in THIRDS else shape


def in_network(shape: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """The other way. Raises ValueError for what is no shape of this form."""
    if form == Form.convolution:
        if any(size != 1 for size in shape[2:]):
            raise ValueError(f"{shape} is not {form}")
        return shape[:2]
    if form == Form.transposed:
        return shape[::-1]
    if form in THIRDS:
        if not shape or shape[0] % 3:
            raise ValueError(f"{shape} has no thirds")
        return (shape[0] // 3, *shape[1:])
    return shape


def _within(ours: str, theirs: str, inner: Table) -> Table:
    return {f"{ours}.{name}": f"{theirs}.{key}" for name, key in inner.items()}


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1) + 1


def _translated(names: Iterable[str], table: Table) -> dict[str, Place]:
    found = ((name, _translate(name, table)) for name in names)
    return {name: Place(key) for name, key in found if key is not None}


def _inverted(keys: Iterable[str], table: Table) -> dict[str, Place]:
    back = {theirs: ours for ours, theirs in table.items()}
    found = ((_translate(key, back), key) for key in keys)
    return {name: Place(key) for name, key in found if name is not None}


def _translate(name: str, table: Table) -> str | None:
    """A name by the longest of the table's entries that it begins with."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


class Names(NamedTuple):
    """Both ways of one kind of network."""

    places: Callable[[Iterable[str]], dict[str, Place]]  # by the network's names
    names: Callable[[Iterable[str]], dict[str, Place]]  # the same, found from the file's keys


UNET = Names(unet_places, unet_names)
VAE = Names(vae_places, vae_names)
CLIP = Names(clip_places, clip_names)
OPENCLIP = Names(openclip_places, openclip_names)
