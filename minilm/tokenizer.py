"""Text -> word ids: WordPiece through the `tokenizers` package, and what becomes of texts that are too long.

One text is tokenised at a time, in the calling thread. The package's batch calls start a thread pool of their own, and
then warn in every forked process; one call a text starts nothing, and keeps the environment out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers

from minilm.texts import Text

CHUNK_OVERLAP = 0.25


@dataclass(frozen=True)
class TokenizedText:
    """A text's word ids, special tokens included, and its token types (0; 1 for a pair's second text)."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.ids)


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

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the word pieces that `ids` stand for."""
        return [self._tokenizer.id_to_token(i) or f"[{i}]" for i in ids]

    def __call__(self, text: Text) -> TokenizedText:
        """Tokenise one text, whole."""
        encoding = self._tokenizer.encode(*((text,) if isinstance(text, str) else text))
        return TokenizedText(encoding.ids, encoding.type_ids)

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
        boundary = len(text) - sum(text.type_ids)
        return text.ids[1 : boundary - 1], text.ids[boundary:-1]

    def _frame(self, first: list[int], second: list[int] | None = None) -> TokenizedText:
        """Put special tokens around content tokens."""
        ids = [self.cls_id, *first, self.sep_id]
        tail = [*second, self.sep_id] if second is not None else []
        return TokenizedText(ids + tail, [0] * len(ids) + [1] * len(tail))
