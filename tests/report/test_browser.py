"""The page in headless Chromium: pictures load, nothing is cut off, it prints.

Collected only where `chromium` is on the path (see conftest.py).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll(".scroll, h2, h3, p, .origin, figure")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1);
  document.title = JSON.stringify({
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
    cut: wide.map(e => e.className + ": " + e.textContent.slice(0, 60)),
    sideways: document.documentElement.scrollWidth > innerWidth,
    beside: [...document.querySelectorAll(".pair:not(.stacked)")].map(e =>
      e.children[1].getBoundingClientRect().left > e.children[0].getBoundingClientRect().right - 1),
    asked: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Run headless Chromium on a page: its standard output."""
    profile = tmp_path_factory.mktemp("profile")

    def run(page: Path, *arguments: str) -> str:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", *arguments]
        result = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("width", [1280, 700])
def test_pictures_load_and_nothing_is_cut_off(chromium, page, width):
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    dom = chromium(probed, f"--window-size={width},1000", "--virtual-time-budget=5000", "--dump-dom")
    found = json.loads(
        re.search("<title>(.*?)</title>", dom).group(1).replace("&amp;", "&").replace("&lt;", "<")
    )
    assert len(found["images"]) == 12
    for complete, natural, shown in found["images"]:
        assert complete
        assert natural > 0
        assert shown > 250
    assert found["cut"] == []
    assert not found["sideways"]
    assert found["asked"] == []
    assert len(found["beside"]) >= 5
    assert all(beside == (width == 1280) for beside in found["beside"])


def test_it_prints_on_pages_with_every_picture(chromium, page, tmp_path):
    target = tmp_path / "page.pdf"
    chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 5 <= pages <= 20
    box = re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", data)
    assert [round(float(side)) for side in box.groups()] == [595, 842]  # A4


def test_a_screenshot_has_dark_text_on_light_ground(chromium, page, tmp_path):
    from PIL import Image

    target = tmp_path / "page.png"
    chromium(page, "--window-size=1280,2000", f"--screenshot={target}")
    image = Image.open(target).convert("L")
    shares = image.histogram()
    total = image.width * image.height
    assert sum(shares[240:]) / total > 0.6
    assert sum(shares[:80]) / total > 0.005
