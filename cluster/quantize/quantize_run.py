"""One plan while it runs: its folder's records, its progress bar, and in the end its report."""

from __future__ import annotations

from rich.progress import Progress, TaskID

from .file_task import FileProgress
from .manifest import MANIFEST, Manifest, MatrixError
from .metadata import expert_formats, write_metadata
from .plan import FilePlan, QuantizePlan
from .report import QuantizeReport, nodes_of, per_format, per_kind, relative_error, worst
from .resume import begin, is_finished


class QuantizeRun:
    """progress: what is finished already. bars: shows how far the run is."""

    def __init__(self, plan: QuantizePlan, progress: Manifest, bars: Progress) -> None:
        self.plan = plan
        self._progress = progress
        self._bars = bars
        self._bar: TaskID | None = None
        self._kept = frozenset(progress.files)
        self._under_way: dict[str, int] = {}
        self._begun = False
        self._started, self._ended = float("inf"), 0.0
        self._import_seconds = 0.0

    def begin(self) -> None:
        """Prepares the folder, if there is anything to do."""
        waiting = " (loading AMD Quark)" if any(file.by_quark for file in self.missing()) else ""
        done = sum(file.source_bytes for file in self.plan.files if self.has(file.name))
        self._bar = self._bars.add_task(self.plan.label + waiting, total=self.plan.source_bytes, completed=done)
        if not self.is_finished():
            self._begun = True
            begin(self.plan, self._progress)

    def has(self, name: str) -> bool:
        return name in self._progress.files

    def missing(self) -> list[FilePlan]:
        return [file for file in self.plan.files if not self.has(file.name)]

    def is_finished(self) -> bool:
        return not self.missing() and is_finished(self.plan.folder)

    def take(self, progress: FileProgress) -> None:
        """Shows a message of a task, and records a file that is finished."""
        file = next(file for file in self.plan.files if str(file.path) == progress.path)
        self._started = min(self._started, progress.started)
        self._ended = max(self._ended, progress.ended)
        self._import_seconds = max(self._import_seconds, progress.import_seconds)
        self._under_way[file.name] = progress.source_bytes
        if progress.record is not None:
            self._progress = self._progress.with_file(file.name, progress.record)
            self.plan.folder.write(MANIFEST, self._progress.dump())
        self._show()

    def stop(self) -> None:
        """After an error: removes what is unfinished, and the folder if nothing was finished in it. What was there
        before `begin` stays where that was not reached."""
        folder = self.plan.folder
        if self._begun:
            folder.remove_parts()
            if not self._progress.files:
                folder.remove(MANIFEST)
        folder.remove_if_empty()

    def finish(self) -> QuantizeReport:
        """Writes what comes last, unless it is there. Returns the report of the whole checkpoint."""
        if not self.is_finished():
            self.plan.folder.remove_parts()  # of workers that died
            write_metadata(self.plan, self._progress)
        files = self._progress.files
        records = [files[file.name] for file in self.plan.files]
        errors: list[MatrixError] = [error for record in records for error in record.matrices]
        formats = set(expert_formats(self.plan).values())
        read = sum(record.source_bytes for name, record in files.items() if name not in self._kept)
        return QuantizeReport(
            label=self.plan.label,
            format=formats.pop() if len(formats) == 1 else "mixed",
            source_format=self.plan.source_format,
            target=self.plan.target,
            bytes_before=sum(self.plan.source.entry(name).bytes for name in self.plan.source.names),
            bytes_after=self.plan.target_bytes,
            seconds=max(0.0, self._ended - self._started),
            bytes_read=read,
            kept_files=len(self._kept),
            import_seconds=self._import_seconds,
            weight_error=relative_error(errors),
            per_kind=per_kind(errors),
            per_format=per_format(errors),
            worst=worst(errors),
            uncalibrated=tuple(name for record in records for name in record.uncalibrated),
            predicted=None if self.plan.choice is None else self.plan.choice.predicted,
            peak_memory=max((record.peak_memory for record in records), default=0),
            work_memory=max((record.peak_memory - record.baseline for record in records), default=0),
            nodes=nodes_of(records),
        )

    def _show(self) -> None:
        assert self._bar is not None
        kept = sum(record.source_bytes for name, record in self._progress.files.items() if name in self._kept)
        self._bars.update(self._bar, completed=kept + sum(self._under_way.values()), description=self.plan.label)
