"""The notebooks as pages of the site, with the outputs that are stored in them; as a command, runs them anew.

python docs/notebooks.py [NAME ...]    pip install nbclient ipykernel
"""

import json
import re
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
KINDS = ("image/png", "text/plain")
"""Of the outputs that are stored."""
ANSI = r"\x1b\[[\d;]*m"
"""Colours and weights of a terminal."""


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: adds a page for each notebook, and the notebook itself."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        text = page(json.loads(path.read_text()), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs: a link to a notebook leads to its page."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/(\w+)\.ipynb\)", r"](\1notebooks/\2.md)", markdown)


def page(notebook: Any, name: str) -> str:
    """The Markdown of a notebook; a picture is described by the `alt` of its cell's metadata."""
    title, *parts = _parts(notebook["cells"])
    heading, _, rest = title.partition("\n")
    source = f"*The outputs are those of a run on {notebook['metadata']['run']}. Download: [{name}]({name})*"
    return "\n\n".join(["---\nhide: [toc]\n---", heading, rest.strip(), source, *parts])  # code needs the width


def _parts(cells: list[Any]) -> Any:
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source.replace("](../docs/", "](../")
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data = {"text/plain": output.get("text"), **output.get("data", {})}
            if "image/png" in data:
                yield f"![{cell['metadata']['alt']}](data:image/png;base64,{''.join(data['image/png']).strip()})"
            else:
                yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def run(path: Path) -> None:
    """Run a notebook and store its outputs; what goes to stderr, such as the log of Lightning, is left out."""
    import nbformat
    import torch
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    metadata = {**notebook.metadata, "run": f"{date.today()} with torch {torch.__version__.partition('+')[0]} on a CPU"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, record_timing=False)
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    output.data = {kind: re.sub(ANSI, "", output.data[kind]) for kind in KINDS if kind in output.data}
    notebook.metadata = metadata
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for stem in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{stem}.ipynb")
