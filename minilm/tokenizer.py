"""Text -> word ids: WordPiece through the `tokenizers` package, and what becomes of texts that are too long.

BERT's WordPiece never looks across a space, so a text's ids are those of its words, one word after the other. Most of a
text is words met before, and their ids are looked up, not computed again: several times as fast as the package, which
works out where in the text each token came from, too. The package's own answer to speed, its batch calls, start a
thread pool that warns in every forked process; one call a word starts nothing, and keeps the environment out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from minilm.texts import Text

CHUNK_OVERLAP = 0.25
KNOWN_WORDS = 32_768  # remembered, about 8 MB
LONGEST_WORD = 64  # of those remembered, in characters


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens, special tokens included.

    Attributes:
        ids: their word ids.
        second: how many of them, at the end, belong to the second text of a pair.
    """

    ids: list[int]
    second: int = 0

    @property
    def type_ids(self) -> list[int]:
        """The token types: 0, or 1 in a pair's second text."""
        return [0] * (len(self.ids) - self.second) + [1] * self.second

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.ids)


class _KnownWords(dict[str, tuple[int, ...]]):
    """Words and their ids, without special tokens; a word that is not there is tokenised, and remembered."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        """Tokenise a word; all are forgotten when there is no room for it, and the common ones soon back."""
        ids = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        if len(word) <= LONGEST_WORD:
            if len(self) >= KNOWN_WORDS:
                self.clear()
            self[word] = ids
        return ids


class Tokenizer:
    """A BERT tokenizer: `[CLS] text [SEP]`, or `[CLS] first [SEP] second [SEP]` for a pair.

    Literal special tokens in a text ("[SEP]") become those tokens, as in the reference.

    Args:
        tokenizer_json: a complete description as `tokenizers` writes it; its truncation and padding are not used.

    Raises:
        ValueError: the description can't be read, or it does not put one token before a text and one behind.
    """

    def __init__(self, tokenizer_json: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"this tokenizer description can't be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2:
            raise ValueError(f"expected a tokenizer that puts [CLS] and [SEP] around a text, got {len(frame)} tokens")
        self.cls_id, self.sep_id = frame
        self._words = _KnownWords(self._tokenizer) if _is_word_by_word(self._tokenizer) else None

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the word pieces that `ids` stand for."""
        return [self._tokenizer.id_to_token(i) or f"[{i}]" for i in ids]

    def __call__(self, text: Text) -> TokenizedText:
        """Tokenise one text, whole."""
        if not isinstance(text, str):
            encoding = self._tokenizer.encode(*text)
            return TokenizedText(encoding.ids, sum(encoding.type_ids))
        if self._words is None:
            return TokenizedText(self._tokenizer.encode(text).ids)
        words = map(self._words.__getitem__, text.split(" "))
        return TokenizedText([self.cls_id, *chain.from_iterable(words), self.sep_id])

    def truncate(self, text: TokenizedText, limit: int) -> TokenizedText:
        """Cut a text to `limit` tokens, special tokens included; of a pair, the longer half first."""
        if len(text) <= limit:
            return text
        first, second = self._halves(text)
        if not second:
            return self._frame(first[: limit - 2])
        room = limit - 3
        short, long = sorted((len(first), len(second)))
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
        first_room, second_room = (short, long) if len(first) <= len(second) else (long, short)
        return self._frame(first[:first_room], second[:second_room])

    def chunk(self, text: TokenizedText, limit: int) -> list[TokenizedText]:
        """Split a text into windows of at most `limit` tokens, each overlapping the one before by a quarter.

        Raises:
            ValueError: the text is a pair.
        """
        if len(text) <= limit:
            return [text]
        content, second = self._halves(text)
        if second:
            raise ValueError('a text pair can\'t be split into windows; use on_truncate="warn", "ignore" or "error"')
        size = limit - 2
        overlap = int(size * CHUNK_OVERLAP)
        starts = range(0, len(content) - overlap, size - overlap)
        return [self._frame(content[start : start + size]) for start in starts]

    def _halves(self, text: TokenizedText) -> tuple[list[int], list[int]]:
        """Return the content tokens of the first and second text, without the frame's special tokens."""
        boundary = len(text) - text.second
        return text.ids[1 : boundary - 1], text.ids[boundary:-1]

    def _frame(self, first: list[int], second: list[int] | None = None) -> TokenizedText:
        """Put special tokens around content tokens."""
        ids = [self.cls_id, *first, self.sep_id]
        return TokenizedText(ids) if second is None else TokenizedText([*ids, *second, self.sep_id], len(second) + 1)


def _is_word_by_word(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a text's ids are surely those of the words between its spaces (U+0020), one after the other.

    BERT's normaliser and pre-tokeniser look at single characters, at least up to the next space; so does the search for
    added tokens, if they are looked for in the text as it stands and have no space in them.
    """
    parts = (
        (tokenizer.normalizer, normalizers.BertNormalizer),
        (tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
        (tokenizer.model, models.WordPiece),
    )
    added = tokenizer.get_added_tokens_decoder().values()
    return all(isinstance(part, kind) for part, kind in parts) and not any(
        token.normalized or " " in token.content for token in added
    )
