"""AMD Quark's calibrated algorithms on a model that fits in memory: a cross-check of flyray's own.

The model runs in transformers in float32, with Quark's rounding of the routed experts' weights (INT4 or INT8, a scale
an output row) and of their inputs (INT8, a scale a token); what comes out is how well it still predicts text. No
checkpoint is written: the figures stand beside those of `flyray eval` on the same text.

    python -m flyray.cluster.quantize.quark_in_memory CHECKPOINT --calibration FILE --text FILE [--json FILE]

Where Quark 0.13 needs help:
- transformers 5 keeps a layer's experts in one tensor; they are split into linears before, or stay as they are;
- AWQ and SmoothQuant leave out what a router also reads, so that only down_proj would be smoothed. Named one by one,
  the experts' gate and up projections are too, and the norm's other readers are corrected afterwards;
- GPTQ turns an expert that calibration never reached into zeros, and SmoothQuant fails: such experts are named, and
  see every token of their layer while it is calibrated, which changes no output;
- torch compiles the rounding anew for every shape, which takes minutes: here it runs as it is.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...actors.checkpoint import Checkpoint
from ...actors.expert_format import expert_matrices
from ...actors.safetensors_header import TensorEntry
from ..evaluate.perplexity import choose, cut_windows, read_documents
from ..figures import Figure, write_figures
from ..tokenizer import Tokenizer
from .matrix import SOURCE_FORMATS, QuantizeError, dequantize
from .quark_quantizer import import_quark

ALGORITHMS = ("nearest", "gptq", "awq", "smoothquant")
"""nearest: Quark's plain rounding, without any calibration."""
_KINDS = ("gate_proj", "up_proj", "down_proj")
# In config.json, but not among DeepseekV3Config's arguments, or there in another form.
_NOT_ARGUMENTS = ("model_type", "architectures", "quantization_config", "scoring_func", "topk_method")
_NOT_ARGUMENTS += ("moe_layer_freq", "rope_theta", "rope_scaling", "torch_dtype", "dtype")
_ALPHA = 0.5  # of SmoothQuant: as much to the weights as stays with the activations

Windows = Sequence[Sequence[int]]


class _Batches(Dataset[Tensor]):
    """Token tensors [1, T], as Quark's calibration takes them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Tensor:
        return self._batches[number]


@dataclass(frozen=True)
class Quantized:
    """unreached: names of the experts that no token of the calibration is routed to."""

    model: Any
    unreached: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """How well a model predicts: nats a token; KL divergence from the reference, nats a token; share of tokens at
    which both find the same one most likely."""

    nats: float
    kl: float
    top1: float


def load_model(checkpoint: Checkpoint) -> Any:
    """A native or bf16 checkpoint's text model as transformers' DeepseekV3ForCausalLM in float32, each routed expert's
    matrices as linears. Raises QuantizeError for another format, CheckpointError for a tensor that is missing."""
    import_quark()
    transformers = importlib.import_module("transformers")
    source_format = checkpoint.expert_format()
    if source_format not in SOURCE_FORMATS:
        raise QuantizeError(f"{checkpoint.path} is quantized to {source_format}; a native or bf16 one is needed")
    text = checkpoint.config.get("text_config", checkpoint.config)
    scaling = dict(text.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), **scaling, "rope_theta": text["rope_theta"]}
    arguments = {name: value for name, value in text.items() if name not in _NOT_ARGUMENTS}
    config = transformers.DeepseekV3Config(**arguments, rope_parameters=rope, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    importlib.import_module("quark.torch.utils.llm").preprocess_for_quantization(model)
    matrices = expert_matrices({name: checkpoint.entry(name) for name in checkpoint.names})
    for name, tensor in model.state_dict().items():
        matrix = name.removesuffix(".weight")
        parts = matrices.get(matrix)
        tensor.copy_(_matrix(checkpoint, source_format, matrix, parts) if parts else checkpoint.read(name).float())
    return model


def quantize_model(model: Any, algorithm: str, bits: int, windows: Windows) -> Quantized:
    """Quantizes the routed experts of a model of `load_model`'s, in place.

    algorithm: one of ALGORITHMS; bits: of the weights, 4 or 8; windows: calibration tokens, all of one length, or else
    QuantizeError.
    """
    quark = import_quark()
    if len({len(window) for window in windows}) != 1:
        raise QuantizeError("calibration windows must all have one length; Quark takes no others")
    data = [torch.tensor([window]) for window in windows]
    unreached = _unreached(model, data)
    norms = {number: layer.post_attention_layernorm.weight.clone() for number, layer in _moe_layers(model)}
    quantizer = quark.ModelQuantizer(_config(quark, algorithm, bits, model))
    loader: DataLoader[Tensor] = DataLoader(_Batches(data), batch_size=None)
    hooks = _show_all_tokens(model, unreached)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = quantizer.quantize_model(model, loader)
        for hook in hooks:
            hook.remove()
        model = quantizer.freeze(model)
    for number, layer in _moe_layers(model):
        _correct_other_readers(layer, norms[number] / layer.post_attention_layernorm.weight, algorithm)
    return Quantized(model, tuple(unreached))


def predict(model: Any, reference: Any, windows: Windows) -> Prediction:
    """Scores every token of the windows but each one's first."""
    nats = kl = 0.0
    same = tokens = 0
    for window in windows:
        given = torch.tensor([window])
        found = _log_probabilities(model, given)
        kept = found if reference is model else _log_probabilities(reference, given)
        nats -= float(found.gather(1, given[0, 1:, None]).sum(dtype=torch.float64))
        kl += float((kept.exp() * (kept - found)).sum(dtype=torch.float64))
        same += int((found.argmax(1) == kept.argmax(1)).sum())
        tokens += len(window) - 1
    return Prediction(nats / tokens, kl / tokens, same / tokens)


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """tokens [1, T] -> [T - 1, V] float32, of what follows each but the last."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        return torch.log_softmax(model(tokens, use_cache=False).logits[0, :-1].float(), dim=-1)


def _matrix(checkpoint: Checkpoint, source_format: str, name: str, parts: dict[str, TensorEntry]) -> Tensor:
    return dequantize(source_format, {part: checkpoint.read(f"{name}.{part}") for part in parts})


def _moe_layers(model: Any) -> Iterator[tuple[int, Any]]:
    return ((number, layer) for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))


def _experts(model: Any) -> Iterator[tuple[str, Any]]:
    for number, layer in _moe_layers(model):
        for expert in range(model.config.n_routed_experts):
            yield f"model.layers.{number}.mlp.experts.{expert}", layer.mlp.experts.get_submodule(str(expert))


def _unreached(model: Any, data: Sequence[Tensor]) -> list[str]:
    """Names of the experts that no token of the data is routed to."""
    reached: set[str] = set()
    hooks = [
        expert.down_proj.register_forward_hook(lambda *_, name=name: reached.add(name))
        for name, expert in _experts(model)
    ]
    with torch.no_grad():
        for tokens in data:
            model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [name for name, _ in _experts(model) if name not in reached]


def _show_all_tokens(model: Any, names: Sequence[str]) -> list[Any]:
    """Hooks by which these experts also see what their layer's experts are given; what they answer is dropped."""
    hooks = []
    for name in names:
        block, expert = model.get_submodule(name.rpartition(".experts.")[0]), model.get_submodule(name)

        def show(_block: Any, given: tuple[Tensor, ...], _answer: Any, expert: Any = expert) -> None:
            tokens = given[0].flatten(0, -2)
            expert.down_proj(torch.nn.functional.silu(expert.gate_proj(tokens)) * expert.up_proj(tokens))

        hooks.append(block.register_forward_hook(show))
    return hooks


def _config(quark: Any, algorithm: str, bits: int, model: Any) -> Any:
    configs = importlib.import_module("quark.torch.quantization.config.config")
    common = {"symmetric": True, "scale_type": "float32", "round_method": "half_even"}
    spec = {4: configs.Int4PerChannelSpec, 8: configs.Int8PerChannelSpec}[bits]
    layers = configs.QLayerConfig(
        weight=spec(ch_axis=0, is_dynamic=False, **common).to_quantization_spec(),
        input_tensors=configs.Int8PerChannelSpec(ch_axis=1, is_dynamic=True, **common).to_quantization_spec(),
    )
    # The patterns of the template that leaves all but routed experts alone.
    exclude = quark.LLMTemplate.get("kimi_k25").exclude_layers_name
    return configs.QConfig(
        global_quant_config=layers, exclude=exclude, algo_config=_algorithms(configs, algorithm, model)
    )


def _algorithms(configs: Any, algorithm: str, model: Any) -> list[Any] | None:
    count = model.config.n_routed_experts
    inputs = [f"mlp.experts.{expert}.{kind}" for expert in range(count) for kind in ("gate_proj", "up_proj")]
    shared = [f"mlp.shared_experts.{kind}" for kind in ("gate_proj", "up_proj")]
    inner = {"prev_op": "up_proj", "layers": ["experts.*.down_proj"], "inp": "down_proj"}
    norm = {"prev_op": "post_attention_layernorm", "module2inspect": "mlp"}
    match algorithm:
        case "gptq":
            inside = [f"experts.*.{kind}" for kind in _KINDS]
            return [configs.GPTQConfig(inside_layer_modules=inside, model_decoder_layers="model.layers")]
        case "awq":
            layers = [{**norm, "layers": inputs, "inp": "mlp"}, inner]
            return [configs.AWQConfig(scaling_layers=layers, model_decoder_layers="model.layers")]
        case "smoothquant":
            # The first of the layers says how large the inputs are: shared experts see every token.
            layers = [{**norm, "layers": shared + inputs, "inp": shared[0]}, inner]
            return [configs.SmoothQuantConfig(alpha=_ALPHA, scaling_layers=layers, model_decoder_layers="model.layers")]
    return None


def _correct_other_readers(layer: Any, factor: Tensor, algorithm: str) -> None:
    """factor [D]: what the norm's output was divided by; the experts' weights are multiplied with it already."""
    readers = [layer.mlp.gate]
    if algorithm != "smoothquant":
        readers += [layer.mlp.shared_experts.gate_proj, layer.mlp.shared_experts.up_proj]
    for reader in readers:
        reader.weight.mul_(factor)


def compare(
    checkpoint: Path, calibration: Path, text: Path, algorithms: Sequence[str], bits: Sequence[int], settings: Settings
) -> Iterator[Figure]:
    """Figures of every algorithm at every number of bits: perplexity, and its ratio, KL and top-1 against float32."""
    opened, tokenizer = Checkpoint(checkpoint), Tokenizer(checkpoint)
    documents = choose(read_documents(calibration), 1 << 40)
    cut = [window.tokens for window in cut_windows(tokenizer, documents, settings.calibration_length)]
    known = [tokens for tokens in cut if len(tokens) == settings.calibration_length][: settings.calibration_windows]
    heldout = choose(read_documents(text), settings.text_bytes)
    scored = [window.tokens for window in cut_windows(tokenizer, heldout, settings.window)]
    reference = load_model(opened)
    plain = predict(reference, reference, scored)
    yield Figure("perplexity.float32", math.exp(plain.nats), "perplexity")
    for each in bits:
        for algorithm in algorithms:
            quantized = quantize_model(load_model(opened), algorithm, each, known)
            if quantized.unreached:
                print(f"calibration never reached {', '.join(quantized.unreached)}", file=sys.stderr)
            found = predict(quantized.model, reference, scored)
            label = f"quark-{algorithm}-int{each}"
            yield Figure(f"perplexity.{label}", math.exp(found.nats), "perplexity")
            yield Figure(f"perplexity_ratio.{label}", math.exp(found.nats - plain.nats), "ratio")
            yield Figure(f"kl.{label}", found.kl, "nats")
            yield Figure(f"top1.{label}", found.top1, "share")


@dataclass(frozen=True)
class Settings:
    """window, text_bytes: of the scored text, as in `flyray eval`. calibration_*: in tokens, and how many of them."""

    window: int = 1024
    text_bytes: int = 200_000
    calibration_length: int = 512
    calibration_windows: int = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m flyray.cluster.quantize.quark_in_memory")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS)
    parser.add_argument("--bits", action="append", type=int, choices=(4, 8))
    parser.add_argument("--json", type=Path)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    settings = Settings(**{name: given[name] for name in vars(Settings())})
    figures = []
    for figure in compare(
        given["checkpoint"],
        given["calibration"],
        given["text"],
        given["algorithm"] or ALGORITHMS,
        given["bits"] or (4, 8),
        settings,
    ):
        print(f"{figure.name:<40} {figure.value:.6f} {figure.unit}", flush=True)
        figures.append(figure)
    if given["json"]:
        write_figures(given["json"], figures)


if __name__ == "__main__":
    main()
