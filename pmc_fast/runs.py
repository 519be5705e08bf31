"""The folder of a run: its options, a line of metrics per step, the newest checkpoint and the report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmc_fast.errors import UserError

_TEMPORARY = ".tmp-"


class Run:
    """A folder that a run can be killed in at any moment and resumed from.

    config.json: what the run was started with. metrics.jsonl: one JSON object per optimizer step. start.json: what was
    found out before the first step. checkpoint.pt: the newest checkpoint, gone once there is a report. report.json:
    written last; a folder that has one holds a finished run. Each file but metrics.jsonl appears whole or not at all.

    Args:
        folder: where; made by `start()`, nothing is written before.
        config: JSON-able options that decide the run's outcome.
        resume: continue the run that the folder holds, or start it where the folder is missing or empty.

    Raises:
        UserError: the folder holds another run or other files, or cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any], resume: bool = False) -> None:
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))
        self.resumed = False
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is not a folder; choose another --out")
        try:
            names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}); choose another --out") from None
        if not [name for name in names if not name.startswith(_TEMPORARY)]:
            return
        held = self._read("config.json")
        if not isinstance(held, dict) or held.get("pmc_fast_run") != 1:
            raise UserError(
                f"{self.folder}: the folder is not empty and holds no run of pmc-fast; choose another --out"
            )
        if not resume:
            raise UserError(
                f"{self.folder}: the folder holds another run; choose another --out, delete it, or continue it with "
                "--resume and the options it was started with"
            )
        if changes := _changes(held["options"], self.config):
            raise UserError(f"{self.folder}: --resume with other options than the run was started with: {changes}")
        self.resumed = True

    def start(self) -> None:
        """Make the folder, if need be, and drop what a killed process left half written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(_TEMPORARY + "*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not self.resumed:
                self.write_json("config.json", {"pmc_fast_run": 1, "options": self.config})
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror}); choose another --out") from None

    @property
    def report(self) -> dict | None:
        """The report of a finished run."""
        return self._read("report.json")

    @property
    def beginning(self) -> dict | None:
        """What `save_beginning` stored."""
        return self._read("start.json")

    def save_beginning(self, values: dict) -> None:
        """Store what was found out before the first step: it cannot be computed again later."""
        self.write_json("start.json", values)

    def finish(self, report: dict) -> None:
        """Write the report, then drop the checkpoint."""
        self.write_json("report.json", report)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint on the CPU, or None; metrics.jsonl is cut back to its step."""
        import torch

        path = self.folder / "checkpoint.pt"
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        step = 0 if state is None else state["step"]
        lines = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        if (self.folder / "metrics.jsonl").exists():
            self._replace("metrics.jsonl", lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
        return state

    def save_checkpoint(self, state: dict) -> None:
        """Replace the checkpoint; `state` holds tensors and plain values, and the step it was taken after."""
        import torch

        self._replace("checkpoint.pt", lambda temporary: torch.save(state, temporary))

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl; `record` has a "step", counted from 1."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, up to one that was being written when the process died."""
        records = []
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def write_json(self, name: str, value: object) -> None:
        text = json.dumps(value, indent=2) + "\n"
        self._replace(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def save_model(self, name: str, model: Any, tokenizer: Any) -> Path:
        """Write an ordinary transformers folder, in safetensors, and return its path."""

        from transformers.utils import logging

        def save(temporary: Path) -> None:
            logging.disable_progress_bar()
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

        self._replace(name, save)
        return self.folder / name

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Write under another name, make it durable, and give it its name in one move."""
        path, temporary = self.folder / name, self.folder / (_TEMPORARY + name)
        write(temporary)
        for part in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _sync(part)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(self.folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changes(held: dict, wanted: dict) -> str:
    names = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
    return ", ".join(f"{name} was {held.get(name)!r}, now {wanted.get(name)!r}" for name in names)
