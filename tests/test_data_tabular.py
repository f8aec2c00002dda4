"""Tables: what becomes of columns, splits and targets, and what is said of files that are not as they should be."""

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ff_lightning import data
from ff_lightning.data.columns import MISSING

CSV = "id,size,colour,kind\n" + "".join(
    f"{i},{i % 7 + 0.5},{('red', 'green', 'blue')[i % 3]},{'cat' if i % 2 else 'dog'}\n" for i in range(60)
)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def written(content=CSV, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written


def ready(*args, name="Tabular", **arguments):
    module = getattr(data, name)(*args, **arguments)
    module.setup("fit")
    module.setup("test")
    return module


def inputs_of(split):
    return split.source.read(split.numbers)


def test_columns_are_standardised_and_one_hot_by_the_training_split_alone(write):
    module = ready(write(), "kind", drop=["id"])
    assert (module.num_classes, module.input_shape, module.class_names) == (2, (4,), ["cat", "dog"])
    assert module.encoder.feature_names == ["size", "colour=blue", "colour=green", "colour=red"]
    table = np.array([line.split(",") for line in CSV.splitlines()[1:]], object)
    lines = {name: getattr(module, f"{name}_set") for name in ("train", "val", "test")}
    # numbers of training and validation samples count what is left without the test samples
    rest = np.setdiff1d(np.arange(60), module._test.rows - 2)
    rows = {"train": rest[lines["train"].numbers], "val": rest[lines["val"].numbers], "test": module._test.rows - 2}
    size = table[:, 1].astype(float)
    mean, std = size[rows["train"]].mean(), size[rows["train"]].std()
    for name, split in lines.items():
        expected = [(size[i] - mean) / std for i in rows[name]]
        colours = [[float(table[i, 2] == colour) for colour in ("blue", "green", "red")] for i in rows[name]]
        torch.testing.assert_close(inputs_of(split)[:, 0], torch.tensor(expected, dtype=torch.float32))
        assert inputs_of(split)[:, 1:].tolist() == colours
        assert split.targets.tolist() == [int(table[i, 3] == "dog") for i in rows[name]]
    assert sorted(np.concatenate(list(rows.values()))) == list(range(60))


def test_the_test_set_is_the_same_for_every_seed_and_stratified(write):
    one, two = (ready(write(), "kind", drop=["id"], seed=seed, test_fraction=0.3) for seed in (0, 1))
    assert one._test.rows.tolist() == two._test.rows.tolist()
    assert one.train_set.numbers.tolist() != two.train_set.numbers.tolist()
    assert one.test_set.targets.bincount().tolist() == [9, 9]


@pytest.mark.parametrize("ending", ["tsv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_another_format_gives_the_same_samples(ending, write, tmp_path):
    header, *lines = (line.split(",") for line in CSV.splitlines())
    if ending == "parquet":
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        path = str(tmp_path / "table.parquet")
        pandas.read_csv(write()).to_parquet(path)
    else:
        text = CSV
        if ending == "tsv":
            text = CSV.replace(",", "\t")
        elif ending.startswith("jsonl"):
            rows = [{**dict(zip(header, line, strict=True)), "size": float(line[1])} for line in lines]
            text = "".join(json.dumps(row) + "\n" for row in rows)
        path = write(gzip.compress(text.encode()) if ending.endswith("gz") else text, f"table.{ending}")
    expected, found = (ready(each, "kind", drop=["id"]) for each in (write(), path))
    for split in ("train_set", "val_set", "test_set"):
        assert torch.equal(inputs_of(getattr(expected, split)), inputs_of(getattr(found, split)))
        assert torch.equal(getattr(expected, split).targets, getattr(found, split).targets)


def test_parquet_without_pandas_says_what_to_install(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"table.parquet: .*pip install ff-lightning\[parquet\]"):
        data.Tabular(write("", "table.parquet"), "kind")


def test_files_for_each_split_are_read_as_the_training_file(write):
    train = write()
    val = write("kind,colour,size,id,more\ndog,red,3.5,0,x\ncat,,,1,x\n", "val.csv")
    test = write("size,colour,kind\n0.5,purple,cat\n", "test.csv")
    module = ready(train, "kind", val=val, test=test, drop=["id"], on_missing="fill")
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [60, 2, 1]
    mean, std = (values[0] for values in module.statistics)
    values = [[(3.5 - mean) / std, 0, 0, 1], [0, 0, 0, 0]]
    torch.testing.assert_close(inputs_of(module.val_set), torch.tensor(values, dtype=torch.float32))
    assert inputs_of(module.test_set)[0, 1:].tolist() == [0, 0, 0], "a category that training never had"
    assert module.val_set.targets.tolist() == [1, 0]


def test_numbers_may_be_categories_and_classes_are_in_the_order_of_their_numbers(write):
    rows = [f"{i % 3},{(2, 10, 9)[i % 3]}" for i in range(60)]
    module = data.Tabular(write("\n".join(["code,level", *rows])), "level", categorical=["code"])
    assert module.class_names == ["2", "9", "10"]
    assert module.encoder.feature_names == ["code=0", "code=1", "code=2"]
    assert module.statistics == ([], [])


def test_a_class_may_be_called_none(write):
    module = ready(write(CSV.replace("dog", "none")), "kind", drop=["id"])
    assert module.class_names == ["cat", "none"]


def regression(write):
    rows = [f"{i},{i * i},{i % 2},{(i // 2) % 2 == 1}" for i in range(50)]
    return write("\n".join(["x,y,odd,half", *rows]))


def test_a_regression_keeps_the_unit_of_its_targets_unless_told(write):
    path = regression(write)
    module = ready(path, "y", task="regression", drop=["odd", "half"])
    assert (module.task, module.num_classes, module.class_names) == ("regression", 1, ["y"])
    assert module.train_set.targets.dtype == torch.float32
    assert {float(y) for y in module.test_set.targets} <= {float(i * i) for i in range(50)}
    standard = ready(path, "y", task="regression", drop=["odd", "half"], standardise_target=True)
    assert abs(standard.train_set.targets.mean()) < 1e-6
    assert abs(standard.train_set.targets.std(correction=0) - 1) < 1e-6
    (mean,), (std,) = standard.target_statistics
    torch.testing.assert_close(standard.test_set.targets * std + mean, module.test_set.targets)
    several = ready(path, ["y", "odd"], task="regression", standardise_target=True)
    assert several.train_set.targets.shape == (36, 2)
    torch.testing.assert_close(several.train_set.targets.mean(0), torch.zeros(2))


def test_several_labels_are_zeros_and_ones(write):
    module = ready(regression(write), ["odd", "half"], task="multilabel", drop=["y"])
    assert (module.num_classes, module.class_names, module.input_shape) == (2, ["odd", "half"], (1,))
    one = ready(regression(write), "odd", task="multilabel", drop=["y", "half"])
    assert one.train_set.targets.shape == (36, 1)
    (x, y), *_ = module.test_dataloader()
    mean, std = (values[0] for values in module.statistics)
    numbers = (x[:, 0] * std + mean).round().long()
    assert torch.equal(y, torch.stack([numbers % 2, numbers // 2 % 2], 1).float())


@pytest.mark.parametrize("word", [*sorted(MISSING - {""}), "", " "])
def test_what_is_missing_is_the_mean_or_no_category(word, write):
    text = CSV.replace("\n3,3.5,red,", f"\n3,{word},{word},")
    module = ready(write(text), "kind", drop=["id"], on_missing="fill")
    row = np.flatnonzero(np.concatenate([module._train.rows, module._test.rows]) == 5)[0]
    samples = [*module.encoder.transform(module._train), *module.encoder.transform(module._test)]
    assert samples[row].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"table.csv, line 5, column 'size': there is no value: on_missing='fill'"):
        ready(write(text), "kind", drop=["id"])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, r"table.csv: the file is empty"),
        ("\n\n", {}, "table.csv: the file is empty"),
        ("size,kind\n", {}, "table.csv: the file holds no row"),
        (CSV, {"target": "kin"}, r"target='kin' is not known: give a column of .*table.csv.*did you mean 'kind'"),
        (CSV, {"drop": ["nr"]}, "drop='nr' is not known"),
        (CSV, {"categorical": ["nr"]}, "categorical='nr' is not known"),
        (CSV, {"drop": ["id", "size", "colour"]}, "there is no column besides the target"),
        (CSV.replace(",", ";"), {}, r"table.csv, line 1: .*one column with delimiter=','; it seems to be ';'"),
        (CSV.replace(",", "\t"), {}, r"line 1: .*it seems to be a tab"),
        (CSV, {"delimiter": ";"}, r"line 1: .*one column with delimiter=';'; it seems to be ','"),
        (CSV.replace("red", "ré").encode("latin-1"), {}, r"table.csv, line 2: byte 0xe9 is not UTF-8"),
        (CSV.encode("utf-16"), {}, r"table.csv, line 1: byte 0xff is not UTF-8"),
        (CSV.replace("7,0.5", "7,0.5,1"), {}, r"table.csv, line 9: 5 values, the header names 4 columns"),
        (CSV.replace("7,0.5,", "7,"), {}, r"table.csv, line 9: 3 values, the header names 4 columns"),
        (CSV.replace("7,0.5,", "7,0;5,"), {}, r"table.csv, line 9, column 'size': '0;5' is not a finite number"),
        (CSV.replace("7,0.5,", "7,inf,"), {}, r"table.csv, line 9, column 'size': 'inf' is not a finite number"),
        (CSV.replace("\n7,0.5,green,cat", "\n7,0.5,green,"), {}, r"line 9, column 'kind': there is no target"),
        (CSV.replace("size", "colour"), {}, r"table.csv, line 1: the header names \['colour'\] more than once"),
        (CSV.replace("id,", ",", 1), {}, "line 1: the header has no name for column 1 of 4"),
        (CSV.split("\n", 1)[1].replace("red", "1").replace("dog", "2"), {}, r"line 1: must be a header with the names"),
        (CSV.replace("dog", "cat"), {}, r"two or more classes, it holds \['cat'\]"),
        (CSV + "x,1.5,\"red,cat\n", {}, r"table.csv, line 62: .*is a quote not closed"),
        (CSV + "60,1.5,red,cow\n", {}, "test_fraction=0.2 of 61 training samples: The least populated"),
        (CSV, {"target": "id", "drop": ["kind"]}, r"column 'id': holds 60 different numbers.*task='regression'"),
        (CSV, {"task": "regression"}, r"table.csv, line 2, column 'kind': 'dog' is not a finite number"),
        (CSV, {"target": ["size"], "task": "multilabel"}, r"line 2, column 'size': must be 0 or 1, it is '0.5'"),
        (CSV, {"target": ["kind", "size"]}, r"target=\['kind', 'size'\]: must be the name of a column for task="),
        (CSV, {"target": [], "task": "multilabel"}, r"target=\[\]: must be a name or names of columns"),
        (CSV, {"task": "regresion"}, "task='regresion' is not known.*did you mean 'regression'"),
        (CSV, {"on_missing": "drop"}, "on_missing='drop' is not known"),
        (CSV, {"drop": "id"}, "drop='id': must be a list"),
        (CSV, {"delimiter": ", "}, "delimiter=', ': must be one character"),
        (CSV, {"standardise_target": True}, "standardise_target=True is for task='regression'"),
        (CSV, {"test_fraction": 1}, "test_fraction=1: must be above 0 and below 1"),
        (CSV, {"target": "size", "task": "regression", "classes": ["a", "b"]}, r"classes=.*Tabular has no classes"),
        (CSV, {"target": "size", "task": "regression", "samples_per_class": 3}, "samples_per_class=3: Tabular has no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_line_and_column(content, arguments, message, write):
    with pytest.raises(ValueError, match=message):
        ready(**{"train": write(content), "target": "kind", **arguments})


def test_texts_that_are_no_categories_are_not_taken_for_some(write):
    rows = [f"{i},n{i},{i % 2}" for i in range(200)]
    path = write("\n".join(["x,name,y", *rows]))
    with pytest.raises(ValueError, match=r"table.csv, column 'name': holds 144 different texts, such as 'n0'"):
        data.Tabular(path, "y")
    assert data.Tabular(path, "y", categorical=["name"]).input_shape == (145,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"a": 1, "kind": "cat"}\n{"a": 1,\n', "t.jsonl, line 2: is not JSON"),
        ("t.jsonl", "[1]\n", r"t.jsonl, line 1: must be an object {...}, it is \[1\]"),
        ("t.txt", "", r"t.txt: the name of a table must end in"),
        ("t.csv.gz", CSV.encode(), "t.csv.gz: the file cannot be read: Not a gzipped file"),
        ("t.csv.gz", gzip.compress(CSV.encode())[:-20], "t.csv.gz: the file cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, write):
    with pytest.raises((ValueError, OSError), match=message):
        data.Tabular(write(content, name), "kind")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv: there is no such file"):
        data.Tabular(str(tmp_path / "nowhere.csv"), "kind")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("size,kind\n1,cat\n", r"test.csv: has no column \['colour'\], which the training samples have"),
        ("size,colour,kind\n1,red,cat\n1,red,cow\n", r"test.csv, line 3: class 'cow' is none of the classes"),
        (
            "size,colour,kind\n1,red,cat\nbig,red,cat\n",
            r"test.csv, line 3, column 'size': 'big' is not a finite",
        ),
    ],
)
def test_a_test_file_that_does_not_fit(content, message, write):
    module = data.Tabular(write(), "kind", test=write(content, "test.csv"), drop=["id"])
    module.setup("fit")
    with pytest.raises(ValueError, match=message):
        module.setup("test")


def test_empty_lines_are_passed_over_and_the_lines_after_them_are_named_as_they_are(write):
    spaced = CSV.replace("\n5,", "\n\n  \n,,,\n5,").replace("\n", "\r\n")
    one, two = ready(write(), "kind", drop=["id"]), ready("\ufeff" and write("\ufeff" + spaced), "kind", drop=["id"])
    assert torch.equal(inputs_of(one.train_set), inputs_of(two.train_set))
    assert set(two._train.rows) | set(two._test.rows) == {*range(2, 7), *range(10, 65)}


def test_the_embedded_tables_can_be_learned():
    cancer, diabetes = ready(name="BreastCancer", batch_size=32), ready(name="Diabetes", batch_size=32)
    torch.manual_seed(0)
    for module in (cancer, diabetes):
        net = nn.Linear(*module.input_shape, 2)
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(10):
            for x, y in module.train_dataloader():
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x)[:, 0], y) if y.is_floating_point() else (
                    nn.functional.cross_entropy(net(x), y)
                )  # fmt: skip
                loss.backward()
                optimizer.step()
        ((x, y),) = [tuple(map(torch.cat, zip(*module.test_dataloader(), strict=True)))]
        with torch.no_grad():
            scores = net(x)
        if module is cancer:
            assert (scores.argmax(1) == y).float().mean() > 0.93
        else:
            assert ((scores[:, 0] - y) ** 2).mean() / y.var() < 0.6
