"""The pre-training command goes from nothing to a pipeline that loads, and goes on where it was killed."""

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lowvram_db.demo.captions import caption
from lowvram_db.demo.critic import Critic, load_critic
from lowvram_db.demo.denoiser import Base, give_rare_words_a_place
from lowvram_db.demo.measure import Asked, prompt_accuracy
from lowvram_db.demo.models import make_scheduler, make_vae
from lowvram_db.demo.names import NEW_WORDS, individuals
from lowvram_db.demo.pretrain import Settings, run
from lowvram_db.demo.stage import Budget, Fit
from lowvram_db.demo.tokenizer import END, RARE_WORDS, name_pieces, train_tokenizer
from lowvram_db.demo.world import NOUNS, SETTINGS, training_scene

SHORT = Budget(steps=2, batch=2, lr=1e-3, measure_steps=2)
TINY = dataclasses.replace(
    Settings(),
    scenes=8,
    held_out=4,
    looks=16,
    vae=SHORT,
    decoder=SHORT,
    wide=SHORT,
    reader=SHORT,
    critic=SHORT,
    base=SHORT,
)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer()


def test_the_command_makes_a_pipeline_that_loads_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram_db.demo.denoiser.MEASURED_BATCHES", 1)
    run(TINY, tmp_path, "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export" / "base")
    critic = load_critic(tmp_path / "export" / "critic.safetensors")
    assert set(prompt_accuracy(pipeline, critic, [Asked("mug", "red", "in snow")], steps=2)) == {
        "class",
        "colour",
        "setting",
    }
    assert {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert {p.name for p in tmp_path.glob("*.csv")} == {
        "vae.csv",
        "decoder.csv",
        "wide.csv",
        "critic.csv",
        "reader.csv",
        "base.csv",
    }
    assert (tmp_path / "settings.json").exists()


def test_all_of_it_is_small_enough_to_ship(tokenizer) -> None:  # type: ignore[no-untyped-def]
    parts = (make_vae(), Base(tokenizer), Critic())
    assert sum(p.numel() for part in parts for p in part.parameters()) <= 10_000_000


def _toy(folder: Path, steps: int) -> tuple[Fit, list[int]]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    return Fit("toy", module, Budget(steps=steps, batch=4, lr=0.1, warmup=2), folder), []


def _toy_loss(fit: Fit, seen: list[int], die_at: int | None = None):  # type: ignore[no-untyped-def]
    def loss_of(step: int) -> Tensor:
        if step == die_at:
            raise KeyboardInterrupt
        seen.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (fit.module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss_of


def test_a_killed_stage_goes_on_and_ends_where_a_straight_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, seen = _toy(tmp_path / "straight", 30)
    straight.folder.mkdir()
    straight.run(_toy_loss(straight, seen), lambda module: {})
    monkeypatch.setattr("lowvram_db.demo.stage.CHECKPOINT_SECONDS", -1.0)
    broken, seen = _toy(tmp_path / "broken", 30)
    broken.folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        broken.run(_toy_loss(broken, seen, die_at=17), lambda module: {})
    again, seen = _toy(tmp_path / "broken", 30)
    again.run(_toy_loss(again, seen), lambda module: {})
    assert seen == list(range(17, 30))
    assert torch.equal(again.module.weight, straight.module.weight)


def test_a_finished_stage_is_passed_over(tmp_path: Path) -> None:
    first, seen = _toy(tmp_path, 5)
    first.run(_toy_loss(first, seen), lambda module: {})
    second, seen = _toy(tmp_path, 5)
    second.run(_toy_loss(second, seen), lambda module: {})
    assert seen == []
    assert torch.equal(second.module.weight, first.module.weight)


def test_learning_rate_rises_stays_and_falls() -> None:
    budget = Budget(steps=1000, batch=1, lr=1.0, warmup=100, decay=0.4)
    assert budget.lr_at(0) == pytest.approx(0.01)
    assert budget.lr_at(100) == budget.lr_at(600) == pytest.approx(1.0)
    assert budget.lr_at(800) == pytest.approx(0.51)
    assert budget.lr_at(999) < 0.03


def test_the_schedule_ends_in_noise() -> None:
    alphas = make_scheduler().alphas_cumprod
    assert alphas[-1].sqrt() < 0.02


def test_ordinary_words_are_one_token_and_names_are_pieces_that_others_share(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for word in (*NOUNS, "photo", "picture", "crown", "stripes", *" ".join(SETTINGS).split()):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    known = set(name_pieces(tokenizer, (one.name for one in individuals())))
    for word in NEW_WORDS:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(pieces) > 1 and set(pieces) <= known, word


def test_the_tail_of_the_vocabulary_holds_tokens_no_caption_used(tokenizer) -> None:  # type: ignore[no-untyped-def]
    used: set[int] = set()
    for seed in range(2000):
        used.update(tokenizer(caption(training_scene(seed), Random(seed)))["input_ids"])
    rare = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in RARE_WORDS]
    assert all(len(ids) == 1 for ids in rare)
    assert not {ids[0] for ids in rare} & used
    assert min(ids[0] for ids in rare) > len(tokenizer) - 60


def test_captions_fit_the_text_encoder(tokenizer) -> None:  # type: ignore[no-untyped-def]
    longest = max(len(tokenizer(caption(training_scene(s), Random(s)))["input_ids"]) for s in range(2000))
    assert longest <= tokenizer.model_max_length == 32


def test_the_tokenizer_comes_back_from_disk(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "a photo of the pkblz jellyfish in the sea"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.model_max_length == tokenizer.model_max_length and again.pad_token == END


def test_rare_words_join_the_crowd_of_name_pieces(tokenizer) -> None:  # type: ignore[no-untyped-def]
    base = Base(tokenizer)
    table = base.text_encoder.get_input_embeddings().weight
    known = name_pieces(tokenizer, (one.name for one in individuals()))
    rare = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in RARE_WORDS]
    with torch.no_grad():
        table[known] = table[known] * 10 + 1
    before = table.detach().clone()
    give_rare_words_a_place(base, tokenizer)
    assert table[rare].mean().item() == pytest.approx(table[known].mean().item(), abs=0.2)
    assert table[rare].std().item() == pytest.approx(table[known].std().item(), rel=0.3)
    untouched = [i for i in range(len(table)) if torch.equal(table[i], before[i])]
    assert set(known) <= set(untouched) and len(untouched) > len(table) - 60
