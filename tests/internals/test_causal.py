"""Ablating everything in one call gives what ablating one component at a time gives."""

import pytest
import torch
from scipy.stats import spearmanr

import minilm
from minilm.evaluate import evaluate_sts
from minilm.internals import UnknownPointError, ablate, patch
from minilm.internals import replay as replay_module
from minilm.internals.captures import pack
from minilm.internals.causal import AblationEffects, Component, ablation_effects, components
from minilm.internals.replay import Replay, repeated

FIRST, SECOND = "The old man sleeps in the garden.", "A dog runs over the green field, barking."
SOURCES = {"zero": None, "mean": ["Rain fell all night.", "Who are you?"], "resample": "Rain fell all night."}
LIMIT = 1e-6


def cosines(encoder, first, second):
    a, b = torch.from_numpy(encoder.encode([*first, *second])).double().split(len(first))
    return torch.cosine_similarity(a, b, dim=-1).tolist()


def cosine(encoder, first, second):
    return cosines(encoder, [first], [second])[0]


def ablated(encoder, component, how="zero"):
    """One component, by the means that are tested elsewhere."""
    return ablate(encoder, component.point, how, source=SOURCES[how], head=component.head)


# Components.


def test_components(encoder):
    found = [component.name for component in components(encoder.config)]
    assert len(found) == 78
    assert found[:2] == ["layers.0.attention.heads.0", "layers.0.attention.heads.1"]
    assert found[12:14] == ["layers.0.feed_forward", "layers.1.attention.heads.0"]
    assert components(encoder.config, ["layers.5.feed_forward", "layers.1.attention.heads.1*"]) == [
        Component(1, 1),
        Component(1, 10),
        Component(1, 11),
        Component(5, None),
    ]
    with pytest.raises(UnknownPointError, match=r"'layers.1.feedforward'; did you mean layers.1.feed_forward"):
        components(encoder.config, ["*", "layers.1.feedforward"])
    with pytest.raises(UnknownPointError, match=r"'q'; did you mean layers.3.attention.heads.5\?"):
        components(encoder.config, "q")


# A pair.


@pytest.mark.parametrize("how", SOURCES)
def test_a_pair_against_one_at_a_time(encoder, how):
    names = "*" if how == "zero" else ["layers.3.**", "**.heads.11"]
    effects = ablation_effects(encoder, FIRST, SECOND, how=how, source=SOURCES[how], names=names)
    intact = cosine(encoder, FIRST, SECOND)
    assert effects.score == pytest.approx(intact, abs=LIMIT)
    assert effects.how == how
    for name, component, effect in zip(
        effects.components, components(encoder.config, names), effects.effects, strict=True
    ):
        with ablated(encoder, component, how):
            expected = cosine(encoder, FIRST, SECOND) - intact
        assert name == component.name
        assert float(effect) == pytest.approx(expected, abs=LIMIT), name
    assert effects.effects.abs().max() > 0.01


def test_ranked_and_laid_out(encoder):
    effects = ablation_effects(encoder, FIRST, SECOND, names=["layers.0.**", "layers.5.feed_forward"])
    ranked = effects.ranked()
    assert sorted(name for name, _ in ranked) == sorted(effects.components)
    assert [abs(effect) for _, effect in ranked] == sorted(effects.effects.abs().tolist(), reverse=True)
    name, effect = ranked[0]
    lines = effects.table(most=3).splitlines()
    assert lines[0] == f"cosine: {effects.score:.4f}"
    assert lines[2].split() == ["zero", "ablation", "of", "score", "effect"]
    assert lines[3].split() == [name, f"{effects.score + effect:.4f}", f"{effect:+.4f}"]
    assert len(lines) == 6


# Many pairs.

TEXTS = ["", "a", FIRST, "one " * 60, SECOND, "A man.", FIRST, "Two dogs.", "It rains, and rains, and rains.", "b c"]
OTHERS = [SECOND, "a", "", "A woman.", "one " * 126, "A man.", "Who?", "Dogs", "It is raining.", FIRST]
GOLD = [0.0, 5.0, 0.5, 1.0, 1.5, 5.0, 0.0, 4.0, 4.5, 1.0]
SOME = ["layers.[024].attention.heads.7", "layers.2.attention.heads.1*", "layers.[25].feed_forward"]


@pytest.mark.parametrize(("how", "tokens"), [("zero", 700), ("mean", 4096), ("resample", 1)])
def test_many_pairs_against_one_at_a_time(encoder, monkeypatch, how, tokens):
    """In batches of several pairs, of all, and of one each; the pairs stay in their order."""
    monkeypatch.setattr("minilm.internals.causal.TOKENS_AT_ONCE", tokens)
    effects = ablation_effects(encoder, TEXTS, OTHERS, how=how, source=SOURCES[how], names=SOME)
    chosen = components(encoder.config, SOME)
    assert effects.components == tuple(component.name for component in chosen)
    assert effects.intact.tolist() == pytest.approx(cosines(encoder, TEXTS, OTHERS), abs=LIMIT)
    for component, row in zip(chosen, effects.ablated, strict=True):
        with ablated(encoder, component, how):
            assert row.tolist() == pytest.approx(cosines(encoder, TEXTS, OTHERS), abs=LIMIT), component.name
    assert effects.effects[0] == pytest.approx(float(effects.ablated[0].mean() - effects.intact.mean()))
    assert effects.measure == "mean cosine of 10 pairs"


def test_with_peoples_scores(encoder):
    """Effects on Spearman's correlation, by scipy."""
    effects = ablation_effects(encoder, TEXTS, OTHERS, GOLD, names=SOME)
    assert effects.measure == "Spearman x 100 of 10 pairs"
    intact = spearmanr(effects.intact.round(decimals=7), GOLD).statistic
    assert effects.score == pytest.approx(100 * intact)
    for row, effect in zip(effects.ablated, effects.effects, strict=True):
        expected = spearmanr(row.round(decimals=7), GOLD).statistic - intact
        assert float(effect) == pytest.approx(100 * expected, abs=1e-9)
    assert effects.effects.abs().max() > 1


def test_on_sts_as_evaluated(encoder, sts_folder, tmp_path):
    """STS-B pairs, against the whole evaluation run with a component ablated."""
    lines = (sts_folder / "stsb" / "dev.tsv").read_text(encoding="utf-8").splitlines()[::50]
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scores, first, second = zip(*(line.split("\t") for line in lines), strict=True)
    names = ["layers.0.feed_forward", "layers.1.attention.heads.3", "layers.5.attention.heads.0"]
    effects = ablation_effects(encoder, first, second, list(map(float, scores)), names=names)
    assert len(lines) == 30

    def evaluated():
        return evaluate_sts(encoder, tmp_path, tasks=["stsb"], split="dev").average

    # Cosines of two runs differ in their last bits, so that two pairs may change ranks: 0.04 of 100 here.
    assert effects.score == pytest.approx(evaluated(), abs=0.05)
    for component, effect in zip(components(encoder.config, names), effects.effects, strict=True):
        with ablated(encoder, component):
            assert effects.score + effect == pytest.approx(evaluated(), abs=0.05)
    assert effects.effects.abs().max() > 0.2


# The model as it is: patched, pooled otherwise, restored.


def test_within_a_patch(encoder):
    with patch(encoder, "layers.2.feed_forward.output", lambda x: 0.5 * x):
        effects = ablation_effects(encoder, FIRST, SECOND, names="layers.[14].**")
        intact = cosine(encoder, FIRST, SECOND)
        assert effects.score == pytest.approx(intact, abs=LIMIT)
        for component, effect in zip(components(encoder.config, "layers.[14].**"), effects.effects, strict=True):
            with ablated(encoder, component):
                assert float(effect) == pytest.approx(cosine(encoder, FIRST, SECOND) - intact, abs=LIMIT)
    assert effects.score != pytest.approx(cosine(encoder, FIRST, SECOND), abs=1e-3)


@pytest.mark.parametrize(
    ("pooling", "first"),
    [
        ("cls", "embeddings"),
        ("avg_top2", "embeddings"),
        ("avg_first_last", "embeddings"),
        ("avg_first_last", "first_layer"),
    ],
)
def test_with_every_pooling(canonical_folder, pooling, first):
    encoder = minilm.load(canonical_folder, device="cpu", pooling=pooling, first_hidden_state=first, normalize=False)
    names = ["layers.0.attention.heads.3", "layers.1.feed_forward", "layers.5.feed_forward"]
    effects = ablation_effects(encoder, FIRST, SECOND, names=names)
    intact = cosine(encoder, FIRST, SECOND)
    for component, effect in zip(components(encoder.config, names), effects.effects, strict=True):
        with ablated(encoder, component):
            assert float(effect) == pytest.approx(cosine(encoder, FIRST, SECOND) - intact, abs=LIMIT)


WRONG = {
    "more texts on one side": ((TEXTS, OTHERS[1:]), {}, "as many second texts as first, one at least; got 10 and 9"),
    "no texts": (([], []), {}, "got 0 and 0"),
    "a score too few": ((TEXTS, OTHERS, GOLD[1:]), {}, r"a score for each of 10 pairs, got \[9\]"),
    "one score": ((FIRST, SECOND, [1.0]), {}, "at least two pairs of different scores; leave gold out"),
    "unknown way": ((FIRST, SECOND), {"how": "remove"}, "one of zero, mean, resample; got 'remove'"),
    "a source for nothing": ((FIRST, SECOND), {"source": FIRST}, "zero ablation takes no source"),
    "no source": ((FIRST, SECOND), {"how": "mean"}, "mean ablation takes source texts, got none"),
    "sources": ((FIRST, SECOND), {"how": "resample", "source": TEXTS[:2]}, "takes one source text, got 2"),
    "too long": ((FIRST, "one " * 127), {}, "text 1 has 129 tokens, more than the limit of 128"),
    "unknown component": ((FIRST, SECOND), {"names": "layers.6.*"}, "no component is called 'layers.6"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_leaves_the_model_as_it_was(encoder, arguments, options, message):
    before, backend = encoder.encode(FIRST), encoder.model.backend
    with pytest.raises(ValueError, match=message):
        ablation_effects(encoder, *arguments, **options)
    assert encoder.model.backend is backend
    assert (encoder.encode(FIRST) == before).all()


def test_a_progress_bar(encoder, capsys):
    ablation_effects(encoder, TEXTS[:3], OTHERS[:3], names="layers.5.feed_forward", show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    ablation_effects(encoder, TEXTS[:3], OTHERS[:3], names="layers.5.feed_forward", show_progress_bar=False)
    assert capsys.readouterr().err == ""


# What it is made of.


def test_copies_are_what_they_copy(encoder):
    (batch,) = pack(encoder, [FIRST, "", SECOND])
    copies = repeated(batch, 3)
    assert copies.lengths == batch.lengths * 3
    assert (copies.ids == batch.ids.repeat(3)).all()
    assert (copies.positions == batch.positions.repeat(3)).all()
    expected = minilm.PackedBatch.from_sequences([encoder.tokenizer(text).ids for text in [FIRST, "", SECOND] * 3])
    assert (copies.cu_seqlens == expected.cu_seqlens).all()
    assert copies.cu_seqlens.dtype == expected.cu_seqlens.dtype


@pytest.mark.parametrize("layer", [-1, 0, 3, 6])
def test_a_replay_of_what_is_unchanged_is_the_same(encoder, layer):
    (batch,) = pack(encoder, [FIRST, "", SECOND])
    vectors = Replay(encoder, batch)(2, {}, layer)
    expected = torch.from_numpy(encoder.encode([FIRST, "", SECOND]))
    assert vectors.shape == (2, 3, 384)
    assert (vectors - expected).abs().max() < 1e-6
    assert not vectors.requires_grad


def test_layers_below_are_not_computed_again(encoder, monkeypatch):
    """The point of it: of 6 layers x 78 copies, 273."""
    computed = []
    monkeypatch.setattr(
        replay_module.Replay,
        "__call__",
        lambda self, copies, visitors, layer=-1, original=Replay.__call__: (
            computed.append(copies * (6 - max(layer, 0))),
            original(self, copies, visitors, layer),
        )[1],
    )
    effects = ablation_effects(encoder, FIRST, SECOND)
    assert isinstance(effects, AblationEffects)
    assert sum(computed) == 13 * (6 + 5 + 4 + 3 + 2 + 1)
