"""Which module gets which scheme: a recipe's rules, held against the modules that a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...actors.expert_format import EXPERT_TENSOR
from ...actors.weight_formats import INT8_LINEAR, INT8_LINEARS
from .matrix import QuantizeError
from .mixed import Choice
from .recipe import Recipe, Rule, Scheme, matches

_ACTIVATIONS = {"w8a8-fp8": "FP8", "bf16": "bfloat16", "w4a16": "bfloat16"}


@dataclass(frozen=True)
class Modules:
    """What can be matched. matrices: of routed experts, by name (layer, expert); others: every other module with a
    weight, in the checkpoint's order."""

    matrices: Mapping[str, tuple[int, int]]
    others: tuple[str, ...]

    @staticmethod
    def of(names: Iterable[str]) -> Modules:
        """names: of tensors, without the prefix."""
        matrices: dict[str, tuple[int, int]] = {}
        others: dict[str, None] = {}
        for name in names:
            match = EXPERT_TENSOR.fullmatch(name)
            if match is not None:
                matrices[match["matrix"]] = int(match["layer"]), int(match["expert"])
            elif name.endswith(".weight"):
                others[name.removesuffix(".weight")] = None
        return Modules(matrices, tuple(others))


def assign(recipe: Recipe, modules: Modules, choice: Choice | None) -> dict[str, Scheme]:
    """The scheme of every module that is quantized; choice: of the recipe's mixed rule.

    Raises QuantizeError for a pattern that matches nothing, for a rule that decides nothing, and for a module that
    cannot be what its rule says.
    """
    check_patterns(recipe, modules)
    schemes: dict[str, Scheme] = {}
    for module, (layer, expert) in modules.matrices.items():
        if (rule := recipe.rule_for(module)) is not None:
            schemes[module] = _expert_scheme(rule, (layer, expert), choice)
    for module in modules.others:
        if (rule := recipe.rule_for(module)) is not None:
            schemes[module] = _linear_scheme(recipe, rule, module)
    return schemes


def check_experts(modules: Modules, schemes: Mapping[str, Scheme], source_format: str) -> None:
    """Raises QuantizeError unless the three matrices of every expert share one format, and the experts of every layer
    one format of activations, as the engine needs it."""
    experts: dict[tuple[int, int], tuple[str, str]] = {}
    layers: dict[int, tuple[str, str]] = {}
    for module, (layer, expert) in modules.matrices.items():
        format = schemes[module].format if module in schemes else source_format
        first, other = experts.setdefault((layer, expert), (module, format))
        if other != format:
            raise QuantizeError(f"{first} would be {other} and {module} {format}; an expert's matrices share a format")
        activations = _ACTIVATIONS.get(format, "INT8")
        first, other = layers.setdefault(layer, (module, activations))
        if other != activations:
            raise QuantizeError(
                f"{first} would need {other} activations and {module} {activations}; the experts of a layer share one "
                "kind: w4a8, w8a8 and w4a8-channel go together, w8a8-fp8 and unquantized experts each stand alone"
            )


def mixed_experts(recipe: Recipe, modules: Modules) -> set[tuple[int, int]]:
    """(layer, expert) of what the recipe's mixed rule decides over. Raises QuantizeError if that is no expert."""
    check_patterns(recipe, modules)
    found = {
        expert
        for module, expert in modules.matrices.items()
        if (rule := recipe.rule_for(module)) is not None and rule.mixed is not None
    }
    if not found:
        raise QuantizeError(f"recipe {recipe.name}: the mixed rule matches no routed expert; mixed is for those alone")
    return found


def check_patterns(recipe: Recipe, modules: Modules) -> None:
    """Raises QuantizeError for a pattern that matches nothing, and for a rule all of whose modules are taken by earlier
    rules or by exclude: somebody meant something by it."""
    names = [*modules.others, *modules.matrices]
    for where, pattern in _patterns(recipe):
        if not any(matches(pattern, name) for name in names):
            raise QuantizeError(f"recipe {recipe.name}: {where}: {pattern!r} matches no module of the checkpoint")
    decides = {id(recipe.rule_for(name)) for name in names}
    for index, rule in enumerate(recipe.rules):
        if id(rule) not in decides:
            raise QuantizeError(
                f"recipe {recipe.name}: rules[{index}] decides nothing: "
                "earlier rules or exclude take all that it matches"
            )


def _patterns(recipe: Recipe) -> Iterable[tuple[str, str]]:
    for index, rule in enumerate(recipe.rules):
        for pattern in rule.modules:
            yield f"rules[{index}].modules", pattern
    for pattern in recipe.exclude:
        yield "exclude", pattern


def _expert_scheme(rule: Rule, expert: tuple[int, int], choice: Choice | None) -> Scheme:
    if rule.mixed is None:
        assert rule.scheme is not None
        return rule.scheme
    if choice is None:
        raise ValueError("a mixed rule without a choice")
    return rule.mixed.high if expert in choice.high else rule.mixed.low


def _linear_scheme(recipe: Recipe, rule: Rule, module: str) -> Scheme:
    where = f"recipe {recipe.name}: rules[{recipe.rules.index(rule)}]: {module}"
    if not INT8_LINEAR.fullmatch(module):
        raise QuantizeError(
            f"{where} cannot be quantized; routed experts can, and {INT8_LINEARS} in w8a8. "
            "Narrow the pattern, or name the module under exclude"
        )
    if rule.scheme is None:
        raise QuantizeError(f"{where} is no routed expert; mixed is for those alone")
    if rule.scheme.format != "w8a8":
        raise QuantizeError(f"{where} cannot be {rule.scheme.format}; {INT8_LINEARS} can be w8a8")
    return rule.scheme
