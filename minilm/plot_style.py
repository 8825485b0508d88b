"""How every picture of this library looks."""

OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's colours, which all eyes tell apart
THEIRS = ("#8A8F98", "#C3A66B", "#6C8EAD", "#B58FB0", "#9CB38A", "#54585F", "#C98B7B")
INK, MUTED, FAINT, GRID = "#22262B", "#5B6169", "#C9CDD3", "#E8EAED"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Raise `ImportError` where matplotlib is not installed, with how to get it."""
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "minilm[plots]"') from error
