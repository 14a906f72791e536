"""`flyray verify` as publishers run it: a process of its own, real engines, exit codes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_model import all_log_probabilities
from transformers import DeepseekV3ForCausalLM
from typer.testing import CliRunner
from verified import put, verify, write_as, write_native, write_sums

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.cli import app
from flyray.cluster.evaluate.columns import ColumnScore, TaskScore
from flyray.cluster.evaluate.perplexity import TextScore
from flyray.cluster.figures import read_figures
from flyray.cluster.verify.check import at_least, at_most
from flyray.cluster.verify.limits import Limits, score_checks

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Kimi zählt: 1, 2, 3, 4, 5, 6, 7.", "a b c " * 20]
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepseekV3ForCausalLM]:
    path = tmp_path_factory.mktemp("native") / "model"
    return path, write_native(path)


def flyray_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = "from flyray.cluster.cli import main; main()"
    command = [sys.executable, "-c", program, "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)


def test_distances_of_a_pair_are_those_of_transformers(
    native: tuple[Path, DeepseekV3ForCausalLM], tmp_path: Path
) -> None:
    a, model = native
    b = write_as(tmp_path / "b", model, a, "bf16")
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    head = (model.lm_head.weight.detach() * (1 + 0.1 * noise)).bfloat16()
    put(b, HEAD, head)
    write_sums(b)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "tasks.jsonl").write_text(
        json.dumps({"family": "add", "messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2"})
    )
    before = [all_log_probabilities(model, list(text.encode())) for text in TEXTS]
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.copy_(head)
        after = [all_log_probabilities(model, list(text.encode())) for text in TEXTS]
        model.lm_head.weight.copy_(kept)
    p, q = torch.cat(before), torch.cat(after)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    top1 = float((p.argmax(1) == q.argmax(1)).double().mean())
    common = [a, b, "--text", tmp_path / "text.jsonl", "--tasks-file", tmp_path / "tasks.jsonl", "--tasks", 1]
    common += ["--work-dir", tmp_path / "work", "--json", tmp_path / "verified.json"]

    done = flyray_verify(*common, "--max-kl", 1.01 * kl, "--max-perplexity-ratio", 1.0001, "--min-top1", 1)
    assert (done.returncode, done.stderr) == (1, "")
    failed = [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["FAIL  same top-1 token", "FAIL  perplexity"]
    for words in (
        "B checksums: all files are as in",
        "copied tensors: 42 are the same to the bit, 1 differ: lm_head.weight (",
        "KL divergence: 0.",
        "nats a token over ",
        "tasks: 0 and 0 of 1 right, no share of nothing",
        "2 of 21 checks failed",
    ):
        assert words in done.stdout
    found = read_figures(tmp_path / "verified.json")
    assert found["kl.B"].value == pytest.approx(kl, rel=1e-3)
    assert found["top1.B"].value == pytest.approx(top1, abs=1.5 / len(p))
    assert (found["kl.A"].value, found["top1.A"].value) == (0.0, 1.0)
    assert 0 < found["weight_error"].value < 0.002  # bfloat16 of what the native INT4 stands for
    content = json.loads((tmp_path / "verified.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in content["checks"]}
    assert (content["passed"], verdicts["KL divergence"], verdicts["tasks"]) == (False, "ok", "-")
    assert not list((tmp_path / "work").iterdir())


def test_one_checkpoint_is_loaded_and_passes_the_golden_prompt(native: tuple[Path, DeepseekV3ForCausalLM]) -> None:
    done = flyray_verify(f"{native[0]}:w8a8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    engine: A loads, its kernels and the golden prompt are right" in done.stdout
    assert done.stdout.endswith("all checks passed\n")


def test_weights_that_make_nonsense_of_the_golden_prompt(
    native: tuple[Path, DeepseekV3ForCausalLM], tmp_path: Path
) -> None:
    """Finite values whose products are not: only running shows it."""
    b = write_as(tmp_path / "b", native[1], native[0], "bf16")
    weight = Checkpoint(b).read("model.layers.0.mlp.down_proj.weight")
    put(b, "model.layers.0.mlp.down_proj.weight", torch.full_like(weight, 3e38))
    code, report = verify(b, engine=True)
    assert code == 1
    assert "ok    A values" in report
    assert "FAIL  engine: " in report


def test_calls_that_make_no_sense(native: tuple[Path, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    for arguments, words in (
        ((f"{tmp_path}/nothing",), "no such checkpoint folder"),
        ((f"{native[0]}", "--max-kl", "0.1"), "--max-kl: a limit compares two checkpoints; name the second one"),
        ((f"{native[0]}:w8a8-fp8",), "cannot be loaded from a w4a16 checkpoint"),
    ):
        done = CliRunner().invoke(app, ["verify", *arguments])
        assert (done.exit_code, done.output.count("FAIL")) == (2, 0)
        assert words in done.output


def text_score(divergences: tuple[float, ...]) -> TextScore:
    return TextScore((10.0, 21.0), (10, 20), (30, 60), divergences, (9, 20) if divergences else ())


def test_numbers_are_held_against_their_limits() -> None:
    a = ColumnScore("A", text_score(()), (TaskScore("all", 8, 10),), 5)
    b = ColumnScore("B", text_score((0.01, 0.02)), (TaskScore("all", 6, 10),), 5)

    def verdicts(limits: Limits) -> dict[str, str]:
        return {check.name: check.verdict for check in score_checks(a, b, limits)}

    names = ("KL divergence", "same top-1 token", "perplexity", "tasks")
    assert verdicts(Limits()) == dict.fromkeys(names, "-")
    assert verdicts(Limits(0.001, 29 / 30, 1.0, 0.75)) == dict.fromkeys(names, "ok")
    assert verdicts(Limits(0.00099, 0.97, 0.999, 0.76)) == dict.fromkeys(names, "FAIL")
    none_right = replace(a, tasks=(TaskScore("all", 0, 10),))
    assert score_checks(none_right, b, Limits(min_task_share=0.1))[-1].verdict == "FAIL"


def test_nan_is_beyond_every_limit() -> None:
    assert at_most("n", math.nan, 1.0, "").passed is False
    assert at_least("n", math.nan, 0.0, "").passed is False
    assert at_most("n", math.nan, None, "").passed is None
