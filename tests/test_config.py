import contextlib
import re
import sys
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.config import Config, differences, known_keys, load
from lowvram_db.errors import UserError

SMALLEST = """
[model]
name = "some/model"
[subject]
photos = "photos"
identifier = "ohwx"
class = "dog"
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "dog.toml"
    path.write_text(SMALLEST)
    return path


def test_defaults_are_the_known_recipe(toml):
    config = load(toml)
    train = config.train
    assert (train.lr, train.steps, train.resolution, train.batch) == (2e-6, 800, 512, 1)
    assert config.prior.enabled
    assert config.prior.weight == 1.0
    assert config.sample.guidance == [7.0, 11.0]
    assert config.output.name == "dog"
    assert config.fill(config.subject.prompts[0]) == "a photo of a ohwx dog"
    assert config.fill(config.prior.prompt) == "a photo of a dog"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([], "adam8"),
        (["method.name=lora"], "adamw"),
        (["method.name=lora", "optimizer.beta1=0.8"], "adamw"),
        (["method.name=lora", "optimizer.name=adam8"], "adam8"),
    ],
)
def test_the_optimizer_that_is_not_named_suits_the_method(toml, changes, name):
    assert load(toml, changes).optimizer.name == name


def test_saved_config_is_the_loaded_one(toml, tmp_path):
    config = load(toml, ["train.min_snr_gamma=5.0", 'sample.prompts=["a {class}", "\\u00e9 \\"quoted\\""]'])
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load(tmp_path / "config.toml") == config


def test_overrides_take_toml_values_and_bare_words(toml):
    config = load(toml, ["train.lr=1e-5", "subject.class=teapot", "sample.guidance=[3, 4.5]", "prior.enabled=false"])
    assert config.train.lr == 1e-5
    assert config.subject.class_noun == "teapot"
    assert config.sample.guidance == [3.0, 4.5]
    assert not config.prior.enabled


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("subject.class=golden retriever", "golden retriever"),
        ("subject.class = 1984 ", "1984"),
        ("subject.class=true", "true"),
        ("subject.class=2024-01-01", "2024-01-01"),
        ("subject.class=dog # 1", "dog # 1"),
        ("subject.class='dog'", "dog"),
        ('subject.class="a \\"dog\\""', 'a "dog"'),
        ("subject.photos=C:\\new\\tests", "C:\\new\\tests"),
        ("prior.images=5", "5"),
        ("subject.class=dog\nx = 3", "dog\nx = 3"),
        (" output . name =x", "x"),
        ("train.steps=3\n[train]", None),
    ],
)
def test_a_text_needs_no_quotes_on_the_command_line(toml, override, value):
    if value is None:
        with pytest.raises(UserError, match=r"train\.steps: should be a valid integer"):
            load(toml, [override])
    else:
        section, _, key = override.partition("=")[0].strip().replace(" ", "").partition(".")
        assert load(toml, [override]).model_dump()[section][key] == value


WRONG = {
    "train.stepz=3": "unknown key train.stepz; did you mean train.steps?",
    "stepz=3": "unknown key stepz; did you mean prior.steps or train.steps or sample.steps?",
    "prior.weigth=1.0": "unknown key prior.weigth; did you mean prior.weight?",
    "subject.class_name=x": "unknown key subject.class_name; did you mean subject.class?",
    "optimiser.name=adamw": "unknown key optimiser; did you mean optimizer",
    'train.steps="many"': "train.steps: should be a valid integer (is 'many')",
    "train.steps=1.5": "train.steps: should be a valid integer",
    "train.text_encoder=true": "unknown key train.text_encoder; did you mean text_encoder.train?",
    "text_encoder.train=1": "text_encoder.train: should be a valid boolean",
    "text_encoder.lr=1e-6": "text_encoder: lr means nothing where train is false; set train = true, or leave it out",
    "text_encoder.stop=5": "text_encoder: stop means nothing where train is false; set train = true, or leave it out",
    "text_encoder={train=true, stop=0}": "text_encoder.stop: should be greater than or equal to 1",
    "text_encoder={train=true, stop=800}": "text_encoder.stop: 800 is not before the end of the run",
    "text_encoder={train=true, lr=0}": "text_encoder.lr: should be greater than 0",
    "train.ema=1": "train.ema: should be less than 1",
    "train.ema=0": "train.ema: should be greater than 0",
    "train.ema=true": "train.ema: should be a valid number",
    "train.lr=0": "train.lr: should be greater than 0",
    "train.lr=inf": "train.lr: should be a finite number",
    "train.lr=nan": "train.lr: should be a finite number",
    "train.resolution=500": "train.resolution: 500 is not divisible by 8; 496 is the nearest",
    "train.warmup=801": "train: warmup (801) is longer than the run (steps = 800)",
    "train=3": "train: must be a section, written [train]",
    'subject.identifier=""': "subject.identifier: must not be empty",
    'subject.identifier="  "': "subject.identifier: must not be empty",
    "subject.identifier=DOG": "subject: identifier 'DOG' is the class noun itself; choose a rare word",
    "subject.identifier={identifier}": "subject: identifier '{identifier}' has {identifier} in it, which is the place",
    "subject.class=a {class}": "subject.class: 'a {class}' has {class} in it, which is the place for a word",
    "subject.identifier=a": "subject: identifier 'a' stands in nearly every prompt",
    'subject.identifier="x\\u200b"': "has an invisible character in it (U+200B); type it anew",
    'subject.prompts=["a dog"]': "lacks {identifier}",
    "subject.prompts=[]": "subject.prompts: ",
    'prior.prompt="a {identifier} {class}"': "prior: prompt: only {class} may stand in a prior prompt",
    'sample.prompts=["a {animal}"]': "sample.prompts: {animal} is unknown; use {identifier} and {class}",
    "sample.prompts=[]": "sample.prompts: ",
    'sample.prompts=["a {class"]': "expected '}'",
    "optimizer.name=lion": "optimizer.name: should be 'adam8', 'adafactor', 'bnb-adam8' or 'adamw' (is 'lion')",
    "kernels=cuda": "kernels: should be 'auto', 'triton' or 'torch' (is 'cuda')",
    "precision.weights=bf15": "precision.weights: should be 'bf16', ",
    "attention=flash": "attention: should be 'auto', 'sdpa' or 'xformers' (is 'flash')",
    "output.name=../elsewhere": "output.name: '../elsewhere' has '/' in it",
    "output.name=..": "output.name: '..' is no name",
    "output.name=what?": "output.name: 'what?' has '?' in it",
    'output.name="dog. "': "ends in a dot or a space",
    "output.name=aux.v2": "is the name of a device on Windows",
    "train.steps=0x" + "f" * 5000: "train.steps: should be less than 2147483648 (is a very large number)",
    "train.steps=" + "9" * 5000: "train.steps: should be a valid integer (is '999",
    "sample.guidance=" + "[" * 5000: "sample.guidance: should be a valid list (is '[[[",
    "output.name=\udcff": "has bytes in it that are no characters",
    'subject.photos="C:\\Users\\me"': "write the path with / or in 'single quotes'",
    'subject.photos="C:\\new\\tests"': "subject.photos: 'C:\\new\\tests' has control characters in it",
    "subject.class='open": "and end it as it begins",
    "output.dir=~nobody-of-that-name/runs": "output.dir: ~nobody-of-that-name/runs: the home folder",
    "train.steps": "write it as key=value",
    "train.steps.more=1": "not a section",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_setting_is_named_in_one_line(toml, override):
    with pytest.raises(UserError) as caught:
        load(toml, ["train.steps=800", override])
    message = str(caught.value)
    assert WRONG[override] in message
    assert "\n" not in message
    assert str(toml) in message or "--set" in message


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text('[model]\nname = "x"\n')
    with pytest.raises(UserError, match="subject is missing"):
        load(path)


@pytest.mark.parametrize("name", ["my dog", "jelly (1)", "Hund & Katze", "dog's", "犬 🐶", "-x", ".x", "a.b", "100%"])
def test_names_that_every_system_takes_are_taken(tmp_path, name):
    (tmp_path / f"{name}.toml").write_text(SMALLEST)
    assert load(tmp_path / f"{name}.toml").output.name == name
    assert load(tmp_path / f"{name}.toml", [f"output.name={name} two"]).output.name == f"{name} two"


@pytest.mark.skipif(sys.platform == "win32", reason="files that cannot be there")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a:b?", "a-b-"),
        ("con", "run-con"),
        ("dog. ", "dog"),
        (" .", "run"),
        ("LPT1.old", "run-LPT1.old"),
        ("\udcff", "-"),
    ],
)
def test_a_file_whose_name_no_folder_can_have_everywhere_still_names_a_run(tmp_path, file, name):
    (tmp_path / f"{file}.toml").write_text(SMALLEST)
    assert load(tmp_path / f"{file}.toml").output.name == name


@given(word=st.text(min_size=1, max_size=20))
def test_any_override_is_taken_or_refused_by_a_user_error(word, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text(SMALLEST)
    for override in (word, f"train.steps={word}", f"{word}=1", f"sample.prompts=[{word}]"):
        with contextlib.suppress(UserError):
            load(path, [override])


def test_differences_name_dotted_keys(toml):
    changed = differences(load(toml), load(toml, ["train.lr=1e-5", "sample.every=10"]))
    assert changed == {"train.lr": (2e-6, 1e-5), "sample.every": (0, 10)}


def test_every_setting_is_described():
    assert all(field.description for field in known_keys().values())


def test_the_shipped_configs_load(request):
    paths = sorted((request.config.rootpath / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        assert isinstance(load(path), Config)
        assert tomllib.loads(path.read_text())["subject"]["class"]


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ([], "bf16"),
        (["precision.compute=fp16"], "fp16"),
        (["precision.compute=fp32"], "fp32"),
        (["optimizer.name=bnb-adam8"], "fp32"),
        (["optimizer.name=adamw", "precision.compute=fp16"], "fp32"),
        (["precision.weights=bf16+residual"], "bf16+residual"),
        (["precision.weights=fp32"], "fp32"),
    ],
)
def test_weights_are_stored_as_optimizer_and_arithmetic_allow(toml, changes, weights):
    assert load(toml, changes).weights == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["precision.weights=bf16", "optimizer.name=bnb-adam8"], 'bf16 weights need optimizer.name = "adam8"'),
        (["precision.weights=fp16"], 'fp16 weights compute in that precision, precision.compute is "bf16"'),
        (
            ["precision.weights=bf16+residual", "precision.compute=fp32"],
            'precision.compute is "fp32"; leave precision.weights out, or set precision.compute = "bf16"',
        ),
    ],
)
def test_weights_that_could_not_be_stepped_are_refused(toml, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(toml, changes)


def test_flipping_needs_variants(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(SMALLEST + "[train]\nflip = true\n")
    with pytest.raises(UserError, match="train: flip mirrors every other variant, and variants is 1; set variants = 2"):
        load(path)
    assert load(path, ["train.variants=2"]).train.flip
