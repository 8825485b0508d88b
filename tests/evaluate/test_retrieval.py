"""Retrieval figures against figures by hand and those of trec_eval, ties included."""

import json

import numpy as np
import pytest

from minilm.evaluate import EvaluationDataError, evaluate_retrieval
from minilm.evaluate.retrieval import DEPTH, retrieve, score_run
from minilm.evaluate.retrieval_data import RetrievalData, read_retrieval

RECALL_AT = (1, 5, 10, 100)


@pytest.fixture
def pytrec_eval():
    return pytest.importorskip("pytrec_eval", reason="needs pytrec-eval-terrier, which the extra test brings")


def assert_equals_trec_eval(pytrec_eval, run, qrels, ours):
    """Hold figures by query against trec_eval's, which has no cut-off for the reciprocal rank."""
    cuts = ",".join(map(str, RECALL_AT))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"map", "recip_rank", "ndcg_cut.10", f"recall.{cuts}"})
    theirs = evaluator.evaluate(run)
    names = {"MAP": "map", "nDCG@10": "ndcg_cut_10", **{f"Recall@{k}": f"recall_{k}" for k in RECALL_AT}}
    none = dict.fromkeys((*names.values(), "recip_rank"), 0.0)
    for index, query in enumerate(qrels):
        expected = theirs.get(query, none)
        for name, their_name in names.items():
            assert ours[name][index] == pytest.approx(expected[their_name], abs=1e-9), (query, name)
        rank = expected["recip_rank"]
        assert ours["MRR@10"][index] == pytest.approx(rank if rank > 1 / 10.5 else 0, abs=1e-9)


@pytest.mark.parametrize("decimals", [0, 1, 3], ids=["many_ties", "some_ties", "few_ties"])
@pytest.mark.parametrize("relevances", [(0, 1), (-1, 0, 1, 2, 3)], ids=["binary", "graded"])
def test_equals_trec_eval(pytrec_eval, decimals, relevances):
    random = np.random.default_rng(decimals)
    documents = [f"d{number}" for number in range(150)] + ["é", "Z", "10", "9"]
    run, qrels = {}, {}
    for number in range(60):
        found = random.choice(documents, size=random.integers(1, len(documents)), replace=False)
        run[f"q{number}"] = {str(name): round(random.normal(), decimals) for name in found}
        judged = random.choice([*documents, "not in the corpus"], size=random.integers(1, 40), replace=False)
        qrels[f"q{number}"] = {str(name): int(random.choice(relevances)) for name in judged}
    del run["q7"]  # found nothing
    del qrels["q8"]  # was not judged
    qrels["q9"] = {"d1": 0, "d2": 0}  # nothing is relevant
    assert_equals_trec_eval(pytrec_eval, run, qrels, score_run(run, qrels, RECALL_AT))


def test_scores_tie_in_single_precision(pytrec_eval):
    run = {"q": {"a": 0.5 + 1e-12, "b": 0.5}}
    qrels = {"q": {"a": 1}}
    ours = score_run(run, qrels, RECALL_AT)
    assert ours["MRR@10"].tolist() == [0.5]
    assert_equals_trec_eval(pytrec_eval, run, qrels, ours)


def test_figures_by_hand():
    run = {"q": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}}
    qrels = {"q": {"b": 2, "d": 1, "missing": 1}}
    figures = {name: values.item() for name, values in score_run(run, qrels, (1, 3)).items()}
    best = 2 + 1 / np.log2(3) + 1 / np.log2(4)
    assert figures == {
        "nDCG@10": pytest.approx((2 / np.log2(3) + 1 / np.log2(5)) / best),
        "MRR@10": 0.5,
        "Recall@1": 0,
        "Recall@3": pytest.approx(1 / 3),
        "MAP": pytest.approx((1 / 2 + 2 / 4) / 3),
    }


@pytest.mark.parametrize("k", [0, 1001])
def test_recall_within_the_depth(k):
    with pytest.raises(ValueError, match=f"expected recall at 1 to 1000 documents, got 10, {k}"):
        score_run({}, {}, (10, k))


@pytest.fixture
def folder(lines):
    """Three queries at 0, 40 and 90 degrees, and documents, two of which have one text."""
    lines(("q0", "0 query"), ("q40", "40 query"), ("q90", "90 query"), ("unjudged", "7 query"), name="queries.tsv")
    corpus = [(f"d{angle}", f"{angle} document") for angle in (1, 5, 12, 30, 50, 81, 95)]
    path = lines(*corpus, ("twin1", "45 twin"), ("twin2", "45 twin"), ("q0", "0 query"), name="corpus.tsv")
    judged = [("q0", "d1", 1), ("q0", "d12", 2), ("q40", "twin1", 1), ("q40", "d81", 1), ("q90", "d30", 1)]
    lines(("query-id", "corpus-id", "score"), *judged, name="qrels/test.tsv")
    return path.parent


def test_evaluation(folder, angle_encoder):
    result = evaluate_retrieval(angle_encoder, folder, recall_at=(1, 2))
    assert result.sizes == {"queries": 3, "documents": 10}
    assert result.queries == ("q0", "q40", "q90")
    assert list(result.figures) == ["nDCG@10", "MRR@10", "Recall@1", "Recall@2", "MAP"]
    # q0: q0 d1 d5 d12; q40: twin2 twin1 (a tie, by falling id) ... d81 is ninth; q90: d95 d81 d50 twin2 twin1 d30
    assert result.per_query["MRR@10"].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 6])
    assert result.per_query["Recall@2"].tolist() == [0.5, 0.5, 0]
    assert result.per_query["MAP"].tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 9) / 2, 1 / 6])
    assert result.figures["MRR@10"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 6) / 3)
    assert len(angle_encoder.seen) == 9 + 3  # different texts, and the queries that were judged
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["measure"] == "retrieval"
    assert report["figures"]["MRR@10"] == result.figures["MRR@10"]
    assert result.table().startswith("retrieval: 3 queries, 10 documents\n\nfigure     value\nnDCG@10   0.")


def test_ignored_identical_ids(folder, angle_encoder):
    result = evaluate_retrieval(angle_encoder, folder, ignore_identical_ids=True)
    assert result.per_query["MRR@10"].tolist() == pytest.approx([1, 1 / 2, 1 / 6])


def test_runs_are_a_thousand_deep_and_equal_trec_evals(pytrec_eval, angle_encoder):
    corpus = {f"d{number}": f"{number / 10:.1f} document" for number in range(1100)}
    corpus |= {f"copy{number}": corpus[f"d{number}"] for number in range(0, 1100, 7)}
    queries = {f"q{angle}": f"{angle} query" for angle in range(0, 120, 1)}
    random = np.random.default_rng(0)
    relevant = {query: random.choice(list(corpus), 20, replace=False) for query in queries}
    qrels = {query: {str(name): int(random.integers(0, 3)) for name in names} for query, names in relevant.items()}
    run = dict(retrieve(angle_encoder, RetrievalData(corpus, queries, qrels)))
    assert {len(scores) for scores in run.values()} == {DEPTH}
    nearest = sorted(corpus, key=lambda name: abs(float(corpus[name].split()[0]) - 30))[:DEPTH]
    assert set(run["q30"]) == set(nearest)
    assert run["q30"]["copy301"] == run["q30"]["d301"]
    assert all(score == round(score, 7) for score in run["q30"].values())  # so equal texts tie wherever they stand
    assert_equals_trec_eval(pytrec_eval, run, qrels, score_run(run, qrels, RECALL_AT))


def test_queries_and_documents_are_encoded_as_such(folder, angle_encoder):
    class Encoder:
        encode = None

        def encode_query(self, texts):
            return angle_encoder.encode([f"{180 - float(text.split()[0])}" for text in texts])

        def encode_document(self, texts):
            return angle_encoder.encode([f"{180 - float(text.split()[0])}" for text in texts])

    expected = evaluate_retrieval(angle_encoder, folder).per_query
    for name, values in evaluate_retrieval(Encoder(), folder).per_query.items():
        assert values.tolist() == pytest.approx(expected[name].tolist())


TREC = "q0 0 d1 1\nq0 0 d12 2\nq40 0 twin1 1\nq40 0 d81 1\nq90 0 d30 1\n"


def test_layouts_are_one(folder, tmp_path):
    expected = read_retrieval(folder)
    assert expected.qrels["q0"] == {"d1": 1, "d12": 2}
    assert list(expected.queries) == ["q0", "q40", "q90"]
    other = tmp_path / "other"
    (other / "qrels").mkdir(parents=True)
    (other / "qrels" / "dev.txt").write_text(TREC)
    records = [{"_id": name, "text": text, "metadata": {}} for name, text in expected.corpus.items()]
    (other / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (other / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in expected.queries.items())
    )
    assert read_retrieval(other, "dev") == expected


def test_titles_stand_before_texts(folder):
    (folder / "corpus.tsv").unlink()
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "A title", "text": "a text"}\n{"_id": "d2", "title": "", "text": "b"}\n'
    )
    assert read_retrieval(folder).corpus == {"d1": "A title a text", "d2": "b"}


def test_judged_documents_that_are_missing_are_told(folder, caplog):
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q90\tgone\t1\n")
    read_retrieval(folder)
    assert "1 judged documents are not in the corpus" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "q0\td1\n", r"test.tsv, line 1: expected query<TAB>document<TAB>relevance or .* got 'q0"),
        ("qrels/test.tsv", "q0 0 d1 1\nq0 0 d2 high\n", "test.tsv, line 2: expected .* the relevance an integer"),
        ("qrels/test.tsv", "\n", "test.tsv, line 1: expected query"),
        ("qrels/test.tsv", "q1 0 d1 1\n", "test.tsv, line 1: expected a query of the queries file, got 'q1'"),
        ("qrels/test.tsv", "q0 0 d1 1\nq0 0 d1 0\n", "line 2: expected each document once a query, got 'd1' again"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv has no judgements"),
        ("corpus.tsv", "d1\ta\nd2\n", "corpus.tsv, line 2: expected id<TAB>text, got 1 column$"),
        ("corpus.tsv", "d1\ta\nd1\tb\n", "corpus.tsv, line 2: expected each id once, got 'd1' again"),
        ("corpus.jsonl.gz", "", "there are .*corpus.jsonl.gz, .*corpus.tsv: keep one"),
    ],
    ids=["columns", "relevance", "blank", "query", "judged_twice", "header", "text", "id_twice", "two_files"],
)
def test_malformed_data(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(EvaluationDataError, match=message):
        read_retrieval(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(EvaluationDataError, match=r"has no qrels/dev.tsv; retrieval data is expected as DIR/corpus"):
        read_retrieval(folder, "dev")
    with pytest.raises(EvaluationDataError, match=r"nowhere has no corpus.jsonl; retrieval data is expected as"):
        read_retrieval(tmp_path / "nowhere")
