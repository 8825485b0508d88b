"""Pictures are drawn without a browser or a display, show the numbers given, and leave matplotlib as it was."""

import io
import subprocess
import sys

import pytest
import torch

from minilm.internals import capture, plots
from minilm.internals.decomposition import decompose_pair
from minilm.internals.report import explain

mpl = pytest.importorskip("matplotlib", reason="pictures need matplotlib")

A, B = "A man is eating.", "Someone eats lunch."


def png(figure):
    """Return the picture's size in pixels, from its header."""
    figure.savefig(file := io.BytesIO(), format="png")
    data = file.getvalue()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def written(axes):
    return [text.get_text() for text in axes.texts]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_grid_shows_numbers_where_they_belong():
    figure = plots.grid(
        [[0.25, -0.5, 0.0001], [1.0, 0.0, 0.125]], ["first", "second"], ["a", "b", "c"], title="T", unit="u"
    )
    axes = figure.axes[0]
    assert written(axes) == ["+.250", "\N{MINUS SIGN}.500", "0", "+1.000", "0", "+.125"]
    assert (labels(axes.yaxis), labels(axes.xaxis)) == (["first", "second"], ["a", "b", "c"])
    (image,) = axes.images
    assert image.get_clim() == (-1.0, 1.0)  # as far below 0 as above: 0 is without colour
    blue, orange = (image.cmap(image.norm(value)) for value in (-1.0, 1.0))
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    assert min(png(figure)) > 300


def test_many_columns_get_no_numbers():
    names = [f"token{index}" for index in range(40)]
    figure = plots.grid(torch.randn(2, 40), ["a", "b"], names)
    assert written(figure.axes[0]) == []
    assert png(figure)[0] < 3000


def test_attention(encoder):
    captured = capture(encoder, A, "layers.1.attention.pattern")
    pattern = captured["layers.1.attention.pattern"][0][8]
    figure = plots.attention(pattern, captured.tokens[0], title="Layer 1, head 8")
    axes = figure.axes[0]
    assert axes.images[0].get_array().data == pytest.approx(pattern.numpy())
    assert labels(axes.yaxis) == captured.tokens[0]
    assert written(axes) == [f"{100 * weight:.0f}" for weight in pattern.flatten().tolist() if weight >= 0.01]
    png(figure)


def test_heads(encoder):
    found = capture(encoder, A, "layers.*.attention.pattern")
    patterns = torch.stack([found[f"layers.{layer}.attention.pattern"][0] for layer in range(6)])
    figure = plots.heads(patterns)
    assert len(figure.axes) == 72
    assert figure.axes[12 * 3 + 5].images[0].get_array().data == pytest.approx(patterns[3, 5].numpy())
    png(figure)


def test_components_by_layer(encoder):
    shares = decompose_pair(encoder, A, B).shares
    rows, columns, matrix = plots.by_layer(shares)
    assert rows == [f"layer {layer}" for layer in range(6)]
    assert columns == [*(f"head {head}" for head in range(12)), "feed-forward", "biases"]
    assert matrix[5, 10] == pytest.approx(shares["layers.5.attention.heads.10"])
    assert matrix[2, 12] == pytest.approx(shares["layers.2.feed_forward"])
    inputs = sum(value for name, value in shares.items() if name.startswith("embeddings"))
    assert matrix.sum().item() == pytest.approx(sum(shares.values()) - inputs, abs=1e-6)
    figure = plots.components(shares)
    names = labels(figure.axes[1].yaxis)
    assert names[-1] == max(shares, key=lambda name: abs(shares[name]))  # the largest on top
    assert len(names) == 12
    png(figure)


def test_heads_alone_have_no_column_for_others():
    _, columns, matrix = plots.by_layer({"layers.1.attention.heads.1": 2.0, "embeddings.word": 5.0})
    assert columns == ["head 0", "head 1"]
    assert matrix.tolist() == [[0, 0], [0, 2]]


def test_layers():
    figure = plots.layers({"one": [0.5, 0.25], "two": [0.1, -0.2]}, ["embeddings", "layer 0"], unit="cosine")
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.25], [0.1, -0.2]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert written(plots.layers({"": [0.5, 0.25]}, ["embeddings", "layer 0"]).axes[0]) == ["0.50", "0.25"]
    png(figure)


def test_bars():
    figure = plots.bars({"small": 0.1, "large": -0.5, "none": 0.0}, most=2)
    (axes,) = figure.axes
    assert labels(axes.yaxis) == ["small", "large"]
    assert [bar.get_width() for bar in axes.patches] == [0.1, -0.5]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    png(figure)


def test_pictures_of_an_explanation(encoder):
    explanation = explain(encoder, A, B, point="layers.4.output", show_progress_bar=False)
    pictures = explanation.pictures()
    assert list(pictures) == ["tokens", "components", "attention-first", "attention-second", "layers"]
    expected = [plots._signed(value, 3) for value in explanation.attribution.score_by_token.flatten().tolist()]
    assert written(pictures["tokens"].axes[0]) == expected
    assert pictures["layers"].axes[0].lines[0].get_ydata().tolist() == list(explanation.layers.values())


def test_settings_are_left_alone():
    before = dict(mpl.rcParams)
    png(plots.bars({"a": 1.0}))
    assert dict(mpl.rcParams) == before
    code = "import sys, minilm.internals.plots as p; p.bars({'a': 1.0}); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.grid([[1.0, 2.0]], ["a"], ["b"]), r"expected a matrix .*\[1, 1\], got \[1, 2\]"),
        (lambda: plots.attention(torch.ones(2, 3), ["a", "b"]), r"\[2, 2\], got \[2, 3\]"),
        (lambda: plots.heads(torch.ones(12, 3, 3)), r"\[layers, heads, L, L\], got \[12, 3, 3\]"),
        (lambda: plots.layers({"one": [1.0]}, ["a", "b"]), "one has 1 numbers for 2 places"),
        (lambda: plots.bars({}), "got none"),
        (lambda: plots.components({"embeddings.word": 1.0}), "layers.3.attention.heads.5, got embeddings.word"),
    ],
    ids=["grid", "attention", "heads", "layers", "bars", "components"],
)
def test_what_can_not_be_drawn(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "minilm\[plots\]"'):
        plots.bars({"a": 1.0})
