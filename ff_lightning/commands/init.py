"""``ff-lightning init``: a config to start from."""

from argparse import Namespace

from ff_lightning.commands.start import EPOCHS
from ff_lightning.util.files import replacing

TEMPLATE = """\
# ff-lightning fit --config {name}
# What is left out has its default; see: ff-lightning fit --config {name} --print_config
seed_everything: 0
trainer:
  max_epochs: {epochs}
  # precision: bf16-mixed      # on a GPU
model:
  class_path: SFF              # Backprop: the same network and recipe by backpropagation
  init_args:
    backbone: cnn              # resnet18, mobilenet_v3_small, timm/NAME, or class_path and init_args of your own
    # stem: small              # for images of about 32 pixels
    granularity: block         # layer, block, stage
    lr: 0.005
data:
  class_path: Digits           # CIFAR10; ImageFolder for root/{{train,val,test}}/<class>/*; see docs/data.md
  init_args:
    # root: data
    batch_size: 64
"""


def main(settings: Namespace) -> None:
    """Write a config to start from.

    Args:
        settings: See `ff_lightning.commands.parsers.init`.

    Raises:
        FileExistsError: If the file is there already.
    """
    path = settings.file
    if path.exists():
        raise FileExistsError(f"{path} is there already: give another name")
    with replacing(path) as part:
        part.write_text(TEMPLATE.format(name=path, epochs=EPOCHS), encoding="utf-8")
    print(f"{path}: edit it, then: ff-lightning fit --config {path}")
