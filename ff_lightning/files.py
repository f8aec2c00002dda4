"""Files that are whole or not there."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name beside `path` to write to, which takes its place in one step when all went well.

    A process that dies while it writes leaves the file that was there before, and one that reads it is not disturbed;
    after an error nothing is left of what was written.

    Args:
        path: Where the file is to be; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
