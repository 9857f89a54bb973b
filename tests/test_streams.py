"""What becomes of the command line's output, as people run it: in a process of its own."""

import subprocess
import sys

import pytest

from lowvram_db.streams import patient_streams

NEW = "from lowvram_db.cli import main; main()"
SAID = b"identifier ohwx: 4 tokens (o h w x); no meaning of its own\n"


@pytest.fixture
def new(photos, miniature, tmp_path):
    """Run `lowvram-db new NAME` in tmp_path by a shell line, where {} stands for it: (exit code, stdout, stderr)."""

    def run(line, name="犬", **environment):
        words = [sys.executable, "-c", NEW, "new", name, "--photos", photos, "--class", "dog", "--model", miniature]
        command = line.replace("{}", subprocess.list2cmdline(map(str, words)))
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(new, tmp_path, encoding):
    code, out, err = new("{}", PYTHONIOENCODING=encoding)
    assert (code, err) == (0, SAID)
    assert out.startswith(f"wrote {'犬' if encoding == 'utf-8' else chr(92) + 'u72ac'}.toml; now: ".encode())
    code, _, err = new("{}", PYTHONIOENCODING=encoding)
    assert code == 2 and err.startswith(b"error: ") and err.count(b"\n") == 1, "and so it is in an error"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's words")
@pytest.mark.parametrize(
    "line", ["{ {}; echo $? >code; } | true", "{} >&-; echo $? >code", "{} 2>&- >&-; echo $? >code"]
)
def test_nobody_has_to_listen(new, tmp_path, line):
    _, _, err = new(f"sleep 0.1; {line}")
    assert (tmp_path / "code").read_text() == "0\n" and err == (b"" if "2>&-" in line else SAID)
    assert (tmp_path / "犬.toml").read_text(encoding="utf-8").startswith("# DreamBooth run"), (
        "and nothing else is in it"
    )


def test_streams_that_are_none_or_closed_or_broken_fail_nobody(monkeypatch, tmp_path):
    """None as in a Windows program without a console; an error of the disk as on /dev/full."""

    class Broken:
        def write(self, text=""):
            raise OSError

        flush = write

    closed = (tmp_path / "closed").open("w")
    closed.close()
    for stream in (None, closed, Broken()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with patient_streams():
            for print_to in (sys.stdout, sys.stderr):
                print("a word", file=print_to, flush=True)
        assert sys.stdout is None, "nothing is left to flush when Python ends"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's words")
def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    """Libraries that write their messages to handle 1 or 2 would write into it."""
    script = "import sys; from lowvram_db.streams import patient_streams as patient\n"
    script += "with patient(): sys.exit(open(sys.argv[1], 'w').fileno() <= 2)"
    words = subprocess.list2cmdline([sys.executable, "-c", script, str(tmp_path / "file")])
    assert subprocess.run(f"{words} >&- 2>&-", shell=True).returncode == 0
