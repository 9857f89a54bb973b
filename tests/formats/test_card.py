import json
import shutil
from itertools import pairwise

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.formats.card import card, write_card
from lowvram_db.formats.export import Format, export
from lowvram_db.run import Run

SCORES = {name: {"mean": 0.5} for name in ("subject", "class_likeness", "class_diversity", "memorised")}
EVALUATION = {
    "backbone": "dinov2",
    "checkpoints": [
        {"step": 2, "scores": {name: {"mean": 0.9} for name in [*SCORES, "prompt"]}, "findings": ["not yet learned"]},
        {"step": 4, "scores": {**SCORES, "prompt": None}, "findings": ["memorised"]},
    ],
}


def test_a_run_is_exported_with_a_card_that_the_hub_reads(make_config, miniature, tmp_path):
    base = shutil.copytree(miniature, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Base")
    run = run_dreambooth(make_config(model={"name": str(base)}))
    (run.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    export(str(run.folder), tmp_path / "out", Format.diffusers)
    read = ModelCard.load(tmp_path / "out" / "README.md")
    assert read.data.license == "creativeml-openrail-m"
    assert read.data.base_model is None, "no hub knows a folder"
    assert read.data.library_name == "diffusers"
    assert read.data.instance_prompt == "a photo of a pkblz ball"
    assert read.data.tags == ["text-to-image", "dreambooth", "stable-diffusion"]
    assert (tmp_path / "out" / "samples.png").read_bytes() == run.sample_grid(4).read_bytes()
    for said in (
        "likeness to the photos | 0.500",
        "It was found: memorised.",
        "| steps | 4 |",
        "3 class images",
        "text encoder | as",
    ):
        assert said in read.text
    assert "agreement with prompts" not in read.text
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")

    export(str(run.model), tmp_path / "model", Format.diffusers)
    assert not (tmp_path / "model" / "README.md").exists(), "of a model alone nothing is known"


HOSTILE = [
    "---\n# x",
    "`a` ``b``",
    "a: [b",
    '"quoted"',
    "\u202eright to left",
    "<script>alert(1)</script>",
    "x" * 9000,
    "💟",
    "\x7f\x85\u2028",
    "a\n\n# b",
    "a\n```\n# b",
]
HEADINGS = ["[a](b) _c_ `d` #", "In diffusers", "In web UIs", "Training"]


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_any_words_stay_words(make_config, miniature, tmp_path, words):
    config = make_config(subject={"class": words}, model={"name": "owner/name"})
    (tmp_path / HEADINGS[0]).mkdir()
    (tmp_path / HEADINGS[0] / "evaluation.json").write_text('{"backbone": "cut o')
    text = card(miniature, Run(tmp_path / HEADINGS[0]), config, has_samples=False)
    read = ModelCard(text)
    assert read.data.instance_prompt == f"a photo of a pkblz {words}"
    assert read.data.base_model == "owner/name"
    assert read.data.license == "other"
    blocks = MarkdownIt().parse(read.text)
    prompt, code = (block.content for block in blocks if block.type == "fence")
    assert prompt == f"a photo of a pkblz {words}\n"
    compile(code, "card", "exec")
    lines = [(before.type, line.children) for before, line in pairwise(blocks) if line.type == "inline"]
    assert ["".join(part.content for part in parts) for kind, parts in lines if kind == "heading_open"] == HEADINGS
    parts = [part for _, parts in lines for part in parts]
    assert " ".join(words.split()) in [part.content for part in parts if part.type == "code_inline"]
    assert not any("html" in part.type for part in [*blocks, *parts])


def test_a_card_that_cannot_be_written_is_said_and_costs_no_model(make_config, miniature, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(miniature, model)
    (model / "README.md").mkdir()
    write_card(model, Run(tmp_path / "run"), make_config())
    assert f"{model}: the model card is not written (" in capfd.readouterr().err
