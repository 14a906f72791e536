"""What a target folder holds already: nothing, a stopped or finished run of the same making, or something else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ...actors.checkpoint import INDEX
from .fingerprint import code_fingerprint, inputs_digests, source_fingerprint
from .manifest import MANIFEST, SUMS, FileRecord, Manifest, ManifestError, Origin, find_manifest
from .matrix import QuantizeError
from .plan import QuantizePlan
from .target_folder import TargetFolder, is_part

CONFIG = "config.json"


def origin_of(plan: QuantizePlan) -> Origin:
    recipe = plan.recipe.model_dump(mode="json", exclude={"name", "about"})
    source = source_fingerprint(plan.source)
    return Origin(source, recipe, inputs_digests(plan.inputs), code_fingerprint(plan.recipe))


def find_progress(plan: QuantizePlan, origin: Origin, overwrite: bool) -> Manifest:
    """What is finished already, for a run of `origin`; changes nothing. Raises QuantizeError for a folder with anything
    else in it, unless `overwrite`.

    A stopped run goes on also with `overwrite`, for it may have been started with it; a finished one begins anew then.
    """
    folder = plan.folder
    try:
        found = find_manifest(folder)
    except ManifestError:
        if not overwrite:
            raise
        found = None
    if found is not None and found.origin == origin:
        done = {name: record for name, record in found.files.items() if _is_there(folder, name, record)}
        whole = is_finished(folder) and len(done) == len(plan.files)
        return Manifest(origin, {} if whole and overwrite else done)
    if not overwrite and found is not None:
        raise QuantizeError(f"{plan.target}: was made from {_other(found.origin, origin)}; --overwrite begins anew")
    if not overwrite and folder.names():
        raise QuantizeError(f"{plan.target}: is not empty; pass --overwrite to replace the checkpoint in it")
    return Manifest(origin)


def is_finished(folder: TargetFolder) -> bool:
    """Whether the files that come last are there."""
    return folder.size(SUMS) is not None and folder.size(CONFIG) is not None


def begin(plan: QuantizePlan, progress: Manifest) -> None:
    """Makes the folder ready for the files that `progress` does not have.

    Where nothing is kept, what an old checkpoint consists of is removed: config.json first, so that what remains after
    an interruption does not open. Other files stay.
    """
    folder = plan.folder
    folder.create()
    folder.remove_parts()
    names = folder.names()
    stale = [CONFIG, SUMS]
    if not progress.files:
        stale += [MANIFEST, INDEX, *(name for name in names if Path(name).suffix == ".safetensors")]
    for name in stale:
        if name in names:
            folder.remove(name)
    folder.write(MANIFEST, progress.dump())


def room_there(target: Path, progress: Manifest) -> int:
    """Bytes in a local folder that a run does not need room for: what `progress` has, or what `begin` removes."""
    if not target.is_dir():
        return 0
    unfinished = sum(path.stat().st_size for path in target.iterdir() if is_part(path.name))
    if progress.files:
        return progress.bytes + unfinished
    return unfinished + sum(path.stat().st_size for path in target.glob("*.safetensors"))


def _is_there(folder: TargetFolder, name: str, record: FileRecord) -> bool:
    return folder.size(name) == record.bytes


def _other(found: Origin, wanted: Origin) -> str:
    theirs, ours = asdict(found), asdict(wanted)
    words = {"source": "another source", "recipe": "another recipe", "inputs": "other inputs", "code": "other code"}
    return " and ".join(words[key] for key in words if theirs[key] != ours[key])
