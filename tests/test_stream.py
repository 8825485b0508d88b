"""`encode_stream` on very many texts: the memory of a few."""

import subprocess
import sys
from pathlib import Path

import pytest

STREAM = """
import sys
from collections import deque
from itertools import islice
from pathlib import Path
from minilm import EncodingConfig, MiniLM, MiniLMConfig, SentenceEncoder
from minilm.weights.checkpoint import Checkpoint

config = MiniLMConfig(hidden_size=8, num_layers=1, num_heads=1, feed_forward_size=8)
tokenizer = Path(sys.argv[1], "tokenizer.json").read_text(encoding="utf-8")
encoder = SentenceEncoder(Checkpoint(config, EncodingConfig(), MiniLM(config).state_dict(), tokenizer), "torch")
words = [f"w{number}" for number in range(5_000)] * 2

def sentences(count):
    for number in range(count):
        start = number * 1_999 % 5_000
        yield " ".join(words[start : start + 1 + number % 8]) + f" {number}"

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1_024

stream = encoder.encode_stream(sentences(250_000))
for count in (10_000, 40_000, 200_000):
    assert sum(1 for _ in islice(stream, count)) == count
    print(peak())
assert next(stream, None) is None
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_stream_takes_the_memory_of_its_beginning(canonical_folder):
    """With a model so small that a quarter of a million texts take seconds, and in a process of its own."""
    command = [sys.executable, "-c", STREAM, str(canonical_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    at_10_000, at_50_000, at_250_000 = map(int, done.stdout.split())
    assert at_250_000 < 1.1 * at_10_000
    assert (at_250_000 - at_50_000) / 200_000 < 25  # bytes for each text that went through
