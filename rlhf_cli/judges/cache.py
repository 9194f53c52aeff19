"""Replies on the disk: a file per process that only grows, and an index of all files of the folder.

A reply is found by the hash of its question (see `ask.key_of`), so that an interrupted or repeated run asks nothing twice
and gets the same answers. Questions are not stored.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Reply


class Cache:
    """Replies by key.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        self._lock = threading.Lock()
        self._own: Path | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"judge.cache: cannot write {folder}: {e.strerror}; type judge.cache=FOLDER") from None
        for path in sorted(folder.glob("replies-*.jsonl")):
            self._index(path)

    def get(self, key: str) -> Reply | None:
        """The reply, or None. A line that is damaged counts as absent."""
        place = self._places.get(key)
        if place is None:
            return None
        path, offset = place
        try:
            with path.open("rb") as f:
                f.seek(offset)
                row = json.loads(f.readline())
            top = tuple((str(t), float(p)) for t, p in row["top"])
            return Reply(str(row["text"]), top, str(row["finish"]), cached=True) if row["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply that is no failure."""
        if self.folder is None or reply.error or key in self._places:
            return
        row = {"key": key, "text": reply.text, "top": reply.top, "finish": reply.finish}
        line = (json.dumps(row) + "\n").encode()
        with self._lock:
            if self._own is None:
                self._own = self.folder / f"replies-{socket.gethostname()}-{os.getpid()}.jsonl"
                self._finish_line(self._own)
            with self._own.open("ab") as f:
                offset = f.seek(0, os.SEEK_END)
                f.write(line)
            self._places[key] = (self._own, offset)

    def _index(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as f:
            for line in f:
                with suppress(
                    ValueError, KeyError, TypeError
                ):  # a line that was being written when a process was killed
                    self._places[str(json.loads(line)["key"])] = (path, offset)
                offset += len(line)

    @staticmethod
    def _finish_line(path: Path) -> None:
        """Begin on a line of one's own, should an earlier process of the same number have died amid one."""
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as f:
                f.write(b"\n")
