"""Folders of small random BERT models, built with transformers, whose names and shapes are the independent truth."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

WORDS = ["a", "cat", "dog", "sat", "##s", "on", "the", "mat", "hello", "cafe", "café", "Hello", "hellö", ",", ".", "!"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def vocabulary():
    """A vocabulary whose size is no multiple of 8, so that no row of the table passes for padding."""
    return [*SPECIAL, *WORDS, *(f"word{number}" for number in range(20))]


@pytest.fixture(scope="session")
def bert_config(vocabulary):
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 160,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
    }


@pytest.fixture(scope="session")
def _bert_state(bert_config):
    generator = torch.Generator().manual_seed(1)
    state = BertModel(BertConfig(**bert_config)).state_dict()
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return state | {"embeddings.position_ids": torch.arange(160).unsqueeze(0)}


@pytest.fixture
def bert_state(_bert_state):
    """The tensors of a BertModel, under transformers' names, with its pooler and position numbers; safe to change."""
    return {name: tensor.clone() for name, tensor in _bert_state.items()}


@pytest.fixture
def bert_folder(tmp_path, bert_state, bert_config, vocabulary):
    """Return a function that writes a plain BERT folder; keywords change config.json, None leaves a file out."""

    def write(name="bert", state=bert_state, weights="model.safetensors", vocab=vocabulary, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(bert_config | changes))
        if weights == "model.safetensors":
            save_file(state, folder / weights)
        elif weights:
            torch.save(state, folder / weights)
        if vocab:
            (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def st_folder(bert_folder):
    """Return a function that writes a sentence-transformers folder from the JSON of its files."""

    def write(pooling=None, modules=("Transformer", "Pooling", "Normalize"), files=None, path="", **keywords):
        folder = bert_folder(name=keywords.pop("name", "st") + ("/" + path if path else ""), **keywords)
        root = folder.parent if path else folder
        paths = [path, "1_Pooling", "2_Normalize", "3_More"]
        types = [name if "." in name else f"sentence_transformers.models.{name}" for name in modules]
        entries = [{"idx": i, "name": str(i), "path": paths[i], "type": kind} for i, kind in enumerate(types)]
        (root / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True} if pooling is None else pooling
        contents = {"modules.json": entries, "1_Pooling/config.json": pooling, **(files or {})}
        for name, values in contents.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(json.dumps(values))
        return root

    return write


@pytest.fixture
def modelscope_folder(bert_folder, bert_state):
    """Return a function that writes a ModelScope folder with these `model` and `preprocessor` sections."""

    def write(model=None, preprocessor=None, state=None, **keywords):
        state = {f"bert.{name}": tensor for name, tensor in (state or bert_state).items()}
        folder = bert_folder("modelscope", state, "pytorch_model.bin", **keywords)
        configuration = {"framework": "pytorch", "task": "sentence-embedding", "model": model or {"type": "bert"}}
        configuration |= {"pipeline": {"type": "sentence-embedding"}}
        configuration |= {} if preprocessor is None else {"preprocessor": preprocessor}
        (folder / "configuration.json").write_text(json.dumps(configuration))
        return folder

    return write
