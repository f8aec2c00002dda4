"""Models on the Hugging Face hub: weights without code, and a model card."""

import json
import tempfile
from pathlib import Path
from typing import Any

from ff_lightning.inference.exporting import export
from ff_lightning.inference.facts import Facts
from ff_lightning.inference.formats import HUB_FILES
from ff_lightning.inference.predictor import Predictor
from ff_lightning.util.extras import needs

_NOT_ON_CARDS = ("num_classes", "input_shape", "task")
"""Arguments that the card has in words."""


def save_pretrained(
    predictor: Predictor, folder: str | Path, license: str | None = None, notes: str = "", **arguments: Any
) -> None:
    """Write ``model.safetensors`` and a model card, ``README.md``, into a folder.

    Args:
        predictor: The result of `ff_lightning.load` for a checkpoint.
        folder: It is created; files of an earlier call are replaced.
        license: Licence of the weights, in the hub's spelling, such as ``"apache-2.0"``; None: the card says that there
            is none.
        notes: Markdown for the card: what it is for, what it was tested on.
        arguments: The arguments of `load` besides the path, such as ``backbone=network``.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: As `ff_lightning.inference.export`.
    """
    folder = Path(folder).expanduser()
    weights, card = HUB_FILES
    export(predictor, folder / weights, "safetensors", **arguments)
    (folder / card).write_text(model_card(predictor.facts, license, notes), encoding="utf-8")


def push_to_hub(
    predictor: Predictor,
    name: str,
    license: str | None = None,
    notes: str = "",
    private: bool = False,
    **arguments: Any,
) -> str:
    """Upload what `save_pretrained` writes; `ff_lightning.from_pretrained` brings it back.

    Args:
        predictor: As of `save_pretrained`, like `license`, `notes` and `arguments`.
        name: ``"user/model"``; it is created if missing.
        license: See above.
        notes: See above.
        private: Whether a new model is private.
        arguments: See above.

    Returns:
        Its address.

    Raises:
        ModuleNotFoundError: If huggingface_hub or safetensors is not installed.
    """
    hub = needs("huggingface_hub", "hub").HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(predictor, folder, license, notes, **arguments)
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Model of ff-lightning"))


def model_card(facts: Facts, license: str | None = None, notes: str = "") -> str:
    """The card of a model, Markdown with the head that the hub reads."""
    head = ["---", "library_name: ff-lightning", "tags: [image-classification, local-learning]"]
    head += [f"license: {json.dumps(license) if ':' in license else license}"] if license else []
    method = facts.class_path.rpartition(".")[2]
    data = (facts.data or "not recorded").rpartition(".")[2]
    recipe = {name: value for name, value in facts.arguments.items() if name not in _NOT_ON_CARDS}
    names = ", ".join(" ".join(name.split()) for name in facts.class_names[:20])
    more = f" and {len(facts.class_names) - 20} more" if len(facts.class_names) > 20 else ""
    figures = "".join(f"| `{name}` | {value:.4f} |\n" for name, value in facts.figures.items())
    measured = f"| figure | value |\n| --- | --- |\n{figures}" if figures else "None was recorded in the checkpoint.\n"
    shape = " x ".join(map(str, facts.input_shape))
    settings = "".join(f"{name}: {json.dumps(value)}\n" for name, value in recipe.items())
    command = f"```bash\n{facts.command}\n```\n\n" if facts.command else ""
    return f"""{chr(10).join(head)}
---

# {method} on {data}

{facts.num_classes} classes: {names}{more}. Images of {shape}, normalised with {json.dumps(facts.statistics)}.

```python
import ff_lightning

predictor = ff_lightning.from_pretrained("NAME")  # its name on the hub, or the path of the folder
for answer in predictor(["image.jpg"]):
    print(answer.name, answer.probability)
```

The weights are tensors alone (safetensors): nothing in them runs code.

## How it was trained

{facts.epochs} epochs with ff-lightning {facts.version}:

{command}```yaml
class_path: {method}
{settings}```

## Figures

Of the validation at which the weights were written; they were chosen by it, so a test on other images may be worse.

{measured}
## Licence

{license or "None was given: ask whoever made it before you use it."}
{chr(10) + notes + chr(10) if notes else ""}"""
