"""Texts: token ids of one length with their mask, and what is said of files that are not as they should be."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from ff_lightning import data
from tests.conftest import REAL_DATA

pytest.importorskip("tokenizers")

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
ROWS = [(f"A {(GOOD, BAD)[i % 2][i % 3]} film, number {i}.", ("pos", "neg")[i % 2]) for i in range(60)]


def as_csv(rows=ROWS):
    return "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def written(content=None, name="texts.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = as_csv() if content is None else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written


def ready(path, **arguments):
    module = data.Text(path, **{"length": 8, **arguments})
    module.setup("fit")
    module.setup("test")
    return module


def test_a_batch_is_ids_with_a_mask_of_what_is_text(write):
    module = ready(write(), batch_size=4, length=12)
    assert (module.input_shape, module.num_classes, module.class_names) == ((12,), 2, ["neg", "pos"])
    tokenizer = module.encoder.tokenizer
    for (inputs, targets), start in zip(module.test_dataloader(), range(0, 12, 4), strict=True):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.dtype == mask.dtype == targets.dtype == torch.int64
        assert ids.max() < module.vocabulary
        for row in range(4):
            text = module._test.inputs[start + row].lower().replace(",", " ,").replace(".", " .").split()
            known = [tokenizer.token_to_id(word) or 1 for word in text]
            assert ids[row].tolist() == known + [0] * (12 - len(text))
            assert mask[row].tolist() == [1] * len(text) + [0] * (12 - len(text))
        assert targets.tolist() == [module.class_names.index(name) for name in module._test.targets[start : start + 4]]


def test_the_vocabulary_is_that_of_the_training_split_alone(write):
    module = ready(write())
    number = [int(text.split()[-1].rstrip(".")) for text in module._train.inputs]
    words = {str(number[i]) for i in module.train_set.numbers}
    others = {str(i) for i in range(60)} - words
    vocabulary = module.encoder.tokenizer.get_vocab()
    assert words <= set(vocabulary)
    assert not others & set(vocabulary)
    assert module.vocabulary == len(vocabulary)
    assert ready(write(), vocabulary=10).vocabulary == 10


def test_texts_are_cut_off_at_the_length(write):
    short, whole = ready(write(), length=3), ready(write(), length=30)
    torch.testing.assert_close(short.train_set.source.inputs, whole.train_set.source.inputs[:, :3])


def test_every_text_can_be_written_in_bytes_and_is_read_back(write):
    texts = ["Grüße, 世界!", "Ein [PAD] und [UNK]", "tabs\tand\nlines", "\u200b\u200b", "ABC abc"]
    rows = [(text + "." * i, "ab"[i % 2]) for i, text in enumerate(texts * 8)]
    path = write("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), "texts.jsonl")
    from tokenizers import decoders

    module = ready(path, level="byte", vocabulary=300, length=100)
    module.encoder.tokenizer.decoder = decoders.ByteLevel()
    (inputs, _), *_ = module.test_dataloader()
    for ids, mask, text in zip(inputs["input_ids"], inputs["attention_mask"], module._test.inputs, strict=True):
        assert module.encoder.tokenizer.decode(ids[mask.bool()].tolist(), skip_special_tokens=False) == text
        assert (ids[mask.bool()] > 1).all()
        assert not ids[~mask.bool()].any()


def test_a_folder_for_each_class_gives_the_same_texts(write, tmp_path):
    for i, (text, label) in enumerate(ROWS):
        write(text, f"folder/{label}/{i:02}.txt")
    table, folder = ready(write()), ready(str(tmp_path / "folder"))
    assert folder.class_names == table.class_names

    for module in (table, folder):
        samples = (module.read_train(), module.read_test())
        found = {pair for part in samples for pair in zip(part.inputs, part.targets, strict=True)}
        assert found == {(text, ["neg", "pos"].index(label)) for text, label in ROWS}


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_another_process(write):
    code = (
        "import sys; from ff_lightning import data\n"
        "for level in ('word', 'byte'):\n"
        "    print(data.Text(sys.argv[1], level=level, vocabulary=300).encoder.tokenizer.to_str())"
    )
    path = write()
    other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    own = [data.Text(path, level=level, vocabulary=300).encoder.tokenizer.to_str() for level in ("word", "byte")]
    assert own == other.splitlines()


def test_another_vocabulary_than_that_of_the_run_is_refused(write):
    path = write()
    state = ready(path).state_dict()
    ready(path).load_state_dict(state)
    write(as_csv([(text.replace("film", "movie"), label) for text, label in ROWS]))
    with pytest.raises(
        ValueError, match=r"token ids of another vocabulary than that of the training split of '.*texts"
    ):
        ready(path).load_state_dict(state)


def test_lsa_makes_standardised_vectors_of_the_words_of_the_training_split(write):
    module = ready(write(), level="lsa", length=8, batch_size=60)
    assert (module.input_shape, module.vocabulary) == ((8,), None)
    numbers = module.train_set.numbers
    texts = module._train.inputs[numbers]
    counts = TfidfVectorizer(sublinear_tf=True).fit(texts)
    assert set(module.encoder.words.get_feature_names_out()) == set(counts.get_feature_names_out())
    vectors = module.encoder.transform(module._train.take(numbers))
    torch.testing.assert_close(vectors.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.std(0, correction=0), torch.ones(8), atol=1e-4, rtol=0)
    whole = counts.transform(texts).toarray()
    cut = module.encoder.scaler.inverse_transform(vectors.numpy())
    lost = np.square(np.linalg.svd(whole, compute_uv=False)[8:]).sum()
    assert np.square(whole).sum() - np.square(cut).sum() == pytest.approx(lost, rel=0.02), "the strongest directions"
    ((inputs, targets),) = module.test_dataloader()
    assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (12, 8), torch.int64)


def test_lsa_that_cannot_be(write):
    with pytest.raises(ValueError, match=r"length=500: the .. texts for training have .. words"):
        data.Text(write(), level="lsa", length=500)
    with pytest.raises(ValueError, match="level='lsa' makes vectors, which have no next token"):
        data.Text(write(), level="lsa", task="nexttoken")
    path = write()
    state = ready(path, level="lsa").state_dict()
    ready(path, level="lsa").load_state_dict(state)
    with pytest.raises(ValueError, match="another vocabulary"):
        ready(path, level="word").load_state_dict(state)


def test_several_labels_and_a_regression(write):
    rows = [f'"word {i}",{i % 2},{i % 3 == 0},{i / 4}' for i in range(40)]
    path = write("\n".join(["review,odd,third,stars", *rows]))
    labels = ready(path, text="review", target=["odd", "third"], task="multilabel")
    assert (labels.num_classes, labels.class_names) == (2, ["odd", "third"])
    stars = ready(path, text="review", target="stars", task="regression")
    assert (stars.num_classes, stars.class_names) == (1, ["stars"])
    for module in (labels, stars):
        for text, target in zip(module._test.inputs, module.test_set.targets, strict=True):
            i = int(text.split()[1])
            assert target.tolist() == ([i % 2, i % 3 == 0] if module is labels else i / 4)


def test_the_next_token_needs_no_labels_and_nothing_behind_a_text_is_a_target(write, tmp_path):
    write(ROWS[0][0], "folder/a/0.txt")
    for i, (text, label) in enumerate(ROWS):
        write(text, f"folder/{label}/{i:02}.txt")
    table = write("text\n" + "".join(f'"{text}"\n' for text, _ in ROWS))
    for path in (table, str(tmp_path / "folder")):
        module = ready(path, task="nexttoken", length=12)
        assert module.num_classes == module.vocabulary
        assert module.class_names[:2] == ["[PAD]", "[UNK]"]
        for inputs, targets in module.test_dataloader():
            told = inputs["attention_mask"] == 1
            assert torch.equal(targets[told], inputs["input_ids"][told])
            assert (targets[~told] == -100).all()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, "texts.csv: the file is empty"),
        (as_csv(), {"text": "review"}, "text='review' is not known: give a column of .*texts.csv"),
        (as_csv(), {"target": "class"}, "target='class' is not known: give a column of .*texts.csv"),
        (as_csv([*ROWS, ("", "pos")]), {}, "texts.csv, line 62: there is no text, it is ''"),
        (as_csv([*ROWS, ("A film", "")]), {}, "texts.csv, line 62, column 'label': there is no target"),
        (as_csv([("two\nlines", "pos"), *ROWS, (" ", "pos")]), {}, "texts.csv, line 64: there is no text, it is ' '"),
        (as_csv().replace(".", "\xe9").encode("latin-1"), {}, "texts.csv, line 2: byte 0xe9 is not UTF-8"),
        (as_csv().replace('"', ""), {}, "texts.csv, line 2: 3 values, the header names 2 columns"),
        (as_csv().replace('",', '";').replace("text,", "text;"), {}, "line 1: .*it seems to be ';'"),
        (as_csv(), {"level": "char"}, "level='char' is not known"),
        (as_csv(), {"level": "byte", "vocabulary": 257}, "vocabulary=257: must be at least 258"),
        (as_csv(), {"length": 0}, "length=0: must be at least 1"),
        (as_csv(), {"delimiter": ""}, "delimiter='': must be one character"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_line_and_column(content, arguments, message, write):
    with pytest.raises(ValueError, match=message):
        ready(write(content), **arguments)


def test_jsonl_that_is_not_as_it_should_be(write):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    for line, message in (
        ('{"text": 3, "label": "pos"}', "t.jsonl, line 4: there is no text, it is 3"),
        ('{"label": "pos"}', "t.jsonl, line 4: there is no text, it is None"),
        ('{"text": "A film"}', "t.jsonl, line 4, column 'label': there is no target"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(write("\n".join([*lines[:2], "", line, *lines[2:]]), "t.jsonl"))


def test_folders_that_are_not_as_they_should_be(write, tmp_path):
    for i, (text, label) in enumerate(ROWS):
        write(text, f"folder/{label}/{i:02}.txt")
    with pytest.raises(ValueError, match="folders hold classes, not what task='regression' needs: give a table"):
        ready(str(tmp_path / "folder"), task="regression")
    write(b"gr\xfcn", "folder/pos/99.txt")
    with pytest.raises(ValueError, match=r"pos/99.txt, line 1: byte 0xfc is not UTF-8"):
        ready(str(tmp_path / "folder"))
    write(" ", "folder/pos/99.txt")
    with pytest.raises(ValueError, match=r"pos/99.txt: there is no text"):
        ready(str(tmp_path / "folder"))


def test_without_the_library_it_says_what_to_install(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"Text needs the library tokenizers: pip install ff-lightning\[text\]"
    ):
        data.Text(write())


@pytest.mark.skipif(
    not (REAL_DATA / "imdb_train.jsonl.gz").exists(), reason=f"no real texts in {REAL_DATA} (see FF_DATA)"
)
def test_real_reviews():
    module = data.Text(str(REAL_DATA / "imdb_train.jsonl.gz"), subset=1000)
    module.setup("fit")
    assert (module.vocabulary, module.class_names) == (10000, ["0", "1"])
    (inputs, targets), *_ = module.train_dataloader()
    assert inputs["attention_mask"].float().mean() > 0.5
    assert 0.3 < targets.float().mean() < 0.7
    assert (inputs["input_ids"] == 1).float().mean() < 0.1, "few words of the training split are unknown"
