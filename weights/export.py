"""Writing weights for others: as a sentence-transformers folder and as a ModelScope folder, exact to the bit.

Every tensor comes back unchanged when such a folder is read again. What the other format cannot say, and would make its
vectors different from ours, is an error; nothing is half written, and no folder that holds something is overwritten.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from minilm.weights.card import model_card
from minilm.weights.checkpoint import CARD_FILE, TOKENIZER_FILE, Checkpoint
from minilm.weights.convert import check_canonical, config_to_bert, to_bert
from minilm.weights.files import WeightsError, new_folder, standalone, write_json, write_safetensors
from minilm.weights.load import DENSE_WEIGHT, IDENTITY, MODELSCOPE_POOLINGS, ST_POOLINGS, ST_SWITCHES
from minilm.weights.names import OUTPUT_LAYER
from minilm.weights.vocabulary import SPECIAL_TOKENS, bert_settings, vocabulary

logger = logging.getLogger("minilm.weights")

_TOKENS = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))


def export_sentence_transformers(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> Path:
    """Write a folder that `sentence_transformers.SentenceTransformer` loads and encodes alike with; return it.

    Its README.md is the checkpoint's model card, or one of what the checkpoint tells.

    Raises:
        WeightsError: the pooling is one that sentence-transformers does not have, or the folder is not empty.
    """
    config, encoding = checkpoint.config, checkpoint.encoding
    mode = _their_pooling(encoding.pooling, ST_POOLINGS, "sentence-transformers")
    layer = checkpoint.tensors.get(OUTPUT_LAYER)
    wanted = {"Transformer": True, "Pooling": True, "Dense": layer is not None, "Normalize": encoding.normalize}
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(names[1:], 1))]
    modules = [  # these types are understood by every version from 2 to 6
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    switches = {switch: name == mode for switch, name in ST_SWITCHES.items()}
    settings = {
        "prompts": dict(encoding.prompts),
        "default_prompt_name": encoding.default_prompt_name,
        "similarity_fn_name": encoding.similarity,
    }
    with new_folder(folder) as temporary:
        _write_tokenizer(checkpoint, temporary)
        write_json(temporary / "config.json", config_to_bert(config, _dtype(checkpoint)))
        write_json(temporary / "modules.json", modules)
        write_json(temporary / "config_sentence_transformers.json", settings)
        limit = {"max_seq_length": encoding.max_seq_length, "do_lower_case": False}
        write_json(temporary / "sentence_bert_config.json", limit)
        (temporary / paths[1]).mkdir()
        write_json(temporary / paths[1] / "config.json", {"word_embedding_dimension": config.hidden_size, **switches})
        if layer is not None:
            _write_dense(layer, temporary / paths[2])
        (temporary / CARD_FILE).write_text(checkpoint.card or model_card(checkpoint), encoding="utf-8")
        write_safetensors(temporary / "model.safetensors", _bert_tensors(checkpoint), {"format": "pt"})
    return Path(folder)


def export_modelscope(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> Path:
    """Write a folder that ModelScope's sentence-embedding pipeline loads and encodes alike with; return it.

    Raises:
        WeightsError: the pooling, output layer, default prompt or tokenizer is one that ModelScope does not have, or
            the folder is not empty.
    """
    encoding = checkpoint.encoding
    if checkpoint.output_width is not None:
        raise WeightsError("ModelScope has no output layer, and its vectors would be others; nothing was exported")
    pooler = _their_pooling(encoding.pooling, MODELSCOPE_POOLINGS, "ModelScope")
    if encoding.pooling == "avg_first_last" and encoding.first_hidden_state != "first_layer":
        raise WeightsError(
            "ModelScope's avg_first_last begins at the first layer; set first_hidden_state='first_layer'"
        )
    if encoding.default_prompt_name is not None and encoding.prompts[encoding.default_prompt_name]:
        raise WeightsError(
            f"ModelScope has no prompts; set default_prompt_name={encoding.default_prompt_name!r} to None"
        )
    if encoding.prompts or encoding.similarity != "cosine":
        logger.warning("ModelScope has no place for the prompts and the similarity; they are left out of %s", folder)
    if bert_settings(checkpoint.tokenizer_json) is None:
        raise WeightsError("the tokenizer cannot be written as BERT's vocab.txt, from which ModelScope builds its own")
    configuration = {
        "framework": "pytorch",
        "task": "sentence-embedding",
        "pipeline": {"type": "sentence-embedding"},
        "model": {"type": "bert", "emb_pooler_type": pooler, "normalize": encoding.normalize},
        "preprocessor": {"type": "sentence-embedding", "max_length": encoding.max_seq_length},
    }
    config = config_to_bert(checkpoint.config, _dtype(checkpoint))
    tensors = {f"bert.{name}": standalone(tensor) for name, tensor in _bert_tensors(checkpoint).items()}
    with new_folder(folder) as temporary:
        _write_tokenizer(checkpoint, temporary)
        write_json(temporary / "configuration.json", configuration)
        write_json(temporary / "config.json", config | {"output_hidden_states": True})
        torch.save(tensors, temporary / "pytorch_model.bin")
    return Path(folder)


def _their_pooling(pooling: str, ours: dict[str, str], format_name: str) -> str:
    """Return another format's name for our pooling; `WeightsError` if it has none."""
    names = {mine: theirs for theirs, mine in ours.items()}
    if pooling not in names:
        raise WeightsError(f"{format_name} has no pooling {pooling}, only {', '.join(names)}; nothing was exported")
    return names[pooling]


def _bert_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors under BERT's names; `WeightsError` if they do not fit its configuration."""
    check_canonical(checkpoint.tensors, checkpoint.config, "the checkpoint to export")
    return to_bert(checkpoint.tensors, checkpoint.config)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that most of the model's values are stored in."""
    return checkpoint.tensors["embeddings.word.weight"].dtype


def _write_dense(layer: torch.Tensor, folder: Path) -> None:
    """Write an output layer `[D, C]` as sentence-transformers' Dense module."""
    width, inputs = layer.shape
    folder.mkdir()
    settings = {"in_features": inputs, "out_features": width, "bias": False, "activation_function": IDENTITY}
    write_json(folder / "config.json", settings)
    write_safetensors(folder / "model.safetensors", {DENSE_WEIGHT: layer}, {"format": "pt"})


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if it is BERT's kind of tokenizer, vocab.txt."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    bert = bert_settings(checkpoint.tokenizer_json)
    if bert is not None:
        settings = bert
        text = "".join(f"{token}\n" for token in vocabulary(checkpoint.tokenizer_json))
        (folder / "vocab.txt").write_text(text, encoding="utf-8", newline="\n")
    (folder / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
    limit = {"model_max_length": checkpoint.encoding.max_seq_length}
    write_json(folder / "tokenizer_config.json", settings | _TOKENS | limit)
