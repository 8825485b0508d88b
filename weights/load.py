"""Reading weights from any layout minilm knows: its own, sentence-transformers, ModelScope, plain Hugging Face BERT."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from minilm.config import EncodingConfig, MiniLMConfig
from minilm.weights.checkpoint import WEIGHTS_FILE, Checkpoint, is_canonical, read_canonical
from minilm.weights.convert import Tensors, check_canonical, config_from_bert, from_bert
from minilm.weights.files import WeightsError, find_weights, read_json, read_object, read_tensors, sha256
from minilm.weights.known import is_default_model, known_results
from minilm.weights.names import OUTPUT_LAYER
from minilm.weights.vocabulary import check_vocabulary, read_tokenizer

logger = logging.getLogger("minilm.weights")

# sentence-transformers' names for poolings, of version 6 and of the switches before it, and ours.
ST_POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "mean_sqrt_len_tokens": "mean_sqrt_len"}
ST_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# sentence-transformers' Dense module that is an output layer: its activation, and the one tensor it has.
IDENTITY, DENSE_WEIGHT = "torch.nn.modules.linear.Identity", "linear.weight"
# ModelScope's values of `emb_pooler_type`, and ours.
MODELSCOPE_POOLINGS = {"cls": "cls", "avg": "mean", "avg_top2": "avg_top2", "avg_first_last": "avg_first_last"}

_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-4.0": "CC-BY-4.0"}


@dataclass(frozen=True)
class _Layout:
    """A foreign folder, understood: whose format, where BERT's files are, and what differs from our defaults."""

    format: str
    folder: Path
    encoding: dict[str, Any]
    lowercase: bool = False
    source_max_seq_length: int | None = None
    pooled_size: int | None = None
    dense: Path | None = None


def read_checkpoint(path: str | os.PathLike[str], *, source: str | None = None) -> Checkpoint:
    """Read a model from a folder, or from a weights file and the folder around it.

    Args:
        path: a canonical, sentence-transformers, ModelScope or Hugging Face BERT folder, or a weights file in one.
        source: the name to record in `provenance["source"]` of converted weights; the folder's own name if None.

    Raises:
        WeightsError: something is missing, damaged or contradictory, or needs what minilm does not have. Nothing is
            ever filled in at random.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError(f"{path} does not exist; expected a folder of weights")
    folder, files = (path, None) if path.is_dir() else (path.parent, [path])
    canonical = path if files else folder / WEIGHTS_FILE
    if is_canonical(canonical):
        return read_canonical(canonical)
    layout = _detect(folder)
    return _read_bert(layout, files or find_weights(layout.folder), source or folder.resolve().name, _licence(folder))


def _detect(folder: Path) -> _Layout:
    """Return the layout of a folder that is not canonical."""
    configuration = read_object(folder / "configuration.json", missing_ok=True)
    if "model" in configuration:  # mirrors of Hugging Face models carry a configuration.json without it
        return _modelscope(folder, configuration)
    if (folder / "modules.json").exists():
        return _sentence_transformers(folder)
    if (folder / "config.json").exists():
        logger.info("%s is a plain BERT folder: mean pooling without normalisation, as sentence-transformers", folder)
        encoding = {"pooling": "mean", "normalize": False}
        return _Layout("bert", folder, encoding, source_max_seq_length=_length_limit(folder))
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    expected = "a minilm model.safetensors, or modules.json, configuration.json or config.json"
    raise WeightsError(f"{folder} is no model folder that minilm knows: expected {expected}; found {held}")


def _sentence_transformers(folder: Path) -> _Layout:
    """Understand a sentence-transformers folder, of any version up to 6."""
    modules = read_json(folder / "modules.json")
    try:
        types: list[str] = [module["type"] for module in modules]
        names = [name.split(".")[-1] if name.startswith("sentence_transformers.") else name for name in types]
        paths = [folder / module["path"] for module in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder / 'modules.json'} is not a list of modules ({error!r})") from error
    further = [[], ["Normalize"], ["Dense"], ["Dense", "Normalize"]]
    if names not in [["Transformer", "Pooling", *more] for more in further]:
        raise WeightsError(
            f"{folder / 'modules.json'} lists {', '.join(names)}; minilm runs Transformer, Pooling and, if wanted, "
            "a Dense without bias and activation and Normalize. Another module would be left out, and the vectors wrong"
        )
    for path in paths[2:]:
        _check_place(path / "config.json")
    dense = paths[2] if "Dense" in names else None
    if dense is not None:
        _check_dense(dense / "config.json")
    settings = read_object(paths[0] / "sentence_bert_config.json", missing_ok=True)
    limit = _length_limit(paths[0], settings.get("max_seq_length"))
    chosen = {} if limit is None else {"max_seq_length": limit}
    pooling, pooled_size = _st_pooling(paths[1] / "config.json")
    return _Layout(
        "sentence-transformers",
        paths[0],
        encoding={"pooling": pooling, "normalize": names[-1] == "Normalize", **chosen, **_st_encoding(folder)},
        lowercase=bool(settings.get("do_lower_case")),
        source_max_seq_length=limit,
        pooled_size=pooled_size,
        dense=dense,
    )


def _st_pooling(path: Path) -> tuple[str, int | None]:
    """Return the pooling of a sentence-transformers Pooling module, and the width it expects."""
    values = read_object(path)
    modes = values.get("pooling_mode") or [mode for switch, mode in ST_SWITCHES.items() if values.get(switch)] or "mean"
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in list(ST_POOLINGS):
        raise WeightsError(
            f"{path} asks for pooling {' and '.join(map(str, modes))}; expected one of {list(ST_POOLINGS)}"
        )
    if values.get("include_prompt", True) is not True:
        raise WeightsError(f"{path} says include_prompt=false; minilm always pools over the prompt too")
    return ST_POOLINGS[modes[0]], values.get("embedding_dimension", values.get("word_embedding_dimension"))


def _check_place(path: Path) -> None:
    """Raise `WeightsError` if a module after Pooling acts on anything but the sentence embedding."""
    values = read_object(path, missing_ok=True)
    for key in ("module_input_name", "module_output_name"):
        if values.get(key) not in (None, "sentence_embedding"):
            raise WeightsError(f"{path}: {key} must be sentence_embedding, got {values[key]!r}")


def _check_dense(path: Path) -> None:
    """Raise `WeightsError` if a Dense module is more than a linear map without bias."""
    values = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"} | read_object(path)
    for key, expected in (("bias", False), ("activation_function", IDENTITY), ("use_residual", False)):
        if values.get(key, False) != expected:
            raise WeightsError(f"{path}: {key} must be {expected!r}, got {values[key]!r}; minilm has no such layer")


def _st_encoding(folder: Path) -> dict[str, Any]:
    """Return prompts and similarity from config_sentence_transformers.json."""
    path = folder / "config_sentence_transformers.json"
    values = read_object(path, missing_ok=True)
    if values.get("truncate_dim") is not None:
        raise WeightsError(
            f"{path} says truncate_dim={values['truncate_dim']}; remove it, and give it to encode instead"
        )
    prompts = values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise WeightsError(f"{path}: prompts must map names to texts, got {prompts!r}")
    similarity = values.get("similarity_fn_name") or "cosine"
    return {"prompts": prompts, "default_prompt_name": values.get("default_prompt_name"), "similarity": similarity}


def _modelscope(folder: Path, configuration: dict[str, Any]) -> _Layout:
    """Understand a ModelScope sentence-embedding folder, as modelscope's own pipeline does."""
    path = folder / "configuration.json"
    model, preprocessor = configuration["model"], configuration.get("preprocessor") or {}
    if isinstance(preprocessor, dict) and "type" not in preprocessor:
        preprocessor = preprocessor.get("val") or preprocessor
    if not isinstance(model, dict) or not isinstance(preprocessor, dict):
        raise WeightsError(f"{path}: model and preprocessor must be JSON objects")
    kind = model.get("type", model.get("model_type", "bert"))
    if kind != "bert":
        raise WeightsError(f"{path}: model.type must be 'bert', got {kind!r}; minilm has no such model")
    pooler = model.get("emb_pooler_type", "cls")
    if pooler not in list(MODELSCOPE_POOLINGS):
        raise WeightsError(f"{path}: emb_pooler_type must be one of {', '.join(MODELSCOPE_POOLINGS)}; got {pooler!r}")
    if "emb_pooler_type" not in model:
        logger.info("%s names no emb_pooler_type: cls, as modelscope", path)
    affixes = [key for key in ("boq", "eoq", "bod", "eod") if preprocessor.get(key) is not None]
    if affixes:
        raise WeightsError(f"{path}: the preprocessor adds {', '.join(affixes)} to texts, which minilm does not do")
    encoding = {"pooling": MODELSCOPE_POOLINGS[pooler], "normalize": bool(model.get("normalize", False))}
    limit = preprocessor.get("max_length")
    chosen = {} if limit is None else {"max_seq_length": limit}
    encoding |= {"first_hidden_state": "first_layer", **chosen}
    return _Layout("modelscope", folder, encoding, source_max_seq_length=128 if limit is None else limit)


def _length_limit(folder: Path, limit: Any = None) -> int | None:
    """Return the source's own maximum length: the limit given, else that of its tokenizer_config.json, if any."""
    if limit is None:
        limit = read_object(folder / "tokenizer_config.json", missing_ok=True).get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and limit < 1e9 else None  # transformers' "no limit" is 10^30


def _read_bert(layout: _Layout, files: list[Path], source: str, licence: str) -> Checkpoint:
    """Read the BERT model of an understood folder."""
    config = config_from_bert(read_object(layout.folder / "config.json"), layout.folder / "config.json")
    if layout.pooled_size not in (None, config.hidden_size):
        sizes = f"pools vectors of {layout.pooled_size}, config.json's hidden_size is {config.hidden_size}"
        raise WeightsError(f"{layout.folder}: the Pooling module {sizes}; one of them belongs to another model")
    encoding = _encoding(layout, config)
    tensors, ignored = from_bert(read_tensors(files), config, files[0])
    if layout.dense is not None:
        dense = find_weights(layout.dense)
        tensors |= _output_layer(dense)
        check_canonical(tensors, config, dense[0])
        files = [*files, *dense]
    digest = sha256(files)
    if is_default_model(digest) and encoding.max_seq_length == 256:  # as published; the reference's limit is 128
        encoding = replace(encoding, max_seq_length=128)
    tokenizer_json = read_tokenizer(layout.folder, lowercase=layout.lowercase)
    check_vocabulary(tokenizer_json, config, layout.folder)
    provenance: dict[str, Any] = {
        "source": source,
        "source_format": layout.format,
        "source_sha256": digest,
        "source_max_seq_length": layout.source_max_seq_length,
        "licence": licence,
        "converted_with": _version(),
    }
    calibration, golden = known_results(digest, encoding)
    return Checkpoint(config, encoding, tensors, tokenizer_json, provenance, calibration, golden, ignored)


def _output_layer(files: list[Path]) -> Tensors:
    """Read the output layer, under our name, from a Dense module's file."""
    found = read_tensors(files)
    if found.keys() != {DENSE_WEIGHT}:
        raise WeightsError(f"{files[0]} must hold {DENSE_WEIGHT} and nothing else, got {', '.join(found) or 'nothing'}")
    return {OUTPUT_LAYER: found[DENSE_WEIGHT]}


def _encoding(layout: _Layout, config: MiniLMConfig) -> EncodingConfig:
    """Return the encoding configuration, its length limited to the positions that the model has."""
    values = dict(layout.encoding)
    try:
        limit = EncodingConfig.from_dict(values).max_seq_length
        if limit > config.max_positions:
            logger.warning("max_seq_length %d is limited to the model's %d positions", limit, config.max_positions)
            values["max_seq_length"] = config.max_positions
        return EncodingConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{layout.folder}: the {layout.format} configuration cannot be used: {error}") from error


def _licence(folder: Path) -> str:
    """Return the licence that a README.md's front matter names, or `unknown`."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return _SPDX.get(licence[1].lower(), licence[1]) if licence else "unknown"


def _version() -> str:
    """Return `minilm` and the version that runs."""
    try:
        return f"minilm {metadata.version('minilm')}"
    except metadata.PackageNotFoundError:
        return "minilm (not installed)"
