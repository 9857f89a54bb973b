import json
import shutil

import pytest

from lowvram_db.errors import UserError
from lowvram_db.run import Run
from lowvram_db.train import checkpoint
from lowvram_db.train.resume import check_content, check_settings, choose, whole

CONTENT = {"model": ["m"], "photos": ["a", "b", "b"], "class images": ["c"]}


@pytest.fixture
def state_of(make_config):
    def make(step, content=CONTENT):
        return checkpoint.State(step, make_config(), content, {}, {}, {})

    return make


@pytest.fixture
def run(make_config, state_of):
    return Run.of(make_config())


@pytest.fixture
def write(run, state_of):
    """Write checkpoints of these steps, all but the weights."""

    def write(*steps, run=run):
        for step in steps:
            run.checkpoint(step).mkdir(parents=True)
            for name in ("unet.safetensors", "optimizer.safetensors"):
                (run.checkpoint(step) / name).write_bytes(f"{name} of {step}".encode())
            files = {file.name: checkpoint._checksum(file) for file in run.checkpoint(step).iterdir()}
            state = {"format": checkpoint._FORMAT, **state_of(step).__dict__, "checksums": files}
            text = json.dumps(state | {"config": state["config"].model_dump()})
            (run.checkpoint(step) / "state.json").write_text(text)

    return write


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_auto_takes_the_latest(run, write):
    assert choose(run, "auto") is None
    write(2, 10, 9, 1_000_000)
    (run.checkpoints / ".step-1000001.partial-01234567").mkdir()
    assert choose(run, "auto") == run.checkpoint(1_000_000)


def test_what_the_user_keeps_beside_is_neither_taken_nor_deleted(run, write):
    write(2, 4)
    theirs = ["step-000004-good", "step-9", "step-000005", "step-000007", "steps"]
    for name in theirs[:3]:  # copies, the third under a name that ours could have
        shutil.copytree(run.checkpoint(4), run.checkpoints / name)
    (run.checkpoints / theirs[3]).mkdir()
    (run.checkpoints / theirs[3] / "notes.txt").touch()
    (run.checkpoints / theirs[4]).touch()
    assert choose(run, "auto") == run.checkpoint(4)
    checkpoint.keep_last(run.checkpoints, 1)
    assert names(run) == sorted(["step-000004", *theirs])


def test_never_refuses_to_overwrite(run, write):
    assert choose(run, "never") is None
    write(2)
    with pytest.raises(UserError, match="has step-000002 already, which --resume never would overwrite"):
        choose(run, "never")


def test_a_path_must_be_a_checkpoint_and_the_last_of_its_run(run, write, tmp_path):
    with pytest.raises(UserError, match="--resume nowhere: not a checkpoint folder"):
        choose(run, "nowhere")
    other = Run(tmp_path / "other")
    write(5, run=other)
    assert choose(run, str(other.checkpoint(5))) == other.checkpoint(5)
    write(2, 4)
    assert choose(run, str(run.checkpoint(4))) == run.checkpoint(4)
    with pytest.raises(UserError, match="already has step-000004, which would be overwritten"):
        choose(run, str(run.checkpoint(2)))


@pytest.mark.parametrize("name", ["state.json", "unet.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "zeros", "cut", "a bit"])
def test_after_a_power_cut_the_one_before_is_taken(run, write, capfd, name, damage):
    write(2, 4)
    file = run.checkpoint(4) / name
    content = file.read_bytes()
    spoiled = {
        "empty": b"",
        "zeros": bytes(len(content)),
        "cut": content[:9],
        "a bit": bytes([content[0] ^ 1, *content[1:]]),
    }
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(spoiled[damage])
    assert whole(run, choose(run, "auto")) == run.checkpoint(2)
    assert names(run) == ["damaged-step-000004", "step-000002"]
    assert "step-000004: damaged" in capfd.readouterr().err


def test_without_another_training_begins_anew_and_nothing_is_lost(run, write):
    for round_ in ("damaged-step-000002", "damaged-step-000002-2"):
        write(2)
        (run.checkpoint(2) / "unet.safetensors").write_bytes(b"")
        assert whole(run, choose(run, "auto")) is None
        assert (run.checkpoints / round_ / "state.json").exists()


def test_a_damaged_checkpoint_of_another_run_is_left_where_it_is(run, write, tmp_path):
    other = Run(tmp_path / "other")
    write(5, run=other)
    (other.checkpoint(5) / "unet.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000005: damaged \(unet\.safetensors is not as it was written\)"):
        whole(run, choose(run, str(other.checkpoint(5))))
    assert names(other) == ["step-000005"]


def test_one_of_another_version_is_not_passed_over(run, write):
    write(2, 4)
    file = run.checkpoint(4) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="step-000004: written by another version"):
        choose(run, "auto")


def test_the_same_content_goes_on_from_another_place(state_of, make_config, tmp_path):
    state = state_of(2)
    elsewhere = make_config(model={"name": "elsewhere"}, subject={"photos": "elsewhere"}, prior={"images": "elsewhere"})
    check_settings(state, elsewhere, tmp_path)
    check_content(state, CONTENT, tmp_path)
    check_content(state, {"photos": CONTENT["photos"]}, tmp_path)


@pytest.mark.parametrize(
    "now, words",
    [
        ({"model": ["other"]}, "another base model"),
        ({"photos": ["a", "b"]}, r"photos \(1 gone or changed\)"),
        ({"photos": ["a", "b", "x", "y"]}, r"photos \(2 new, 1 gone or changed\)"),
        ({"class images": ["d"]}, r"class images \(1 new, 1 gone or changed\)"),
    ],
)
def test_other_content_is_named(state_of, tmp_path, now, words):
    with pytest.raises(UserError, match=words + "; bring them back"):
        check_content(state_of(2), CONTENT | now, tmp_path)
