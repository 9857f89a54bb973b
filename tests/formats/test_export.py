import base64
import io
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import UserError
from lowvram_db.formats.content import ema_key
from lowvram_db.formats.export import Format, export, export_run
from lowvram_db.reading import Reading
from lowvram_db.run import Run

PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
VAE, CLIP, SECOND = "first_stage_model.", "cond_stage_model.transformer.", "conditioner.embedders.1.model."
KINDS = list(PIPELINES)
EPSILON = Reading(prediction_type="epsilon")


def single(model, out, dtype=None, reading=None):
    """Written as one file; of one that does not say so by itself, epsilon is."""
    said = EPSILON if Path(model).is_file() else Reading()
    export(str(model), out, Format.single_file, dtype, reading or said)
    return load_file(out)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(one, other):
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]) for key, tensor in one.items()
    )


def full_names(part, state):
    is_text = part.startswith("text_encoder")
    return {f"text_model.{n}" if is_text and not n.startswith("text_") else n: t for n, t in state.items()}


def tensors_of(folder):
    return {
        f"{path.parent.name}/{name}": tensor
        for path in folder.glob("*/*.safetensors")
        for name, tensor in full_names(path.parent.name, load_file(path)).items()
    }


def with_averages_and_a_fine_vae(tensors):
    for key in list(tensors):
        if key.startswith(VAE):
            tensors[key] = tensors[key].float()
        if key.startswith("model.diffusion_model."):
            tensors[ema_key(key)] = tensors[key] + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_comes_out_as_it_went_in(kind, write_file, tmp_path):
    """With all that it has beside its networks, bit for bit."""

    def change(tensors):
        with_averages_and_a_fine_vae(tensors)
        tensors |= {"alphas_cumprod": torch.rand(9), "made.up": torch.arange(3), "model_ema.decay": torch.tensor(0.9)}

    file = write_file(kind, dtype=torch.bfloat16, change=change, metadata={"ss_steps": "3", "modelspec.title": "mine"})
    assert same(single(file, tmp_path / "out.safetensors"), load_file(file))
    said = metadata(tmp_path / "out.safetensors")
    assert (said["ss_steps"], said["modelspec.title"], said["modelspec.vae_dtype"]) == ("3", "mine", "float32")


def test_networks_from_elsewhere_are_written_without_what_was_beside_the_file_s_own(write_file, tmp_path):
    def change(tensors):
        tensors |= {f"{VAE}loss.logvar": torch.ones(1), "made.up": torch.arange(3)}

    file, other = write_file(change=change), write_file(name="other.safetensors", seed=1)
    reading = Reading("epsilon", vae=str(other), text_encoder=str(other))
    written, base, theirs = (
        single(file, tmp_path / "out.safetensors", reading=reading),
        load_file(file),
        load_file(other),
    )
    own = {key: tensor for key, tensor in base.items() if not key.startswith((VAE, CLIP))}
    assert same(written, own | {key: theirs[key] for key in base.keys() - own.keys() - {f"{VAE}loss.logvar"}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_from_a_file_as_it_was(kind, write_folder, letters, tmp_path):
    schedule = {"prediction_type": "epsilon"}
    folder = write_folder(kind, **schedule)
    single(folder, tmp_path / "out.safetensors")
    reading = Reading("epsilon", str(letters))
    export(str(tmp_path / "out.safetensors"), tmp_path / "back", Format.diffusers, reading=reading)
    assert same(tensors_of(tmp_path / "back"), tensors_of(folder))
    pipeline = PIPELINES[kind].from_pretrained(tmp_path / "back")
    loaded = {f"{part}/{name}": t for part in ("unet", "vae", "text_encoder")
              for name, t in full_names(part, getattr(pipeline, part).state_dict()).items()}  # fmt: skip
    assert all(torch.equal(loaded[name], t.float()) for name, t in tensors_of(folder).items() if name in loaded)
    assert len(loaded) > 300


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_opens_the_file(kind, write_folder, tmp_path):
    folder = write_folder(kind, prediction_type="epsilon")
    single(folder, tmp_path / "out.safetensors")
    pipeline = PIPELINES[kind].from_single_file(
        tmp_path / "out.safetensors", config=str(folder), local_files_only=True, torch_dtype=torch.float16
    )
    wanted = tensors_of(folder)
    found = {f"{part}/{name}": tensor for part in {name.split("/")[0] for name in wanted}
             for name, tensor in full_names(part, getattr(pipeline, part).state_dict()).items()}  # fmt: skip
    assert same(found, wanted)


# The traps that other writers have fallen into, each by its name.


def test_trap_the_prefix_of_clip_s_names(write_folder, tmp_path):
    """transformers has left `text_model.` out since 5.6; the file format has it."""
    file = single(write_folder("sd1"), tmp_path / "out.safetensors")
    text = [key for key in file if key.startswith("cond_stage_model.")]
    assert text and all(key.startswith(f"{CLIP}text_model.") for key in text)


def openclip_pooled(file, tokens, heads):
    """The pooled output as OpenCLIP computes it from its own tensors, with a tanh-free GELU and a causal mask."""
    own = {key.removeprefix(SECOND): tensor.double() for key, tensor in file.items() if key.startswith(SECOND)}
    x = own["token_embedding.weight"][tokens] + own["positional_embedding"][: len(tokens)]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    for layer in range(3):
        at = f"transformer.resblocks.{layer}"
        y = norm(x, f"{at}.ln_1") @ own[f"{at}.attn.in_proj_weight"].T + own[f"{at}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in y.chunk(3, -1))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        masked = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        y = (masked.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ own[f"{at}.attn.out_proj.weight"].T + own[f"{at}.attn.out_proj.bias"]
        y = norm(x, f"{at}.ln_2") @ own[f"{at}.mlp.c_fc.weight"].T + own[f"{at}.mlp.c_fc.bias"]
        x = x + torch.nn.functional.gelu(y) @ own[f"{at}.mlp.c_proj.weight"].T + own[f"{at}.mlp.c_proj.bias"]
    return norm(x, "ln_final")[-1] @ own["text_projection"]


def test_trap_the_projection_is_the_other_way_round(write_folder, tmp_path):
    folder = write_folder("sdxl", dtype=torch.float32)
    file = single(folder, tmp_path / "out.safetensors")
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").double()
    tokens = torch.tensor([512, 9, 41, 7, config.vocab_size - 1])  # the last is the largest: what is pooled
    with torch.no_grad():
        pooled = encoder(tokens[None]).text_embeds[0]
    assert torch.allclose(openclip_pooled(file, tokens, config.num_attention_heads), pooled, rtol=1e-9, atol=1e-12)


def test_trap_sd_2_has_a_layer_that_diffusers_has_not(write_file, make_config, tmp_path):
    """And projections in one piece."""
    layer = "cond_stage_model.model.transformer.resblocks."

    def change(tensors):
        for key in [key for key in tensors if key.startswith(f"{layer}1.")]:
            tensors[key.replace(f"{layer}1.", f"{layer}2.")] = torch.rand_like(tensors[key])
        tensors["cond_stage_model.model.text_projection"] = torch.rand(64, 64).half()
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)

    file = write_file("sd2", change=change)
    written = single(file, tmp_path / "out.safetensors")
    assert same(written, load_file(file))
    assert written[f"{layer}2.attn.in_proj_weight"].shape == (192, 64)


@pytest.mark.parametrize(
    ("schedule", "markers"),
    [
        ({"prediction_type": "epsilon"}, []),
        ({"prediction_type": "v_prediction"}, ["v_pred"]),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["v_pred", "ztsnr"]),
    ],
)
def test_trap_v_prediction_is_marked(schedule, markers, write_folder, tmp_path):
    out = tmp_path / "out.safetensors"
    file = single(write_folder("sdxl", **schedule), out)
    assert [key for key in ("v_pred", "ztsnr") if key in file] == markers
    assert all(file[key].numel() == 0 for key in markers)
    assert metadata(out)["modelspec.prediction_type"] == ("v" if markers else "epsilon")
    assert same(single(out, tmp_path / "again.safetensors", reading=Reading()), file)


def test_trap_position_ids_are_whole_numbers_or_absent(write_folder, write_file, tmp_path):
    name = f"{CLIP}text_model.embeddings.position_ids"
    assert name not in single(write_folder("sd1"), tmp_path / "a.safetensors")
    for number, ids in enumerate([torch.arange(77)[None], torch.arange(77)[None].half() + 0.25]):
        file = write_file(name=f"{number}.safetensors", change=lambda tensors, ids=ids: tensors.update({name: ids}))
        written = single(file, tmp_path / f"out-{number}.safetensors")[name]
        assert written.dtype == torch.int64 and torch.equal(written, torch.arange(77)[None])


def test_trap_the_vae_keeps_its_precision_and_its_attention_is_convolutions(write_folder, tmp_path):
    """SDXL's draws nothing but black in fp16."""
    out = tmp_path / "out.safetensors"
    file = single(write_folder("sdxl", dtype=torch.float32), out, torch.float16)
    dtypes = {key.startswith(VAE): set() for key in file}
    for key, tensor in file.items():
        dtypes[key.startswith(VAE)].add(tensor.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.float16}}
    assert (metadata(out)["modelspec.vae_dtype"], metadata(out)["modelspec.unet_dtype"]) == ("float32", "float16")
    attention = [t for key, t in file.items() if ".attn_1." in key and key.endswith("weight") and ".norm." not in key]
    assert len(attention) == 8 and all(tensor.shape == (32, 32, 1, 1) for tensor in attention)


def test_trap_weights_in_another_order_of_memory(write_folder, tmp_path):
    folder = write_folder("sd1", dtype=torch.float32)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    (folder / "unet" / "diffusion_pytorch_model.bin").touch()
    path.unlink()
    torch.save({n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()},
               folder / "unet" / "diffusion_pytorch_model.bin")  # fmt: skip
    file = single(folder, tmp_path / "out.safetensors")
    assert torch.equal(file["model.diffusion_model.out.2.weight"], state["conv_out.weight"])


def test_trap_attention_of_sd_2_overflows_in_fp16(write_file, letters, tmp_path):
    """Other programs compute it in float32 where the config says so; ours, by tests/memory/test_attention.py, always
    do."""
    reading = Reading("v_prediction", str(letters))
    export(str(write_file("sd2")), tmp_path / "out", Format.diffusers, reading=reading)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    attention = [module for name, module in pipeline.unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert attention and all(module.upcast_attention for module in attention)


def test_numbers_too_large_for_fp16_are_kept(write_file, tmp_path, capfd):
    key = "model.diffusion_model.out.2.weight"

    def change(tensors):
        tensors[key] = tensors[key] * 0 + 1e5

    file = single(write_file(dtype=torch.float32, change=change), tmp_path / "out.safetensors", torch.float16)
    assert file[key].dtype == torch.float32 and file[key].max() == 1e5
    assert file[f"{CLIP}text_model.final_layer_norm.bias"].dtype == torch.float16
    assert "unet: 1 of its tensors hold numbers too large for float16" in capfd.readouterr().err


_WRITE = """
from pathlib import Path
import torch
from lowvram_db.formats.export import Format, export
def write(name):
    export(name, Path(name).with_suffix(".out.safetensors"), Format.single_file, torch.bfloat16)
write(sys.argv[2])
"""


def test_writing_holds_little_of_a_model(growth, wide_file, write_file):
    assert growth(_WRITE, "write(sys.argv[1])", wide_file, write_file()) < 160  # MiB, of 720


def test_nothing_is_overwritten_and_a_small_disk_is_seen_before(write_file, tmp_path, small_disk, monkeypatch):
    file = write_file()
    (tmp_path / "mine.safetensors").write_text("precious")
    for form, name in ((Format.single_file, "mine.safetensors"), (Format.diffusers, "mine.safetensors")):
        with pytest.raises(UserError, match=r"mine\.safetensors: exists already"):
            export(str(file), tmp_path / name, form)
    assert (tmp_path / "mine.safetensors").read_text() == "precious"
    with pytest.raises(UserError, match=r"--out .*out\.ckpt: a single file's name ends in \.safetensors"):
        export(str(file), tmp_path / "out.ckpt", Format.single_file)
    disk = small_disk("1m")
    with pytest.raises(UserError, match=r"out\.safetensors: takes 0\.\d\d GB, and 0\.00 are free"):
        export(str(file), disk / "out.safetensors", Format.single_file)
    assert not list(disk.iterdir())


def test_a_run_is_written_with_what_it_was_taught(write_file, letters, make_config, tmp_path):
    def change(tensors):
        with_averages_and_a_fine_vae(tensors)
        tensors["made.up"] = torch.arange(3)

    file = write_file(change=change, metadata={"modelspec.license": "CC0", "ss_steps": "3"})
    model = {"name": str(file), "tokenizer": str(letters)}
    output = {"dtype": "fp16", "single_file": True}
    config = make_config(model=model, train={"steps": 1}, prior={"enabled": False}, output=output)
    run = run_dreambooth(config)
    out = run.single_file(1)
    written, base, said = load_file(out), load_file(file), metadata(out)
    unet = {key for key in base if key.startswith("model.diffusion_model.")}
    assert written.keys() == {key for key in base if not key.startswith("model_ema.")}, "they are of another UNet"
    assert same({k: t for k, t in written.items() if k not in unet}, {k: base[k] for k in written if k not in unet})
    assert any(not torch.equal(written[key], base[key]) for key in unet)
    assert said["modelspec.trigger_phrase"] == "a photo of a pkblz ball" and "pkblz" in said["modelspec.usage_hint"]
    assert said["modelspec.license"] == "CC0" and "ss_steps" not in said
    kind, picture = said["modelspec.thumbnail"].split(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(picture))).size == (64, 64)

    before = out.stat().st_mtime_ns
    run_dreambooth(config)
    assert out.stat().st_mtime_ns == before
    file.unlink()
    export(str(run.folder), tmp_path / "alone.safetensors", Format.single_file)
    alone = load_file(tmp_path / "alone.safetensors")
    assert same({key: alone[key] for key in unet}, {key: written[key] for key in unet})


def test_a_run_in_which_nothing_changed_gives_the_file_it_began_with(write_file, letters, make_config, tmp_path):
    """model/ is coarser than the base was; whatever is the same in it is taken from the base."""
    from lowvram_db.families import open_model

    file = write_file("sd1", dtype=torch.float32, change=lambda tensors: tensors.update({"made.up": torch.arange(3)}))
    config = make_config(model={"name": str(file), "tokenizer": str(letters)})
    run = Run.of(config)
    run.folder.mkdir(parents=True)
    family = open_model(str(file), reading=config.model.reading)
    family.save(run.model, torch.float16, unet=family.load_denoiser())
    export_run(config, run, tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), load_file(file))


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_every_family_trains_from_a_file_and_comes_out_as_one(kind, write_file, letters, make_config):
    def change(tensors):
        if kind == "sdxl":
            tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}

    file = write_file(kind, change=change)
    model = {"name": str(file), "tokenizer": str(letters), "prediction_type": {"sd2": "epsilon"}.get(kind)}
    output = {"dtype": "fp16", "single_file": True}
    run = run_dreambooth(make_config(model=model, train={"steps": 1}, prior={"enabled": False}, output=output))
    written, base = load_file(run.single_file(1)), load_file(file)
    assert written.keys() == base.keys()
    changed = {key for key in written if not torch.equal(written[key], base[key])}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)


def test_what_is_said_of_a_single_file_is_refused_for_what_is_none(write_folder, tmp_path):
    folder, speaks = write_folder("sd1"), Reading(prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"--prediction-type v_prediction: .*scheduler_config.json says epsilon"):
        export(str(folder), tmp_path / "out.safetensors", Format.single_file, reading=speaks)
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.toml").touch()
    for reading in (speaks, Reading(ema=True), Reading(vae="x"), Reading(tokenizer="x")):
        with pytest.raises(UserError, match=r"run: is a run, which knows how its model is read; leave those options"):
            export(str(run), tmp_path / "out.safetensors", Format.single_file, reading=reading)
    assert not (tmp_path / "out.safetensors").exists()
