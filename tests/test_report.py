"""The report as a page: what it says, that it needs nothing but itself, and that it works in a
browser, with scripts and without, wide, narrow and dark."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import canonical, write

import convert
from convert.compare.html import render
from convert.compare.report import Report, Training
from convert.compare.report_file import check_report
from convert.diagnose.divergence import Divergence
from convert.judge.bits import TensorDifference
from convert.judge.rows import FLOOR, Row, Statistics
from zoo.checkpoint.label import Label
from zoo.containers.errors import MissingExtra, UsageError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.mlp import MODEL

UGLY = 'layer.<script>alert("x")</script>.\u202eevil\x1b[31m.</script>&amp;'
KINDS = ("Linear", "LayerNorm", "GELU")


def rows(count: int, differ_from: int | None = None, seed: int = 0) -> list[Row]:
    """As a model of many layers gives them: noise that grows with depth, errors around it."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        scale = float(np.exp(rng.normal()))
        noise = scale * 2e-7 * 1.01 ** min(i, 300)
        wrong = differ_from is not None and i >= differ_from
        error = noise * float(np.exp(0.4 * rng.normal())) * (4000 if wrong else 1.2)
        bins = rng.integers(0, 900, 24) * (np.arange(24) < 15)
        statistics = Statistics(-scale, scale, 0.1, 0.3, error / 5, tuple(map(int, bins)))
        same = error <= 8 * max(noise, FLOOR * scale)
        error64 = scale * (1e-4 if wrong else 4e-15)
        made.append(
            Row(
                *(f"encoder.layer.{i // 3}.part{i % 3}", (2, i + 1), error, noise, scale, error64),
                same=same,
                layer=KINDS[i % 3],
                statistics=statistics,
            )
        )
    return made


def training(optimizer: str, differ: bool = False) -> Training:
    exact = [2.0 * 0.8**i for i in range(6)]
    a = [x + 1e-7 * 2**i for i, x in enumerate(exact)]
    b = [x + (1e-3 if differ else 5e-8) for x in a]
    judged = rows(6, 0 if differ else None, 5)
    judged[2] = dataclasses.replace(judged[2], same=False, judged=False, note="no true gradient")
    losses = {"a float32": a, "b float32": b, "a float64": exact, "b float64": exact}
    return Training(optimizer, 5, 1e-3, losses, judged)


def same() -> Report:
    return Report(
        "model.safetensors",
        "model.flax",
        "training",
        compared=104,
        nbytes=90_900_000,
        outputs=rows(46),
        gradients=rows(30, seed=1),
        training=[training("SGD"), training("AdamW")],
        model="bert (minilm_l6)",
        config={"layer_norm_eps": 1e-12, "classifier_dropout": None},
        certificate={
            "source": "model.safetensors",
            "verified": {"level": "bits", "tensors": 104},
            "tensors": [
                {
                    "names": ["pooler.dense.weight"],
                    "op": "permute(1,0)",
                    "dtype": "F32",
                    "source_sha256": ["ab" * 32],
                    "target_sha256": ["cd" * 32],
                }
            ],
        },
        versions={"torch": "2.13.0"},
        command="zooconvert verify model.safetensors model.flax --level training",
        created="2026-01-02T03:04:05Z",
        seconds=12.3,
    )


def different() -> Report:
    report = same()
    report.outputs = rows(46, differ_from=19)
    report.training = [training("SGD"), training("Adam", differ=True)]
    report.differences = [
        TensorDifference("a.weight", "9 of 9 elements", 9, 0.5, 0.1, (0, 2), "transposed"),
        TensorDifference(UGLY, "not in model.flax"),
    ]
    at = report.outputs[19]
    report.first_divergence = Divergence(
        at.name,
        "GELU by tanh, where PyTorch has erf",
        "gelu",
        "pass approximate=False to jax.nn.gelu",
        error=at.error,
        noise=at.noise,
        scale=at.scale,
    )
    return report


def plain(page: str) -> str:
    """What a reader sees of a page: no tags, no scripts, single spaces."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"</(td|th|dt)>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


# --- What it says ---


def test_the_verdict_comes_first_with_its_reason() -> None:
    page = plain(render(same()).partition("<body>")[2])
    assert page.startswith("zooconvert verify Dark Same model.safetensors and model.flax All 104 ")
    assert "46 outputs, 30 gradients and training with SGD and AdamW stay within 8 times" in page
    bad = plain(render(different()).partition("<body>")[2])
    assert bad.startswith("zooconvert verify Dark Different")
    told = "2 of 104 tensors differ in their bits; beyond the rounding noise: 27 of 46 outputs and "
    assert told + "training with Adam." in bad


def test_the_first_divergence_is_told_whole() -> None:
    report = different()
    page = plain(render(report))
    found = report.first_divergence
    assert found is not None
    section = page[page.index("First divergence, in the forward pass") :][:400]
    for part in (found.layer, found.diagnosis, found.advice, f"{found.ratio:,.0f} times the noise"):
        assert part in section
    assert "First divergence" not in plain(render(same()))


def test_without_a_known_divergence_the_first_row_is_named() -> None:
    report = different()
    report.first_divergence = None
    assert "The first is encoder.layer.6.part1" in plain(render(report))
    bits = Report("a", "b", "bits", 2, 8, [TensorDifference("x.weight", "1 of 1 elements", 1)])
    assert "1 of 2 tensors differ in their bits. The first is x.weight." in plain(render(bits))


def test_everything_is_in_the_page_itself() -> None:
    """Without a script nothing is missing: every row of every table, notes and diagnoses."""
    report = different()
    page = plain(render(report))
    for row in report.rows:
        assert row.name in page
    for text in ("transposed", "not in model.flax", "no true gradient", "ab" * 32, report.command):
        assert text in page
    assert page.count("✕") == 0, "signs are the style's, words the page's"
    assert "layer_norm_eps 1e-12" in page
    assert "torch 2.13.0" in page


def test_the_json_in_the_page_is_the_reports() -> None:
    report = different()
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', render(report))
    assert data is not None
    assert json.loads(data[1]) == json.loads(report.to_json())


def test_plots_have_a_mark_for_every_row() -> None:
    page = render(different())
    depth = page[page.index("Error by depth, outputs") : page.index("Histogram")]
    assert len(re.findall(r'<use class="same" href="#mark-same" x', depth)) == 19 + 1  # and legend
    assert len(re.findall(r'<use class="differs" href="#mark-differs" x', depth)) == 27 + 1
    histogram = page[page.index("Histogram of errors") : page.index('<div class="tools"')]
    sums = [sum(r.statistics.bins[i] for r in different().outputs) for i in range(24)]  # type: ignore[union-attr]
    assert histogram.count("<rect") == sum(n > 0 for n in sums)
    assert f"{sum(sums):,} elements of all outputs" in histogram
    assert f"<title>{sums[0]:,} elements equal" in histogram


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_what_is_no_number_is_shown(value: float) -> None:
    report = same()
    report.outputs[3] = dataclasses.replace(report.outputs[3], error=value, same=value == 0)
    report.outputs[4] = Row("zeros", (), 0.0, 0.0, 0.0, 0.0, True)
    report.training[0].losses["b float32"][2] = value
    page = render(report)
    assert "nan%" not in page
    assert "inf%" not in page
    assert ("∞" if value == math.inf else "not a number" if value else "0") in plain(page)


@pytest.mark.parametrize("level", ["bits", "outputs"])
def test_what_a_level_does_not_have_is_left_out(level: str) -> None:
    report = Report("a", "b", level, 3, 12, outputs=rows(2) if level == "outputs" else [])
    page = render(report)
    assert ('id="outputs"' in page) == (level == "outputs")
    for missing in ("gradients", "training", "tensors", "certificate", "notices"):
        assert f'id="{missing}"' not in page


def test_a_real_verification(tmp_path: Path) -> None:
    config = MODEL.tiny["relu"]
    label = Label(MODEL, config).to_metadata()
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", canonical(MODEL, config), **label)
    report = convert.verify(path, path, level="outputs")
    page = render(report)
    assert report.verdict == "same"
    assert plain(page).count(" same") >= len(report.outputs)
    for row in report.outputs:
        assert row.name in plain(page)


# --- What it must not do ---


def test_names_cannot_do_anything() -> None:
    report = different()
    report.a = report.command = report.model = UGLY
    report.notices, report.config, report.versions = [UGLY], {UGLY: UGLY}, {UGLY: UGLY}
    report.certificate = {UGLY: UGLY, "notices": [UGLY], "tensors": [{"names": [UGLY], "op": UGLY}]}
    report.outputs[0] = dataclasses.replace(report.outputs[0], name=UGLY, layer=UGLY, note=UGLY)
    report.outputs[19] = dataclasses.replace(report.outputs[19], name=UGLY)
    report.training = [dataclasses.replace(training(UGLY), optimizer=UGLY)]
    report.first_divergence = Divergence(
        UGLY, UGLY, UGLY, UGLY, "forward", UGLY, (UGLY, UGLY), UGLY
    )
    page = render(report)
    assert page.count("<script") == 2, "the JSON and the page's own"
    assert page.count("alert(") == page.count("&lt;script&gt;alert(") + page.count("003cscript")
    for hidden in ("\u202e", "\x1b"):
        assert hidden not in page
    assert r"\u202eevil\x1b[31m" in plain(page)


def test_nothing_is_referred_to_outside_of_the_page() -> None:
    page = render(different())
    assert re.findall(r"(?:src|href|action)=\"(?!#|data:)", page) == []
    assert "http" not in re.sub(r"<meta http-equiv", "", page)
    assert "url(" not in page
    assert "@import" not in page


def test_signs_have_contrast() -> None:
    """At least 4.5 to 1 (WCAG AA) for all text on either ground, light and dark."""
    style = (files("convert.compare.html") / "style.css").read_text()
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", style))
    for i in (0, 1):
        colours = {k: luminance(v.split(", ")[i]) for k, v in pairs.items()}
        for ground in ("paper", "raised"):
            for ink in ("ink", "quiet", "accent", "same", "differs"):
                high, low = sorted((colours[ink], colours[ground]), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground, i)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_what_the_page_is_made_of_is_installed_with_it() -> None:
    """As package data: a wheel holds every file of a package that git does not ignore."""
    room = files("convert.compare.html")
    page = (room / "page.html").read_text(encoding="utf-8")
    assert page.startswith("{% from")
    for other in re.findall(r'{% from "(.*?)"', page):
        assert (room / other).is_file()


def test_a_page_needs_the_report_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_report(tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"zooconvert\[report\]"):
        check_report(tmp_path / "report.html")
    check_report(tmp_path / "report.json")
    with pytest.raises(UsageError, match="does not exist"):
        check_report(tmp_path / "none" / "report.html")


def test_many_rows_stay_within_bounds() -> None:
    report = Report("a", "b", "outputs", 1, 4, outputs=rows(20_000, differ_from=19_990))
    start = time.perf_counter()
    page = render(report)
    assert time.perf_counter() - start < 20  # 1 s when nothing else runs
    assert len(page) < 25e6
    assert page.count("<details>") == 1000
    assert "of the 1,000 farthest from their noise; those of 19,000 other rows are" in plain(page)
    assert page.count("<use class=") < 600, "plots are thinned"
    assert page.count('href="#mark-differs" x') >= 2, "but show what differs"
    assert "encoder.layer.3333.part1" in plain(page)


# --- In a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("CI"):
            pytest.fail("chromium and chromedriver are not installed")
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report; afterwards, that it fetched nothing and that the console is silent."""

    def call(report: Report, width: int = 1200, scheme: str = "light", scripts: bool = True) -> Any:
        path = tmp_path / "report.html"
        path.write_text(render(report), encoding="utf-8")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        browser.get(path.as_uri())
        return browser

    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield call
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    assert (tmp_path / "report.html").as_uri() in asked, "this test sees requests"
    assert {u for u in asked if not u.startswith("data:")} == {(tmp_path / "report.html").as_uri()}


def column(page: Any, n: int, table: str = "outputs") -> list[str]:
    """The n-th cell of every row that is shown."""
    return page.execute_script(  # type: ignore[no-any-return]
        f"return [...document.querySelector('table[data-rows=\"{table}\"]').tBodies[0].rows]"
        f".filter(r => r.offsetHeight).map(r => r.cells[{n}].innerText.trim())"
    )


def head(page: Any, title: str, table: str = "outputs") -> Any:
    from selenium.webdriver.common.by import By

    heads = page.find_elements(By.CSS_SELECTOR, f'table[data-rows="{table}"] thead th')
    return next(h for h in heads if h.text.strip(" ↑↓") == title)


def press(page: Any, title: str, table: str = "outputs") -> str | None:
    """Click a heading; how it says that the table is then sorted."""
    from selenium.webdriver.common.by import By

    found = head(page, title, table)
    found.find_element(By.TAG_NAME, "button").click()
    return found.get_attribute("aria-sort")  # type: ignore[no-any-return]


def test_sorting(show: Open) -> None:
    report = different()
    page = show(report)
    order = [str(i + 1) for i in range(46)]
    assert column(page, 0) == order
    by_ratio = sorted(range(46), key=lambda i: report.outputs[i].ratio)
    assert press(page, "error ÷ noise") == "descending", "the farthest first"
    assert column(page, 0) == [str(i + 1) for i in reversed(by_ratio)]
    assert press(page, "error ÷ noise") == "ascending"
    assert column(page, 0) == [str(i + 1) for i in by_ratio]
    assert press(page, "tensor") == "ascending"
    assert head(page, "error ÷ noise").get_attribute("aria-sort") is None
    assert column(page, 1) == [r.name for r in report.outputs], "layer.10 comes after layer.9"
    assert press(page, "verdict") == "ascending"
    assert column(page, 8) == ["differs"] * 27 + ["same"] * 19
    assert press(page, "shape") == "ascending"
    assert column(page, 0) == order
    assert press(page, "#") == "ascending"
    assert column(page, 0) == order
    assert press(page, "max error", "differences") == "descending"
    assert column(page, 0, "differences") == ["1", "2"], "nothing comes after every number"


def test_sorting_by_keyboard(show: Open) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page = show(different())
    button = head(page, "error").find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    assert head(page, "error").get_attribute("aria-sort") == "descending"
    assert column(page, 0)[0] != "1"


def test_filtering(show: Open) -> None:
    from selenium.webdriver.common.by import By

    page = show(different())
    section = page.find_element(By.ID, "outputs")
    box = section.find_element(By.CLASS_NAME, "filter")
    output = section.find_element(By.TAG_NAME, "output")
    assert output.text == "46 of 46"
    box.send_keys("LAYER.1 norm")
    assert column(page, 1) == [f"encoder.layer.{n}.part1" for n in (1, 10, 11, 12, 13, 14)]
    assert output.text == "6 of 46"
    section.find_element(By.CLASS_NAME, "only").click()
    assert len(column(page, 1)) == 5, "and differing"
    box.clear()
    box.send_keys(" ")
    assert column(page, 8) == ["differs"] * 27
    press(page, "error ÷ noise")
    assert len(column(page, 1)) == 27, "sorting keeps the selection"
    assert page.find_elements(By.CSS_SELECTOR, "#gradients .only") == [], "there nothing differs"
    assert len(column(page, 1, "gradients")) == 30, "tables are filtered one by one"


def test_rows_that_are_not_judged_do_not_differ(show: Open) -> None:
    from selenium.webdriver.common.by import By

    page = show(different())
    table = "training.1.rows"
    assert column(page, 8, table).count("not judged") == 1
    page.find_elements(By.CSS_SELECTOR, "#training .only")[-1].click()
    assert column(page, 8, table) == ["differs"] * 5


def test_statistics_unfold(show: Open) -> None:
    from selenium.webdriver.common.by import By

    page = show(same())
    row = page.find_element(By.CSS_SELECTOR, "#outputs tbody tr")
    assert "mean error" not in row.text
    row.find_element(By.TAG_NAME, "summary").click()
    assert "mean error" in row.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(show: Open, scheme: str) -> None:
    from selenium.webdriver.common.by import By

    page = show(same(), scheme=scheme)

    def ground() -> str:
        script = "return getComputedStyle(document.documentElement).backgroundColor"
        return page.execute_script(script)  # type: ignore[no-any-return]

    light, dark = "rgb(252, 251, 249)", "rgb(23, 23, 22)"
    assert ground() == (light if scheme == "light" else dark)
    button = page.find_element(By.ID, "theme")
    assert button.text == ("Dark" if scheme == "light" else "Light")
    button.click()
    assert ground() == (dark if scheme == "light" else light)
    button.click()
    assert ground() == (light if scheme == "light" else dark)


@pytest.mark.parametrize("width", [360, 700, 1200])
def test_no_page_is_wider_than_the_window(show: Open, width: int) -> None:
    report = different()
    long = {"name": "x" * 300, "note": "y" * 300, "layer": "w" * 300}
    report.outputs[3] = dataclasses.replace(report.outputs[3], **long)
    report.differences[0] = dataclasses.replace(report.differences[0], diagnosis="z" * 300)
    page = show(report, width)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wide, room = page.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert wide == room <= width


def test_it_reads_the_same_without_scripts(show: Open) -> None:
    from selenium.webdriver.common.by import By

    page = show(different(), scripts=False)
    body = page.find_element(By.TAG_NAME, "body").text
    assert "Different" in body
    assert "encoder.layer.15.part0" in body
    assert not page.find_element(By.ID, "theme").is_displayed()
    assert not page.find_element(By.CLASS_NAME, "tools").is_displayed()


def test_hostile_names_in_a_browser(show: Open) -> None:
    report = different()
    report.outputs[0] = dataclasses.replace(report.outputs[0], name=UGLY, layer=UGLY)
    page = show(report)
    assert page.title.startswith("Different")
    assert press(page, "layer") == "ascending"
    assert any("<script>alert" in name for name in column(page, 1))


def test_many_rows_open(show: Open) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page = show(Report("a", "b", "outputs", 1, 4, outputs=rows(1500, differ_from=1490)))
    assert press(page, "error ÷ noise") == "descending"
    assert len(column(page, 0)) == 1000
    assert column(page, 8)[:11] == ["differs"] * 10 + ["same"]
    output = page.find_element(By.CSS_SELECTOR, "#outputs output")
    assert output.text == "1,500 of 1,500"
    more = page.find_element(By.CLASS_NAME, "more")
    page.find_element(By.CLASS_NAME, "filter").send_keys("part0")
    assert not more.is_displayed()
    page.find_element(By.CLASS_NAME, "filter").send_keys(Keys.BACKSPACE * 5)
    more.click()
    assert len(column(page, 0)) == 1500
    assert not more.is_displayed()
