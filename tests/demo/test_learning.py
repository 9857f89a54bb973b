"""DreamBooth on the shipped base model really learns the subject and keeps the class, by the critic's judgement.

The training is the demo's, shortened. The floors lie under what it reaches by more than seeds differ (see
bench/results/demo_learning.csv); the slow tests show each of them red.
"""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from lowvram_db.config import load
from lowvram_db.demo.critic import load_critic
from lowvram_db.demo.measure import Learned, learned
from lowvram_db.demo.photos import write_photos
from lowvram_db.demo.subjects import SUBJECT, SUBJECTS
from lowvram_db.dreambooth import run_dreambooth

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # under 3 minutes where nothing else runs
OWN, ELSEWHERE, SETTING, MISTAKEN, DIVERSITY = 0.8, 0.78, 0.85, 0.2, 0.9


def measured(model: str) -> Learned:
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return learned(pipeline, load_critic(), SUBJECT, "a photo of a pkblz jellyfish", each=3)


def verdict(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> dict[str, bool]:
    """What a run of configs/demo.toml with `changes` has and has not reached."""
    monkeypatch.chdir(ROOT)
    short = ["sample.seeds=1", "sample.steps=1", f"output.dir={folder}"]
    config = load(ROOT / "configs" / "demo.toml", [*short, *changes])
    base, trained = measured(config.model.name), measured(str(run_dreambooth(config).model))
    print(base, trained)
    return {
        "the subject is learned": trained.own >= OWN and trained.elsewhere >= ELSEWHERE,
        "settings follow the prompt": trained.setting_right >= SETTING,
        "the class is not taken over": trained.mistaken <= MISTAKEN,
        "the class is as varied as before": trained.diversity >= DIVERSITY * base.diversity,
    }


@pytest.mark.slow
def test_the_subject_is_learned_and_the_class_kept(tmp_path, monkeypatch):
    assert all(verdict(tmp_path, monkeypatch).values())


@pytest.mark.slow
def test_a_learning_rate_of_next_to_nothing_learns_no_subject(tmp_path, monkeypatch):
    found = verdict(tmp_path, monkeypatch, "train.lr=1e-9")
    assert not found["the subject is learned"] and found["the class is as varied as before"]


@pytest.mark.slow
def test_photos_of_another_subject_do_not_teach_this_one(tmp_path, monkeypatch):
    write_photos(SUBJECTS["capsule-ball"], tmp_path / "ball")
    assert not verdict(tmp_path, monkeypatch, f"subject.photos={tmp_path / 'ball'}")["the subject is learned"]


@pytest.mark.slow
def test_without_the_prior_loss_the_class_is_lost(tmp_path, monkeypatch):
    """To the subject, which is learned so a little less than the floors ask for: without it, likeness in other settings
    is .78 to .84 over five seeds."""
    found = verdict(tmp_path, monkeypatch, "prior.weight=0.0")
    assert not found["the class is not taken over"] and not found["the class is as varied as before"]
