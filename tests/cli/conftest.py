"""What the tests of the command line share."""

import functools

import pytest

import minilm.encoder

load_once = functools.cache(minilm.encoder.load)


@pytest.fixture(autouse=True)
def use_load_once(monkeypatch):
    """Load the same model with the same options once for all tests; no command changes an encoder."""
    monkeypatch.setattr(minilm.encoder, "load", load_once)


@pytest.fixture
def model(canonical_folder):
    return ["--model", str(canonical_folder)]


@pytest.fixture
def the_error(capsys):
    """Return a function that gives the message on stderr, which must be a single error in a single line."""

    def read():
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("minilm: error: ")
        return line

    return read
