"""The data that the shipped recipes train on: named mixtures of sources.

They read one folder: `sentences.txt.xz` with its line ranges in `sentences.sources.tsv`, `pairs.tsv.xz`,
`caption_groups.tsv.xz`, `nli_triplets.tsv.xz`, `nli_pairs.tsv.xz` and `gold_sim.tsv.xz`, none of them with a header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from minilm.train.data import Draw, Source


def sentences(weights: Mapping[str, float]) -> Source:
    """Unlabelled sentences, column `text`, of some origins."""
    return Source(
        "sentences.txt.xz",
        {"text": "text", "source": "label"},
        origins="sentences.sources.tsv",
        weight=weights,
        weigh_by="source",
    )


def one_side(path: str, fields: tuple[str, ...], origins: tuple[str, ...], weight: float) -> Source:
    """One sentence of each pair, that of the field `text`, of some origins."""
    return Source(path, {"text": "text"}, fields=fields, keep={"origin": origins}, weight=weight)


CAPTIONS = Source(  # two captions of an image are a pair; captions of one image never pass for negatives
    "caption_groups.tsv.xz",
    {"image": "label", "captions": "text"},
    fields=("image", "captions"),
    group_by="image",
    draw=(Draw("captions", into=("query", "positive")),),
    distinct=("image",),
    weight=1,
    on_bad_row="skip",  # images with one caption
)
PARAPHRASES = Source(
    "pairs.tsv.xz",
    {"query": "text", "positive": "text"},
    fields=("query", "positive", "origin"),
    keep={"origin": ("asset", "mrpc", "turkcorpus", "wikisplit")},
    distinct=("query", "positive"),
    weight=1,
)
ENTAILMENTS = Source(
    "nli_pairs.tsv.xz",
    {"query": "text", "positive": "text"},
    fields=("relation", "query", "positive", "origin"),
    keep={"relation": ("entailment",)},
    distinct=("query", "positive"),
    weight=1,
)
TRIPLETS = Source(
    "nli_triplets.tsv.xz",
    {"query": "text", "positive": "text", "negatives": "texts"},
    fields=("query", "positive", "negatives", "origin"),
    distinct=("query",),
)
GRADED = Source(
    "gold_sim.tsv.xz",
    {"score": "number", "sentence1": "text", "sentence2": "text"},
    fields=("score", "sentence1", "sentence2", "origin"),
)
GRADED_STS = replace(GRADED, keep={"origin": ("sick_train", "sts12train", "stsb_train")})  # similarity, not relatedness

_ALL = {
    "captions_flickr": 20.0,
    "captions_coco10k": 3.0,
    "multi30k_task1_extra": 1.0,
    "nlvr": 2.0,
    "nli": 12.0,
    "pairs": 10.0,
    "gold": 4.0,
    "mrpc": 0.5,
    "student_answers_semeval13": 2.0,
    "parade_definitions": 1.0,
    "wordnet_glosses": 10.0,
    "wordnet_examples": 4.0,
    "gcide_definitions": 2.0,
    "reuters_titles": 3.0,
    "reuters_body": 4.0,
    "ag_news_test": 4.0,
    "headlines_clickbait_repo": 6.0,
    "brown": 2.0,
    "abc_news": 3.0,
    "webtext": 2.0,
    "speeches": 1.0,
    "subjectivity_polarity": 2.0,
    "movie_reviews": 2.0,
    "product_reviews": 1.0,
    "tweets_tweeteval": 5.0,
    "reddit_goemotions": 5.0,
    "dialogue_sgd": 3.0,
    "intents_clinc_banking": 2.0,
    "wikipedia": 4.0,
    "questions": 10.0,
}
_OPEN = (  # CC BY, CC BY-SA, MIT, Apache-2.0 or the WordNet licence
    *("captions_coco10k", "nlvr", "wordnet_glosses", "wordnet_examples", "headlines_clickbait_repo"),
    *("reddit_goemotions", "dialogue_sgd", "intents_clinc_banking", "wikipedia"),
)
_OPEN_NLI = ("cad_nli", "med", "snli_dev", "snli_test")

MIXTURES: dict[str, tuple[Source, ...]] = {
    "sentences": (sentences(_ALL),),
    "open-sentences": (
        sentences({name: _ALL[name] for name in _OPEN}),
        one_side("nli_pairs.tsv.xz", ("relation", "text", "other", "origin"), _OPEN_NLI, 6),
        one_side("nli_pairs.tsv.xz", ("relation", "other", "text", "origin"), _OPEN_NLI, 6),
        one_side("pairs.tsv.xz", ("text", "other", "origin"), ("wikisplit",), 5),
    ),
    "headlines": (sentences({"headlines_clickbait_repo": 1.0}),),
    "pairs": (CAPTIONS, PARAPHRASES, ENTAILMENTS),
    "triplets": (TRIPLETS,),
    "graded": (GRADED,),
    "graded-sts": (GRADED_STS,),
}
"""What a recipe may name: `text` to distil from, all, or under open licences, or of these the headlines alone; `query`
and `positive`, with `negatives` in triplets; `sentence1` and `sentence2` with `score` from 0 to 1, all or those of STS
training sets alone."""
