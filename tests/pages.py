"""The pages of the documentation: their code, their links, their anchors."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

MYPACKAGE = """
import torch
from ff_lightning import PooledHead, SFF
from ff_lightning.data import Digits

class MyHead(PooledHead): pass
class MyMethod(SFF): pass
class MyData(Digits): pass
def make_head(channels, classes, size): return PooledHead(channels, classes, size=size)

class MyNetwork(torch.nn.Sequential):
    def __init__(self, width: int):
        super().__init__(torch.nn.Conv2d(1, width, 3))
"""
"""A user's own classes, as pages call them."""


def name_of(page):
    return str(page.relative_to(ROOT))


def code(page, *languages):
    """The code blocks of a page in one of these languages, with the number of the line where each begins."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        if match[1] in languages:
            yield text.count("\n", 0, match.start()) + 2, match[2]


def without_code(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda found: found[0].replace("[", "").replace("]", ""), text)


def links(page):
    """The relative links and pictures of a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(page):
    """What a link to a part of a page may name: its headings, as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ +(.+)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(block):
    """The commands of a bash block that bash itself does not know, word by word, with variables and loops expanded."""
    # without a PATH every program is one that is not found
    script = "command_not_found_handle() { printf '%q ' \"$@\"; echo; }\ncd() { :; }\n" + block
    empty = {"PATH": "/nowhere"}
    done = subprocess.run([shutil.which("bash"), "-c", script], cwd="/", env=empty, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]
