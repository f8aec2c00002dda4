"""Every command line of this package on every page is one that it understands."""

import argparse
import re
import shutil
import sys
from itertools import pairwise

import pytest
import yaml
from jsonargparse import auto_parser

from ff_lightning import results
from ff_lightning.benchmark import __main__ as benchmark
from ff_lightning.benchmark import throughput
from ff_lightning.cli import main
from ff_lightning.commands import sheet
from ff_lightning.commands.answers import PlainParser
from ff_lightning.commands.start import OF_TRAINER, is_of_files
from tests.pages import MYPACKAGE, PAGES, ROOT, code, commands, name_of
from tests.test_cli import QUICK

FAST = ("README.md", "docs/use.md")


class Parsed(BaseException):
    """A command line was understood; nothing of it was run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that pages speak of: configs, a checkpoint in each place, classes of the user's own."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "CONFIG").symlink_to(ROOT / "configs/sff/digits_cnn.yaml")
    (folder / "config.yaml").write_text("model: SFF\n")
    (folder / "mypackage.py").write_text(MYPACKAGE)
    main(["fit", *QUICK, "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(folder)])
    trained = folder / "lightning_logs/version_0/checkpoints/last.ckpt"
    for place in ("last.ckpt", "FILE", *(f"runs/finetune-{i}/{trained.relative_to(folder)}" for i in range(3))):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained, folder / place)
    return folder


@pytest.fixture
def parse(folder, monkeypatch):
    """What parses a command line by the parser of its command."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)

    def parse_known_args(parser, args=None, namespace=None):
        _, rest = argparse.ArgumentParser.parse_known_args(parser, args, namespace)
        if rest and "results" not in parser.prog:
            parser.error(f"unrecognized arguments: {rest}")
        raise Parsed(rest)

    def parse_args(parser, args=None):
        super(sheet._Parser, parser).parse_args(args)
        raise Parsed

    monkeypatch.setattr(PlainParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sheet._Parser, "parse_args", parse_args)
    return parse_command


def parse_command(module, args):
    """Parse, and no more; SystemExit with a code if an argument is not understood."""
    if module == "ff_lightning.benchmark.throughput":
        auto_parser(throughput.compare).parse_args(args)
    elif module == "ff_lightning.results":
        with pytest.raises(Parsed) as parsed:
            results.main(args)
        methods = args[args.index("--methods") + 1] if "--methods" in args else "*"
        configs = [path.relative_to(ROOT) for arg in args for path in ROOT.glob(f"configs/{methods}/{arg}.yaml")]
        for config in configs:
            parse_command("ff_lightning", ["fit", "--config", str(config), *parsed.value.args[0]])
        assert configs or {"--plot", "--figures"} & {*args}
    elif module == "ff_lightning.benchmark":
        with pytest.raises(Parsed):
            benchmark.main(args)
    else:
        shown = {"--help", "--model.help", "--data.help", "--print_config"} & set(args)
        of_trainer = args[:1] and args[0] in OF_TRAINER and not is_of_files(args)
        try:
            main([*args, "--print_config"] if of_trainer and not shown else args)
        except Parsed:
            pass
        except SystemExit as end:
            if end.code:
                raise


def of_package(words):
    """The module of this package that a command line runs, and its arguments; None: another program."""
    if "ff-lightning" in words:
        return "ff_lightning", words[words.index("ff-lightning") + 1 :]
    for option, module in pairwise(words):
        if option == "-m" and module.startswith("ff_lightning"):
            return module, words[words.index(module) + 1 :]
    return None


def of_page(page):
    """The commands of a page that belong to this package, each with the line of its block."""
    blocks = [(line, block) for line, block in code(page, "bash") if re.search(r"ff-lightning|-m ff_lightning", block)]
    every = [(line, words) for line, block in blocks for words in commands(block)]
    return [(line, *of_package(words)) for line, words in every if of_package(words)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if name_of(page) in FAST else pytest.mark.slow, id=name_of(page))
        for page in PAGES
        if of_page(page)
    ],
)
def test_command_lines_are_understood(page, parse, capsys):
    for line, module, args in of_page(page):
        try:
            parse(module, args)
        except SystemExit:
            pytest.fail(f"{name_of(page)}:{line}: {' '.join(args)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", [page for page in PAGES if [*code(page, "yaml")]], ids=name_of)
def test_yaml_is_a_config(page, parse):
    for _, block in code(page, "yaml"):
        assert yaml.safe_load(block)
        parse("ff_lightning", ["fit", f"--config={block}"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_of_code_is_left_out(page):
    opened = re.findall(r"^ *```(.*)$", page.read_text(), flags=re.M)[::2]
    assert set(opened) <= {"python", "bash", "yaml", "text"}, "python and bash are checked, text is none of them"
