"""The demo model's formats against its own weights, on a little text: who is near, who is far, and who is the same."""

from pathlib import Path

from rich.console import Console

from flyray.cluster.demo.files import DEMO_MODEL, DEMO_TASKS, DEMO_TEXT
from flyray.cluster.evaluate import command as eval_command
from flyray.cluster.evaluate.settings import EvalSettings
from flyray.cluster.figures import read_figures

# One INT4 scale an output row, clipped: better than without, as the published layout is made.
CHANNEL = 'version: 1\nrules: [{modules: ["model.layers.*.mlp.experts.*"], format: w4a8-channel, clip: mse}]\n'


def test_groups_lose_less_than_a_third_of_what_rows_lose(tmp_path: Path) -> None:
    (tmp_path / "channel.yaml").write_text(CHANNEL)
    code = eval_command.run(
        [DEMO_MODEL],
        text_file=DEMO_TEXT,
        tasks_file=DEMO_TASKS,
        formats=["bf16", "w4a8", str(tmp_path / "channel.yaml")],
        settings=EvalSettings(tasks=0, text_bytes=6000, window=512),
        work_dir=tmp_path / "work",
        json_path=tmp_path / "figures.json",
        console=Console(quiet=True),
    )
    assert code == 0
    found = {name: figure.value for name, figure in read_figures(tmp_path / "figures.json").items()}
    assert (found["kl.w4a16"], found["top1.w4a16"]) == (0.0, 1.0)
    assert (found["kl.bf16"], found["kl.bf16.high"], found["top1.bf16"], found["perplexity_ratio.bf16"]) == (0, 0, 1, 1)
    assert 0 < 3 * found["kl.w4a8"] < found["kl.channel"]
    assert 1 > found["top1.w4a8"] > found["top1.channel"] > 0.5
    assert found["kl.channel"] == max(found[f"kl.{label}"] for label in ("w4a16", "bf16", "w4a8", "channel"))
