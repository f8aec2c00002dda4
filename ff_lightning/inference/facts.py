"""The facts about a trained model that its checkpoint and its exports hold."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ff_lightning import __version__


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is needed to use a model, as values that JSON can hold.

    Attributes:
        class_path: Import path of the class of the model.
        arguments: Those that it is made with.
        num_classes: K.
        input_shape: Of a sample, such as (C, H, W).
        task: Name of the class of its task.
        class_names: K names; numbers from 0 if the data had no names.
        statistics: Mean and standard deviation of each channel, for pixels from 0 to 1; None: the data had none.
        data: Name of the class of the data that it was trained on, if known.
        figures: Validation figures at the time of the checkpoint, by the names they were logged by.
        epochs: Number of epochs trained.
        command: Command line of the training, if there was one.
        version: Of the package that wrote the checkpoint.
    """

    class_path: str
    arguments: dict[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]
    task: str
    class_names: list[str]
    statistics: list[list[float]] | None = None
    data: str | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    epochs: int | None = None
    command: str | None = None
    version: str = __version__

    def to_json(self) -> str:
        """As JSON.

        Raises:
            ValueError: If an argument of the model cannot be written as JSON, such as a tensor.
        """

        def refuse(value: Any) -> Any:
            raise ValueError(f"an argument of the model holds {value!r}, which JSON cannot hold: give it plain values")

        return json.dumps(dataclasses.asdict(self), default=refuse)

    @classmethod
    def from_json(cls, text: str | None, source: str) -> "Facts":
        """What `to_json` wrote.

        Raises:
            ValueError: If it is none, such as that of a later version.
        """
        try:
            values = json.loads(text or "")
            return cls(**{**values, "input_shape": tuple(values["input_shape"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{source} was not written by ff-lightning export, or by another version of it (this is {__version__})"
            ) from error


def facts_of(checkpoint: Mapping[str, Any], source: str) -> Facts:
    """What a checkpoint of this package says of its model.

    Args:
        checkpoint: Its content.
        source: Its name, for errors.

    Raises:
        ValueError: If it does not say which model it is of.
    """
    saved = checkpoint.get("ff_lightning", {})
    model, data, arguments = saved.get("model"), saved.get("data", {}), saved.get("arguments", {})
    if not model:
        raise ValueError(
            f"{source} does not say of which model it is: it was written by another program, or before version 0.2.0 "
            f"(this is {__version__}); resume the run for an epoch to write it anew, or use load_from_checkpoint"
        )
    names = data.get("class_names") or [str(number) for number in range(model["num_classes"])]
    return Facts(
        class_path=model["class_path"],
        arguments=arguments,
        num_classes=model["num_classes"],
        input_shape=tuple(model["input_shape"]),
        task=model["task"],
        class_names=names,
        statistics=data.get("statistics"),
        data=checkpoint.get("datamodule_hyper_parameters", {}).get("_class_path", data.get("class")),
        figures={
            state["monitor"]: float(state["current_score"])
            for state in checkpoint.get("callbacks", {}).values()
            if isinstance(state, Mapping) and state.get("monitor") and state.get("current_score") is not None
        },
        epochs=checkpoint.get("epoch", -1) + 1,
        command=saved.get("command"),
        version=saved.get("version", "0.1.0"),
    )
