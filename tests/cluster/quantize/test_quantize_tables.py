"""The tables that `flyray quantize` prints."""

from pathlib import Path

from rich.console import Console

from flyray.cluster.quantize.manifest import MatrixError
from flyray.cluster.quantize.report import QuantizeReport, tables


def test_a_matrix_is_named_whole_in_a_narrow_terminal() -> None:
    name = "model.layers.1.mlp.experts.17.up_proj"
    report = QuantizeReport(
        label="w4a8-channel-calibrated", format="w4a8-channel", source_format="w4a16", target=Path("out"),
        bytes_before=1, bytes_after=1, seconds=1.0, bytes_read=1, kept_files=0, import_seconds=0.0, weight_error=0.1,
        per_kind={"up_proj": 0.1}, per_format={}, worst=(MatrixError(name, "up_proj", "w4a8-channel", 0.1, 1.0),),
        uncalibrated=(), predicted=None, peak_memory=1, work_memory=1, nodes=(),
    )  # fmt: skip
    console = Console(width=50)
    with console.capture() as captured:
        console.print(tables([report])[-1])
    cells = [line.split("│")[2].strip() for line in captured.get().splitlines() if line.count("│") == 4]
    assert "".join(cells) == name
