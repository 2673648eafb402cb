"""The page of a report in a browser: sorting, filtering, no request, no error, nothing that sticks out."""

import shutil

import pytest
from browser import BROWSER, DRIVER, browser
from PIL import Image
from report_toy import fingerprints, write_data, write_run

from experiments.report import write_report

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="there is no browser: chromium and chromedriver"
)

COLUMN = """
const [table, column] = arguments;
return [...document.querySelectorAll("table.results")[table].tBodies[0].rows]
  .filter((row) => !row.hidden).map((row) => row.cells[column].dataset.value ?? row.cells[column].textContent);
"""
HEADER = "return document.querySelectorAll('table.results')[0].tHead.rows[arguments[0]].cells[arguments[1]]"
FOCUS = f"{HEADER}.querySelector('button').focus()".replace("return ", "")
WIDE = """
const page = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre, svg"))
  .filter((e) => e.getBoundingClientRect().right > page + 1).map((e) => e.outerHTML.slice(0, 200));
"""
ENTER, TAB = "\ue007", "\ue004"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three methods in the first table, one with outliers, one without costs; another protocol in the second."""
    root = tmp_path_factory.mktemp("checkpoints")
    data = write_data(root / "images")
    splits = fingerprints(data)
    outliers = {"source": "other images", "size": 1234567, "feed": "paired", "duplicates": None}
    long = {"source": "a_collection_of_very_many_images_with_a_name_that_has_no_end", "size": 7, "feed": "mixed"}
    for seed in range(2):
        write_run(root / "toy" / "a" / f"seed{seed}", data, splits, seed=seed)
    write_run(root / "toy/b/seed0", data, splits, shift=4.0, method="Exposed", outliers=outliers | {"duplicates": {}})
    unknown = {"seconds": None, "trained_parameters": None}
    write_run(root / "toy/c/seed0", data, splits, shift=1.0, method="AMethodWithAnUncommonlyLongName", record=unknown)
    write_run(root / "toy/d/seed0", data, splits, protocol="openood", outliers=long | {"duplicates": None})
    (root / "toy/c/seed0/figures").mkdir()
    Image.new("RGB", (2000, 300)).save(root / "toy/c/seed0/figures/heatmaps.png")
    broken = root / "toy" / "e" / "seed0"
    shutil.copytree(root / "toy" / "d" / "seed0", broken)
    (broken / "results.json").write_text("{")
    write_report([root / "toy"], root / "report")
    return root / "report" / "report.html"


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


def test_the_page_is_quiet_and_fits(page, window):
    for width in (390, 1280):
        window.open(page, width)
        assert window.run("return innerWidth") == width
        window.run("document.querySelectorAll('details').forEach((part) => part.open = true)")
        assert window.run("return document.documentElement.scrollWidth") <= width
        assert window.run(WIDE) == []
        broken = "return [...document.images].filter((image) => !image.naturalWidth).length"
        assert window.run(broken) == 0
    addresses = window.requests(page)
    assert page.as_uri() in addresses
    assert [address for address in addresses if not address.startswith(("file:", "data:"))] == []
    assert [entry for entry in window.log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_tables_are_sorted_from_the_keyboard(page, window):
    window.open(page, 1280)
    before = list(map(float, window.run(COLUMN, 0, 2)))
    assert before != sorted(before, reverse=True)
    window.run(FOCUS, 1, 0)  # AUROC of the first column: at first, the best on top
    window.press(ENTER)
    assert list(map(float, window.run(COLUMN, 0, 2))) == sorted(before, reverse=True)
    assert window.run(f"{HEADER}.getAttribute('aria-sort')", 1, 0) == "descending"
    window.press(ENTER)
    assert list(map(float, window.run(COLUMN, 0, 2))) == sorted(before)
    window.press(TAB + ENTER)  # FPR95 beside it
    rates = list(map(float, window.run(COLUMN, 0, 3)))
    assert rates == sorted(rates)
    assert window.run(f"{HEADER}.getAttribute('aria-sort')", 1, 0) is None
    for _ in range(2):  # what is not known comes last, either way
        window.run(
            "document.querySelectorAll('table.results')[0].tHead.rows[0].cells[9].querySelector('button').click()"
        )
        seconds = window.run(COLUMN, 0, 13)
        assert seconds[-2:] == ["", ""]
        assert "" not in seconds[:-2]
    names = "document.querySelectorAll('table.results')[0].tHead.rows[0].cells[0].querySelector('button').click()"
    window.run(names)
    found = window.run(COLUMN, 0, 0)
    assert found == sorted(found)


def test_rows_are_filtered(page, window):
    window.open(page, 1280)
    rows = len(window.run(COLUMN, 0, 0))
    assert rows == 6
    window.run("document.querySelector('input[type=search]').focus()")
    window.press("exposed msp")
    assert window.run(COLUMN, 0, 1) == ["msp"]
    assert window.run("return document.querySelector('output').textContent") == "1 of 6 rows"
    assert len(window.run(COLUMN, 1, 0)) == 2  # the other table is left alone
    window.run("document.querySelector('input[type=checkbox]').click()")
    assert window.run(COLUMN, 0, 1) == []
    window.run(
        "const s = document.querySelector('input[type=search]'); s.value = ''; s.dispatchEvent(new Event('input'))"
    )
    assert len(window.run(COLUMN, 0, 1)) == 4
    assert not any("Exposed" in name for name in window.run(COLUMN, 0, 0))


def test_without_scripts_the_tables_are_whole(page, window):
    off = {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": True}}
    window.ask("POST", "/goog/cdp/execute", off)
    try:
        window.open(page, 390)
        assert len(window.ask("POST", "/elements", {"using": "css selector", "value": "table.results tbody tr"})) == 8
        assert window.ask("POST", "/elements", {"using": "css selector", "value": "th button"}) == []
    finally:
        off["params"]["value"] = False
        window.ask("POST", "/goog/cdp/execute", off)
