"""The golden prompt: what an engine must get right before it says that it is ready.

A fixed prompt is run greedily through the whole engine, clients' socket and all, first alone and then beside other
sequences that share its steps. What is checked:

1. Every log probability is finite and not above 0.
2. Both runs give the same tokens and the same log probabilities, to the bit: rows do not depend on their batch.
3. For a model of at most `REFERENCE_PARAMETERS` parameters: the prompt's log probabilities are those of the reference
   kernels in one process with the same weights, within `MEAN_BOUND` on average and `WORST_BOUND` each. Backends need
   not agree to the bit: float32 sums may have another order, and a rounding to INT8 that falls the other way is a small
   step.

A larger model would not fit beside the engine; there the shards' kernel checks and 1 and 2 have to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from ..kernels.select import ROUNDED_KV_DTYPES, select_kernels
from .engine_config import EngineConfig
from .engine_error import EngineError
from .link import Links
from .model.config import ModelConfig
from .model.single import SingleProcessModel
from .request import Generate, ProgressBatch
from .step_plan import Sampling
from .wire import decode_as, encode

PROMPT_TOKENS = 24
ANSWER_TOKENS = 8
NEIGHBOURS = 3
REFERENCE_PARAMETERS = 64_000_000
# The tokens are like no text, so that a difference of a millionth in one operation already turns some roundings to INT8
# and some choices of experts: 0.06 nats on average on the demo model. Attention 5 % too large is 0.32 there, no rotary
# embedding 1.6; finer faults are for the shards' kernel checks.
MEAN_BOUND = 0.25
WORST_BOUND = 1.5

GREEDY = Sampling(0.0, 1.0, 0, 0)


class GoldenPromptError(EngineError):
    """The engine computes something else than it should; the numbers are in the message."""


@dataclass(frozen=True)
class GoldenRun:
    """tokens and their log probabilities, and the log probabilities of the prompt's tokens but the first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    scores: tuple[float, ...]


def golden_prompt(model: ModelConfig, context_length: int, variant: int = 0) -> tuple[int, ...]:
    """A fixed prompt that fits; other variants differ in tokens and length."""
    length = max(1, min(PROMPT_TOKENS + 5 * variant, context_length - ANSWER_TOKENS))
    return tuple((97 + 131 * place + 1009 * variant) % model.vocab_size for place in range(length))


class GoldenClient:
    """A client of the router that waits for its answers; `identity` is the one that a starting engine listens to."""

    def __init__(self, links: Links, address: str, identity: bytes, timeout_s: float) -> None:
        self._socket = links.connect(zmq.DEALER, address, identity=identity)
        self._timeout_s = timeout_s

    def run(self, requests: Sequence[Generate]) -> dict[str, GoldenRun]:
        """Runs requests at once; raises GoldenPromptError when one fails or the time is over."""
        for request in requests:
            self._socket.send(encode(request))
        runs = {request.request: GoldenRun((), (), ()) for request in requests}
        waiting = set(runs)
        deadline = time.monotonic() + self._timeout_s
        while waiting:
            if not self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                raise GoldenPromptError(f"the golden prompt had no answer within {self._timeout_s:g} s")
            for item in decode_as(self._socket.recv(), ProgressBatch).news:
                if item.finish == "error":
                    raise GoldenPromptError(f"the golden prompt failed: {item.error}")
                before = runs[item.request]
                runs[item.request] = GoldenRun(
                    before.tokens + item.tokens, before.logprobs + item.logprobs, before.scores + item.scores
                )
                if item.finish:
                    waiting.discard(item.request)
        return runs


def run_golden(client: GoldenClient, model: ModelConfig, context_length: int) -> GoldenRun:
    """Runs the golden prompt alone and among others; returns what it gave, checked as 1 and 2 above."""

    def request(name: str, variant: int) -> Generate:
        prompt = golden_prompt(model, context_length, variant)
        answer = max(1, min(ANSWER_TOKENS, context_length - len(prompt)))
        return Generate(name, prompt, answer, GREEDY, (), 0, True)

    alone = client.run([request("golden", 0)])["golden"]
    others = [request(f"neighbour-{variant}", variant) for variant in range(1, NEIGHBOURS + 1)]
    beside = client.run([*others[:1], request("golden", 0), *others[1:]])["golden"]
    for value in (*alone.logprobs, *alone.scores):
        if not math.isfinite(value) or value > 0:
            raise GoldenPromptError(f"the golden prompt has the log probability {value}")
    if alone != beside:
        raise GoldenPromptError(f"the golden prompt gives {alone} alone and {beside} beside other sequences")
    return alone


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the text model, without norms."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    queries = (
        hidden * heads * model.qk_head_dim
        if model.q_lora_rank is None
        else model.q_lora_rank * (hidden + heads * model.qk_head_dim)
    )
    values = hidden * model.kv_width + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = queries + values + heads * model.v_head_dim * hidden
    expert = 3 * hidden * model.moe_intermediate_size
    moe = expert * (model.n_routed_experts + model.n_shared_experts) + model.n_routed_experts * hidden
    dense = 3 * hidden * model.intermediate_size
    layers = model.num_hidden_layers * attention + len(model.moe_layers) * moe
    layers += (model.num_hidden_layers - len(model.moe_layers)) * dense
    return layers + 2 * model.vocab_size * hidden


def reference_scores(config: EngineConfig, model: ModelConfig, context_length: int) -> tuple[float, ...] | None:
    """The golden prompt's log probabilities by the reference kernels; None for a model that is too large for it, or of
    random weights, which are other ones on another device."""
    if parameter_count(model) > REFERENCE_PARAMETERS or config.weights == "random":
        return None
    prompt = golden_prompt(model, context_length)
    kv_dtype = config.kv_dtype if config.kv_dtype in ROUNDED_KV_DTYPES else "f32"
    kernels = select_kernels("reference", config.threads_per_shard, kv_dtype)
    single = SingleProcessModel.load(
        config.model_path, config.precision, kernels, len(prompt), config.int8_weights, config.int4_weights
    )
    logprobs = single.prefill(prompt).log_softmax(dim=-1)
    return tuple(float(logprobs[row, token]) for row, token in enumerate(prompt[1:]))


def compare_scores(scores: Sequence[float], reference: Sequence[float]) -> str:
    """Check 3 above: a line that says how near they are; raises GoldenPromptError beyond the bounds."""
    distances = [abs(ours - theirs) for ours, theirs in zip(scores, reference, strict=True)]
    if not distances:
        return "golden prompt: a context of so few tokens has nothing to compare"
    mean, worst = sum(distances) / len(distances), max(distances)
    line = (
        f"golden prompt: log probabilities are {mean:.2g} from the reference kernels' on average, {worst:.2g} at most"
    )
    if not (mean <= MEAN_BOUND and worst <= WORST_BOUND):
        raise GoldenPromptError(f"{line}; allowed are {MEAN_BOUND} and {WORST_BOUND}")
    return line
