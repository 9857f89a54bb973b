import errno
import os
import platform
import subprocess
import sys

import pytest

from lowvram_db.config import load
from lowvram_db.errors import UserError
from lowvram_db.run import Run


@pytest.fixture
def run(make_config):
    return Run.of(make_config())


def test_one_process_at_a_time(run):
    with run.locked(), pytest.raises(UserError, match="another process is training there"), Run(run.folder).locked():
        pass
    with Run(run.folder).locked():
        pass


def answer_locks_with(error, monkeypatch):
    def flock(handle, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=os.strerror)
def share_without_locks(request, monkeypatch):
    answer_locks_with(request.param, monkeypatch)


def test_a_disk_that_fails_is_not_one_without_locks(run, monkeypatch):
    answer_locks_with(errno.EIO, monkeypatch)
    with pytest.raises(UserError, match="cannot be used as a folder"), run.locked():
        pass


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
    marker = (run.folder / ".in-use").read_text().replace(platform.node(), "another machine")
    (run.folder / ".in-use").write_text(marker)
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


def test_the_settings_are_written_down_and_a_config_of_the_users_stays(run, make_config, tmp_path):
    for steps in (4, 5):
        run.save_config(make_config(train={"steps": steps}))
        assert load(run.config).train.steps == steps
    run.config.write_bytes(b"\0" * 500)  # a power cut
    run.save_config(make_config())
    run.config.write_text("# my own notes\n" + make_config().to_toml())
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=r"config\.toml: is not of a run"):
        run.save_config(make_config())
    assert run.config.read_bytes() == before


def test_half_written_files_of_ours_go_and_all_else_stays(run):
    theirs = [run.folder / ".model.partial-old", run.checkpoints / ".best.partial-01234567"]
    ours = [run.folder / ".plan.json.partial-01234567", run.checkpoints / ".step-000002.partial-89abcdef"]
    for path in theirs + ours:
        path.mkdir(parents=True)
    with run.locked():
        assert [path.exists() for path in theirs + ours] == [True, True, False, False]
