"""Tables from files: csv, tsv, jsonl and parquet, each also compressed by gzip where it is text.

What is wrong with a file is said in one sentence, with the file, the line and the column.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ff_lightning.data.listing import first_five
from ff_lightning.util.arguments import shown
from ff_lightning.util.files import read_bytes
from ff_lightning.util.suggest import unknown

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}

Column = np.ndarray[Any, Any]


@dataclass
class Records:
    """A table.

    Args:
        path: Its file.
        columns: By name, (N,) each: text and what else JSON knows as objects, or numbers.
        lines: Number of the line of each row, (N,); the last one of a row over several lines.
        unit: What `lines` counts.
    """

    path: str
    columns: dict[str, Column]
    lines: np.ndarray[Any, np.dtype[np.int64]]
    unit: str = "line"

    def column(self, argument: str, name: str) -> Column:
        """A column.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.columns:
            raise ValueError(
                unknown(argument, name, self.columns, f"a column of {self.path}, {first_five(self.columns)}")
            )
        return self.columns[name]


def read_records(path: str, delimiter: str | None = None) -> Records:
    """Read a table.

    Args:
        path: A file that ends in .csv, .tsv, .jsonl or .parquet, and .gz after the first three.
        delimiter: Between the values of a line; None: a comma, in a file that ends in .tsv a tab.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If it is parquet, and pandas or pyarrow is not there.
        OSError: If it cannot be read.
        ValueError: If it is not what its name says, or holds no row.
    """
    name = path.lower().removesuffix(".gz")
    if not name.endswith(ENDINGS):
        raise ValueError(f"{path}: the name of a table must end in one of {list(ENDINGS)}, or in .gz after that")
    if not Path(path).expanduser().exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if name.endswith(".parquet"):
        records = _read_parquet(path)
    elif name.endswith(".jsonl"):
        records = _read_jsonl(path, read_text(path))
    else:
        records = _read_csv(path, read_text(path), delimiter or ("\t" if name.endswith(".tsv") else ","))
    if not len(records.lines):
        raise ValueError(f"{path}: the file holds no row")
    return records


def read_text(path: str) -> str:
    """The text of a file, without the mark that some programs put before it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not UTF-8; the line is named.
    """
    try:
        content = read_bytes(Path(path).expanduser())
        if path.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{path}: the file cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def _read_csv(path: str, text: str, delimiter: str) -> Records:
    rows: list[list[str]] = []
    lines: list[int] = []
    names: list[str] | None = None
    limit = csv.field_size_limit(len(text) + 1)  # a text may be longer than the usual limit of 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for row in reader:
            if not any(map(str.strip, row)):  # an empty line, or one of a spreadsheet without a value
                pass
            elif names is None:
                names = _checked_header(path, [name.strip() for name in row], delimiter)
            elif len(row) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} values, the header names {len(names)} columns "
                    f"(delimiter={delimiter!r})"
                )
            else:
                rows.append(row)
                lines.append(reader.line_num)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: {error}; is a quote not closed?") from None
    finally:
        csv.field_size_limit(limit)
    if names is None:
        raise ValueError(f"{path}: the file is empty")
    columns = {name: np.array(values, object) for name, values in zip(names, zip(*rows, strict=True), strict=False)}
    return Records(path, columns, np.array(lines, np.int64))


def _checked_header(path: str, names: list[str], delimiter: str) -> list[str]:
    """The names of the columns, if they can be that."""
    if len(names) == 1:
        for other, spelled in DELIMITERS.items():
            if other != delimiter and other in names[0]:
                raise ValueError(
                    f"{path}, line 1: the header {shown(names[0])} has one column with delimiter={delimiter!r}; it "
                    f"seems to be {spelled}"
                )
    unnamed = [number for number, name in enumerate(names, 1) if not name]
    if unnamed:
        raise ValueError(f"{path}, line 1: the header has no name for column {unnamed[0]} of {len(names)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, line 1: the header names {first_five(twice)} more than once")
    if all(_is_number(name) for name in names):
        raise ValueError(f"{path}, line 1: must be a header with the names of the columns, it is {shown(names)}")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_jsonl(path: str, text: str) -> Records:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be an object {{...}}, it is {shown(row)}")
        rows.append(row)
        lines.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        columns[name] = np.empty(len(rows), object)  # np.array would look into lists
        columns[name][:] = [row.get(name) for row in rows]
    return Records(path, columns, np.array(lines, np.int64))


def _read_parquet(path: str) -> Records:
    try:
        import pandas as pd

        frame = pd.read_parquet(Path(path).expanduser())
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: to read parquet needs pandas and pyarrow: pip install ff-lightning[parquet]"
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        raise OSError(f"{path}: the file cannot be read: {error}") from error
    columns = {}
    for name in frame.columns:
        kind, missing = (np.float64, math.nan) if frame[name].dtype.kind in "iuf" else (object, None)
        columns[str(name)] = frame[name].to_numpy(kind, na_value=missing)
    return Records(path, columns, np.arange(1, len(frame) + 1), "row")
