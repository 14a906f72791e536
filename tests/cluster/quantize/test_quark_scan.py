"""The short import of Quark finds the classes that the long one finds."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import transformers

from flyray.cluster.quantize.quark_quantizer import import_quark
from flyray.cluster.quantize.quark_scan import short_scan


def decorated() -> set[str]:
    """transformers' classes with the decorator that Quark looks for, by a search of their text."""
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for file in models.rglob("modeling_*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if line.startswith("@use_experts_implementation"):
                below = next(after for after in lines[number + 1 :] if after.startswith("class "))
                found.add(below.removeprefix("class ").partition("(")[0].partition(":")[0])
    return found


def test_no_class_is_passed_over() -> None:
    import_quark()
    scanner = importlib.import_module("quark.torch.utils.llm.module_replacement.quark_experts")
    registered = {module.__name__ for module in scanner.PREPROCESS_REGISTRY}
    expected = decorated()
    assert len(expected) > 10
    assert expected <= registered


def test_others_parse_as_ever() -> None:
    plain = ast.parse
    with short_scan():
        assert ast.dump(ast.parse("a = 1", mode="exec")) == ast.dump(plain("a = 1"))
        scanner = {"__name__": "quark.torch.utils.llm.module_replacement.quark_experts", "ast": ast}
        passed_over = eval("ast.parse('a = 1')", scanner)
        parsed = eval("ast.parse('use_experts_implementation = 1')", scanner)
    assert passed_over.body == []
    assert len(parsed.body) == 1
    assert ast.parse is plain
