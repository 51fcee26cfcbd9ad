"""A report page in a browser: nothing is fetched, nothing overflows a phone, dark pages have dark pictures."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from support import synthetic_analysis as synthetic

from jaxcrit.reporting import tables
from jaxcrit.reporting.analysis import analysis_report
from jaxcrit.reporting.report import Report, Section

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390
MEASURE = """<script>
addEventListener("load", () => {
  const all = [...document.querySelectorAll("body *")]
    .filter(one => !one.closest("pre") && one.getClientRects().length);
  const right = one => one.getBoundingClientRect().right;
  const blocks = [...document.querySelectorAll("main > section, main > section > *")];
  const root = document.documentElement;
  const found = {
    width: innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    wide: all.filter(one => right(one) > root.clientWidth + 0.5).map(one => one.outerHTML.slice(0, 80)),
    overlaps: blocks.filter(one => {
      const next = one.nextElementSibling, box = one => one.getBoundingClientRect();
      return next && next.getClientRects().length && box(next).top < box(one).bottom - 0.5;
    }).length,
    pictures: [...document.images].map(one => [one.naturalWidth, one.currentSrc.length, one.width]),
    fetched: performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:")),
    paper: getComputedStyle(document.body).backgroundColor,
  };
  parent.document.title = "found" + JSON.stringify(found).replaceAll("<", "(");
});
</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")


def opened(page, *flags):
    """What the browser says of a page at a phone's width."""
    inner = html.escape(page.read_text(encoding="utf-8").replace("</body>", MEASURE))
    measured = page.with_name("measured.html")  # a window is never narrower than 500
    measured.write_text(f'<iframe width="{PHONE}" height="800" style="border: 0" srcdoc="{inner}"></iframe>', "utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *flags]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", measured.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>found(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr[-500:]
    return json.loads(found[1].replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """An analysis, and beside it what is widest: a table, a path, a warning and a command of one word each."""
    out = tmp_path_factory.mktemp("page")
    analysis = synthetic.analysis(out, names=("alpaca",), warnings=("w" * 300,))
    whole = analysis_report(analysis)
    wide = Section("h" * 80, "n" * 300, tables.table(["layer", "t" * 200], [["0", "x" * 200]]))
    report = Report(["f" * 200, *whole.headline], whole.warnings, [wide, *whole.sections], whole.caveats, ["p" * 200])
    record = analysis.run | {"config": analysis.run["config"] | {"data": "d" * 300, "k" * 40: "v" * 300}}
    return report.write(out, record)


def test_nothing_is_fetched_and_nothing_overflows(page):
    light, dark = opened(page), opened(page, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    for found in (light, dark):
        assert found["width"] == PHONE and found["scroll"] <= found["client"], found
        assert (found["wide"], found["overlaps"], found["fetched"]) == ([], 0, []), found
        assert len(found["pictures"]) == 3
        assert all(natural > 600 and PHONE * 0.8 < width < PHONE for natural, _, width in found["pictures"])
    assert light["paper"] != dark["paper"]
    assert all(one[1] != other[1] for one, other in zip(light["pictures"], dark["pictures"], strict=True))
