"""Texts of a table or of txt files, as token ids (T,) with a mask, or as vectors (F,).

Shapes: N texts, T tokens of a text, B batch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ff_lightning.data.columns import targets_of
from ff_lightning.data.listing import class_files
from ff_lightning.data.loaders import Split, as_it_is
from ff_lightning.data.lsa import LSAEncoder
from ff_lightning.data.memory import FileData, Samples
from ff_lightning.data.records import read_records, read_text
from ff_lightning.losses import IGNORED
from ff_lightning.training.plain import to_plain
from ff_lightning.util.arguments import check_choice, check_delimiter, check_whole, shown
from ff_lightning.util.files import printable

Tokens = Literal["word", "byte"]
Level = Literal["word", "byte", "lsa"]
TextTask = Literal["classification", "multilabel", "regression", "nexttoken"]
PADDING, UNKNOWN = "[PAD]", "[UNK]"
"""The tokens 0 and 1."""
CHUNK = 1000  # texts that are encoded at once


class TextEncoder:
    """Token ids of one length, filled up with 0; the vocabulary is learned from the texts it is fitted to.

    Args:
        level: ``"word"``: words and punctuation, in small letters; those not in the vocabulary are 1. ``"byte"``:
            byte-pair encoding, by which every text can be written.
        vocabulary: Most tokens, with the two for padding and unknown words.
        length: T.

    Raises:
        ModuleNotFoundError: If the library tokenizers is not there.
    """

    statistics = None

    def __init__(self, level: Tokens, vocabulary: int, length: int) -> None:
        self.input_shape = (length,)
        self.level, self.vocabulary = level, vocabulary
        self.tokenizer = _make_tokenizer(level)
        self.tokenizer.enable_truncation(length)

    def fit(self, samples: Samples) -> None:
        """Learn the vocabulary."""
        from tokenizers import pre_tokenizers, trainers

        special, size = [PADDING, UNKNOWN], self.vocabulary
        if self.level == "word":
            trainer: Any = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
        else:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            trainer = trainers.BpeTrainer(
                vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            )
        self.tokenizer.train_from_iterator(samples.inputs, trainer)

    def transform(self, samples: Samples) -> Tensor:
        """Token ids of all texts, int32 (N, T)."""
        found = np.zeros((len(samples.rows), *self.input_shape), np.int32)
        for start in range(0, len(found), CHUNK):
            encodings = self.tokenizer.encode_batch_fast(samples.inputs[start : start + CHUNK].tolist())
            for row, encoding in enumerate(encodings, start):
                found[row, : len(encoding.ids)] = encoding.ids
        return torch.from_numpy(found)

    def to_str(self) -> str:
        """The tokenizer, as the text of its file."""
        text: str = self.tokenizer.to_str()
        return text


def _make_tokenizer(level: Tokens) -> Any:
    """A tokenizer without a vocabulary."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise ModuleNotFoundError("Text needs the library tokenizers: pip install ff-lightning[text]") from error
    if level == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.encode_special_tokens = True  # a text that holds "[PAD]" holds these five signs
    return tokenizer


class Text(FileData):
    """Your own texts: a table (csv, tsv, jsonl, parquet), or a folder of txt files for each class.

    A batch of inputs is a dict: ``input_ids``, int64 (B, T), and ``attention_mask``, int64 (B, T), 1 where there is a
    token and 0 behind the text. The vocabulary is learned from the training split alone. Longer texts are cut off.

    Args:
        train: A table with the columns `text` and `target`, or a folder with a folder of txt files for each class.
        text: Column of the text.
        target: Column of the target: classes; for ``task="multilabel"`` a list of columns of 0 and 1; for
            ``task="regression"`` one or more columns of numbers. Folders have classes only.
        task: Also ``"nexttoken"``, without `target`: targets are the ids themselves, int64 (B, T), -100 where the text
            is filled up, and the classes are the tokens.
        level: ``"word"``: words and punctuation, in lower case. ``"byte"``: byte-pair encoding, without unknown words,
            and with capitals. ``"lsa"``: no tokens but a vector, float32 (B, `length`): TF-IDF of the words, reduced to
            its strongest directions (truncated SVD) and standardised; see `ff_lightning.data.lsa`.
        vocabulary: Most different tokens: the most frequent ones, 0 for padding and 1 for unknown words.
        length: T, tokens of a text; of ``"lsa"`` the numbers of its vector.
        delimiter: Between the values of a line; None: a comma, in a file that ends in .tsv a tab.
        kwargs: val, test, test_fraction, task, batch_size, val_fraction, seed, ...; see `FileData` and `DataModule`.

    Attributes:
        vocabulary: Number of different ids; None where texts are vectors.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ModuleNotFoundError: If the library tokenizers is not there.
        ValueError: If an argument or a file is not as it should be; line and column are named.
    """

    tasks = get_args(TextTask)

    def __init__(
        self,
        train: str,
        text: str = "text",
        target: list[str] | str = "label",  # lists first: the command line takes the first type that fits
        level: Level = "word",
        vocabulary: int = 10_000,
        length: int = 256,
        delimiter: str | None = None,
        task: TextTask = "classification",
        **kwargs: Any,
    ) -> None:
        target, vocabulary, length = to_plain((target, vocabulary, length))
        check_choice("level", level, get_args(Level))
        if level == "lsa" and task == "nexttoken":
            raise ValueError("level='lsa' makes vectors, which have no next token: give task='classification'")
        check_whole("vocabulary", vocabulary, least=258 if level == "byte" else 3)  # all bytes and two more
        check_whole("length", length)
        check_delimiter(delimiter)
        self.text, self.target, self.delimiter = text, target, delimiter
        self.level = level
        make: Any = LSAEncoder if level == "lsa" else partial(TextEncoder, level)
        self._encoder = make(vocabulary, length)
        super().__init__(train=train, task=cast(Any, task), **kwargs)
        if level != "lsa":
            self.vocabulary = self._encoder.tokenizer.get_vocab_size()
        if task == "nexttoken":
            self.class_names = [self._encoder.tokenizer.id_to_token(number) for number in range(self.vocabulary or 0)]

    def read_file(self, path: str) -> Samples:
        """All texts of a file or folder."""
        if Path(path).expanduser().is_dir():
            samples = self._read_folder(path)
        else:
            records = read_records(path, self.delimiter)
            inputs = records.column("text", self.text)
            if self.task == "nexttoken":
                targets, outputs = np.zeros(len(inputs), np.float32), None  # the ids are the targets: see `finish`
            else:
                targets, outputs = targets_of(records, self.target, self.task)
            samples = Samples(inputs, targets, records.path, records.lines, records.unit, outputs)
        for row, text in enumerate(samples.inputs):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{samples.place(row)}: there is no text, it is {shown(text)}")
        return samples

    def make_encoder(self) -> Any:
        """A `TextEncoder` or an `LSAEncoder`."""
        return self._encoder

    def finish(self, split: Split) -> Callable[[Any], Any]:
        """What makes the dict of a batch, and targets of its ids where the task wants them."""
        if self.level == "lsa":
            return as_it_is
        return with_next_tokens if self.task == "nexttoken" else with_mask

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: also the tokenizer, as the text of its file, or the words of the vectors."""
        return {**super().state_dict(), "tokenizer": self._encoder.to_str()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a run, or test what it trained.

        Raises:
            ValueError: If its vocabulary was another one.
        """
        super().load_state_dict(state_dict)
        if state_dict["tokenizer"] != self._encoder.to_str():
            raise ValueError(
                f"the model was trained on token ids of another vocabulary than that of the training split of "
                f"{self.paths['train']!r}: give the same file, level, vocabulary, length, seed and subset"
            )

    def _read_folder(self, path: str) -> Samples:
        if self.task not in ("classification", "nexttoken"):
            raise ValueError(f"{path}: folders hold classes, not what task={self.task!r} needs: give a table")
        files, names = class_files(path, (".txt",))
        texts = np.array([read_text(file) for file in files], object)
        targets = np.array(names, object) if self.task == "classification" else np.zeros(len(texts), np.float32)
        return Samples(texts, targets, path, np.array([printable(file) for file in files], object))


def with_mask(batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The ids of a batch with the mask of those that are tokens, and the targets."""
    ids, targets = batch
    return {"input_ids": ids.long(), "attention_mask": (ids != 0).long()}, targets


def with_next_tokens(batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The ids of a batch with their mask, and as targets the ids, `IGNORED` behind the text."""
    inputs, _ = with_mask(batch)
    return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
