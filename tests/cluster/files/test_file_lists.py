"""Files in a folder: what is listed, in which order, page by page, while files come and go."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyray.cluster.files.durable import try_lock
from flyray.cluster.files.file_store import FileStore
from flyray.cluster.files.identity import BATCH, FILE, Page, created_at, is_id, new_id

PURPOSES = ("batch", "batch_output")


def put(store: FileStore, purpose: str = "batch", content: bytes = b"x") -> str:
    with store.create() as new:
        new.write(content)
        return new.keep("../../name of the client's", purpose).id


@given(st.floats(1e9, 4e9), st.floats(1e9, 4e9))
def test_ids_sort_as_they_came_to_be(first: float, second: float) -> None:
    names = [new_id(BATCH, lambda: at) for at in (first, second)]  # noqa: B023
    assert [created_at(name, BATCH) for name in names] == [int(int(at * 1e6) // 1_000_000) for at in (first, second)]
    if int(first * 1e6) < int(second * 1e6):
        assert names[0] < names[1]


@pytest.mark.parametrize(
    "name", ["", "file-", "..", "file-..", "file-/etc/passwd", "batch_" + "0" * 24, "file-" + "0" * 25]
)
def test_what_is_no_id_is_no_file(tmp_path: Path, name: str) -> None:
    assert not is_id(name, FILE)
    store = FileStore(tmp_path)
    for ask in (store.get, store.content, lambda name: store.delete(name, lambda _: False)):
        with pytest.raises(LookupError):
            ask(name)


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from(PURPOSES), max_size=8),
    st.sets(st.integers(0, 7)),
    st.sampled_from(("", *PURPOSES, "vision")),
    st.integers(1, 5),
    st.booleans(),
)
def test_pages_are_the_list(kinds: list[str], gone: set[int], purpose: str, limit: int, newest: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder))
        names = [put(store, kind) for kind in kinds]
        for index in gone & set(range(len(names))):
            assert store.delete(names[index], lambda _: False) == ""
        want = [
            name
            for index, (name, kind) in enumerate(zip(names, kinds, strict=True))
            if index not in gone and purpose in ("", kind)
        ]
        found: list[str] = []
        more = True
        while more:
            page, more = store.list(Page(limit, found[-1] if found else "", newest), purpose)
            assert len(page) == limit or not more
            found += [file.id for file in page]
        assert found == (sorted(want, reverse=True) if newest else sorted(want))
        # The id of a file that is gone still has its place.
        for index in gone & set(range(len(names))):
            rest, _ = store.list(Page(100, names[index], newest_first=False), purpose)
            assert [file.id for file in rest] == [name for name in sorted(want) if name > names[index]]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with store.create() as new:
        new.write(b"half")
        assert store.list(Page(10)) == ([], False)
    with pytest.raises(RuntimeError), store.create() as new:  # noqa: PT012
        new.write(b"half")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    name = put(store, content=b"whole")
    assert store.content(name).read_bytes() == b"whole"
    assert store.get(name).filename == "../../name of the client's"
    assert {path.name for path in tmp_path.rglob("*")} >= {"content", "object.json", name}


def test_what_a_dead_process_left_goes_with_the_next_upload(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    left, held = tmp_path / "new" / "write-left", tmp_path / "new" / "write-held"
    for folder in (left, held):
        folder.mkdir()
        (folder / "lock").touch()
    lock = try_lock(held / "lock")
    assert lock is not None
    put(store)
    assert list((tmp_path / "new").iterdir()) == [held]
