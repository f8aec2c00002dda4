"""The site is built without a warning, and its links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.pages import PAGES, ROOT, anchors, links, name_of


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target
        if page.is_relative_to(ROOT / "docs"):
            on_the_site = place.is_relative_to(ROOT / "docs") or place.parent == ROOT / "notebooks"
            assert on_the_site, f"{target}: the site has nothing else"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs pip install -e '.[docs]'")
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"(.*?)\"", page.read_text())
        loaded += re.findall(r"<link [^>]*rel=\"(?:stylesheet|preload)\"[^>]* href=\"(.*?)\"", page.read_text())
        assert not [address for address in loaded if re.match(r"(\w+:)?//", address)]
    start = (tmp_path / "index.html").read_text()
    for page in (*(ROOT / "docs/methods").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")):
        assert f'href="{page.parent.name}/{page.stem}/"' in start, "each method and notebook is in the navigation"
    assert "GreedyBlocks" in (tmp_path / "api/parts/index.html").read_text()
