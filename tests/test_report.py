"""Claims about the page of a run (lab/report.py)."""

import re

from made_folders import RED, command, made_up
from PIL import Image

from parts.world import draw_scenes


def test_the_page_needs_nothing_else_and_shows_the_run(tmp_path):
    """Pictures are inside it, no address is, text of the run is no markup; a run without results is a page too."""
    for place in ("a/run", "b/run"):
        Image.fromarray(draw_scenes([(RED,)])[0]).save(made_up(tmp_path / place) / "samples.png")
    for name in ("curves.json", "scores.json", "result.json", "metrics.jsonl"):
        (tmp_path / "b/run" / name).unlink()
    command("report", tmp_path / "a/run", tmp_path / "b/run", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search("http|<script|<link|@import", re.sub('base64,[^"]*', "", page))
    assert "&lt;b&gt;&amp;amp;" in page and "&lt;i&gt;" in page and "<b>" not in page and "<i>" not in page
    assert all(f"<td>{cell}</td>" in page for cell in (0.875, 0.75, 0.3)) and "b/run</h2><p>This run has no res" in page


def test_the_page_links_to_maps_to_play_with(tmp_path):
    """As seen from where the page lies, and only where there are some."""
    (made_up(tmp_path / "a #/run") / "explore.html").write_text("")
    made_up(tmp_path / "b/run")
    (tmp_path / "pages").mkdir()
    command("report", tmp_path / "a #/run", tmp_path / "b/run", "--out", tmp_path / "pages/page.html")
    page = (tmp_path / "pages/page.html").read_text()
    assert re.findall('href="([^"]*)"', page) == ["../a%20%23/run/explore.html"]
