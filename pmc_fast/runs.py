"""The folder of a run: its options, a line of metrics per step, the newest checkpoint and the report."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmc_fast.errors import UserError, described

_TEMPORARY = ".tmp-"
_FORM = 2  # of config.json: files among the options by what they hold

# What a JSON file holds: by key other forms, float for any number, dict, list, or object for anything.
Form = Mapping[str, Any] | type
_KINDS = {float: "number", dict: "object", list: "list"}


def holds_run(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is that of a run, finished or not."""
    try:
        held = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and "pmc_fast_run" in held


def is_out_of_memory(error: Exception) -> bool:
    """Whether a machine lacked the room, which says nothing of what was to be loaded."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def file_option(path: str | os.PathLike[str]) -> dict[str, str]:
    """A file as an option of a run: what it holds decides how the run ends, where it lies does not."""
    if not Path(path).is_file():
        raise UserError(f"{path}: not a plain file; want one, which --resume can compare with what the run began with")
    return {"file": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


class Run:
    """A folder that a run can be killed in at any moment and resumed from.

    config.json: what the run was started with. metrics.jsonl: one JSON object per optimizer step. start.json: what was
    found out before the first step. checkpoint.pt: the newest checkpoint, gone once there is a report. report.json:
    written last; a folder that has one holds a finished run. Each file but metrics.jsonl appears whole or not at all.

    Args:
        folder: where; made by `start()`, nothing is written before.
        config: JSON-able options that decide the run's outcome; files among them as `file_option` gives them.
        resume: continue the run that the folder holds, or start it where the folder is missing or empty.
        beginning, report: what start.json and report.json hold, if nothing else.

    Raises:
        UserError: the folder holds another run or other files, a damaged file, or cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: dict[str, Any],
        resume: bool = False,
        *,
        beginning: Form = dict,
        report: Form = dict,
    ) -> None:
        self.folder = Path(folder)
        self._beginning, self._report = beginning, report
        self.config = json.loads(json.dumps(config))
        self.resumed = False
        try:
            names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}); choose another --out") from None
        if [name for name in names if not name.startswith(_TEMPORARY)]:
            self._check_held(resume)
            self.resumed = True
        if self.report is None:
            self._check_writable()

    def start(self) -> None:
        """Make the folder, if need be, and drop what a killed process left half written."""
        if not self.resumed and (self.folder / "config.json").exists():
            raise UserError(f"{self.folder}: another run began there meanwhile; choose another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(_TEMPORARY + "*"):
                _remove(path)
            if not self.resumed:
                self.write_json("config.json", {"pmc_fast_run": _FORM, "options": self.config})
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror}); choose another --out") from None

    @property
    def report(self) -> dict | None:
        """The report of a finished run."""
        return self._read("report.json", self._report)

    @property
    def beginning(self) -> dict | None:
        """What `save_beginning` stored."""
        return self._read("start.json", self._beginning)

    def save_beginning(self, values: dict) -> None:
        """Store what was found out before the first step."""
        self.write_json("start.json", values)

    def finish(self, report: dict) -> None:
        """Write the report, then drop the checkpoint."""
        self.write_json("report.json", report)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint on the CPU, or None; metrics.jsonl is cut back to its step."""
        import torch

        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        except Exception as error:  # at damaged files torch raises what it likes, with advice that is none here
            if is_out_of_memory(error):
                raise
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is torch's seeking beyond the ends
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}); make it readable, or choose another --out"
                ) from error
            raise self.damaged(path.name, f"torch cannot load it: {type(error).__name__}") from error
        if state is not None and not (isinstance(state, dict) and type(state.get("step")) is int):
            raise self.damaged(path.name, "it is no checkpoint")
        step = 0 if state is None else state["step"]
        lines = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        if (self.folder / "metrics.jsonl").exists():
            self._replace("metrics.jsonl", lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
        return state

    def save_checkpoint(self, state: dict) -> None:
        """Replace the checkpoint; `state` holds tensors and plain values, and the step it was taken after."""
        import torch

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:  # of Python's, which says why it fails; torch puts its own error on top
                try:
                    torch.save(state, file)
                except RuntimeError as error:
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from None
                    raise

        self._replace("checkpoint.pt", save)

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl; `record` has a "step", counted from 1."""
        path = self.folder / "metrics.jsonl"
        with _writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, up to one that was being written when the process died."""
        records = []
        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); choose another --out") from None
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                break
            records.append(record)
        return records

    def write_json(self, name: str, value: object) -> None:
        text = json.dumps(value, indent=2) + "\n"
        self._replace(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def save_model(self, name: str, model: Any, tokenizer: Any) -> Path:
        """Write an ordinary transformers folder, in safetensors, and return its path."""

        from safetensors import SafetensorError
        from transformers.utils import logging

        def save(temporary: Path) -> None:
            logging.disable_progress_bar()
            try:
                model.save_pretrained(temporary)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            tokenizer.save_pretrained(temporary)

        self._replace(name, save)
        return self.folder / name

    def damaged(self, name: str, reason: str) -> UserError:
        """What to raise about a file of the folder that is not as it was written."""
        advice = "choose another --out, or delete the folder"
        if name != "config.json":
            advice = "delete this file, and --resume does again what it held"
        return UserError(f"{self.folder / name}: the file is damaged ({reason}); {advice}")

    def _check_held(self, resume: bool) -> None:
        """Raise UserError unless the folder holds a run that is to be resumed with the options it was started with."""
        if not holds_run(self.folder):
            raise UserError(
                f"{self.folder}: the folder is not empty and holds no run of pmc-fast; choose another --out"
            )
        if not resume:
            raise UserError(
                f"{self.folder}: the folder holds another run; choose another --out, delete it, or continue it with "
                "--resume and the options it was started with"
            )
        held = self._read("config.json", {"pmc_fast_run": object, "options": dict})
        if held["pmc_fast_run"] != _FORM:
            raise UserError(
                f"{self.folder}: the folder holds a run of another version of pmc-fast; choose another --out"
            )
        held = held["options"]
        command, wanted = held.get("command"), self.config.get("command")
        if command != wanted:
            raise UserError(
                f"{self.folder}: the folder holds a run of {command}, not of {wanted}; choose another --out"
            )
        if changes := _changes(held, self.config):
            raise UserError(
                f"{self.folder}: --resume with other options than the run was started with: {'; '.join(changes)}"
            )

    def _check_writable(self) -> None:
        """Raise UserError if the folder can neither be written to nor be made."""
        try:
            place = self.folder.absolute()
            there = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
            if not there.is_dir():
                raise UserError(f"{self.folder}: {there} is not a folder; choose another --out")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"{self.folder}: {there} cannot be written to; choose another --out")
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror}); choose another --out") from None

    def _read(self, name: str, form: Form) -> dict | None:
        """What a JSON file holds, of this form; None if there is no such file."""
        try:
            value = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise self.damaged(name, f"not JSON: {error}") from None
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be read ({error.strerror}); choose another --out") from None
        if misfit := _misfit(value, form):
            raise self.damaged(name, misfit)
        return value

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Write under another name, make it durable, and give it its name in one move."""
        path, temporary = self.folder / name, self.folder / (_TEMPORARY + name)
        with _writing(path):
            try:
                write(temporary)
                for part in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                    _sync(part)
            except OSError:  # a full disk has use for the room
                _remove(temporary)
                raise
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
            _sync(self.folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says against writing there, as the user's error."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); once it can, go on with --resume") from error


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changes(held: dict, wanted: dict, of: str = "--") -> list[str]:
    """The options that differ, in words."""
    found = []
    for name in {**held, **wanted}:
        option, old, new = of + name.replace("_", "-"), held.get(name), wanted.get(name)
        if _is_file(old) and _is_file(new):
            if old["sha256"] != new["sha256"]:
                same = old["file"] == new["file"]
                found.append(
                    f"{option}: {new['file']} holds other text than {'then' if same else old['file'] + ' did'}"
                )
        elif isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{option} ")
        elif old != new:
            found.append(f"{option} was {_worded(old)}, now {_worded(new)}")
    return found


def _misfit(value: Any, form: Form, what: str = "it") -> str | None:
    """What keeps a value from being of that form, in words."""
    if not isinstance(form, Mapping):
        if form is object or isinstance(value, int | float if form is float else form) and not isinstance(value, bool):
            return None
        return f"{what} is {described(value)}, no {_KINDS[form]}"
    if not isinstance(value, dict):
        return f"{what} is {described(value)}, no object"
    for key, inner in form.items():
        if key not in value:
            return f"{what} lacks {key!r}"
        if (misfit := _misfit(value[key], inner, f"its {key}")) is not None:
            return misfit
    return None


def _is_file(value: Any) -> bool:
    """Or else sets by their names, which may be these two."""
    return isinstance(value, dict) and value.keys() == {"file", "sha256"} and isinstance(value["file"], str)


def _worded(value: Any) -> str:
    return "not given" if value is None else value["file"] if _is_file(value) else repr(value)
