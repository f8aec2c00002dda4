"""Files that are whole or not there, and their names."""

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import ZipFile, is_zipfile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r".+\.[0-9a-f]{32}\.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name beside `path` to write to, which takes its place in one step when all went well.

    A process that dies while it writes leaves the file that was there before, and one that reads it is not disturbed;
    after an error nothing is left of what was written. What killed processes have left in the folder is removed.

    Args:
        path: Where the file is to be; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_parts(path.parent)
    with _locked_part(path) as part:
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _locked_part(path: Path) -> Iterator[Path]:
    """A new file that is locked as long as this process writes to it: the system lets go of it when the process dies.

    A process that cleans up may take the lock, and the file with it, in the moment between the two; then comes another.
    """
    while True:
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        if fcntl is None:  # an open file could not be renamed there
            yield part
            return
        with part.open("xb") as file:
            _lock(file, wait=True)
            if part.exists():
                yield part
                return


def _remove_left_parts(folder: Path) -> None:
    """Remove the parts that nobody writes to any more; where files cannot be locked, they stay."""
    for part in folder.glob("*.part") if fcntl else ():
        if _PART.fullmatch(part.name):
            with contextlib.suppress(OSError), part.open("rb+") as file:  # it may be gone, or belong to someone else
                if _lock(file, wait=False):
                    part.unlink()


def _lock(file: IO[bytes], wait: bool) -> bool:
    """Whether this process could lock the file; it waits for that, or gives up at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or the file system knows no locks
        return False
    return True


@contextmanager
def claimed(path: Path) -> Iterator[Sequence[int] | None]:
    """A claim, by the lock of a file, that is gone when the last process dies that holds it.

    Where files cannot be locked (Windows, some file systems over a network), any process gets it.

    Args:
        path: Of the file; it is made.

    Yields:
        The file descriptors for the children that are to hold the claim too, as `subprocess` takes them (``pass_fds``);
        None if another process has it.
    """
    with path.open("ab") as file:
        mine = True
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            mine = not isinstance(error, BlockingIOError)
        if not mine:
            yield None
        else:
            yield () if fcntl is None else (file.fileno(),)


def check_sums(path: Path) -> bool:
    """Compare the content of a file of `torch.save` with the sums in it, which torch itself does not look at.

    Returns:
        Whether there are sums: not in torch's old format, in other files, and in files that were cut off.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the content is not what was written.
    """
    with path.open("rb") as file:
        if not is_zipfile(file):  # the directory of an archive stands at its end, where it is cut off first
            return False
        try:
            with ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # whatever a damaged directory leads to
            damaged = str(error)
    if damaged:
        raise ValueError(f"{path} is damaged ({damaged}): take an earlier one, or copy it again")
    return True


def printable(path: str | Path) -> str:
    """A path as text that can be written: bytes that are not UTF-8 as backslash and number."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: If it cannot be read, or is none: a pipe would be waited for.
    """
    check_kind(os.stat(path).st_mode)
    return Path(path).read_bytes()


def check_kind(mode: int) -> None:
    """Raise OSError for the mode of what is no file."""
    if stat.S_ISDIR(mode):
        raise OSError("it is a folder: one with the ending of a file, that cannot be listed, or that leads back up")
    if not stat.S_ISREG(mode):
        raise OSError("it is a pipe, socket or device, not a file")
