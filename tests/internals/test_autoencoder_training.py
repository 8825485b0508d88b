"""Training sparse autoencoders: planted features are found, dead ones brought back, and real activations explained."""

import pytest
import torch

from minilm.internals import autoencoder_training as module
from minilm.internals import capture
from minilm.internals.autoencoder import SparseAutoencoder, reconstruction_effect, reconstruction_quality
from minilm.internals.autoencoder_training import TrainingOptions, fit, train_autoencoder


@pytest.fixture(scope="module")
def planted():
    """48 directions in 32 dimensions, and 20,000 sums of few of them about a mean that is not 0."""
    generator = torch.Generator().manual_seed(99)  # not a seed that an autoencoder below starts from
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1)
    strengths = (torch.rand(20_000, 48, generator=generator) < 0.05) * (
        0.5 + torch.rand(20_000, 48, generator=generator)
    )
    return directions, 3 * strengths @ directions + torch.randn(32, generator=generator)


def trained(rows, top_k, seed=0, epochs=4, features=64, start=None, **options):
    chosen = TrainingOptions(batch_size=256, learning_rate=5e-3, seed=seed, **options)
    made = SparseAutoencoder("pooled", rows.shape[1], features, top_k, seed)
    if start is not None:
        start(made)
    return fit(made, [rows] * epochs, epochs * -(-len(rows) // 256), chosen, show_progress_bar=False)


@pytest.mark.parametrize(("top_k", "l1"), [(4, 0.0), (None, 0.7)])
def test_planted_features_are_found(planted, top_k, l1):
    directions, rows = planted
    made = trained(rows, top_k, l1=l1, epochs=12)
    nearest = (directions @ made.decoder_weight.T).max(dim=1).values
    assert (nearest > 0.95).sum() >= 46
    torch.testing.assert_close(made.decoder_weight.norm(dim=1), torch.ones(64))
    untrained = SparseAutoencoder("pooled", 32, 64, top_k)
    assert ((directions @ untrained.decoder_weight.T).max(dim=1).values > 0.95).sum() < 5
    error = (rows - made(rows)).square().sum() / (rows - rows.mean(dim=0)).square().sum()
    assert error < 0.15


def test_a_larger_penalty_is_sparser(planted):
    rows = planted[1][:5000]
    few, many = (trained(rows, None, l1=l1, epochs=8).features(rows).gt(0).sum(dim=1).float().mean() for l1 in (4, 0.2))
    assert few < many / 2


def never_above_0(made):
    made.encoder_bias.data[:32] = -1e3


def never_among_the_largest(made):
    made.encoder_weight.data[:32] *= 0.01


@pytest.mark.parametrize(
    ("top_k", "start", "remedy", "without"),
    [(None, never_above_0, "RESAMPLINGS", 0), (2, never_among_the_largest, "DEAD_AFTER_STEPS", 10**9)],
    ids=["L1", "top-k"],
)
def test_dead_features_come_back(planted, monkeypatch, top_k, start, remedy, without):
    rows = planted[1]

    def living():
        made = trained(rows, top_k, l1=1.0, epochs=6, start=start)
        return int((made.features(rows)[:, :32] > 0).any(dim=0).sum())

    assert living() >= 12
    monkeypatch.setattr(module, remedy, without)
    assert living() == 0


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_seed_decides(planted, top_k):
    rows = planted[1][:3000]
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (trained(rows, top_k, seed=seed, l1=1.0).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder_weight"], other["decoder_weight"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def sts(tmp_path_factory, sts_folder):
    """The first 100 pairs of STS-B's dev set, as a folder."""
    lines = (sts_folder / "stsb" / "dev.tsv").read_text(encoding="utf-8").splitlines()[:100]
    folder = tmp_path_factory.mktemp("sts")
    (folder / "stsb").mkdir()
    (folder / "stsb" / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_real_activations(encoder, own_sentences, sts):
    """A hundred sentences teach it to explain more, and to keep more of STS, than directions at random do."""
    options = TrainingOptions(epochs=20, batch_size=128)
    with torch.inference_mode():
        made = train_autoencoder(encoder, own_sentences, "layers.4.output", 256, 16, options)
    random = SparseAutoencoder("layers.4.output", 384, 256, 16)
    for name in ("mean", "scale", "pre_bias"):
        getattr(random, name).data.copy_(getattr(made, name))
    ours, theirs = (reconstruction_quality(encoder, which, own_sentences) for which in (made, random))
    assert ours.explained_variance > 0.5 > 0.2 > theirs.explained_variance
    assert ours.l0 <= 16
    kept, left = (reconstruction_effect(encoder, which, sts, split="dev").recovered for which in (made, random))
    assert kept > left + 0.03


def test_all_rows_are_taken_in_blocks_that_fit(encoder, own_sentences, monkeypatch):
    texts, point, taken = own_sentences[:30], "layers.0.output", []

    def record(autoencoder, blocks, num_steps, options, **_):
        taken.extend(blocks)
        assert num_steps == sum(-(-len(block) // options.batch_size) for block in taken)
        return autoencoder

    monkeypatch.setattr(module, "fit", record)
    train_autoencoder(encoder, [*texts, texts[0]], point, options=TrainingOptions(epochs=2), buffer_rows=100)
    assert len(taken) > 4
    assert max(map(len, taken)) <= 100
    rows, expected = torch.cat(taken), capture(encoder, texts, point)[point].packed
    assert len(rows) == 2 * len(expected)
    torch.testing.assert_close(rows.sum(dim=0), 2 * expected.sum(dim=0), rtol=0, atol=1e-3)
    first = [*taken]
    taken.clear()
    train_autoencoder(encoder, texts, point, options=TrainingOptions(epochs=2), buffer_rows=100)
    assert all(torch.equal(a, b) for a, b in zip(first, taken, strict=True))
    taken.clear()
    train_autoencoder(encoder, texts, "embedding", options=TrainingOptions(epochs=3))
    assert [tuple(block.shape) for block in taken] == [(30, 384)] * 3
    assert taken[0] is taken[1]  # captured once


def test_width_by_default(encoder, texts):
    made = train_autoencoder(encoder, texts, "layers.1.feed_forward.activation", top_k=4)
    assert (made.width, made.num_features) == (1536, 12288)


def test_bad_input(encoder, texts):
    with pytest.raises(ValueError, match="nothing to learn"):
        train_autoencoder(encoder, texts, "embeddings.token_type", 8)
    with pytest.raises(ValueError, match="choose another point"):
        train_autoencoder(encoder, texts, "layers.0.attention.scores")
    with pytest.raises(ValueError, match="means 6"):
        train_autoencoder(encoder, texts, "layers.*.attention_norm")
    with pytest.raises(ValueError, match="all else above 0"):
        TrainingOptions(batch_size=0)
    with pytest.raises(ValueError, match="at least one text"):
        train_autoencoder(encoder, [], "embedding")
