"""The page, clicked through in a headless Chromium: it shows what was computed, to everyone, and fetches nothing."""

import base64
import itertools
import json
import re

import pytest
import torch

from minilm.internals.report import explain

A, B = "A man is eating his sandwich, unhurriedly.", "Someone eats lunch outside."
HOSTILE = (
    '</script><script>document.title="taken"</script><img src=x onerror=alert(1)> {{data}} <!-- \u2028 & &amp; "\'\\'
)
CELLS = """[...document.querySelectorAll("#TABLE tbody tr")]
  .map((row) => [...row.children].map((cell) => cell.textContent))"""


@pytest.fixture(scope="module")
def explanation(encoder):
    return explain(encoder, A, B, point="layers.3.output", show_progress_bar=False)


@pytest.fixture(scope="module")
def page(explanation, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(explanation.page(), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, page):
    """The page, just opened; in the end nothing may have gone wrong, and nothing but the file been asked for."""
    browser.open(page)
    yield browser
    assert browser.complaints() == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [f"file://{page}"]


def number(text):
    """Read a number as the page writes it."""
    return float(text.replace("\u2212", "-"))


# What is explained.


def test_the_parts_are_those_of_the_analyses(encoder, explanation):
    assert explanation.texts == (A, B)
    assert explanation.score == pytest.approx(float(encoder.similarity(*encoder.encode([A, B]))), abs=1e-6)
    assert list(explanation.layers) == ["embeddings", *(f"layer {k}" for k in range(6))]
    assert explanation.layers["layer 5"] == pytest.approx(explanation.score, abs=1e-6)
    assert len(explanation.components) == 106
    assert sum(explanation.components.values()) == pytest.approx(explanation.score, abs=1e-6)
    assert [pattern.shape for pattern in explanation.patterns] == [(6, 12, len(t), len(t)) for t in explanation.tokens]
    assert all((pattern.sum(dim=-1) - 1).abs().max() < 1e-5 for pattern in explanation.patterns)


def test_table(explanation):
    heading, *lines = explanation.table().splitlines()
    assert heading == f"cosine {explanation.score:.4f}"
    strongest = explanation.attribution.score_by_token.abs().max().item()
    assert re.fullmatch(rf" +\+{strongest:.4f}  sandwich x lunch", lines[2])
    assert [line.split()[-1] for line in lines[-7:-1]] == ["embeddings", *"01234"]


# The file.


def test_the_file_is_whole(page):
    text = page.read_text(encoding="utf-8")
    assert len(text) < 200_000
    links = re.findall(r"""(?:src|href|action)=["']?([^"'> ]+)|url\(([^)]*)|@import|(https?:[^"'\s]+)""", text)
    assert {next(filter(None, link)) for link in links} == {"#tokens", "http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_two_long_sentences_stay_small(explanation, monkeypatch):
    long = torch.rand(6, 12, 64, 64)
    monkeypatch.setitem(explanation.__dict__, "patterns", (long, long))
    assert len(explanation.page()) < 1_500_000


def test_attention_is_kept_to_a_255th(explanation):
    (data,) = re.findall(r'id="data">(.*)</script>', explanation.page())
    for pattern, kept in zip(explanation.patterns, json.loads(data)["attention"]["patterns"], strict=True):
        read = torch.frombuffer(bytearray(base64.b64decode(kept)), dtype=torch.uint8).view(pattern.shape) / 255
        assert (read - pattern).abs().max() <= 0.5 / 255 + 1e-6


def test_texts_are_never_html(browser, encoder, tmp_path):
    explanation = explain(encoder, HOSTILE, B, point="layers.4.output", show_progress_bar=False)
    (path := tmp_path / "hostile.html").write_text(explanation.page(), encoding="utf-8")
    browser.open(path)
    assert browser.complaints() == []
    assert browser.run("document.images.length + document.scripts.length") == 2  # the data and the page's own
    assert HOSTILE in browser.run("document.title")
    assert HOSTILE in browser.attributes("#sentence-switch label", "title")


def test_the_policy_keeps_others_out(browser, page, tmp_path):
    """A script that came in nevertheless would not run, and nothing could be fetched."""
    intruder = "<script>window.intruded = true</script><img src='http://127.0.0.1:9/x.png'></main>"
    (path := tmp_path / "intruded.html").write_text(page.read_text(encoding="utf-8").replace("</main>", intruder))
    browser.open(path)
    assert browser.run("window.intruded") is None
    assert len(browser.complaints()) == 2
    assert browser.text("#score") == f"{explain_score(page):.4f}"


def explain_score(page):
    (data,) = re.findall(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))
    return json.loads(data)["score"]


# What the page shows, and what it does.


def test_heat_map_shows_the_attribution(opened, explanation):
    expected = explanation.attribution.score_by_token
    rows = opened.run(CELLS.replace("TABLE", "pair-table"))
    assert [row[0].split(" (")[0] for row in rows] == explanation.tokens[0]
    shown = torch.tensor([[number(cell) for cell in row[1:]] for row in rows])
    assert (shown - expected).abs().max() <= 0.0005 + 1e-6
    assert [name.split(" (")[0] for name in opened.texts("#pair-table thead th")] == explanation.tokens[1]
    assert f"{explanation.score:.4f}" in opened.text("#pair-facts")


def test_a_token_shows_what_it_shares(opened, explanation):
    pairs, (first, second) = explanation.attribution.score_by_token, explanation.tokens
    row = first.index("sandwich")
    chips = "#sentences .sentence:nth-child(2) .token small"
    before = opened.texts(chips)
    assert [number(value) for value in before] == pytest.approx(pairs.sum(dim=0).tolist(), abs=0.00051)
    opened.click(f"#sentences .sentence:nth-child(1) .token:nth-child({row + 1})")
    opened.click("#pair-heading")  # the mouse goes elsewhere: it stays chosen
    assert [number(value) for value in opened.texts(chips)] == pytest.approx(pairs[row].tolist(), abs=0.00051)
    readout = opened.text("#pair-readout")
    assert readout.startswith(f"sandwich adds +{pairs[row].sum():.3f} to ")
    assert f"most with {second[pairs[row].argmax()]}" in readout
    assert opened.attributes(".token[aria-pressed=true]", "class") == ["token"]
    opened.click(f"#sentences .sentence:nth-child(1) .token:nth-child({row + 1})")
    opened.click("#pair-heading")
    assert opened.texts(chips) == before


def test_components_lead_to_attention(opened, explanation):
    rows = opened.run(CELLS.replace("TABLE", "component-table"))
    assert len(rows) == 7
    for layer, row in enumerate(rows[1:]):
        values = explanation.components
        heads = [values[f"layers.{layer}.attention.heads.{head}"] for head in range(12)]
        whole = sum(value for name, value in values.items() if name.startswith(f"layers.{layer}."))
        expected = [*heads, values[f"layers.{layer}.feed_forward"]]
        assert [number(cell) for cell in row[1:14]] == pytest.approx(expected, abs=0.00051)
        assert number(row[15]) == pytest.approx(whole, abs=0.00051)
    opened.click("#component-table tbody tr:nth-child(3) td:nth-child(8) button")
    assert opened.text("#head-heading") == "Layer 1, head 6"


def test_every_head_can_be_chosen_and_read(opened, explanation):
    assert len(opened.attributes(".thumb", "aria-label")) == 72
    pixels = "(c) => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert min(opened.run(f"[...document.querySelectorAll('.thumb canvas')].map({pixels})")) > 4  # none is blank
    own = explanation.tokens[0]
    for layer, head, token in ((0, 2, 3), (5, 10, 1), (3, 0, 0)):
        opened.click(f".layer:nth-child({layer + 2}) .thumb:nth-child({head + 2})")
        assert opened.text("#head-heading") == f"Layer {layer}, head {head}"
        assert opened.attributes(".thumb[aria-selected=true]", "aria-label")[0].startswith(
            f"Layer {layer}, head {head}:"
        )
        opened.click(f"#lines ol:first-child li:nth-child({token + 1}) button")
        weights = explanation.patterns[0][layer, head, token]
        shown = [0.5 if "<" in text else number(text.split("\u00a0")[0]) for text in opened.texts("#lines .to small")]
        assert shown == pytest.approx((100 * weights).tolist(), abs=0.75)
        assert opened.text("#head-readout").startswith(f"{own[token]} looks at {own[weights.argmax()]}")
        assert set(opened.attributes("#lines path:not([style*=none])", "data-from")) == {str(token)}


def test_the_head_as_a_table(opened, explanation):
    opened.click("#head-details summary")
    label = opened.text("#head-heading")
    layer, head = map(int, re.findall(r"\d+", label))
    rows = opened.run(CELLS.replace("TABLE", "head-table"))
    assert (
        torch.tensor([list(map(int, row[1:])) for row in rows]) - 100 * explanation.patterns[0][layer, head]
    ).abs().max() <= 0.75
    assert label in opened.text("#head-table caption")


def test_the_other_sentence(opened, explanation):
    opened.click("#sentence-switch label:nth-of-type(2)")
    assert opened.texts("#lines .to span:first-child") == explanation.tokens[1]
    assert opened.run("document.querySelector('.thumb canvas').width") == len(explanation.tokens[1])


def test_layers(opened, explanation):
    values = [number(value) for value in opened.texts("#layers-table tbody td")]
    assert values == pytest.approx(list(explanation.layers.values()), abs=5.1e-5)
    assert opened.texts("#layers-table tbody th") == list(explanation.layers)
    assert "layer 3" in opened.attributes("#layers-chart svg", "aria-label")[0]


# For everyone.


def test_by_keyboard_alone(opened, explanation):
    def focused():
        return opened.run(
            "document.activeElement.textContent || document.activeElement.ariaLabel || document.activeElement.id"
        )

    def visible():
        return opened.run("getComputedStyle(document.activeElement).outlineStyle")

    opened.press("Tab")
    assert focused() == "Skip to the sentences"
    opened.press("Tab", "Tab")  # past the colours, one stop
    assert focused().startswith("[CLS]")
    opened.press("ArrowRight", "ArrowRight", "Enter")
    assert opened.run("document.activeElement.ariaPressed") == "true"
    assert visible() == "solid"
    assert opened.text("#pair-readout").startswith("man adds")
    opened.press("Tab", "Tab", "Tab")  # the other sentence, the table's frame, its cells
    opened.press("ArrowDown", "ArrowRight")
    assert opened.text("#pair-here").startswith("a \N{MULTIPLICATION SIGN} someone")
    opened.run("document.querySelector('.thumb[tabindex=\"0\"]').focus()")
    opened.press("Home", "ArrowDown", "ArrowDown", "ArrowRight", "Enter")
    assert opened.text("#head-heading") == "Layer 2, head 1"
    assert visible() == "solid"
    assert opened.run("document.querySelectorAll('.thumb[tabindex=\"0\"]').length") == 1
    opened.press("Tab")
    opened.press("ArrowDown", "Enter")
    assert opened.text("#head-readout").startswith(f"{explanation.tokens[0][1]}")


def test_screen_readers_are_told(opened):
    nodes = [node for node in opened("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    wanted = (
        "button",
        "radio",
        "gridcell",
        "image",
        "table",
        "grid",
        "heading",
        "group",
        "region",
        "columnheader",
        "rowheader",
    )
    assert not [(role, name) for role, name in named if role in wanted and not name]
    roles = [role for role, _ in named]
    assert roles.count("table") == 3
    assert roles.count("gridcell") == 72
    assert roles.count("status") == 3
    headings = opened.run("[...document.querySelectorAll('h1, h2, h3')].map((heading) => +heading.tagName[1])")
    assert headings[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
    assert opened.run("document.documentElement.lang") == "en"


CONTRAST = """(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((total, c, index) => total + c * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, noscript") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(rgba(ink)), luminance(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.tagName + " " + element.textContent]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 5).concat([[found.length, "texts"]]);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_on_its_colour(browser, page, scheme):
    """At least 4.5, which WCAG 2.2 asks for (1.4.3); also of what has been chosen."""
    browser.open(page, scheme)
    browser.click("#lines ol:first-child li:nth-child(3) button")
    *worst, (count, _) = browser.run(CONTRAST)
    assert count > 200
    assert worst[0][0] >= 4.5, worst


def test_light_and_dark_can_be_chosen(browser, page):
    colours = {}
    for scheme in ("light", "dark"):
        browser.open(page, scheme)
        background = "getComputedStyle(document.body).backgroundColor"
        pixel = "document.querySelector('.thumb canvas').getContext('2d').getImageData(0, 0, 1, 1).data.join()"
        colours[scheme] = (browser.run(background), browser.run(pixel))
        other = {"light": 3, "dark": 2}[scheme]
        browser.click(f"#theme label:nth-of-type({other})")
        colours[f"from {scheme}"] = (browser.run(background), browser.run(pixel))
    assert colours["from dark"] == colours["light"] != colours["from light"] == colours["dark"]


@pytest.mark.parametrize("width", [320, 768])
def test_narrow_screens_scroll_one_way(browser, page, width):
    browser.open(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_print(opened):
    opened("Emulation.setEmulatedMedia", media="print")
    opened("Emulation.setDeviceMetricsOverride", width=700, height=1000, deviceScaleFactor=1, mobile=False)
    cut = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.id)"
    assert opened.run(cut) == []  # paper has no scroll bars
    printed = base64.b64decode(opened("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 6


# What can't be explained.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("word " * 200, B), "tokens"),
        ((A, 7), "text"),
        ((A, B, "euclidean"), "metric must be cosine or dot"),
        ((A, B, "cosine", "layers.9.output"), "layers"),
    ],
    ids=["too long", "no text", "metric", "point"],
)
def test_bad_input(encoder, arguments, message):
    options = dict(zip(("metric", "point"), arguments[2:], strict=False))
    with pytest.raises((TypeError, ValueError), match=message):
        explain(encoder, *arguments[:2], **options)
