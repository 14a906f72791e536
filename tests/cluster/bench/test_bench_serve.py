"""What `flyray bench serve` refuses before it asks anybody anything."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flyray.cluster.bench.load import Level, LoadError, Workload
from flyray.cluster.cli import app

URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give one of a URL, --demo and --config"),
        ([URL, "--demo"], 2, "give one of a URL, --demo and --config"),
        ([URL, "--concurrency", "1,0"], 2, "--concurrency: '1,0' must be numbers above 0"),
        ([URL, "--rate", "fast"], 2, "--rate: 'fast' must be numbers above 0"),
        ([URL, "--rate", "inf"], 2, "--rate: 'inf' must be numbers above 0"),
        ([URL, "--against-engine"], 1, "the engine behind a URL cannot be reached: measure against it with --demo"),
        ([URL, "--endpoint", "embeddings"], 1, "endpoint: 'embeddings' is none of completions, chat"),
        (["--demo", "--against-engine", "--endpoint", "chat"], 1, "measure against it with the endpoint 'completions'"),
        (["127.0.0.1:9"], 1, "'127.0.0.1:9' is no URL"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, code, says):
    done = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert done.exit_code == code
    assert says in " ".join(done.output.replace("│", " ").split())


def test_a_level_is_streams_or_a_rate():
    assert (Level(1.0, 32).name, Level(1.0, rate=2.5).name) == ("c32", "r2.5")
    for wrong in ((1.0,), (1.0, 4, 2.0)):
        with pytest.raises(LoadError, match="one of them"):
            Level(*wrong)


def test_prompts_differ_and_repeat_with_their_seed():
    load = Workload("m", prompt_tokens=50)
    assert load.prompt(3) == Workload("m", prompt_tokens=50).prompt(3)
    assert len(load.prompt(3)) == 50
    assert len({tuple(load.prompt(number)) for number in range(20)}) == 20
    assert load.body(3, 9) != Workload("m", prompt_tokens=50, seed=1).body(3, 9)
