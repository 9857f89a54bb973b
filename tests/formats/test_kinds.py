import pytest

from lowvram_db.formats.header import Entry
from lowvram_db.formats.kinds import kind_of
from lowvram_db.formats.layout import LAYOUTS

UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"


def files(*keys, **shapes):
    return {key: Entry("F16", (1,)) for key in keys} | {key: Entry("F16", shape) for key, shape in shapes.items()}


def unet(channels=4, context=768, *keys):
    return files(*keys) | files(
        **{
            FIRST: (320, channels, 3, 3),
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context),
        }
    )


# A few keys of each, as the programs' own files have them.
OTHERS = {
    "FLUX.1": files("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"),
    "FLUX.1 ": files(f"{UNET}double_blocks.0.img_mod.lin.weight", "text_encoders.clip_l.transformer.text_model.x"),
    "FLUX.2": files("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
    "Chroma": files("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
    "Stable Diffusion 3": files(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.encoder.conv_in.x"),
    "Z-Image": files("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"),
    "Qwen-Image": files("transformer_blocks.0.img_mod.1.weight"),
    "AuraFlow": files("double_layers.0.attn.w1q.weight"),
    "PixArt": files("t_block.1.weight", "blocks.0.attn.qkv.weight"),
    "Stable Cascade": files("clf.1.weight"),
    "Hunyuan-DiT": files("mlp_t5.0.weight"),
    "HunyuanVideo": files("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.x"),
    "Wan": files("head.modulation", "blocks.0.cross_attn.k.weight"),
    "the refiner": unet(4, 1280, "conditioner.embedders.0.model.ln_final.bias"),
    "the refiner ": unet(4, 1280),
    "an inpainting model": unet(9, 768, "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    "a model that edits": unet(8),
    "a depth model": unet(5, 1024),
    "an upscaler, which": unet(7, 1024),
    "takes 3 channels": unet(3),
    "a UNet of no known family": unet(4, 640),
    "picture embeddings": unet(4, 1024, f"{UNET}label_emb.0.0.weight", "cond_stage_model.model.ln_final.bias"),
    "Playground": unet(4, 2048, "edm_mean", "edm_std", "conditioner.embedders.1.model.ln_final.bias"),
    "CosXL": unet(4, 2048, "edm_vpred.sigma_max"),
    "a VAE alone": files("first_stage_model.encoder.down.0.block.0.conv1.bias", "first_stage_model.quant_conv.bias"),
    "a VAE alone ": files("encoder.conv_in.bias", "decoder.up.0.block.0.conv1.bias", "quant_conv.bias"),
    "a VAE alone  ": files("encoder.down_blocks.0.resnets.0.conv1.bias", "decoder.conv_in.bias"),
    "a LoRA": files("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
    "a LoRA ": files("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
    "a LoRA  ": files("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"),
    "a textual-inversion embedding": files("emb_params"),
    "a textual-inversion embedding ": files("clip_l", "clip_g"),
    "a ControlNet": files("control_model.input_hint_block.0.bias", "control_model.input_blocks.0.0.weight"),
    "a ControlNet ": files("controlnet_cond_embedding.conv_in.bias", "down_blocks.0.resnets.0.conv1.bias"),
    "a UNet alone in diffusers' format": files("down_blocks.0.attentions.0.proj_in.bias", "conv_in.bias"),
    "a UNet alone, without": files("diffusion_model.input_blocks.0.0.weight"),
    "a text encoder alone": files("text_model.encoder.layers.0.mlp.fc1.bias"),
    "an upscaler of pictures": files("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
    "no model known here": files("weights", "metadata.kind"),
}  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_what_cannot_be_trained_is_called_by_its_name(words):
    kind = kind_of(OTHERS[words])
    assert kind.family is None and words.strip() in kind.words


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_family_is_told_by_its_keys(kind, listed):
    held, others = listed(kind)
    shapes = held | others
    entries = {key: Entry("F16", shape) for key, shape in shapes.items()}
    assert kind_of(entries).family == kind
    bare = {key: entry for key, entry in entries.items() if key.startswith((UNET, "first_stage_model."))}
    assert kind_of(bare).family == kind, "by what the UNet listens to, where the text encoder is missing"
