import copy
import json
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss

from lowvram_db.concept import Concept
from lowvram_db.demo.miniature import write_pipeline
from lowvram_db.errors import UserError
from lowvram_db.kernels import bits
from lowvram_db.kernels.noise_loss import noise_loss, noisy_latents
from lowvram_db.memory.arithmetic import is_native
from lowvram_db.run import Run
from lowvram_db.train import checkpoint, objective
from lowvram_db.train.batches import Batches
from lowvram_db.train.loop import train
from lowvram_db.train.optimizer import build


def draws(shape, step, stream):
    return torch.stack([bits.normal(shape[1:], 0, step=step, sample=row, stream=stream) for row in range(shape[0])])


class AdamA(torch.optim.AdamW):
    """Gathers the mean of gradients and of their squares, each scaled to max_norm by the norm of the one before."""

    def __init__(self, parameters, *, parts, max_norm=None, **settings):
        super().__init__(parameters, **settings)
        self.parts, self.max_norm, self.norm, self.steps = parts, max_norm, 0.0, 0
        self.weights = self.param_groups[0]["params"]
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]
        self.sums = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]

    def gather(self):
        factor = min(1.0, self.max_norm / self.norm) if self.max_norm and self.norm else 1.0
        self.norm = torch.stack([w.grad.norm() for w in self.weights]).norm().item()
        for weight, (sum_, squares) in zip(self.weights, self.sums, strict=True):
            sum_ += factor * weight.grad / self.parts
            squares += (factor * weight.grad) ** 2 / self.parts
        self.zero_grad()

    @torch.no_grad()
    def step(self):
        self.steps += 1
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for weight, (m, v), (sum_, squares) in zip(self.weights, self.moments, self.sums, strict=True):
            m.lerp_(sum_, 0.1)
            v.lerp_(squares, 0.001)
            update = m / (1 - 0.9**self.steps) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            weight.mul_(1 - lr * decay).sub_(lr * update)
            sum_.zero_()
            squares.zero_()


def plain_losses(model, trainer, steps, lr, accumulate=1, max_norm=None, mean_of_squares=False):
    """DreamBooth with prior preservation as a textbook loop of diffusers and torch, nothing of ours but the draws."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    if mean_of_squares:
        optimizer = AdamA(unet.parameters(), parts=accumulate, max_norm=max_norm, **settings)
    else:
        optimizer = torch.optim.AdamW(unet.parameters(), **settings)
    losses = []
    for step in range(steps):
        parts = []
        for number in range(step * accumulate, (step + 1) * accumulate):
            batch = trainer.batches[number]
            posterior, noise = (draws(batch.moments.mean.shape, number, stream) for stream in (0, 1))
            timesteps = objective.timesteps(len(noise), 1000, 0, number)
            latents = batch.moments.mean + batch.moments.logvar.mul(0.5).exp() * posterior
            text = trainer.batches.cached.conditioning(batch.prompts)["text"]
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, timesteps)
            else:
                target = noise
            instance_prediction, prior_prediction = prediction.chunk(2)
            instance_target, prior_target = target.chunk(2)
            loss = mse_loss(instance_prediction, instance_target) + 0.7 * mse_loss(prior_prediction, prior_target)
            parts.append(loss.item())
            if mean_of_squares:
                loss.backward()
                optimizer.gather()
            else:
                (loss / accumulate).backward()
        if max_norm and not mean_of_squares:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts) / accumulate)
    return losses


@pytest.mark.parametrize(
    ("prediction_type", "gathering"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("epsilon", {"accumulate": 3}),
        ("epsilon", {"max_norm": 2.0}),  # some gradients are larger, others are not
        ("epsilon", {"accumulate": 2, "max_norm": 2.0}),
    ],
)
def test_losses_equal_a_plain_diffusers_loop(make_config, make_trainer, tmp_path, prediction_type, gathering):
    write_pipeline(tmp_path / "model", prediction_type=prediction_type)
    config = make_config(
        model={"name": str(tmp_path / "model")},
        prior={"weight": 0.7},
        train={"steps": 20, "lr": 1e-3, "batch": 2, "gradient_checkpointing": False, **gathering},
        optimizer={"name": "adamw"},
    )
    trainer = make_trainer(config)
    wanted = plain_losses(tmp_path / "model", trainer, 20, 1e-3, **gathering)
    got = [trainer.train_step().read().total for _ in range(20)]
    # Sums of gradients that are taken in another order part after some steps.
    assert got == pytest.approx(wanted, abs=1e-5 if gathering else 1e-6)
    assert got[-1] != pytest.approx(got[0], abs=1e-3), "nothing was trained, so nothing was compared"


@pytest.mark.parametrize(
    "gathering", [pytest.param({"accumulate": 3}, marks=pytest.mark.slow), {"accumulate": 2, "max_norm": 0.2}]
)
def test_adam8_gathers_batches_by_its_own_rule(make_config, make_trainer, miniature, gathering):
    train = {"steps": 8, "lr": 1e-3, "batch": 2, "gradient_checkpointing": False, **gathering}
    trainer = make_trainer(make_config(prior={"weight": 0.7}, train=train, precision={"compute": "fp32"}))
    got = [trainer.train_step().read().total for _ in range(8)]
    assert got == pytest.approx(plain_losses(miniature, trainer, 8, 1e-3, mean_of_squares=True, **gathering), rel=0.01)
    for other in ({"mean_of_squares": False, **gathering}, {"mean_of_squares": True, "accumulate": 1}):
        assert got != pytest.approx(plain_losses(miniature, trainer, 8, 1e-3, **other), rel=0.01), other


def losses_of(make_trainer, config, steps=6):
    trainer = make_trainer(config)
    return [trainer.train_step().read().total for _ in range(steps)]


def test_gradient_checkpointing_changes_memory_only(make_config, make_trainer):
    on, off = (
        losses_of(make_trainer, make_config(train={"gradient_checkpointing": value}, optimizer={"name": "adamw"}))
        for value in (True, False)
    )
    assert on == off


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("weights", [None, "fp32"])
@pytest.mark.parametrize("compute", HALVES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_half_precision_stays_near_float32(make_config, make_trainer, weights, compute, checkpointing):
    train = {"gradient_checkpointing": checkpointing}
    exact = losses_of(make_trainer, make_config(train=train))
    mixed = losses_of(make_trainer, make_config(train=train, precision={"compute": compute, "weights": weights}))
    assert mixed == pytest.approx(exact, rel=0.03)
    stored = weights is None
    assert (mixed != exact) == (stored or is_native(HALVES[compute], torch.device("cpu")))


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp16"])
def test_weights_in_half_precision_train_in_float32_where_that_would_be_emulated(
    make_config, make_trainer, halves_are_native, weights
):
    """Losses and gradients are those of a float32 network that begins with the weights as they are stored."""
    halves_are_native(False)
    compute, text = weights.partition("+")[0], {"train": True}
    trainer = make_trainer(make_config(text_encoder=text, precision={"compute": compute, "weights": weights}))
    exact = make_trainer(make_config(text_encoder=text, optimizer={"name": "adamw"}))
    gradients = {}
    with torch.no_grad():
        for place, (stored, whole) in enumerate(zip(trainer.parameters, exact.parameters, strict=True)):
            whole.copy_(stored)
            stored.register_hook(partial(gradients.__setitem__, place))
    scale = trainer.scaler.get_scale()
    assert (scale > 1) == (compute == "fp16"), "gradients are stored in fp16, and faint ones would be lost"
    losses = [trained.backward(trained.batches[0]).total for trained in (trainer, exact)]
    assert torch.equal(*losses)
    half, once = HALVES[compute], torch.finfo(HALVES[compute]).eps / 2 * 1.001
    for place, whole in enumerate(exact.parameters):
        assert gradients[place].dtype == half
        faint = 1e-6 * whole.grad.abs().max().item() + torch.finfo(half).tiny * once / scale
        torch.testing.assert_close(gradients[place].float() / scale, whole.grad, rtol=once, atol=faint)
    assert {parameter.dtype for parameter in trainer.parameters} == {half}


def test_weights_stay_float32_under_autocast(make_config, make_trainer):
    trainer = make_trainer(make_config(precision={"compute": "bf16"}, optimizer={"name": "adamw"}))
    trainer.train_step()
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}


WEIGHTS = {"bf16": torch.bfloat16, "bf16+residual": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_adam8_stores_weights_as_it_is_told_and_leaves_no_gradient(make_config, make_trainer, weights):
    compute = {"fp16": "fp16", "fp32": "fp32"}.get(weights, "bf16")
    trainer = make_trainer(make_config(precision={"compute": compute, "weights": weights}))
    assert {parameter.dtype for parameter in trainer.parameters} == {WEIGHTS[weights]}
    trainer.backward(trainer.batches[0])
    assert all(parameter.grad is None for parameter in trainer.parameters), "every gradient is gone with its update"


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 0.01), ("bf16+residual", 0.03), ("bf16", 0.03)])
def test_adam8_learns_as_adamw_does(make_config, make_trainer, weights, tolerance):
    train = {"steps": 30, "lr": 1e-3, "gradient_checkpointing": False}
    exact = losses_of(make_trainer, make_config(train=train, optimizer={"name": "adamw"}), steps=30)
    precision = {"compute": "fp32" if weights == "fp32" else "bf16", "weights": weights}
    ours = losses_of(make_trainer, make_config(train=train, precision=precision), steps=30)
    assert ours == pytest.approx(exact, rel=tolerance)
    assert min(exact[20:]) < 0.9 * exact[0], "nothing was learned, so nothing was compared"


def test_kernels_that_cannot_run_here_are_refused_by_name(make_config, make_trainer, monkeypatch):
    monkeypatch.setattr("lowvram_db.kernels.launch.problem", lambda device: "it is not installed")
    with pytest.raises(
        UserError, match=r'kernels: Triton does not run here: it is not installed; use kernels = "auto"'
    ):
        make_trainer(make_config().model_copy(update={"kernels": "triton"}))


def test_gradients_that_stay_no_numbers_end_the_run_by_name(make_config, make_trainer):
    trainer = make_trainer(make_config(train={"steps": 100}))
    trainer.denoiser.conv_in.weight.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    with (
        pytest.warns(UserWarning, match=r"a gradient of unet\.conv_in\.weight"),
        pytest.raises(
            UserError, match=r"unet\.conv_in\.\w+ was not finite in 20 steps in a row; in a new run .* lower train\.lr"
        ),
    ):
        for _ in range(20):
            trainer.judge(trainer.step, trainer.train_step().read())


def test_text_encoder_training_moves_it(make_config, make_trainer):
    trainer = make_trainer(make_config(text_encoder={"train": True}))
    assert not trainer.batches.cached.prompts
    encoder = trainer.text_encoders["text_encoder"]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for _ in range(2):
        trainer.train_step()
    moved = [
        name
        for name, tensor in trainer.text_encoders["text_encoder"].state_dict().items()
        if not torch.equal(tensor, before[name])
    ]
    assert any("layers.0" in name for name in moved)
    assert set(trainer.modules) == {"unet", "text_encoder"}


def test_min_snr_lowers_the_loss_of_easy_timesteps(make_config, make_trainer):
    plain = losses_of(make_trainer, make_config(optimizer={"name": "adamw"}), steps=1)
    weighted = losses_of(make_trainer, make_config(train={"min_snr_gamma": 1e-3}, optimizer={"name": "adamw"}), steps=1)
    assert weighted[0] < plain[0]


def fixed_loss(trainer, prompt, moments, rows=32):
    """Mean loss on noise and timesteps that never change (an address that training does not reach)."""
    address, timesteps = torch.tensor([99, 10**6]), objective.timesteps(rows, 1000, 99, 10**6)
    mean, logvar = (part.expand(rows, -1, -1, -1) for part in moments)
    noise = mean, logvar, timesteps, trainer.table, address
    with torch.no_grad():
        conditioning = trainer.batches.cached.conditioning([prompt] * rows)
        prediction = trainer.family.denoise(trainer.denoiser, noisy_latents(*noise), timesteps, conditioning)
        return noise_loss(prediction, *noise, objective.row_weights(rows, rows, 0.0))[0].item()


def make_latents_strong(cached):
    """A random VAE's latents are faint; a trained one's have unit scale."""
    stack = cached.store.stack

    def strong(keys):
        entries = stack(keys)
        if "mean" in entries:
            mean = entries["mean"]
            entries["mean"] = (mean - mean.mean((1, 2, 3), keepdim=True)) / mean.std((1, 2, 3), keepdim=True)
        return entries

    cached.store.stack = strong


SUBJECT_PROMPT, CLASS_PROMPT = "a photo of a pkblz ball", "a photo of a ball"


def retrain(trainer, concept, steps=200):
    """Go on with the same weights on another concept, with a fresh optimizer."""
    batches = Batches(concept, trainer.batches.cached, 1, seed=trainer.step)
    group = {"params": list(trainer.denoiser.named_parameters()), "lr": 1e-3, "initial_lr": 1e-3}
    trainer.batches, trainer.optimizer = batches, build(trainer.config.optimizer, [group])
    for _ in range(steps):
        trainer.train_step()


def test_the_subject_is_learned_and_the_class_kept(make_config, make_trainer):
    """200 steps on one photo, after the class has been learned: with prior preservation only, the class stays."""
    train = {"lr": 1e-3, "gradient_checkpointing": False}
    trainer = make_trainer(make_config(train=train, optimizer={"name": "adamw"}))
    subject_photo, class_photo = trainer.batches.concept.instance_photos[::4]
    make_latents_strong(trainer.batches.cached)
    moments = {photo: trainer.batches.cached.moments(trainer.batches.cached.photos[photo].keys)
               for photo in (subject_photo, class_photo)}  # fmt: skip
    retrain(trainer, Concept([class_photo], [CLASS_PROMPT], [], ""))
    knows_the_class, step = copy.deepcopy(trainer.denoiser.state_dict()), trainer.step
    before_subject = fixed_loss(trainer, SUBJECT_PROMPT, moments[subject_photo])
    before_class = fixed_loss(trainer, CLASS_PROMPT, moments[class_photo])

    for prior in (True, False):
        trainer.denoiser.load_state_dict(knows_the_class)
        trainer.step = step
        retrain(trainer, Concept([subject_photo], [SUBJECT_PROMPT], [class_photo] if prior else [], CLASS_PROMPT))
        assert fixed_loss(trainer, SUBJECT_PROMPT, moments[subject_photo]) < 0.5 * before_subject
        assert (fixed_loss(trainer, CLASS_PROMPT, moments[class_photo]) < 1.2 * before_class) == prior


def test_a_loss_that_is_no_number_ends_the_run(make_config, make_trainer, tmp_path):
    config = make_config(train={"steps": 50, "lr": 1e30}, optimizer={"name": "adamw"}, checkpoint={"every": 0})
    run = Run.of(config)
    run.folder.mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"the loss is (nan|inf) in step \d+ and the 19 before it; in a new run .* lower train\.lr \(is 1e\+30\)$",
    ):
        train(make_trainer(config), run, sample=lambda path: None)
    assert not checkpoint.latest(run.checkpoints)


def test_an_optimizer_that_does_nothing_is_noticed_after_one_step(make_config, make_trainer, monkeypatch):
    config = make_config(optimizer={"name": "adamw"})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    with pytest.raises(UserError, match="did not change any weight in its first step"):
        train(trainer, run, sample=lambda path: None)
    assert trainer.step == 1


def test_fp16_gradients_that_overflow_are_no_broken_optimizer(make_config, make_trainer):
    """The first step is skipped and the loss scale comes down; only then the optimizer steps and is judged."""
    config = make_config(precision={"compute": "fp16"}, optimizer={"name": "adamw"})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-10)
    overflow = iter([torch.inf])
    trainer.parameters[0].register_hook(lambda gradient: gradient * next(overflow, 1.0))
    train(trainer, run, sample=lambda path: None)
    assert trainer.scaler.get_scale() == 2.0**10


def test_the_loop_saves_samples_and_logs_when_due(make_config, make_trainer):
    config = make_config(train={"steps": 7, "warmup": 2}, checkpoint={"every": 2, "keep": 2}, sample={"every": 3})
    run = Run.of(config)
    run.folder.mkdir(parents=True)
    sampled = []
    train(make_trainer(config), run, sample=sampled.append)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-000006", "step-000007"]
    assert sampled == [run.sample_grid(3), run.sample_grid(6)]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["lr"] for line in lines[:3]] == [5e-5, 1e-4, 1e-4]
    assert all(line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"]) for line in lines)
    assert list(run.tensorboard.glob("events.*"))


def test_one_loss_that_is_no_number_changes_nothing(make_config, make_trainer, monkeypatch, tmp_path):
    """Of any optimizer's weights and state; the run goes on, and says null in its log."""
    for optimizer in ("adamw", "bnb-adam8", "adam8"):
        config = make_config(optimizer={"name": optimizer}, train={"steps": 3}, output={"name": optimizer})
        trainer, run = make_trainer(config), Run.of(config)
        run.folder.mkdir(parents=True)
        spoiled, denoise = [], trainer.family.denoise

        def once(*inputs, trainer=trainer, spoiled=spoiled, denoise=denoise):
            if trainer.step == 1:
                spoiled.append({n: p.detach().clone() for n, p in trainer.denoiser.named_parameters()})
                return denoise(*inputs) * torch.nan
            if trainer.step == 2 and len(spoiled) == 1:
                spoiled.append({n: p.detach().clone() for n, p in trainer.denoiser.named_parameters()})
            return denoise(*inputs)

        monkeypatch.setattr(trainer.family, "denoise", once)
        train(trainer, run, sample=lambda path: None)
        before, after = spoiled
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), optimizer
        losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
        assert [loss is None for loss in losses] == [False, True, False]
        assert all(p.isfinite().all() for p in trainer.parameters)
        monkeypatch.undo()


@pytest.mark.parametrize("where", ["log", "bar"])
def test_what_fails_between_two_steps_costs_no_step(make_config, make_trainer, monkeypatch, where):
    config = make_config(train={"steps": 5}, checkpoint={"every": 0})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)

    def fail(*_, **__):
        if trainer.step == 3:
            raise ZeroDivisionError

    monkeypatch.setattr(
        {"log": "lowvram_db.train.loop.Metrics.log", "bar": "lowvram_db.train.loop.Bar.advance"}[where], fail
    )
    with pytest.raises(ZeroDivisionError):
        train(trainer, run, sample=lambda path: None)
    assert list(checkpoint.steps(run.checkpoints)) == [3]


def test_what_fails_in_a_step_saves_no_half_of_it(make_config, make_trainer, monkeypatch):
    config = make_config(train={"steps": 5}, checkpoint={"every": 0})
    trainer, run = make_trainer(config), Run.of(config)
    run.folder.mkdir(parents=True)
    update = trainer.update
    monkeypatch.setattr(trainer, "update", lambda loss: 1 / 0 if trainer.step == 3 else update(loss))
    with pytest.raises(ZeroDivisionError):
        train(trainer, run, sample=lambda path: None)
    assert not checkpoint.steps(run.checkpoints)
