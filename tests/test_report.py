"""Reports of an evaluation: as data, which of them compare, and as an HTML page."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from varkit.metrics.report import Curve, PerClass, Report, Result, Score, differences, join, number

PROTOCOL = {
    "name": "adm",
    "summary": "The recipe of the ADM evaluator.",
    "resize": "tf1-bilinear",
    "frechet": {"ddof": 1, "mean_dtype": "float32"},
    "metrics": ["frechet", "precision", "recall"],
    "clip": None,
    "interval": {"level": 0.95, "resamples": 1000, "seed": 0},
}
NETWORKS = {"inception": {"what": "InceptionV3 of 2015-12-05", "hash": "6726825d0af5"}}
REFERENCE = {"source": "reference.npz", "kind": "images", "num": 50000, "hash": "b3f1c9d2"}


def scores(fid: float, precision: float = 0.8, recall: float = 0.6) -> list[Score]:
    return [
        Score("frechet", "FID", fid, fid - 0.04, fid + 0.04, "lower", "50,000 against 50,000; covariance over N - 1"),
        Score("precision", "precision", precision, precision - 0.01, precision + 0.01, "higher", "k = 3, on the ball"),
        Score("recall", "recall", recall, None, None, "higher", "k = 3, on the ball"),
        Score("neighbours", "nearest neighbour", 1.02, better="", how="median of ratios"),
    ]


def report_of(*results: Result, **changes: Any) -> Report:
    parts: dict[str, Any] = {"protocol": PROTOCOL, "networks": NETWORKS, "reference": REFERENCE}
    environment = {"date": "2025-01-02", "device": "cpu"}
    return Report(**copy.deepcopy(parts | {"environment": environment} | changes), results=list(results))


def rich(name: str = "model", fid: float = 3.551) -> Result:
    return Result(
        name,
        f"{name}.npz",
        50000,
        (256, 256),
        {"guidance_scale": 1.5, "top_k": None},
        scores(fid),
        [Curve("FID against samples", "samples", [5000.0, 50000.0], [fid + 2, fid], fid - 0.2)],
        PerClass("Accuracy", ["cat", "dog", "owl"], [0.5, math.nan, 0.75], [4, 0, 8]),
        {"codebook by scale": [{"grid": "1x1", "used": 7, "perplexity": 6.54321}]},
        {"Contact sheet": Image.new("RGB", (8, 6), "red")},
    )


# As data


def test_a_report_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    report = report_of(rich(), warnings=["too few"])
    report.write(tmp_path / "new" / "report.json")
    back = Report.read(tmp_path / "new" / "report.json")
    assert back.to_dict() == report.to_dict() and back.fingerprint == report.fingerprint
    assert back.results[0].size == (256, 256) and back.results[0].pictures == {}
    assert back.results[0].scores == report.results[0].scores and back.results[0].curves == report.results[0].curves
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.json"]  # no part of a file stays


def test_what_is_no_number_is_null_in_json_and_what_has_no_end_a_word(tmp_path: Path) -> None:
    result = rich(fid=math.nan)
    result.scores.append(Score("psnr", "PSNR", math.inf))
    result.curves = [Curve("PSNR", "tokens", [1.0, 2.0], [math.nan, math.inf])]
    report = report_of(result)
    report.write(tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["results"][0]["scores"][0]["value"] is None and data["results"][0]["scores"][-1]["value"] == "inf"
    back = Report.read(tmp_path / "report.json")
    assert math.isnan(back.results[0].score("frechet").value) and back.results[0].score("psnr").value == math.inf
    assert math.isnan(back.results[0].curves[0].values[0]) and back.results[0].curves[0].values[1] == math.inf
    assert back.results[0].per_class is not None and math.isnan(back.results[0].per_class.values[1])
    assert back.to_dict() == report.to_dict()


FOREIGN = {
    "damaged": '{"format": 1, "results": [',
    "of something else": '{"loss": 1.0}',
    "of a later format": '{"format": 1000}',
    "a list": "[1, 2]",
    "without results": '{"format": 1}',
    "with half a score": '{"format": 1, "results": [{"scores": [{"value": 1}], "curves": [], "size": []}]}',
    "without a protocol": '{"format": 1, "results": []}',
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_report_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json: ."):
        Report.read(tmp_path / "odd.json")


def test_a_file_that_is_no_text_is_refused_by_name_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"odd\.json"):
        Report.read(tmp_path / "odd.json")
    with pytest.raises(FileNotFoundError):
        Report.read(tmp_path / "none.json")


CHANGES: dict[str, Callable[[Report], None]] = {
    "protocol.resize": lambda r: r.protocol.update(resize="bicubic"),
    "protocol.frechet.ddof": lambda r: r.protocol["frechet"].update(ddof=0),
    "protocol.metrics": lambda r: r.protocol["metrics"].append("recall"),
    "protocol.clip": lambda r: r.protocol.update(clip=16),
    "networks.inception.hash": lambda r: r.networks["inception"].update(hash="0"),
    "networks.lpips.what": lambda r: r.networks.update(lpips={"what": "LPIPS"}),
    "reference.num": lambda r: r.reference.update(num=10000),
    "reference.hash": lambda r: r.reference.update(hash="0"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_reports_obtained_in_different_ways_are_not_joined(what: str) -> None:
    first, other = report_of(rich()), report_of(rich())
    CHANGES[what](other)
    assert other.fingerprint != first.fingerprint
    where = "networks.lpips" if "lpips" in what else what
    with pytest.raises(ValueError, match=rf"do not compare: {re.escape(where)} is "):
        join([first, other])


def test_where_when_and_what_was_scored_does_not_decide_whether_reports_compare() -> None:
    first = report_of(rich("a"), warnings=["few", "old"])
    other = report_of(rich("b"), warnings=["new", "few"], environment={"device": "cuda"})
    other.reference["source"] = "/elsewhere/reference.npz"
    other.protocol = dict(reversed(other.protocol.items()))
    assert other.fingerprint == first.fingerprint and re.fullmatch("[0-9a-f]{16}", first.fingerprint)
    both = join([first, other])
    assert [r.name for r in both.results] == ["a", "b"] and both.warnings == ["few", "old", "new"]
    assert len(first.results) == 1  # the first is not changed
    with pytest.raises(ValueError, match="no report"):
        join([])


@pytest.mark.parametrize(
    "text", ['{"format": 1, "results": [[]], "protocol": {}}', '{"format": 1, "protocol": {}}', "[]"]
)
def test_what_is_no_whole_report_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "half.json").write_text(text)
    with pytest.raises(ValueError, match=r"half\.json"):
        Report.read(tmp_path / "half.json")


def test_a_protocol_that_was_edited_after_the_fact_is_refused(tmp_path: Path) -> None:
    report_of(rich()).write(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    data["protocol"]["name"] = "another"
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="changed after it was written"):
        Report.read(tmp_path / "r.json")


def test_small_and_round_numbers_keep_four_digits() -> None:
    assert [number(v) for v in (9.99996, 0.000123456, 1.2e-6, 3.5512, 12345.6, 0)] == [
        "10.00", "0.0001235", "1.200e-06", "3.551", "12346", "0.000"
    ]  # fmt: skip


def test_differences_names_every_leaf() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c is 2 and 3",
        "d is 4 in one of them only",
    ]
    assert differences(PROTOCOL, PROTOCOL) == []
    assert differences({"a": (1, math.nan)}, {"a": [1, math.nan]}) == []


def test_lines_say_the_numbers_and_what_they_depend_on() -> None:
    report = report_of(rich(), warnings=["of 2,048 samples only"])
    lines = report.lines()
    text = "\n".join(lines)
    assert any("FID" in line and "3.551 [3.511, 3.591]" in line and "covariance over N - 1" in line for line in lines)
    assert f"protocol adm (fingerprint {report.fingerprint})" in text and "InceptionV3 of 2015-12-05" in text
    assert "95% intervals, 1000 bootstrap resamples" in text and "reference.npz: 50000 (images)" in text
    assert "perplexity 6.543" in text and lines[-1] == "warning: of 2,048 samples only"
    del report.protocol["interval"]
    assert "bootstrap" not in "\n".join(report.lines())


def test_a_score_that_is_not_there_is_refused_naming_those_that_are() -> None:
    with pytest.raises(KeyError, match=r"'fvd'.*frechet, precision"):
        rich().score("fvd")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.5514, "3.551"),
        (0.61, "0.6100"),
        (123456.0, "123456"),
        (0.0, "0.000"),
        (0.0123456, "0.01235"),
        (-2.0, "-2.000"),
    ],
)
def test_numbers_have_four_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


# As a page

matplotlib = pytest.importorskip("matplotlib", reason="draws the charts")

from varkit.metrics.charts import spread  # noqa: E402
from varkit.metrics.html import factor, html, write_html  # noqa: E402

DASH = "\N{EN DASH}"
VOID = {"meta", "img", "br", "col", "hr", "link", "input"}


class Page(HTMLParser):
    """A parsed page. tags: (name, attributes) in order.   text: what is shown.   cells: of its tables, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.tags, self.open = text, list[tuple[str, dict[str, str]]](), list[str]()
        self.pieces, self.cells, self.styles = list[str](), list[tuple[dict[str, str], str]](), ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        assert len(found) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append((found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.styles += data
            return
        self.pieces.append(data)
        if "td" in self.open or "th" in self.open:
            attributes, text = self.cells[-1]
            self.cells[-1] = (attributes, text + data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def charts(self) -> list[str]:
        return [a["aria-label"] for a in self.named("svg") if a.get("role") == "img"]


def row_of(page: Page, name: str) -> list[tuple[dict[str, str], str]]:
    """The cells beside a result's name in the table of scores."""
    first = next(i for i, (a, text) in enumerate(page.cells) if a.get("scope") == "row" and name in text)
    rest = page.cells[first + 1 :]
    return rest[: next((i for i, (a, _) in enumerate(rest) if a.get("scope")), len(rest))]


def starred(page: Page, name: str) -> list[bool]:
    cells = row_of(page, name)
    stars = ["★" in text for _, text in cells]
    assert stars == ["is-best" in a.get("class", "") for a, _ in cells]
    return stars


def kinds() -> dict[str, Report]:
    guided = [rich(f"guidance {w:g}", 3 + (w - 2) ** 2) for w in (1.0, 2.0, 3.0)]
    for w, result in zip((1.0, 2.0, 3.0), guided, strict=True):
        result.settings["guidance_scale"], result.source = w, "model"
    real = rich("real images", 0.5)
    real.settings = {}
    lengths = [1.0, 16.0, 256.0]
    tokenizer = Result("tokenizer", "tok", 50000, (256, 256), {}, [Score("psnr", "PSNR", 20.8, better="higher")])
    tokenizer.curves = [
        Curve("PSNR", "tokens", lengths, [9.0, 15.0, 20.8]),
        Curve("rFID", "tokens", lengths, [9, 5, 1]),
    ]
    clips = Result("clips", "clips", 2048, (16, 128, 128), {}, [Score("frechet", "FVD", 57.1, better="lower")])
    return {
        "one result": report_of(rich()),
        "guidance": report_of(real, *guided, warnings=["few samples"]),
        "twelve results": report_of(*(rich(f"run {i:02d}", 4 - i / 8) for i in range(12))),
        "reconstructions": report_of(tokenizer),
        "videos": report_of(clips),
        "nothing": report_of(),
    }


KINDS = kinds()


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {kind: Page(html(report)) for kind, report in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_and_says_every_score_and_what_it_depends_on(kind: str, pages: dict[str, Page]) -> None:
    page, report = pages[kind], KINDS[kind]
    assert page.source.startswith("<!DOCTYPE html>")
    for result in report.results:
        assert result.name in page.text
        for score in result.scores:
            assert score.title in page.text and score.how in page.text
            assert score.text().split(" ")[0] in page.text
    for value in (*PROTOCOL["frechet"].values(), "tf1-bilinear", "6726825d0af5", "b3f1c9d2", "2025-01-02"):
        assert str(value) in page.text
    assert report.fingerprint in page.text and "frechet.mean_dtype" in page.text
    for warning in report.warnings:
        assert page.text.index(warning) < page.text.index("Results")  # before any number


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_loads_nothing_and_runs_nothing(kind: str, pages: dict[str, Page]) -> None:
    page = pages[kind]
    assert "http://" not in page.source and "https://" not in page.source
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
        assert attributes.get("href", "#").startswith("#")
        assert not [key for key in attributes if key.startswith("on")]
    assert "@import" not in page.styles and "url(" not in page.styles
    assert "default-src 'none'" in next(
        a["content"] for a in page.named("meta") if "content" in a and "src" in a["content"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_names_within_a_page_are_unique_and_found(kind: str, pages: dict[str, Page]) -> None:
    page = pages[kind]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    wanted |= {found for _, a in page.tags for value in a.values() for found in re.findall(r"url\(#([^)]+)\)", value)}
    wanted |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert wanted <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_can_be_heard(kind: str, pages: dict[str, Page]) -> None:
    page = pages[kind]
    assert all(a.get("alt") for a in page.named("img")) and all(a.get("scope") for a in page.named("th"))
    assert all((a.get("role") == "img" and a["aria-label"]) or a.get("aria-hidden") for a in page.named("svg"))
    assert page.named("html") == [{"lang": "en"}] and len(page.named("h1")) == 1


def test_charts_are_there_where_there_is_something_to_draw(pages: dict[str, Page]) -> None:
    titles = {kind: [label.split(".")[0].split(",")[0] for label in page.charts()] for kind, page in pages.items()}
    assert titles["one result"] == ["Precision and recall", "FID against samples"]
    assert titles["guidance"] == ["Precision and recall", "FID against samples", "FID against guidance"]
    assert titles["reconstructions"] == ["PSNR", "rFID"]
    assert titles["videos"] == titles["nothing"] == []
    assert "guidance 2: 3.000 [2.960, 3.040] at 2" in pages["guidance"].charts()[-1]
    assert "real images: 0.5000" in pages["guidance"].charts()[-1] and "Dashed" in pages["guidance"].text
    assert "model: recall 0.6000, precision 0.8000 [0.7900, 0.8100]" in pages["one result"].charts()[0]
    assert "5.551 at 5000, 3.551 at 50000; limit 3.351" in pages["one result"].charts()[1]


def test_charts_have_no_colours_of_their_own(pages: dict[str, Page]) -> None:
    used = set[str]()
    for page in pages.values():
        inside = [a.get("style", "") for tag, a in page.tags if tag in ("path", "use", "text", "g", "rect")]
        assert not [style for style in inside if re.search(r"#[0-9a-fA-F]{3,6}\b|rgb", style.replace("url(#", ""))]
        used |= {name for style in inside for name in re.findall(r"var\((--[\w-]+)\)", style)}
        assert len(page.named("style")) == 1  # none that a chart brought
        assert used <= set(re.findall(r"(--[\w-]+): #", page.styles))
    assert {"--muted", "--line", "--paper", "--series-1", "--series-6"} <= used


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_is_read_easily(scheme: int) -> None:
    source = files("varkit.metrics").joinpath("report.html.jinja").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", source, re.S)[scheme]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    series = [name for name in colours if name.startswith("series")]
    assert len(series) == 6
    for name in ["ink", "muted", "accent", *series]:  # a badge is paper on series
        assert contrast(name, "paper") >= 4.5 and contrast(name, "soft") >= 4.5, name
    assert contrast("warn-ink", "warn-paper") >= 4.5


HOSTILE = """"><script>alert('1')</script><img src=x onerror=alert(1)>&amp;$x_{$\\frac{\x07{{ 7777 * 7 }}"""


def test_hostile_text_is_only_shown() -> None:
    h = HOSTILE
    results = []
    for i in range(2):
        values = [
            Score(name, f"{h}{name}", 1.0 + i, 0.5, 2.5, "lower", h) for name in ("frechet", "precision", "recall")
        ]
        result = Result(f"{h}{i}", h, 1, (1, 1), {h: h, "guidance_scale": 1.0 + i, "deep": {h: [h]}}, values)
        result.curves = [Curve(h, h, [1.0, 2.0], [1.0, 2.0], 1.0)]
        result.per_class = PerClass(h, [f"{h}{j}" for j in range(61)], [0.5] * 61, [1] * 61)
        result.tables, result.pictures = {h: [{h: h}]}, {h: Image.new("L", (2, 2))}
        results.append(result)
    facts = {"source": h, "kind": h, "num": 1, "hash": h}
    page = Page(html(Report({"name": h, "summary": h, h: h}, {h: {h: h}}, facts, results, {"date": h, h: h}, [h])))
    known = {"html", "head", "meta", "title", "style", "body", "div", "header", "p", "h1", "h2", "h3", "h4", "dl", "dt"}
    known |= {"dd", "section", "ul", "ol", "li", "nav", "a", "main", "article", "table", "thead", "tbody", "tr", "th"}
    known |= {
        "td",
        "caption",
        "colgroup",
        "col",
        "span",
        "figure",
        "figcaption",
        "img",
        "code",
        "footer",
        "svg",
        "defs",
    }
    assert {tag for tag, _ in page.tags} <= known | {"path", "g", "rect", "use", "text", "clippath", "abbr", "tspan"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert all(a["src"].startswith("data:") for a in page.named("img"))
    whole = "".join(page.pieces)
    assert whole.count(h) > 30 and "54439" not in whole  # shown as it is; the template is not run


def test_pictures_are_embedded_whole_and_enlarged_only_where_tiny() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    result = rich()
    result.pictures = {
        "small": Image.fromarray(pixels),
        "large": Image.new("RGB", (1500, 700)),
        "grey": Image.fromarray(pixels[..., 0]),
        "floats": Image.fromarray(pixels[..., 0].astype(np.float32)),
    }
    page = Page(html(report_of(result)))
    images = {a["alt"].removesuffix(" of model"): a for a in page.named("img")}
    assert list(images) == ["small", "large", "grey", "floats"] and {"small", "large"} <= set(page.pieces)

    def decoded(name: str) -> np.ndarray:
        data = base64.b64decode(images[name]["src"].removeprefix("data:image/png;base64,"))
        return np.asarray(Image.open(io.BytesIO(data)))

    np.testing.assert_array_equal(decoded("small"), pixels)
    np.testing.assert_array_equal(decoded("grey"), pixels[..., 0])
    assert decoded("large").shape == (700, 1500, 3)
    k = factor(result.pictures["small"])
    assert k > 1 and (images["small"]["width"], images["small"]["height"]) == (str(40 * k), str(30 * k))
    assert images["small"]["class"] == "pixels" and "class" not in images["large"]
    assert images["large"]["width"] == "1500"


def test_the_best_of_a_column_is_marked_by_which_way_is_good() -> None:
    a, b, c = (Result(name, name, 10, (8, 8)) for name in ("first", "second", "third"))
    a.scores, b.scores, c.scores = scores(3.0, 0.7, 0.6), scores(2.0, 0.9, 0.6), scores(math.nan, 0.8, math.nan)
    page = Page(html(report_of(a, b, c)))
    assert starred(page, "first") == [False, False, True, False]  # a tie is a tie; no way is good for the last
    assert starred(page, "second") == [True, True, True, False]
    assert starred(page, "third") == [False, False, False, False]
    heads = {text.strip(): a for a, text in page.cells if a.get("scope") == "col"}
    assert {"FID↓", "precision↑", "nearest neighbour"} <= set(heads)
    assert heads["FID↓"]["title"] == "50,000 against 50,000; covariance over N - 1"


def test_one_result_is_not_the_best_of_anything() -> None:
    assert "★" not in Page(html(report_of(rich()))).text


def test_infinity_is_the_best_of_what_should_be_high() -> None:
    results = [Result(n, n, 1, (8, 8), {}, [Score("psnr", "PSNR", v, better="higher")]) for n, v in
               (("same", math.inf), ("other", 30.0))]  # fmt: skip
    page = Page(html(report_of(*results)))
    assert starred(page, "same") == [True] and "∞" in row_of(page, "same")[0][1]


def test_what_is_missing_is_a_dash_that_says_why() -> None:
    a, b = Result("first", "a", 10, (8, 8)), Result("second", "b", 10, (8, 8))
    a.scores, b.scores = scores(3.0)[:1], [Score("frechet", "FID", 2.0), *scores(math.nan)[1:]]
    b.scores[1] = Score("precision", "precision", math.nan, better="higher", how="k = 3")
    b.scores[2] = Score("recall", "recall", None, better="higher")
    b.tables = {"codes": [{"used": None, "share": math.nan}]}
    page = Page(html(report_of(a, b, protocol=PROTOCOL | {"clip": None})))
    (_, first), *others = row_of(page, "first")
    assert "3.000" in first and "[2.960, 3.040]" in first and [text for _, text in others] == [DASH] * 3
    (_, fid), *rest = row_of(page, "second")
    assert fid == "★2.000" and [text for _, text in rest] == [DASH, DASH, "1.020"]
    why = [a["title"] for a in page.named("abbr")]
    assert why.count("not measured for this result") == 3 and why.count("no number came out") == 4
    assert "not set" in why and "nan" not in page.text.lower() and "None" not in page.text
    assert f"A dash ({DASH}) stands for" in page.text
    assert f"A dash ({DASH}) stands for" not in Page(html(report_of(rich()))).text


def test_a_score_that_was_taken_differently_says_for_whom() -> None:
    a, b, c = rich("first"), rich("second"), rich("third")
    for result in (a, c):
        result.scores[3] = Score("neighbours", "nearest neighbour", 1.0, how="3 near copies")
    text = Page(html(report_of(a, b, c))).text
    assert "3 near copies (first, third)" in text and "median of ratios (second)" in text
    assert "covariance over N - 1 (" not in text  # the same for all


def test_few_classes_are_all_shown_in_order_and_of_many_the_ends() -> None:
    for count in (60, 1000):
        names, generator = [f"kind {i}" for i in range(count)], np.random.default_rng(1)
        shares = generator.permutation(count) / count
        result = Result("model", "m", count, (8, 8))
        result.per_class = PerClass("Accuracy", names, [math.nan, *shares[1:].tolist()], [0] + [1] * (count - 1))
        page = Page(html(report_of(result)))
        shown = [text for a, text in page.cells if a.get("scope") == "row" and text.startswith("kind")]
        order = [names[i] for i in np.argsort(shares) if i]
        assert shown == (names if count == 60 else [*order[:20], *order[:-21:-1]])
        assert len(page.charts()) == (count > 60)
        widths = [float(a["width"][:-1]) for a in page.named("rect") if a.get("class") == "bar"]
        np.testing.assert_allclose(widths, [100 * shares[names.index(n)] for n in shown if n != "kind 0"], atol=0.051)
        assert f"Classes without images: 1 of {count}" in page.text
        assert (count == 60) == ("the class has no images" in [a.get("title") for a in page.named("abbr")])


def test_curves_of_all_results_share_a_chart_and_gaps_are_left_out() -> None:
    a, b = rich("first"), rich("second", 5.0)
    a.curves[0].values[0] = None
    b.curves.append(Curve("only here", "tokens", [1.0, 512.0], [math.nan, math.inf]))
    charts = Page(html(report_of(a, b))).charts()
    assert sum(label.startswith("FID against samples") for label in charts) == 1
    assert not [label for label in charts if "only here" in label]  # nothing to draw
    assert "first: 3.551 at 50000;" in charts[1] and "second: 7.000 at 5000, 5.000 at 50000" in charts[1]


def test_an_interval_may_lie_beside_its_value() -> None:
    result = rich()
    result.scores[1] = Score("precision", "precision", 0.8, 0.85, 0.9, "higher")
    assert "0.8000 [0.8500, 0.9000]" in Page(html(report_of(result))).charts()[0]


def test_settings_are_said_once_where_results_agree() -> None:
    page = Page(html(KINDS["guidance"]))
    alike = page.text[page.text.index("Alike for all results") : page.text.index("Result by result")]
    assert "50000" in alike and "256\N{MULTIPLICATION SIGN}256" in alike and "guidance_scale" not in alike
    rest = page.text[page.text.index("Result by result") :]
    assert "guidance_scale" in rest and "4 guidance 3" in rest and "top_k" in rest


def test_the_page_does_not_depend_on_the_users_style_nor_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it fails
    report = KINDS["one result"]
    plain = html(report)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "text.usetex": True, "svg.fonttype": "path"}):
        before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
        assert html(report) == plain
        assert {key: matplotlib.rcParams[key] for key in before} == before


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "varkit\[eval\]"'):
        write_html(KINDS["one result"], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_html(KINDS["videos"], path)
    assert path.read_text(encoding="utf-8") == html(KINDS["videos"])
    broken = report_of(rich())
    broken.results[0].pictures["bad"] = object()
    with pytest.raises(AttributeError):
        write_html(broken, path)
    assert path.read_text(encoding="utf-8") == html(KINDS["videos"]) and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_places_are_moved_apart_and_no_more_than_needed(seed: int) -> None:
    generator = np.random.default_rng(seed)
    places = np.sort(generator.uniform(0, 1, 10) ** 2).tolist()
    moved = spread(places, 0.08)
    assert np.diff(moved).min() >= 0.08 - 1e-9 and min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.08) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])


@pytest.mark.browser
def test_nothing_sticks_out_in_a_browser(tmp_path: Path) -> None:
    from tests import test_demo_browser as chromium

    if not (chromium.CHROMIUM and chromium.CHROMEDRIVER):
        pytest.skip("chromium or chromedriver is not installed")
    for kind, report in KINDS.items():
        write_html(report, tmp_path / f"{kind}.html")
    port = chromium.free_port()
    with chromium.process([str(chromium.CHROMEDRIVER), f"--port={port}"], tmp_path / "chromedriver.log"):
        chromium.wait("chromedriver to start", lambda: chromium.answers(f"http://127.0.0.1:{port}/status"))
        browser = chromium.Browser(f"http://127.0.0.1:{port}", tmp_path / "profile")
        try:
            papers = set[str]()
            for scheme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
                browser.call("POST", "/goog/cdp/execute", command)
                for width in (320, 420, 1200):
                    browser.width(width, 900)
                    for kind in KINDS:
                        browser.open((tmp_path / f"{kind}.html").as_uri())
                        assert browser.run("return document.documentElement.scrollWidth") <= width, (kind, width)
                papers.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
            assert len(papers) == 2 and browser.errors() == []
        finally:
            browser.quit()
