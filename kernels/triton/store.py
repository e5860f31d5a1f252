"""The file in the user's cache folder that keeps what was measured on their GPUs. Knows neither torch nor Triton."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows: of two processes that write at once, one may be forgotten
    fcntl = None  # type: ignore[assignment]

FORMAT = 1

Entry = dict[str, Any]


class Store:
    """Entries by key: read from the file once, when first asked; written at once.

    `put` merges into what other processes have written meanwhile, and replaces the file in one step, so that a reader
    sees the old file or the new one. Where the folder cannot be written, entries last as long as the process.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """`$XDG_CACHE_HOME/fastenc/tuning.json`, by default in `~/.cache`."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return Path(base) / "fastenc" / "tuning.json"

    def entries(self) -> dict[str, Entry]:
        """All of them; not to be changed."""
        with self._lock:
            if self._entries is None:
                self._entries = _read(self.path)
            return self._entries

    def get(self, key: str) -> Entry | None:
        return self.entries().get(key)

    def put(self, new: dict[str, Entry]) -> str | None:
        """Add or replace entries. Why they could not be written to the file, in words, or None."""
        known = self.entries()
        with self._lock:
            known.update(new)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path.with_suffix(".lock")):
                    merged = {**_read(self.path), **new}
                    _replace(self.path, json.dumps({"format": FORMAT, "entries": merged}, indent=1, sort_keys=True))
                known.update(merged)
            except OSError as error:
                return f"{error.filename or self.path}: {error.strerror}"
        return None

    def clear(self) -> None:
        """Remove the file, and forget the entries.

        Raises:
            OSError: the file is there and cannot be removed.
        """
        with self._lock:
            self.path.unlink(missing_ok=True)
            self._entries = None

    def forget(self) -> None:
        """Read the file again when next asked."""
        with self._lock:
            self._entries = None


def _read(path: Path) -> dict[str, Entry]:
    """The entries in the file; none if it cannot be read, with a warning if its contents make no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["entries"]
        if content["format"] == FORMAT and all(isinstance(entry, dict) for entry in entries.values()):
            return entries
        problem = f"its format is {content['format']}, not {FORMAT}"
    except OSError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"fastenc cannot make sense of {path} ({problem}) and goes on without what was measured; "
        f"`fastenc info --clear-cache` removes it",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from the file meanwhile; a process that dies lets go."""
    with open(path, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    """Write the file in one step: whoever reads it, even after a crash, finds the old text or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


STORE = Store()
