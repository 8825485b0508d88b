"""What every engine is compared with, and given: plain torch's vectors in float32, the workloads, the weights."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.bench.workloads import Texts, Workload, token_sequences
from minilm.bench.workloads import build as build_workloads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from minilm.encoder import SentenceEncoder

CHECKED_TOKENS = 4_096  # of each workload, its first sequences, are compared with the reference
CORPUS_TOKENS = 100_000  # of running text, from which token workloads are cut


def describe(device: str | None) -> dict[str, Any]:
    """Describe the machine.

    Raises:
        ValueError: the device is not there.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r} can't be used here: torch sees no CUDA GPU")
        properties: Any = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {"device": device, "threads": torch.get_num_threads(), "machine": machine}


def build(
    model: str | None, data: str | None, names: Sequence[str], scratch: str, *, sts: bool = False
) -> dict[str, Any]:
    """Write what the other workers read: the plan, the weights for peers, the workloads and the reference's rows.

    Args:
        model: as in `minilm.load`.
        data: a folder of STS data, or a file with a sentence a line; the package's own sentences if None.
        names: of the workloads.
        scratch: where to write.
        sts: whether `data` must hold all tasks of semantic textual similarity.

    Returns:
        The plan, the workloads, and `refused`: why others can't be had.
    """
    import numpy as np

    from minilm.encoder import load
    from minilm.evaluate.sts_data import TASKS, read_sts
    from minilm.weights.export import export_sentence_transformers

    if sts:
        read_sts(data, TASKS, "test")
    folder = Path(scratch)
    encoder = load(model, device="cpu", dtype="float32", backend="torch")
    sentences = read_sentences(data)
    texts = Texts(sentences, lambda text: encoder.token_counts([text])[0])
    workloads, refused = build_workloads(names, texts, encoder.config.max_positions)
    corpus = np.array(list(islice(_running_text(encoder, sentences), CORPUS_TOKENS)), dtype=np.int64)
    plan: dict[str, Any] = {
        "model": model,
        "folder": str(folder / "model"),
        "source": encoder.checkpoint.provenance.get("source"),
        "fingerprint": encoder.fingerprint(),
        "config": encoder.config.to_dict(),
        "encoding": encoder.encoding.to_dict(),
        "frame": [encoder.tokenizer.cls_id, encoder.tokenizer.sep_id],
        "sentences": len(texts.sentences),
    }
    try:
        export_sentence_transformers(encoder.checkpoint, folder / "model")
    except ValueError as error:  # a pooling of ours that they do not have
        plan["folder_error"] = str(error)
    listed = [workload.to_dict() for workload in workloads]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "workloads.json").write_text(json.dumps(listed), encoding="utf-8")
    np.save(folder / "corpus.npy", corpus)
    (folder / "reference").mkdir()
    for workload in workloads:
        np.save(folder / "reference" / f"{workload.name}.npy", _rows(encoder, workload, corpus, plan["frame"]))
    return {"plan": plan, "workloads": listed, "refused": refused}


def _running_text(encoder: SentenceEncoder, sentences: Sequence[str]) -> Iterator[int]:
    """Yield the word ids of one sentence after the other."""
    for sentence in sentences:
        yield from encoder.tokenizer(sentence).ids[1:-1]


def read_sentences(data: str | None) -> list[str]:
    """Return the sentences of a folder of STS data, mixed, or of a text file; by default the package's own.

    Raises:
        OSError: there is no such file or folder, or it has no sentences.
    """
    if data is None:
        from minilm.quantization import calibration_sentences

        return calibration_sentences()
    if Path(data).is_dir():
        from minilm.evaluate.sts_data import read_tsv

        pairs = [read_tsv(path) for path in sorted(Path(data).glob("*/*.tsv"))]
        sentences = [text for part in pairs for both in zip(part.first, part.second, strict=True) for text in both]
        random.Random(0).shuffle(sentences)  # or neighbours, and tasks, would be alike
    else:
        sentences = Path(data).read_text(encoding="utf-8").splitlines()
    if not any(sentences):
        raise OSError(f"no sentences in {data}: expected a folder with TASK/*.tsv (see `minilm eval sts --help`)")
    return sentences


def _rows(encoder: SentenceEncoder, workload: Workload, corpus: NDArray[Any], frame: Sequence[int]) -> NDArray[Any]:
    """Return plain torch's rows for the workload's first sequences: `[n, C]` float32."""
    from minilm.batch import PackedBatch
    from minilm.bench.engines import random_heads, vectors

    count = max(1, sum(end <= CHECKED_TOKENS for end in accumulate(workload.lengths)))
    if workload.kind == "texts":
        encoder.max_seq_length = workload.limit
        rows: NDArray[Any] = encoder.encode(workload.texts[:count], on_truncate="ignore")
        return rows
    batch = PackedBatch.from_sequences(token_sequences(workload.lengths[:count], corpus, frame, 0))
    if workload.kind == "tokens":
        return vectors(encoder, batch).numpy()
    heads = random_heads((workload.num_tokens, encoder.config.num_heads, encoder.config.head_size))
    query, key, value = (x[: batch.num_tokens] for x in heads)
    return encoder.model.backend.attention(query, key, value, batch).flatten(1).numpy()


def _processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
