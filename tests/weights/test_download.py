"""The child that downloads is watched, its failure told, and its folder cleaned up."""

import errno
import os
import time

import pytest

from minilm.weights import download
from minilm.weights.download import SourceError, move_into_place, run_python, scratch_folder

# writes this many blocks of 100 kB, so many seconds apart
BLOCKS = """
import pathlib, sys, time
file = pathlib.Path(sys.argv[1], "part").open("wb")
for _ in range(int(sys.argv[2])):
    time.sleep(float(sys.argv[3])); file.write(bytes(100_000)); file.flush()
"""


def test_a_child_writes_nothing_to_our_streams(tmp_path, capfd):
    run_python("import sys; print('out'); print('err', file=sys.stderr)", [], tmp_path, "x", patience=20)
    assert capfd.readouterr() == ("", "")


def test_the_last_lines_of_a_failed_child_are_the_reason(tmp_path):
    code = "import sys; print('one\\ntwo\\n\\nthree'); sys.exit('four')"
    with pytest.raises(SourceError, match=r"^two \| three \| four$"):
        run_python(code, [], tmp_path, "x", patience=20)


def test_a_silent_failure_has_a_reason_too(tmp_path):
    with pytest.raises(SourceError, match=r"^ended with status 3$"):
        run_python("raise SystemExit(3)", [], tmp_path, "x", patience=20)


def test_no_first_byte(tmp_path):
    start = time.monotonic()
    code = "import time; print('I retry', flush=True); time.sleep(60)"
    with pytest.raises(SourceError, match=r"^nothing arrived for 1 seconds \| I retry$"):
        run_python(code, [], tmp_path, "x", patience=1)
    assert time.monotonic() - start < 5


def test_a_stall_after_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 1.0)
    code = BLOCKS + "time.sleep(60)"
    with pytest.raises(SourceError, match="nothing arrived for 1 seconds"):
        run_python(code, [str(tmp_path), "1", "0"], tmp_path, "x", patience=20)


def test_slow_but_steady_is_no_stall_and_shows_progress_on_stderr(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(download, "STALL_SECONDS", 1.0)
    run_python(BLOCKS, [str(tmp_path), "5", "0.5"], tmp_path, "the model", patience=20, expected_bytes=500_000)
    out, err = capfd.readouterr()
    assert out == ""
    assert "the model" in err
    assert "/500k" in err
    assert "80%" in err or "60%" in err


def test_variables_are_added_to_the_environment(tmp_path):
    code = "import os, sys; sys.exit(os.environ['PLANET'] + ' ' + str('PATH' in os.environ))"
    with pytest.raises(SourceError, match=r"^venus True$"):
        run_python(code, [], tmp_path, "x", patience=20, environment={"PLANET": "venus"})


def test_modules_in_the_current_folder_are_not_seen(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('not the json you meant')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    run_python("import json; json.dumps(1)", [], tmp_path, "x", patience=20)


@pytest.mark.parametrize("raised", [None, KeyboardInterrupt, ZeroDivisionError])
def test_a_scratch_folder_is_removed(tmp_path, raised):
    try:
        with scratch_folder(tmp_path / "cache") as scratch:
            (scratch / "file").touch()
            if raised:
                raise raised
    except (KeyboardInterrupt, ZeroDivisionError):
        assert raised
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), OSError(errno.EROFS, "Read-only")],
    ids=["full", "read-only"],
)
def test_a_failure_to_write_names_the_folder_and_the_remedy(tmp_path, error):
    with pytest.raises(SourceError, match=f"cannot write to {tmp_path} .*MINILM_CACHE"), scratch_folder(tmp_path):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_cache_should_be(tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    with pytest.raises(SourceError, match=rf"cannot write to {cache} .*MINILM_CACHE"), scratch_folder(cache):
        pass


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    for name, age in ((".partial-old", 25 * 3600), (".partial-new", 3600), ("model", 25 * 3600)):
        (tmp_path / name / "half").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with scratch_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".partial-new", "model"}


def test_the_process_that_finishes_first_wins(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    destination = move_into_place(tmp_path / "theirs", tmp_path / "model")
    assert move_into_place(tmp_path / "ours", tmp_path / "model") == destination
    assert (destination / "model.safetensors").read_text() == "theirs"


def test_another_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary").touch()
    with pytest.raises(OSError, match="not empty"):
        move_into_place(tmp_path / "ours", tmp_path / "model")
    assert (tmp_path / "model" / "diary").exists()
