"""What makes the import of AMD Quark short: most of it was parsing files that cannot hold what Quark looks for.

Quark 0.13 parses every `modeling_*.py` of transformers, some 400 files, while it is imported, to find classes with one
decorator (`quark/torch/utils/llm/module_replacement/quark_experts.py`): 9 of the import's 17 s of processor time.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SCANNER = "quark.torch.utils.llm.module_replacement.quark_experts"
_DECORATOR = "use_experts_implementation"


@contextmanager
def short_scan() -> Iterator[None]:
    """While it lasts, Quark's scanner gets an empty module for a source in which its decorator's name does not occur.

    Every other caller of `ast.parse`, in this thread or another, gets what it asks for.
    """
    parse = ast.parse

    def parse_what_may_matter(source: Any, *arguments: Any, **options: Any) -> ast.AST:
        caller = sys._getframe(1).f_globals.get("__name__")
        passed_over = caller == _SCANNER and isinstance(source, str) and _DECORATOR not in source
        return parse("" if passed_over else source, *arguments, **options)

    ast.parse = parse_what_may_matter
    try:
        yield
    finally:
        ast.parse = parse
