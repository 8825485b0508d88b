"""Quality measurements: `evaluate_sts` for semantic textual similarity, and others of the same shape.

Each takes anything with `encode` and a file or folder of data, and returns a `Result`: figures, a dictionary, a table.
`with_intervals` adds bootstrap confidence intervals, `compare` tells how sure the difference of two models is.
"""

from minilm.evaluate.clustering import ClusteringResult, evaluate_clustering
from minilm.evaluate.comparison import Comparison, compare
from minilm.evaluate.files import EvaluationDataError
from minilm.evaluate.pairs import PairResult, evaluate_pairs
from minilm.evaluate.result import Interval, Result
from minilm.evaluate.retrieval import RetrievalResult, evaluate_retrieval
from minilm.evaluate.significance import Difference, with_intervals
from minilm.evaluate.sts import STSResult, STSScore, evaluate_sts
from minilm.evaluate.triplets import TripletResult, evaluate_triplets
from minilm.evaluate.uniformity import UniformityResult, evaluate_uniformity

__all__ = [
    "ClusteringResult",
    "Comparison",
    "Difference",
    "EvaluationDataError",
    "Interval",
    "PairResult",
    "Result",
    "RetrievalResult",
    "STSResult",
    "STSScore",
    "TripletResult",
    "UniformityResult",
    "compare",
    "evaluate_clustering",
    "evaluate_pairs",
    "evaluate_retrieval",
    "evaluate_sts",
    "evaluate_triplets",
    "evaluate_uniformity",
    "with_intervals",
]
