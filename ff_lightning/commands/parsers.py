"""What the commands without a Trainer take; the commands themselves import Lightning, and so come later."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping

from ff_lightning.commands.answers import PlainParser, as_path
from ff_lightning.local.exits import RULES
from ff_lightning.local.probes import DECAYS


def predict() -> PlainParser:
    """Of ``ff-lightning predict --data.root``."""
    parser = PlainParser(
        prog="ff-lightning predict",
        description="Classify images with a trained model: a table of file, class and probability.",
        epilog="With --data, --config or an option of trainer or model it is Lightning's own predict, over the test "
        "samples of a data module; it writes no table.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint (or last, or best) or export of a model")
    parser.add_argument("--data.root", dest="root", required=True, help="folder of images, one image, or a pattern")
    parser.add_argument("--out", type=as_path, default="predictions.csv", help="table to write: .csv or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace the table if it is there")
    parser.add_argument("--scores", action="store_true", help="also a column of scores for each class")
    parser.add_argument("--batch_size", type=int, default=64, help="images that run at once")
    parser.add_argument("--device", default=None, help="such as cpu or cuda; by itself: cuda where there is one")
    return parser


def exits() -> PlainParser:
    """Of ``ff-lightning exits``."""
    parser = _of_trained(
        "exits",
        "Error against multiply-adds: each depth for all samples, and early exit by each rule. Thresholds "
        "are set on the validation samples, errors are those of the test samples.",
    )
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="rules to try")
    parser.add_argument("--out", type=as_path, help="picture to draw, such as exits.png")
    return parser


def probe() -> PlainParser:
    """Of ``ff-lightning probe``."""
    parser = _of_trained(
        "probe",
        "Accuracy of a linear read-out of all layers, trained on frozen features; the same for untrained "
        "weights. Its penalty is chosen on the validation samples, the test samples are looked at once.",
    )
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS, help="penalties to choose from")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained weights")
    parser.add_argument("--no_test", action="store_true", help="validation samples alone, to choose settings by")
    return parser


def export() -> PlainParser:
    """Of ``ff-lightning export``."""
    parser = _of_trained(
        "export", "Write a trained model for use elsewhere.", "images to compare the export with the original on"
    )
    formats = ("onnx", "torch", "safetensors")
    parser.add_argument("--format", choices=formats, default="onnx", help="safetensors holds the weights alone")
    parser.add_argument("--out", type=as_path, help="file to write; by itself: beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    return parser


def _of_trained(
    command: str, description: str, root: str = "folder of the data; by itself: the one of the training"
) -> PlainParser:
    """What the commands that look at a trained model have in common; `root` is the help of the folder."""
    parser = PlainParser(prog=f"ff-lightning {command}", description=description)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a trained model, or last, or best")
    parser.add_argument("--data.root", dest="root", help=root)
    return parser


def init() -> PlainParser:
    """Of ``ff-lightning init``."""
    parser = PlainParser(prog="ff-lightning init", description="Write a config to start from.")
    parser.add_argument("file", type=as_path, nargs="?", default="config.yaml", help="to write; config.yaml")
    return parser


def completion() -> PlainParser:
    """Of ``ff-lightning completion``."""
    return PlainParser(
        prog="ff-lightning completion",
        description="Print a script by which bash completes commands, options, names of classes and other values.",
        epilog="To use it: ff-lightning completion > ~/.local/share/bash-completion/completions/ff-lightning",
        formatter_class=RawDescriptionHelpFormatter,  # a command that is broken into lines cannot be copied
    )


PARSERS: Mapping[str, Callable[[], PlainParser]] = {
    parser.__name__: parser for parser in (predict, exits, probe, export, init, completion)
}
