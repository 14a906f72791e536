"""The figures file: its form, its refusals, and that it is written whole or not at all."""

import json
import math
from pathlib import Path

import pytest

from flyray.cluster.figures import Figure, read_figures, write_figures


def test_written_form(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "figures.json"
    write_figures(path, [Figure("perplexity.w4a8", 5.25, "1"), Figure("bytes.w4a8", 12, "bytes")])
    content = json.loads(path.read_text())
    assert content["figures"] == [
        {"name": "perplexity.w4a8", "value": 5.25, "unit": "1"},
        {"name": "bytes.w4a8", "value": 12, "unit": "bytes"},
    ]
    assert {"flyray", "python", "torch", "ray"} <= set(content["versions"])
    assert read_figures(path)["bytes.w4a8"] == Figure("bytes.w4a8", 12, "bytes")


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ([Figure("a.b", 1.0, "1"), Figure("a.b", 2.0, "1")], "'a.b' is given twice: 1.0 and 2.0"),
        ([Figure("a.b", math.nan, "1")], "'a.b' is nan"),
        ([Figure("a.b", math.inf, "1")], "'a.b' is inf"),
        ([Figure("a.b", 1.0, "")], "'a.b' has unit ''"),
        ([Figure("", 1.0, "1")], "figure '' has unit"),
    ],
)
def test_refused_figures_leave_the_old_file(tmp_path: Path, figures: list[Figure], words: str) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(ValueError, match=words):
        write_figures(path, figures)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
