"""What `minilm eval` can measure: each evaluator with its options and the format of its data, as `--help` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STS_EPILOG = """\
The figure of the field is Spearman's correlation x 100, averaged over the tasks sts12 ... sts16, stsb and sickr.
Data in DIR: sts12/SUBSET.tsv ... sts16/SUBSET.tsv, stsb/test.tsv, sickr/test.tsv; each line is
score<TAB>sentence1<TAB>sentence2 in UTF-8, without a header. Without --data, MTEB's copies of these sets are fetched
from the Hugging Face hub (mteb/sts12-sts ... mteb/sts16-sts, mteb/stsbenchmark-sts, mteb/sickr-sts).

examples:
  minilm eval sts --data sts/
  minilm eval sts --data sts/ --tasks stsb sickr --split dev --model my-model/
  minilm eval sts --data sts/ --json - | jq .figures.average
"""
RETRIEVAL_EPILOG = """\
nDCG@10, MRR@10, Recall@k and MAP (of the first 1,000 documents) by cosine similarity, as trec_eval computes them.
Data in DIR, in UTF-8, plain or compressed (.gz, .xz):
  corpus.jsonl      {"_id": "d1", "title": "may be missing", "text": "..."}     or corpus.tsv   d1<TAB>text
  queries.jsonl     {"_id": "q1", "text": "..."}                                or queries.tsv  q1<TAB>text
  qrels/SPLIT.tsv   query-id<TAB>corpus-id<TAB>score, then q1<TAB>d1<TAB>1      or, as in TREC,  q1 0 d1 1
A score above 0 is relevant. These are the layouts of BEIR and TREC.

examples:
  minilm eval retrieval --data scifact/
  minilm eval retrieval --data msmarco/ --split dev --recall-at 10 1000
  minilm eval retrieval --data arguana/ --ignore-identical-ids --json - | jq '.figures["nDCG@10"]'
"""
PAIRS_EPILOG = """\
Average precision, and the best F1 with its threshold, of telling pairs that belong together by cosine similarity.
Data: lines label<TAB>text1<TAB>text2 in UTF-8, without a header, plain or compressed (.gz, .xz); label 1 or 0:
  1<TAB>How do I boil an egg?<TAB>What is the way to boil eggs?
  0<TAB>How do I boil an egg?<TAB>How do I fry an egg?

examples:
  minilm eval pairs --data duplicate-questions.tsv
  minilm eval pairs --data duplicate-questions.tsv.xz --model my-model/ --json -
"""
TRIPLETS_EPILOG = """\
How often an anchor is nearer, by cosine similarity, to its positive than to its negative.
Data: lines anchor<TAB>positive<TAB>negative in UTF-8, without a header, plain or compressed (.gz, .xz):
  Two dogs run.<TAB>Animals are moving.<TAB>Two dogs sleep.

examples:
  minilm eval triplets --data nli.tsv
  minilm eval triplets --data nli.tsv.xz --json - | jq .figures.accuracy
"""
CLUSTERING_EPILOG = """\
V-measure of k-means (k is the number of labels, the best of ten starts). It needs scikit-learn: the extra "eval".
Data: lines label<TAB>text in UTF-8, without a header, plain or compressed (.gz, .xz):
  sport<TAB>The match ended two all.
  weather<TAB>Rain is expected by noon.

examples:
  minilm eval clustering --data newsgroups.tsv
  minilm eval clustering --data newsgroups.tsv --seed 1 --model my-model/
"""
UNIFORMITY_EPILOG = """\
Alignment, the mean squared distance of pairs that belong together, and uniformity, log mean exp(-2 squared distance) of
all pairs of texts (Wang and Isola, 2020); lower is better. Time grows with the square of the number of texts.
Data, in UTF-8, without a header, plain or compressed (.gz, .xz), one of
  text1<TAB>text2                the texts of every line belong together
  score<TAB>text1<TAB>text2      those of a score above 4 do (an STS task); all texts count for uniformity

examples:
  minilm eval uniformity --data sts/stsb/test.tsv
  minilm eval uniformity --data paraphrases.tsv.xz --json -
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "tasks": {"nargs": "+", "metavar": "TASK", "help": "only these (default: all seven)"},
    "split": {"help": "which part of the data (default: test; sts has dev for the tasks stsb and sickr)"},
    "recall_at": {"nargs": "+", "type": int, "metavar": "K", "help": "the k of Recall@k (default: 10 100)"},
    "ignore_identical_ids": {
        "action": "store_const",
        "const": True,
        "help": "leave out the document that has the query's own id",
    },
}
"""Options that are arguments of an evaluator; None where not given, and the evaluator's own default then holds."""


@dataclass(frozen=True)
class Measure:
    """An evaluator on the command line.

    Attributes:
        evaluator: the function of `minilm.evaluate` that measures an encoder on data.
        summary: what it measures, in a few words.
        data: what `--data` takes, `DIR` or `FILE`.
        epilog: the format of the data, and examples.
        options: those of `OPTIONS` that the evaluator takes.
        takes_seed: whether it takes a seed.
    """

    evaluator: str
    summary: str
    data: str
    epilog: str
    options: tuple[str, ...] = ()
    takes_seed: bool = False


MEASURES = {
    "sts": Measure("evaluate_sts", "semantic textual similarity, seven tasks", "DIR", STS_EPILOG, ("tasks", "split")),
    "retrieval": Measure(
        "evaluate_retrieval",
        "finding the documents that are relevant to a query",
        "DIR",
        RETRIEVAL_EPILOG,
        ("split", "recall_at", "ignore_identical_ids"),
    ),
    "pairs": Measure("evaluate_pairs", "telling pairs that belong together", "FILE", PAIRS_EPILOG),
    "triplets": Measure("evaluate_triplets", "telling which of two texts is nearer", "FILE", TRIPLETS_EPILOG),
    "clustering": Measure("evaluate_clustering", "finding groups of texts", "FILE", CLUSTERING_EPILOG, takes_seed=True),
    "uniformity": Measure("evaluate_uniformity", "alignment and uniformity of vectors", "FILE", UNIFORMITY_EPILOG),
}
