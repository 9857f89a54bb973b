"""A model's config files from the shapes of its tensors: those of its family, of other sizes where a shape says so.

What no shape tells is as in the family: heads, groups of norms, activations.
"""

from collections.abc import Mapping
from typing import Any

from lowvram_db.files.foreign import read_json
from lowvram_db.formats.known import family_folder
from lowvram_db.formats.names import count

Shapes = Mapping[str, tuple[int, ...]]  # by diffusers' names
Config = dict[str, Any]

_HEAD = 64  # channels of one attention head, but for Stable Diffusion 1.x, whose UNet has 8 heads everywhere


def config_of(part: str, known: str, shapes: Shapes) -> Config:
    """The config of one part.

    known: the family's folder of config files. Raises ValueError, IndexError or KeyError where the shapes are of no
    network of the family.
    """
    config = read_json(family_folder(known) / part / "config.json", "it comes with the package")
    derive = {"unet": _unet, "vae": _vae}.get(part, _text)
    return config | derive(config, shapes)


def _unet(config: Config, shapes: Shapes) -> Config:
    blocks, layers = count(shapes, r"down_blocks\.(\d+)\."), count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    channels = [shapes[f"down_blocks.{block}.resnets.0.conv1.weight"][0] for block in range(blocks)]
    depths = [count(shapes, rf"down_blocks\.{b}\.attentions\.0\.transformer_blocks\.(\d+)\.") for b in range(blocks)]
    changes: Config = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": next(s[1] for name, s in shapes.items() if name.endswith(".attn2.to_k.weight")),
    }
    if isinstance(config["attention_head_dim"], list):
        changes["attention_head_dim"] = [width // _HEAD for width in channels]
    if "transformer_layers_per_block" in config:
        changes["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if "add_embedding.linear_1.weight" in shapes:
        changes["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
    return changes


def _vae(config: Config, shapes: Shapes) -> Config:
    blocks, layers = count(shapes, r"encoder\.down_blocks\.(\d+)\."), count(shapes, r"encoder.*0\.resnets\.(\d+)\.")
    return {
        "block_out_channels": [shapes[f"encoder.down_blocks.{b}.resnets.0.conv1.weight"][0] for b in range(blocks)],
        "layers_per_block": layers,
        "latent_channels": shapes["post_quant_conv.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }


def _text(config: Config, shapes: Shapes) -> Config:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    changes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // _HEAD,
    }
    if "text_projection.weight" in shapes:
        changes["projection_dim"] = shapes["text_projection.weight"][0]
    return changes
