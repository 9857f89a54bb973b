"""Loss and gradients of each generation of Stable Diffusion beside a loop made of its diffusers pipeline's pieces.

Networks compute in float64 on both sides: in float32 the order of sums leaves .9e-6 of SDXL's whole gradient open,
and 4e-6 of a tensor's. What is left, 2.1e-7 of a tensor's, is of noise and loss, which the objective takes in
float32.
"""

import json

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from PIL import Image
from torch.nn.functional import mse_loss

from lowvram_db.demo.miniature import write_pipeline, write_sd2, write_sdxl
from lowvram_db.kernels import bits
from lowvram_db.train import checkpoint, objective

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SIZES = [(1366, 768), (1000, 1366), (601, 601)]  # none of which bfloat16 has numbers for


def pieces(model):
    """The UNet, and what it is told of prompts and (height, width) sizes: all by the pipeline's own functions. And the
    text encoders behind them, by their names."""
    kind = json.loads((model / "model_index.json").read_text())["_class_name"]
    if kind == "StableDiffusionPipeline":
        pipeline = StableDiffusionPipeline.from_pretrained(model)

        def told(prompts, _):
            return {"encoder_hidden_states": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}

        return pipeline.unet, told, {"text_encoder": pipeline.text_encoder}
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)

    def told_sizes(prompts, sizes):
        text, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        width = pipeline.text_encoder_2.config.projection_dim
        ids = [pipeline._get_add_time_ids(*row, dtype=torch.float32, text_encoder_projection_dim=width)
               for row in sizes]  # fmt: skip
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.cat(ids)},
        }

    return pipeline.unet, told_sizes, {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}


def cast(told, dtype):
    """Tensors, and those of a dictionary inside."""
    return {name: cast(x, dtype) if isinstance(x, dict) else x.to(dtype) for name, x in told.items()}


def plain(unet, told, scheduler, batch, step, sizes, min_snr_gamma, prior_weight):
    """Loss and gradients in the UNet's precision, with nothing of ours but the draws."""
    unet.zero_grad()
    rows, shape = len(batch.prompts), batch.moments.mean.shape[1:]
    posterior, noise = (
        torch.stack([bits.normal(shape, 0, step=step, sample=row, stream=stream) for row in range(rows)]).to(unet.dtype)
        for stream in (0, 1)
    )
    timesteps = objective.timesteps(rows, 1000, 0, step)
    mean, logvar = (tensor.to(unet.dtype) for tensor in batch.moments)
    latents = mean + logvar.mul(0.5).exp() * posterior
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, **cast(told(batch.prompts, sizes), unet.dtype)).sample
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v else noise
    losses = mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
    if min_snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=min_snr_gamma) / (snr + 1 if v else snr)
    loss = losses[: batch.instances].mean() + prior_weight * losses[batch.instances :].mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in unet.named_parameters()}


def crops(photo, size):
    """Original size, crop corner and target size of a photo's middle, as (height, width) and (top, left)."""
    (width, height), (wide, high) = photo, size
    scale = max(wide / width, high / height)
    return (height, width), (round((height * scale - high) / 2), round((width * scale - wide) / 2)), (high, wide)


MODELS = {
    "SD 1, epsilon": (write_pipeline, {}),
    "SD 2, v prediction": (write_sd2, {}),
    "SD 2 base, epsilon": (write_sd2, {"prediction_type": "epsilon"}),
    "SDXL": (write_sdxl, {}),
    "SDXL, v prediction that ends in noise": (write_sdxl, ZERO_SNR),
}


@pytest.fixture
def odd_photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "photos" / f"{number}.jpg")
    return str(tmp_path / "photos")


@pytest.mark.parametrize(("crop", "min_snr_gamma"), [("square", None), ("buckets", 5.0)])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_equal_a_plain_diffusers_loop(
    make_config, make_trainer, tmp_path, odd_photos, model, crop, min_snr_gamma
):
    write, schedule = MODELS[model]
    write(tmp_path / "model", **schedule)
    train = {"batch": 2, "crop": crop, "min_snr_gamma": min_snr_gamma, "gradient_checkpointing": False}
    trainer = make_trainer(
        make_config(
            model={"name": str(tmp_path / "model")},
            subject={"photos": odd_photos},
            prior={"weight": 0.7},
            train=train,
            optimizer={"name": "adamw"},
        )
    )
    unet, told, _ = pieces(tmp_path / "model")
    theirs = unet.double(), told, DDPMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    trainer.denoiser.double()
    trainer.activations = torch.float64
    for step in range(2):
        batch = trainer.batches[step]
        sizes = [crops(view.photo, view.size) for view in batch.views]
        wanted, gradients = plain(*theirs, batch, step, sizes, min_snr_gamma, 0.7)
        trainer.step = step
        assert trainer.backward(batch).total.item() == pytest.approx(wanted, rel=1e-6)
        for name, parameter in trainer.denoiser.named_parameters():
            assert (parameter.grad - gradients[name]).norm() <= 1e-6 * gradients[name].norm(), name
        trainer.optimizer.zero_grad()


@pytest.mark.parametrize("model", ["SD 1, epsilon", "SD 2, v prediction", "SDXL"])
def test_text_encoders_learn_as_in_a_plain_loop_at_their_own_rate_until_they_stop(
    make_config, make_trainer, tmp_path, model
):
    """Two groups of torch's AdamW under LambdaLR; encoders that have stopped still encode every batch there."""
    write, schedule = MODELS[model]
    write(tmp_path / "model", **schedule)
    trainer = make_trainer(
        config := make_config(
            model={"name": str(tmp_path / "model")},
            prior={"weight": 0.7},
            train={"steps": 5, "lr": 1e-3, "schedule": "linear", "warmup": 2, "gradient_checkpointing": False},
            text_encoder={"train": True, "lr": 3e-3, "stop": 3},
            optimizer={"name": "adamw"},
        )
    )
    unet, told, encoders = pieces(tmp_path / "model")
    texts = [weight for encoder in encoders.values() for weight in encoder.parameters()]
    adamw = torch.optim.AdamW([{"params": unet.parameters(), "lr": 1e-3}, {"params": texts, "lr": 3e-3}])
    rates = torch.optim.lr_scheduler.LambdaLR(adamw, [0.5, 1, 1, 2 / 3, 1 / 3, 0].__getitem__)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    for step in range(5):
        if step == 3:
            checkpoint.save(tmp_path / "step-000003", trainer.contents())
            trainer = make_trainer(config, start=tmp_path / "step-000003")
            assert set(trainer.modules) == {"unet"}
            for weight in texts:
                weight.requires_grad_(False)
        batch = trainer.batches[step]
        sizes = [crops(view.photo, view.size) for view in batch.views]
        wanted, _ = plain(unet, told, scheduler, batch, step, sizes, None, 0.7)
        assert trainer.train_step().read().total == pytest.approx(wanted, rel=1e-5), step
        adamw.step()
        adamw.zero_grad()
        rates.step()
    trainer.family.save(tmp_path / "saved", torch.float32, **trainer.modules)
    for before, after, theirs in zip(
        networks(tmp_path / "model"), networks(tmp_path / "saved"), [unet, *encoders.values()], strict=True
    ):
        moved, wanted = (
            torch.cat([(p - q).detach().flatten() for p, q in zip(x.parameters(), before.parameters(), strict=True)])
            for x in (after, theirs)
        )
        assert (moved - wanted).norm() < 0.01 * wanted.norm()


def networks(model):
    unet, _, encoders = pieces(model)
    return [unet, *encoders.values()]


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_a_layer_nobody_listens_to_computes_as_the_others_do_and_is_saved_as_it_was(
    make_config, make_trainer, tmp_path, halves_are_native, compute
):
    """The last one of SDXL's first text encoder."""
    halves_are_native(True)
    write_sdxl(tmp_path / "model")
    model, text = {"name": str(tmp_path / "model")}, {"train": True}
    trainer = make_trainer(make_config(model=model, text_encoder=text, precision={"compute": compute}))
    before = trainer.family.load_text_encoders()["text_encoder"].state_dict()
    trainer.train_step()
    trainer.finish()
    after = trainer.modules["text_encoder"].state_dict()
    idle = before.keys() - {name.removeprefix("text_encoder.") for name in trainer.trained}
    assert any("layers." in name for name in idle)
    assert all(torch.equal(after[name], before[name]) for name in idle)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_sizes_arrive_as_they_are_in_half_precision(
    make_config, make_trainer, tmp_path, odd_photos, halves_are_native, compute
):
    halves_are_native(True)
    write_sdxl(tmp_path / "model")
    model, subject = {"name": str(tmp_path / "model")}, {"photos": odd_photos}
    trainer = make_trainer(make_config(model=model, subject=subject, precision={"compute": compute}))
    batch, seen = trainer.batches[0], []
    trainer.denoiser.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    trainer.backward(batch)
    wanted = [side for view in batch.views for pair in crops(view.photo, view.size) for side in pair]
    assert trainer.activations != torch.float32 and seen[0] == wanted


def test_a_mask_weighs_the_loss_of_its_rows_also_in_parts(make_config, make_trainer):
    trainer = make_trainer(make_config(train={"batch": 1}))
    batch = trainer.batches[0]
    masks = torch.ones(2, 1, *batch.moments.mean.shape[2:])
    masks[0] = 3
    with torch.no_grad():
        plain = trainer.forward(trainer.inputs(batch), batch.prompts, slice(0, 2))[1]
        inputs = trainer.inputs(batch._replace(masks=masks))
        whole = trainer.forward(inputs, batch.prompts, slice(0, 2))[1]
        parts = [trainer.forward(inputs, batch.prompts, slice(row, row + 1))[1] for row in range(2)]
    torch.testing.assert_close(whole, plain * torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_under_a_lora_frozen_weights_stay_in_the_precision_that_is_computed_in(make_config, make_trainer):
    trainer = make_trainer(make_config(method={"name": "lora", "rank": 4}, precision={"compute": "bf16"}))
    weights = {f"unet.{name}": weight for name, weight in trainer.denoiser.named_parameters() if weight.dim() > 1}
    assert {weight.dtype for name, weight in weights.items() if name not in trainer.trained} == {torch.bfloat16}
    assert {weight.dtype for weight in trainer.trained.values()} == {torch.float32}
