"""Files of a trained model: written, read back, and what each needs to be installed.

| format | file | holds | needs |
| --- | --- | --- | --- |
| onnx | ``.onnx`` | the network as a graph; facts in the metadata | onnx, onnxscript; to run it onnxruntime |
| torch | ``.pt2`` | the network as a program of `torch.export`; facts in a file within | - |
| safetensors | ``.safetensors`` | the weights; facts in the header; this package makes the network | safetensors |

Input ``images`` (B, C, H, W), normalised, and output ``scores`` (B, K), both float32; B may be any number.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from ff_lightning.inference.facts import Facts
from ff_lightning.util.extras import needs

KEY = "ff_lightning"
"""Of the facts, as JSON, in the metadata of each format."""
HUB_FILES = ["model.safetensors", "README.md"]
"""What is taken from a model on the hub, and all that is written for it."""

Network = Callable[[Tensor], Tensor]


class Answering(nn.Module):
    """A trained model with named input and output, for exporters."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, K) after the vote."""
        return self.learner(images)


def _example(facts: Facts) -> tuple[Tensor]:
    return (torch.zeros(2, *facts.input_shape),)  # a batch of one would be taken for the only size


_SHAPES = {"images": {0: torch.export.Dim("batch")}}


# ------------------------------------------------------------------------------------------------------------- writing


def write_onnx(learner: nn.Module, facts: Facts, path: Path) -> None:
    """Write the graph; see the table."""
    for module in ("onnx", "onnxscript"):
        needs(module, "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        graph: Any = torch.onnx.export(
            Answering(learner),
            _example(facts),
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=_SHAPES,
            dynamo=True,
            verbose=False,
        )
    graph.model.metadata_props[KEY] = facts.to_json()
    graph.save(path, external_data=False)


def write_torch(learner: nn.Module, facts: Facts, path: Path) -> None:
    """Write the program; see the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Answering(learner), _example(facts), dynamic_shapes=_SHAPES, strict=False)
    torch.export.save(program, path, extra_files={f"{KEY}.json": facts.to_json()})


def write_safetensors(learner: nn.Module, facts: Facts, path: Path) -> None:
    """Write the weights; see the table."""
    tensors = {name: value.detach().clone().contiguous() for name, value in learner.state_dict().items()}
    needs("safetensors.torch", "hub").save_file(tensors, path, {KEY: facts.to_json(), "format": "pt"})


WRITERS: Mapping[str, tuple[str, Callable[[nn.Module, Facts, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch": (".pt2", write_torch),
    "safetensors": (".safetensors", write_safetensors),
}
"""By the name of the format, the ending of its files and what writes them."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_onnx(path: Path, device: torch.device) -> tuple[Network, Facts]:
    """The network and its facts; it runs on the CPU."""
    runtime = needs("onnxruntime", "onnx")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"{path} is no model that ONNX Runtime can read: {error}") from error
    facts = Facts.from_json(session.get_modelmeta().custom_metadata_map.get(KEY), str(path))

    def network(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["scores"], {"images": images.cpu().numpy()})[0])

    return network, facts


def read_torch(path: Path, device: torch.device) -> tuple[Network, Facts]:
    """The network and its facts."""
    found = {f"{KEY}.json": ""}
    try:
        program = torch.export.load(path, extra_files=found)
    except Exception as error:  # whatever a damaged archive leads to
        raise ValueError(f"{path} is no program of torch.export: {error}") from error
    facts = Facts.from_json(found[f"{KEY}.json"], str(path))
    return move_to_device_pass(program, device).module(), facts


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """The weights and their facts."""
    library = needs("safetensors", "hub")
    try:
        with library.safe_open(path, "pt") as file:
            facts = Facts.from_json((file.metadata() or {}).get(KEY), str(path))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path} is no whole file of safetensors: {error}") from error


READERS: Mapping[str, Callable[[Path, torch.device], tuple[Network, Facts]]] = {
    ".onnx": read_onnx,
    ".pt2": read_torch,
}
"""By the ending of a file that holds a network, what reads it."""
