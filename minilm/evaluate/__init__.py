"""Quality measurements: `evaluate_sts` for semantic textual similarity."""

from minilm.evaluate.sts import STSResult, STSScore, evaluate_sts
from minilm.evaluate.sts_data import STSDataError

__all__ = ["STSDataError", "STSResult", "STSScore", "evaluate_sts"]
