"""What bash completes, asked as bash asks: by the words before the cursor."""

import re
import shutil
import subprocess

import pytest

from ff_lightning import cli, data, modules
from ff_lightning.commands.start import COMMANDS, OF_TRAINER
from tests.trained import run

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="it is a script for bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "ff-lightning"
    path.write_text(run("completion"))
    return path


@pytest.fixture
def complete(script):
    def ask(*words):
        """The completions of the last word."""
        commands = f"""source {script}; COMP_WORDS=(ff-lightning "$@"); COMP_CWORD=$#; _ff_lightning
        printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-uc", commands, "bash", *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return ask


def test_commands(complete):
    assert set(complete("")) == set(COMMANDS)
    assert complete("ex") == ["exits", "export"]


@pytest.mark.parametrize("command", OF_TRAINER)
def test_every_option_of_the_parser_is_completed(command, complete):
    parser = cli._Parser.commands[command]
    groups = ("model.", "data.")  # of the default classes; see below
    known = {f"--{name}" for name in cli._options(parser) if not name.startswith(groups) and "config" not in name}
    assert known
    assert known <= set(complete(command, "--"))


def test_options_of_the_class_that_was_asked_for(complete):
    assert "--model.granularity" in complete("fit", "--model.")
    for words in (["--model", "FF"], ["--model", "=", "ff_lightning.FF"]):
        assert "--model.theta" in complete("fit", *words, "--seed_everything", "1", "--model.")
        assert "--model.reach" not in complete("fit", *words, "--model.")
    assert complete("sheet", "--data", "CIFAR100", "--data.la") == ["--data.labels"]
    assert not complete("exits", "--model.")


def test_options_of_commands_without_the_trainer(complete):
    assert complete("predict", "--o") == ["--out", "--overwrite"]
    assert complete("probe", "--") == ["--help", "--ckpt_path", "--data.root", "--decays", "--seed", "--no_test"]
    for command in set(COMMANDS) - set(OF_TRAINER):
        assert "--help" in complete(command, "--")


def test_values(complete):
    assert {"SFF", "Backprop"} < set(complete("fit", "--model", "")) < set(modules.__all__)
    assert set(complete("fit", "--data.help", "")) == set(data.__all__) - {"DataModule", "ImageData"}
    assert complete("fit", "--model", "=", "S") == ["SCFF", "SFF"]
    assert complete("fit", "--model.norm", "la") == ["layer"]
    assert complete("fit", "--model.backbone", "resnet1") == ["resnet101", "resnet152", "resnet18"]
    assert "bf16-mixed" in complete("fit", "--trainer.precision", "")
    assert complete("export", "--format", "") == ["onnx", "torch", "safetensors"]
    assert complete("test", "--ckpt_path", "la") == ["last"]


def test_anything_else_is_completed_as_a_file(script, complete):
    assert complete("fit", "--config", "conf") == complete("test", "--ckpt_path", "runs/") == []
    assert re.search(r"^complete -o default -F _ff_lightning ff-lightning$", script.read_text(), re.MULTILINE)
