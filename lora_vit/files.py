"""Files that are whole or absent: atomic replacement, locks, JSON and append-only rows."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_vit.errors import RecordError

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that is mounted without flock


def user_path(text: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(text))


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name or path as text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that it appears whole or not at all: temporary file, fsync, rename.

    Its modes are those of any new file (umask, access lists of the folder). A killed process leaves ``.NAME.*``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for wait in (0.2, 1.0, 5.0, 0.0):
            try:
                temporary.replace(path)
                break
            except OSError as error:  # a file server that has just moved answers again
                if error.errno != errno.ESTALE or not wait:
                    raise
                time.sleep(wait)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold the lock that a file stands for, in a folder made if need be; it ends with the process, however that ends.

    It is deleted if the folder is otherwise empty. BlockingIOError: we do not wait. All may hold it ``shared``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            ours = False
            with contextlib.suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if not ours:  # its last holder removed it while we waited
                continue
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):  # the folder was removed meanwhile
                    if not shared and os.listdir(path.parent) == [path.name]:
                        path.unlink()
            return


def remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty, and then the folders around it that are empty and not around the current one."""
    with contextlib.suppress(OSError):
        os.removedirs(os.path.relpath(folder))


def write_json(path: Path, values: Any) -> None:
    """Replace ``path`` atomically by readable JSON."""
    with replacing(path) as file:
        file.write(_json(values, indent=1))


def _json(value: Any, **how: Any) -> bytes:
    """A line (or lines) of JSON, which lacks NaN and infinities: they become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return (json.dumps(finite, sort_keys=True, **how) + "\n").encode()


def write_row(file: BinaryIO, row: dict[str, Any]) -> None:
    """Append a row of JSON to a ``.jsonl`` file, at once."""
    file.write(_json(row))
    file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``.jsonl`` file; a last line cut off by a crash is left out, a missing file is empty."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RecordError(f"{path}: row {len(rows) + 1} is not JSON") from None
    return rows
