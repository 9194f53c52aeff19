"""Labels from a slow judge, asked for beside the training: the newest items first, and never waited for longer than agreed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

Labels = list[tuple[str, float]]
"""(item, label) in the order in which they came; an item of a ranking is two texts behind one another."""

FILE = "annotations.jsonl"


class Annotator:
    """A thread that labels one batch of items at a time.

    A batch whose labels are waited for in vain is lost, and nobody waits for that thread again; an error loses the batch.

    Args:
        label: labels some items; what it leaves out stays unlabelled.
    """

    def __init__(self, label: Callable[[Sequence[str]], Labels]) -> None:
        self.label = label
        self.items: list[str] = []  # under way
        self.error = ""  # of the last batch that failed
        self.hung = False
        self._thread: threading.Thread | None = None
        self._found: Labels = []

    def ask(self, items: Sequence[str]) -> None:
        """Start on some items, unless a batch is under way."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.items, self._found, self.hung = list(items), [], False
        self._thread = threading.Thread(target=self._work, args=(self.items,), name="annotator", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> Labels | None:
        """The labels of the batch under way; None while there are none, after waiting for up to so many seconds."""
        if self._thread is None:
            return None
        self._thread.join(0.0 if self.hung else seconds)
        if self._thread.is_alive():
            self.hung = True
            return None
        found, self._thread, self.items = self._found, None, []
        return found

    def _work(self, some: Sequence[str]) -> None:
        try:
            found = self.label(some)
        except Exception as e:  # whatever it is, training goes on without labels
            self.error = f"{type(e).__name__}: {e}"
            return
        self._found = found


class Arrivals:
    """Every label with the step at which it came, on the disk: what a resumed or replayed run is given again at the same steps.

    Args:
        path: the file; None keeps nothing.
        given: another run's file, to be replayed; labels are then asked of nobody.
    """

    def __init__(self, path: Path | None, given: Path | None = None) -> None:
        self.path, self.replays = path, given is not None
        source = given or path
        self.known: dict[int, Labels] = {}
        lines = source.read_text(encoding="utf-8").splitlines() if source is not None and source.exists() else []
        for row in map(json.loads, lines):
            self.known[int(row["step"])] = [(str(item), float(x)) for item, x in row["labels"]]

    def at(self, step: int) -> Labels | None:
        """What came at a step that was taken before; None for a step that is new."""
        return self.known.get(step, [] if self.replays else None)

    def write(self, step: int, labels: Labels) -> None:
        """Note what came at a step."""
        self.known[step] = labels
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, "labels": labels}, ensure_ascii=False) + "\n")
