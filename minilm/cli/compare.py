"""`minilm similarity` and `minilm search`: texts against texts, for reading."""

from __future__ import annotations

import argparse

from minilm.cli.common import (
    Commands,
    Parser,
    add_command,
    add_model_options,
    load_encoder,
    one_line,
    print_json,
    shows_progress,
)
from minilm.cli.files import add_input_options, read_input
from minilm.config import SIMILARITIES

SIMILARITY_EPILOG = """\
examples:
  minilm similarity "A man is eating." "Someone eats." "A plane takes off."
  minilm similarity --all "red" "green" "blue"
"""
SEARCH_EPILOG = """\
examples:
  minilm search "how to boil an egg" --corpus recipes.txt
  minilm search "late delivery" --corpus reviews.csv --column body --top-k 20 --json
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `similarity` and `search`."""
    parser = add_command(
        commands, "similarity", run_similarity, summary="score a text against others", epilog=SIMILARITY_EPILOG
    )
    parser.add_argument("text", metavar="A", help="the text that the others are scored against")
    parser.add_argument("others", nargs="+", metavar="B", help="the other texts")
    parser.add_argument("--all", action="store_true", help="score every text against every other")
    _add_score_options(parser)

    parser = add_command(
        commands, "search", run_search, summary="find the texts closest to a query", epilog=SEARCH_EPILOG
    )
    parser.add_argument("query", metavar="QUERY", help="what to look for")
    parser.add_argument(
        "--corpus", required=True, metavar="FILE", help="the texts to search, as for encode; - is stdin"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="how many to show (default: 5)")
    add_input_options(parser)
    _add_score_options(parser)


def _add_score_options(parser: Parser) -> None:
    """Add what both commands have."""
    parser.add_argument("--metric", choices=SIMILARITIES, help="default: the model's own, mostly cosine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)


def run_similarity(arguments: argparse.Namespace) -> int:
    """Print the scores of the texts."""
    encoder = load_encoder(arguments)
    metric = arguments.metric or encoder.encoding.similarity
    texts = [arguments.text, *arguments.others]
    vectors = encoder.encode(texts)
    scores = encoder.similarity(vectors if arguments.all else vectors[:1], vectors, metric).tolist()
    if arguments.json and arguments.all:
        print_json({"metric": metric, "texts": texts, "scores": scores})
    elif arguments.json:
        others = [{"text": text, "score": score} for text, score in zip(texts[1:], scores[0][1:], strict=True)]
        print_json({"metric": metric, "text": texts[0], "others": others})
    elif arguments.all:
        print(f"{metric:>9} " + "".join(f"{number:>9}" for number in range(1, len(texts) + 1)))
        for number, (text, row) in enumerate(zip(texts, scores, strict=True), start=1):
            print(f"{number:>9} " + "".join(f"{score:>9.4f}" for score in row) + f"  {one_line(text)}")
    else:
        print(f"{metric:>9}  {one_line(texts[0])}")
        for text, score in zip(texts[1:], scores[0][1:], strict=True):
            print(f"{score:>9.4f}  {one_line(text)}")
    return 0


def run_search(arguments: argparse.Namespace) -> int:
    """Print the best of the corpus."""
    texts = list(read_input(arguments, arguments.corpus))
    if not texts:
        raise ValueError(f"the corpus {arguments.corpus} has no text")
    encoder = load_encoder(arguments)
    metric = arguments.metric or encoder.encoding.similarity
    options = {"show_progress_bar": shows_progress(arguments)}
    (hits,) = encoder.search([arguments.query], texts, arguments.top_k, metric, **options)
    if arguments.json:
        found = [{**hit, "text": texts[hit["corpus_id"]]} for hit in hits]
        print_json({"metric": metric, "query": arguments.query, "hits": found})
        return 0
    print(f"{metric:>9}  {'row':>7}  {one_line(arguments.query)}")
    for hit in hits:
        print(f"{hit['score']:>9.4f}  {hit['corpus_id'] + 1:>7}  {one_line(texts[hit['corpus_id']])}")
    return 0
