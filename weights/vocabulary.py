"""The tokenizer of a weights folder, as one complete Hugging Face `tokenizers` JSON.

It comes from `tokenizer.json`, or is built from `vocab.txt` into the pipeline of `transformers.BertTokenizerFast`.
Truncation and padding are removed: how much to keep of a text is the encoder's matter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minilm.config import MiniLMConfig
from minilm.weights.files import WeightsError, read_object, read_text

logger = logging.getLogger("minilm.weights")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_TOKENIZERS = (None, "BertTokenizer", "BertTokenizerFast")
# BertTokenizer's settings in tokenizer_config.json: the BertNormalizer option each one sets, and its default.
_NORMALIZER_SETTINGS = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def read_tokenizer(folder: Path, *, lowercase: bool = False) -> str:
    """Return the tokenizer JSON of a Hugging Face folder.

    Args:
        folder: holds `tokenizer.json` or `vocab.txt`, and perhaps `tokenizer_config.json`.
        lowercase: lowercase each text first, whatever the folder says (sentence-transformers' `do_lower_case`).

    Raises:
        WeightsError: there is no tokenizer, or it is damaged.
    """
    settings = read_object(folder / "tokenizer_config.json", missing_ok=True)
    path = folder / "tokenizer.json"
    if path.exists():
        values = _read_json(path)
        if settings.get("tokenizer_class") in _BERT_TOKENIZERS:
            _apply_settings(values, settings, path)
    elif (folder / "vocab.txt").exists():
        values = json.loads(tokenizer_from_vocabulary(read_vocabulary(folder / "vocab.txt"), settings))
    else:
        raise WeightsError(f"{folder} holds no tokenizer: expected tokenizer.json or vocab.txt beside the weights")
    if lowercase:
        values["normalizer"] = _lowercase_first(values["normalizer"])
    return json.dumps(values | {"truncation": None, "padding": None}, ensure_ascii=False)


def read_vocabulary(path: Path) -> list[str]:
    """Return the tokens of a vocab.txt, one a line, in the order of their ids; empty lines at the end do not count."""
    tokens = read_text(path).rstrip("\n").split("\n")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise WeightsError(f"{path} lacks {', '.join(missing)}; it is not a whole BERT vocabulary. Download it again")
    return tokens


def tokenizer_from_vocabulary(tokens: list[str], settings: Mapping[str, Any] | None = None) -> str:
    """Return the JSON of the tokenizer that `transformers.BertTokenizerFast` makes of a vocabulary.

    Args:
        tokens: the vocabulary in the order of its ids, with BERT's five special tokens.
        settings: `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` of a tokenizer_config.json.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, **_normalizer_options(settings or {}))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return str(tokenizer.to_str())


def check_vocabulary(tokenizer_json: str, config: MiniLMConfig, where: Path) -> None:
    """Raise `WeightsError` unless the tokenizer's ids and the rows of the word embedding table belong together.

    There may be fewer ids than rows only where the table is padded to a multiple of 8.
    """
    size, rows = max(_token_ids(tokenizer_json, where).values(), default=-1) + 1, config.vocab_size
    padding = rows - size
    if padding < 0 or (padding and (rows % 8 or padding >= 128)):
        remedy = "The tokenizer belongs to another model, or was cut short; use the one the weights came with"
        raise WeightsError(f"{where} has {size} tokens for {rows} rows of the word embedding table. {remedy}")


def vocabulary(tokenizer_json: str) -> list[str]:
    """Return a tokenizer's tokens in the order of their ids; an id without a token gets an empty string."""
    tokens = {number: token for token, number in _token_ids(tokenizer_json, "the tokenizer").items()}
    return [tokens.get(number, "") for number in range(max(tokens) + 1)]


def bert_settings(tokenizer_json: str) -> dict[str, Any] | None:
    """Return the tokenizer_config.json with which BertTokenizer is this very tokenizer; None if it cannot be."""
    values = json.loads(tokenizer_json)
    normalizer = values["normalizer"] or {}
    settings = {name: normalizer.get(option) for name, (option, _) in _NORMALIZER_SETTINGS.items()}
    tokens = vocabulary(tokenizer_json)
    if normalizer.get("type") != "BertNormalizer" or not set(SPECIAL_TOKENS) <= set(tokens):
        return None
    same = json.loads(tokenizer_from_vocabulary(tokens, settings)) == values
    return {"tokenizer_class": "BertTokenizer", **settings} if same else None


def _token_ids(tokenizer_json: str, where: Path | str) -> dict[str, int]:
    """Return every token's id, added tokens included; `WeightsError` if the JSON does not hold them."""
    try:
        values = json.loads(tokenizer_json)
        ids = values["model"]["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
        if not all(type(number) is int and number >= 0 for number in ids.values()):
            raise ValueError("an id is not a number from 0 up")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{where} holds no vocabulary of tokens and ids ({error!r}). Download it again") from error
    return dict(ids)


def _read_json(path: Path) -> dict[str, Any]:
    """Return a tokenizer.json's values; `WeightsError` unless `tokenizers` accepts it."""
    values = read_object(path)
    try:
        Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # tokenizers raises Exception itself
        raise WeightsError(f"{path} is not a whole tokenizer ({error}). Download it again") from error
    return values


def _normalizer_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the BertNormalizer options for tokenizer_config.json settings."""
    return {option: settings.get(name, default) for name, (option, default) in _NORMALIZER_SETTINGS.items()}


def _apply_settings(values: dict[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    """Let tokenizer_config.json overrule the JSON's BertNormalizer, as `transformers.BertTokenizerFast` does."""
    normalizer = values["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer":
        return
    for option, value in _normalizer_options(settings).items():
        if normalizer.get(option) != value:
            logger.warning(
                "%s says %s=%s, but BertTokenizer with its tokenizer_config.json means %s; the latter is used, "
                "as transformers does", where, option, normalizer.get(option), value
            )  # fmt: skip
            normalizer[option] = value


def _lowercase_first(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """Return the normalizer that lowercases, then does what the given one does."""
    sequence = normalizer is not None and normalizer["type"] == "Sequence"
    steps = normalizer["normalizers"] if sequence and normalizer else [normalizer] if normalizer else []
    if normalizer and any(step["type"] == "Lowercase" or step.get("lowercase") for step in steps):
        return normalizer
    if len(steps) == 1 and steps[0]["type"] == "BertNormalizer":
        # Lowercasing commutes with the other steps, so the option will do; it must not switch on accent stripping.
        return steps[0] | {"lowercase": True, "strip_accents": bool(steps[0]["strip_accents"])}
    return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
