"""Sets of templates, and what a user may write in their place."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.config import load
from lowvram_db.errors import UserError
from lowvram_db.prompt_sets import weighted
from lowvram_db.wording import template_fields

SETS = ["object", "living", "person", "style"]
SMALLEST = '[model]\nname = "m"\n[subject]\nphotos = "p"\nidentifier = "ohwx"\nclass = "dog"\n'


@pytest.mark.parametrize("name", SETS)
def test_a_set_names_the_subject_once_everywhere_and_the_class_alone_for_class_images(name):
    subject, of_class = list(weighted(name)), list(weighted(name, of_the_class=True))
    assert 20 <= len(subject) <= 40 and len(subject) == len(set(subject)) == len(of_class)
    for template in subject:
        assert re.findall(r"\{(\w+)\}", template).count("identifier") == 1 and template.count("{class}") == 1
    assert all(template_fields(template) == {"class"} for template in of_class)


def test_the_papers_prompts_for_evaluation_are_in_no_set(request):
    """They say where the subject is, which no picture to learn from has to show."""
    listed = request.config.rootpath.parent / "shared" / "data" / "dreambench" / "prompts_and_classes.txt"
    if not listed.is_file():
        pytest.skip(f"the DreamBooth paper's prompts are not at {listed}")
    paper = {
        line.replace("{0}", "{identifier}").replace("{1}", "{class}")
        for line in re.findall(r"^'(.*)'\.format", listed.read_text(), re.M)
    }
    assert len(paper) > 30
    assert not paper & {template for name in SETS for template in weighted(name)}


@given(weights=st.dictionaries(st.sampled_from(["a {identifier}", *SETS]), st.floats(0.1, 9), min_size=1))
def test_weights_are_shares_and_a_sets_is_shared_by_its_templates(weights):
    own = {key: list(weighted(key)) if key in SETS else [key] for key in weights}
    wanted = dict.fromkeys([template for templates in own.values() for template in templates], 0.0)
    for key, weight in weights.items():
        for template in own[key]:
            wanted[template] += weight / sum(weights.values()) / len(own[key])
    assert weighted(weights) == pytest.approx(wanted) and math.isclose(sum(wanted.values()), 1)


@pytest.mark.parametrize("weight", [5e-324, 1e308])
def test_weights_of_any_size_are_added_up(weight):
    shares = weighted({"a {identifier}": weight, "b {identifier}": weight, "object": weight})
    assert sum(shares.values()) == pytest.approx(1) and shares["a {identifier}"] == pytest.approx(1 / 3)


WRITTEN = {
    '["a {identifier}", "b {identifier}"]': 2,
    '"person"': 25,
    "person": 25,
    '{"a {identifier}" = 3, object = 1}': 26,
}


@pytest.mark.parametrize("written", WRITTEN)
def test_prompts_are_a_list_a_set_or_weights(tmp_path, written):
    path = tmp_path / "a.toml"
    path.write_text(SMALLEST)
    config = load(path, [f"subject.prompts={written}"])
    assert len(config.subject.templates) == WRITTEN[written]
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load(tmp_path / "again.toml").subject == config.subject


WRONG = {
    "subject.prompts=persons": "subject.prompts: 'persons' is no set of prompts (object, living, person, style); write",
    'subject.prompts={"a {class}" = 1}': "lacks {identifier}",
    "subject.prompts={object = 0, person = 0.0}": "subject.prompts: the weights are zero everywhere",
    "subject.prompts={object = -1}": "subject.prompts: should be a list of templates, the name of a set, or a table",
    "subject.prompts={object = inf}": "subject.prompts: should be a list of templates",
    "subject.prompts={object = true}": "subject.prompts: should be a list of templates",
    "subject.prompts={}": "subject.prompts: must not be empty",
    'subject.prompts=["  "]': "subject.prompts: a template must not be empty",
    'subject.prompts={"a {identifier} {animal}" = 1}': "subject.prompts: {animal} is unknown",
    "subject.prompts=3": "subject.prompts: should be a list of templates",
    'prior.prompts=["a {identifier} {class}"]': "prior: prompts: only {class} may stand in a prior prompt",
    'prior.prompts=["a {class"]': "prior.prompts: 'a {class': expected '}'",
    'prior.prompt="a {class!r}"': "prior.prompt: 'a {class!r}': write {identifier} and {class} alone",
    'subject.prompts=["a {identifier:>99999999999}"]': "subject.prompts: 'a {identifier:>99999999999}': write",
    'sample.prompts=["a", "a {identifier:9}"]': "sample.prompts.1: 'a {identifier:9}': write",
    "prior.prompts=dogs": "prior.prompts: 'dogs' is no set of prompts",
    "subject.caption_dropout=1": "subject.caption_dropout: should be less than 1",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_drawn_from_is_told_in_one_line(tmp_path, override):
    path = tmp_path / "a.toml"
    path.write_text(SMALLEST)
    with pytest.raises(UserError) as caught:
        load(path, [override])
    assert WRONG[override] in str(caught.value) and "\n" not in str(caught.value)
