"""Which heads carry semantic textual similarity?

Each of the 72 heads, and each feed-forward, is replaced by its mean over the sentences (mean ablation), one at a time;
what that does to Spearman's correlation with people's scores on pairs of the STS-B development set is its effect. So
that chance is not taken for an effect, the effects on two halves of the pairs are compared.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from minilm.encoder import SentenceEncoder
from minilm.evaluate.correlation import spearman
from minilm.evaluate.sts_data import read_sts
from minilm.internals import plots
from minilm.internals.causal import AblationEffects, ablation_effects
from minilm.internals.studies.result import StudyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 1_500  # all of them, some minutes on two cores; of 100, the two halves' effects hardly agree
MOST = 8  # heads in the table, of those needed most and least


def run(
    encoder: SentenceEncoder,
    *,
    data: str | os.PathLike[str] | None = None,
    pairs: int = PAIRS,
    show_progress_bar: bool | None = None,
) -> StudyResult:
    """Ablate every head and feed-forward on STS-B.

    Args:
        encoder: whose.
        data: the folder of the STS data, or None for the hub's, as `minilm.evaluate` takes it.
        pairs: how many, spread evenly over the development set.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: the data is missing, malformed or out of reach.
        ValueError: fewer than four pairs.
    """
    if pairs < 4:
        raise ValueError(f"two halves that can be compared take at least four pairs, got {pairs}")
    ((subset,),) = (task.values() for task in read_sts(data, ["stsb"], "dev").values())
    chosen = torch.linspace(0, len(subset) - 1, min(pairs, len(subset))).long().tolist()
    first, second, gold = ([column[i] for i in chosen] for column in (subset.first, subset.second, subset.scores))
    effects = ablation_effects(
        encoder, first, second, gold, how="mean", source=[*first, *second], show_progress_bar=show_progress_bar
    )
    parts = [effects, _part(effects, 0), _part(effects, 1)]
    values = {name: [float(part.effects[row]) for part in parts] for row, name in enumerate(effects.components)}
    heads = dict(sorted(((n, v) for n, v in values.items() if ".heads." in n), key=lambda item: item[1][0]))
    others = {name: numbers for name, numbers in values.items() if name not in heads}
    names = list(heads)
    agreement = spearman(*(np.array([numbers[half] for numbers in heads.values()]) for half in (1, 2)))
    findings = [
        f"{effects.measure}, of the whole model: {effects.score:.2f}.",
        f"It needs {_listed(names[:3], heads)} most, and is better without {_listed(names[:-4:-1], heads)}.",
        f"Losing a head changes {np.mean([numbers[0] for numbers in heads.values()]):+.2f} on average, losing the "
        f"feed-forward of a layer {np.mean([numbers[0] for numbers in others.values()]):+.2f}.",
        f"The heads' effects on two halves of the pairs have a rank correlation of {agreement:.2f}.",
    ]

    def pictures() -> dict[str, Figure]:
        effect = {name: numbers[0] for name, numbers in heads.items()}
        return {"heads": plots.components(effect, title="STS-B without this head", unit="change of Spearman x 100")}

    rows = {name: heads[name] for name in (*names[:MOST], *names[-MOST:])} | others
    return StudyResult("Which heads carry STS?", ("effect", "even pairs", "odd pairs"), rows, findings, pictures)


def _listed(names: list[str], values: dict[str, list[float]]) -> str:
    """Return names with their effects."""
    return ", ".join(f"{name} ({values[name][0]:+.2f})" for name in names)


def _part(effects: AblationEffects, start: int) -> AblationEffects:
    """Return the effects on every other pair."""
    gold = None if effects.gold is None else effects.gold[start::2]
    return AblationEffects(
        effects.components, effects.how, effects.intact[start::2], effects.ablated[:, start::2], gold
    )
