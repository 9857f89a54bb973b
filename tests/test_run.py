import errno
import os
import subprocess
import sys

import pytest

from lowvram_db.errors import UserError
from lowvram_db.run import Run


@pytest.fixture
def run(make_config):
    return Run.of(make_config())


def with_checkpoints(run, *steps):
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").touch()


def test_auto_takes_the_latest(run):
    assert run.choose_checkpoint("auto") is None
    with_checkpoints(run, 2, 10, 9)
    (run.checkpoints / ".step-000011.partial-01234567").mkdir()
    assert run.choose_checkpoint("auto") == run.checkpoint(10)


def test_never_refuses_to_overwrite(run):
    assert run.choose_checkpoint("never") is None
    with_checkpoints(run, 2)
    with pytest.raises(UserError, match="has step-000002 already, which --resume never would overwrite"):
        run.choose_checkpoint("never")


def test_a_path_must_be_a_checkpoint_and_the_last_of_its_run(run, tmp_path):
    with pytest.raises(UserError, match="--resume nowhere: not a checkpoint folder"):
        run.choose_checkpoint("nowhere")
    other = Run(tmp_path / "other")
    with_checkpoints(other, 5)
    assert run.choose_checkpoint(str(other.checkpoint(5))) == other.checkpoint(5)
    with_checkpoints(run, 2, 4)
    assert run.choose_checkpoint(str(run.checkpoint(4))) == run.checkpoint(4)
    with pytest.raises(UserError, match="already has step-000004, which would be overwritten"):
        run.choose_checkpoint(str(run.checkpoint(2)))


def test_one_process_at_a_time(run):
    with run.locked(), pytest.raises(UserError, match="another process is training there"), Run(run.folder).locked():
        pass
    with Run(run.folder).locked():
        pass


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=os.strerror)
def share_without_locks(request, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_one_process_at_a_time_where_there_are_no_locks(run, share_without_locks):
    with run.locked(), pytest.raises(UserError, match="another process is training there"), Run(run.folder).locked():
        pass
    with Run(run.folder).locked():
        pass


def test_what_a_killed_process_left_where_there_are_no_locks_is_named(run, monkeypatch):
    monkeypatch.setattr("lowvram_db.run.hold", lambda path: None)
    killed = "import os, sys, pathlib; from lowvram_db.lock import hold_by_existence as hold; "
    killed += "held = hold(pathlib.Path(sys.argv[1])); os._exit(9)"
    run.folder.mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", killed, run.folder / ".in-use"]).returncode == 9
    monkeypatch.setattr("filelock._soft.owner_is_stale", lambda *_, **__: False, raising=False)  # as of another machine
    with pytest.raises(UserError, match=r"a killed one has left .*\.in-use behind: delete it"), run.locked():
        pass
    (run.folder / ".in-use").unlink()
    with run.locked():
        pass


def test_an_error_at_work_is_not_taken_for_one_of_the_folder(run):
    with pytest.raises(PermissionError), run.locked():
        raise PermissionError("of something else")
    with run.locked():
        pass


def test_a_place_that_is_a_file_is_named(make_config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"runs/test: cannot be used as a folder"), Run.of(make_config()).locked():
        pass
