"""A page is made of whatever a run's folder has, says what it lacks, and holds no markup but its own."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.errors import UserError
from lowvram_db.evaluate.recommend import FORGOTTEN, MEMORISED, NOT_LEARNED, RUINED
from lowvram_db.report import write_comparison, write_report
from lowvram_db.report.markup import plain
from lowvram_db.report.page import LARGEST
from lowvram_db.report.story import tell

HEADINGS = {
    *("Before and after", "Over the steps", "Guidance scales", "Scores", "Curves", "Memory", "Identifier", "Photos"),
    "Settings",
}
VOID = {"br", "img", "input", "link", "meta"}


class Read(HTMLParser):
    """Elements, attributes, texts and what is loaded; an independent reader of what was written."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.attributes, self.open, self.headings = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "an element has no end"

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), "an attribute is there twice"
        self.attributes += [value for _, value in attributes if value]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(text)
            if self.open[-1] == "h2":
                self.headings.append(text)

    @property
    def text(self):
        return "".join(self.texts)

    def named(self, name):
        return [attributes for element, attributes in self.elements if element == name]


def test_everything_that_a_run_has_is_on_its_page(make_run):
    page = Read(write_report(make_run()))
    assert set(page.headings) == HEADINGS
    for said in (
        "Keep step 20.",
        "a photo of a pkblz jellyfish",
        "1.25 GiB",
        "recommended",
        "97% of the vocabulary",
        "identifier = ",
    ):
        assert said in page.text
    assert "Judged by dinov2, compared with photos." in page.text
    assert [row["class"] for row in page.named("tr") if "class" in row] == ["marked"]
    assert len(page.named("svg")) == 6
    assert not [said for said in page.texts if "Left out here" in said]
    assert all(attributes["alt"] is not None for attributes in page.named("img"))


def test_nothing_is_asked_for_from_anywhere(make_run):
    page = Read(write_report(make_run()))
    loaded = [a[key] for _, a in page.elements for key in ("src", "href", "data", "action", "srcset") if key in a]
    assert loaded and all(place.startswith(("data:image/jpeg;base64,", "#")) for place in loaded)
    assert not re.search(r"url\(|@import|https?:", write_report(make_run("other")).read_text(encoding="utf-8"))


HOSTILE = [
    "<script>document.title='owned'</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "</style><style>*{display:none}", "</title><h1>x</h1>", '"><svg onload=alert(1)>', "' onmouseover='alert(1)",
    "\" autofocus onfocus=\"alert(1)", "<!-- a comment", "--><b>bold</b>", "<![CDATA[x]]>", "<?xml version='1.0'?>",
    "&lt;b&gt;", "&amp;", "&#60;script&#62;", "&nbsp", "&notit;", "&", "<", ">", "a<b>c", "]]>", "`${alert(1)}`",
    "javascript:alert(1)", "{{7*7}}", "{% raw %}", "${7*7}", "%3Cscript%3E", "\\u003cscript\\u003e",
    "مرحبا بالعالم", "\u202eevil\u202c", "\u2066isolated", "שלום <b>", "👩‍👩‍👧‍👦 𝒻", "a\x00b", "a\x1b[31mred",
    "tab\tand\nline", "\ufffe\uffff", "<a href='http://example.org/'>link</a>", "<base href='//example.org/'>",
    "<meta http-equiv=refresh content=0>", "x" * 100_000, "<b>" * 33_000,
]  # fmt: skip


def with_words(folder, word):
    """A run in which every text that a stranger may have written says `word`."""
    config = (folder / "config.toml").read_text(encoding="utf-8").replace("pkblz", "WORD").replace("ball", "WORD")
    (folder / "config.toml").write_text(config.replace("WORD", json.dumps(word)[1:-1]), encoding="utf-8")
    for name in ("plan.json", "evaluation.json", "identifier.json"):
        tree = (folder / name).read_text(encoding="utf-8")
        told = ("identifier pkblz: one token (48136)", "pkblz", "blz", "text_encoder")
        for old in ("no checkpointing", "first step", "dinov2", "As near, and drifts less.", *told):
            tree = tree.replace(json.dumps(old), json.dumps(word))
        (folder / name).write_text(
            tree.replace('"findings": []', f'"findings": [{json.dumps(word)}]'), encoding="utf-8"
        )


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_texts(make_run, word):
    plain_page = Read(write_report(make_run("plain", prompts=["a", "b"])))
    folder = make_run("hostile", prompts=[word, "b"])
    with_words(folder, word)
    page = Read(write_report(folder))
    names = [name for name, _ in page.elements]
    assert names.count("script") == 1 and set(names) == {name for name, _ in plain_page.elements}
    assert {key for _, a in page.elements for key in a} == {key for _, a in plain_page.elements for key in a}
    assert page.text.count(plain(word)[:2000]) >= 3


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_no_text_becomes_markup(tmp_path_factory, text):
    from lowvram_db.report.markup import element

    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(element("p", text, title=text), encoding="utf-8")
    page = Read(path)
    assert [name for name, _ in page.elements] == ["p"]
    assert page.text == page.named("p")[0]["title"] == plain(text) or not text


def test_halves_of_characters_can_be_written(tmp_path):
    assert plain("\udce9a").encode() == "\ufffda".encode()


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def spoil_settings(folder):
    (folder / "config.toml").write_text("[train]\nsteps = 'many'\n[sample]\nprompts = 3\n[subject]\nphotos = 4\n")


SPOILS = {
    "metrics cut in a line": (lambda run: cut(run / "metrics.jsonl"), "1 of its lines", HEADINGS),
    "metrics of nonsense": (
        lambda run: (run / "metrics.jsonl").write_text('[]\n{"step": -1}\n{"step": 1, "loss": "x"}\n\n' + "9" * 5000),
        "lines cannot be read",
        HEADINGS - {"Curves"},
    ),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "there are no curves", HEADINGS - {"Curves"}),
    "a cut sheet": (
        lambda run: cut(run / "samples" / "step-000020.png"), "step-000020.png", HEADINGS - {"Over the steps"}),
    "a plan of another form": (lambda run: (run / "plan.json").write_text("[]"), "plan.json", HEADINGS - {"Memory"}),
    "a plan of nonsense": (
        lambda run: (run / "plan.json").write_text('{"phases": [3]}'), "plan: cannot be read", HEADINGS - {"Memory"}),
    "a cut check of the identifier": (
        lambda run: cut(run / "identifier.json"), "identifier.json: cannot be read", HEADINGS - {"Identifier"}),
    "a check of the identifier of nonsense": (
        lambda run: (run / "identifier.json").write_text('{"encoders": [3]}'), "identifier: cannot be read",
        HEADINGS - {"Identifier"}),
    "a cut evaluation": (lambda run: cut(run / "evaluation.json"), "evaluation.json", HEADINGS - {"Scores"}),
    "an evaluation of another version": (
        lambda run: (run / "evaluation.json").write_text('{"format": 2}'), "format 2", HEADINGS - {"Scores"}),
    "settings of nonsense": (spoil_settings, "", HEADINGS - {"Photos"}),
    "no TOML": (lambda run: (run / "config.toml").write_text("<html>"), "not valid TOML", HEADINGS - {"Photos"}),
    "no checkpoint": (lambda run: (run / "checkpoints" / "step-000040").rmdir(), "no checkpoint", HEADINGS),
    "no model": (lambda run: (run / "model").rmdir(), "no finished model", HEADINGS),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILS)
def test_a_spoiled_part_is_left_out_and_said(make_run, spoiled):
    spoil, said, headings = SPOILS[spoiled]
    folder = make_run()
    spoil(folder)
    page = Read(write_report(folder))
    assert said in page.text and set(page.headings) >= headings - {"Settings"}


def test_of_one_seed_scores_are_shown_without_an_interval(make_run):
    folder = make_run()
    tree = json.loads((folder / "evaluation.json").read_text())
    for scores in (tree["base"], *(one["scores"] for one in tree["checkpoints"])):
        scores["subject"] = {"mean": 0.7, "low": None, "high": None}
    (folder / "evaluation.json").write_text(json.dumps(tree))
    page = Read(write_report(folder))
    assert "0.700" in page.texts and "0.300 (0.250 to 0.350)" in page.texts


def test_a_finding_is_a_sentence_at_the_top(make_run):
    findings = {
        NOT_LEARNED: "train for more steps",
        MEMORISED: "train for fewer",
        FORGOTTEN: "prior.weight",
        RUINED: "lower",
    }
    for finding, mend in findings.items():
        folder = make_run(f"run {finding}")
        tree = (folder / "evaluation.json").read_text()
        (folder / "evaluation.json").write_text(tree.replace('"findings": []', f'"findings": ["{finding}"]'))
        said = [text for text in Read(write_report(folder)).texts if mend in text]
        assert len(said) == 1 and finding in said[0].lower()


def test_a_run_that_has_made_a_lora_is_finished(make_run):
    folder = make_run()
    (folder / "model").rmdir()
    (folder / "lora.safetensors").write_bytes(b"")
    assert tell(folder).finished


def test_photos_that_moved_are_said(make_run, tmp_path):
    page = Read(write_report(make_run(subject={"photos": str(tmp_path / "gone")})))
    assert "gone is not there" in page.text and "Photos" not in page.headings


def test_a_folder_of_no_run_is_refused_and_files_of_the_users_are_kept(make_run, tmp_path, lowvram_db):
    folder = make_run()
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "empty", folder / "config.toml"):
        code, out, err = lowvram_db("report", wrong)
        assert (code, out, err.count("\n")) == (2, "", 1) and str(wrong) in err
    mine = folder / "report.html"
    mine.write_text("<p>mine", encoding="utf-8")
    code, _, err = lowvram_db("report", folder)
    assert code == 2 and "is no report of lowvram-db" in err and mine.read_text() == "<p>mine"
    code, out, _ = lowvram_db("report", folder, "--out", "page.html")
    assert (code, out) == (0, "report: page.html\n")
    code, out, _ = lowvram_db("report", folder, "--out", "page.html")
    assert code == 0, "what is ours is written anew"


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not read-only there")
def test_a_disk_that_fills_up_leaves_the_report_before(make_run, small_disk):
    place = small_disk("40k") / "report.html"
    with pytest.raises(UserError, match="disk is full"):
        write_report(make_run(), place)
    assert not list(place.parent.iterdir())


def test_runs_are_compared(make_run, lowvram_db):
    one = make_run("one")
    other = make_run(
        "other", prompts=["a photo of a jellyfish", "<b>"], train={"lr": 1e-3}, model={"name": "other/model"}
    )
    code, out, _ = lowvram_db("report", one, other)
    assert (code, out) == (0, "report: comparison.html\n")
    page = Read(Path("comparison.html"))
    assert set(page.headings) == {"Settings that differ", "Pictures", "Scores", "Curves"}
    assert "train.lr" in page.text and "other/model" in page.text and "train.resolution" not in page.text
    assert "<b>" in page.text


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    one, other = make_run("a/jelly"), make_run("b/jelly")
    page = Read(write_comparison([one, other], tmp_path / "page.html"))
    assert str(one) in page.text and str(other) in page.text


def test_a_page_can_be_sent(make_run, monkeypatch):
    """Noise is the hardest to keep small: 8 grids of 512 px with 12 pictures each."""
    import numpy as np
    from PIL import Image

    def noise(seed, side):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))

    monkeypatch.setattr(f"{make_run.__module__}.picture", noise)
    folder = make_run(steps=range(0, 800, 100), prompts=["a", "b", "c"], side=512)
    assert write_report(folder).stat().st_size <= LARGEST


def test_torch_is_not_needed(make_run):
    import subprocess

    code = "import sys; from lowvram_db.report import write_report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_of_many_steps_the_first_and_last_are_shown(make_run):
    story = tell(make_run(steps=range(0, 100, 4), side=16))
    assert len(story.pictures) == 12 and {0, 96} <= story.pictures.keys()
