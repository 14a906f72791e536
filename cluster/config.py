"""The one YAML file: what to serve, with which engine, where.

    model: {path: /models/Kimi-K2.5, precision: w4a8}
    engine: {shards: 2, threads_per_shard: 8, kv_memory: 8 GiB}
    serve: {host: 0.0.0.0, port: 8000}

Every key but `model.path` has a default, documented where it is defined below. Unknown keys are refused, each error
names its key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..actors.engine_config import EngineConfig
from ..actors.model.prompt_attention import PromptAttention
from .byte_sizes import parse_bytes
from .fields import first_error
from .yaml_file import YamlError, read_yaml

TEMPORARY = "temporary"
DEMO_MODEL = Path(__file__).parent / "demo" / "kimi-k2.5-nano"


_ORIGIN = re.compile(r"https?://[^/?#@\s]+")


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file, the key and what would be right."""


def _bytes(value: Any) -> Any:
    """512 MiB, 60GiB, 8 GB or a number of bytes."""
    if not isinstance(value, str):
        return value
    size = int(value) if value.strip().isdecimal() else parse_bytes(value)
    if size is None:
        raise PydanticCustomError("size", "must be a size such as '512 MiB', '60 GiB' or a number of bytes")
    return size


def _engines(value: Any) -> Any:
    """A number of engines, or the section that says between which there may be."""
    return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _origin(value: str) -> str:
    """What a browser sends as Origin: scheme, host and port without a path; or * for every page."""
    if value != "*" and not _ORIGIN.fullmatch(value):
        raise PydanticCustomError("origin", "must be as 'https://chat.example.com' or 'http://localhost:3000', or '*'")
    return value


class Section(BaseModel):
    """Takes no unknown keys and changes no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """What is served."""

    path: str = Field(min_length=1)
    """Folder of the checkpoint, the same on every node; relative paths count from the configuration file."""
    name: str = ""
    """The model's name in requests; by default the folder's name."""
    weights: str = EngineConfig.weights
    """"checkpoint", or "random": weights in the shape of the folder's config.json, to measure with; the folder's
    tokenizer is used."""
    precision: str = EngineConfig.precision
    """"auto": as the checkpoint is; or "w4a8", "w8a8", "w4a16", "bf16" … where it can be loaded so."""


class EngineSection(Section):
    """How the engine runs it; `EngineConfig` says more on each."""

    shards: int = Field(default=EngineConfig.shards, ge=1)
    """Actors that sequences and experts are spread over, one a GPU."""
    attention: str = EngineConfig.attention
    """"data_parallel": a sequence's attention is computed by one shard; "tensor_parallel": every shard computes a part
    of the heads, and of the logits, of all sequences, and keeps the KV pages of all: for a few sequences at once."""
    prompt_attention: PromptAttention = EngineConfig.prompt_attention
    """"absorbed": a text never depends on how its prompt was cut into steps, found in the prefix cache or replayed.
    "expanded", on GPUs: long prompts with a key and a value for each head, less work from some 170 tokens a step on, in
    bfloat16; a text may then depend on all of that by rounding, as it does in other engines."""
    threads_per_shard: int = Field(default=EngineConfig.threads_per_shard, ge=1)
    """CPU threads of each shard, also the CPUs that Ray reserves for it."""
    backend: str = EngineConfig.backend
    """The kernels: "cpu" or "reference" on CPUs; "triton" on GPUs, one a shard, which Ray reserves; "rocm" on AMD's,
    which has FlyDSL and AITER beside Triton; "torch" there is the reference, for comparing."""
    kernels: dict[str, list[str]] = {}
    """With rocm, which of "flydsl", "aiter" and "triton" may run an operation, the first that can does, such as
    {experts: [triton], mla_attention: [aiter, triton]}; flyray starts with a plan that says what runs and why."""
    page_size: int = Field(default=EngineConfig.page_size, ge=1)
    """Tokens a KV page."""
    kv_memory: Annotated[int, BeforeValidator(_bytes)] = Field(default=EngineConfig.kv_memory_bytes, ge=0)
    """Memory of each shard's KV pages: "60 GiB", "512 MiB" or bytes; 0: 256 MiB on CPUs, on GPUs see the next key."""
    gpu_memory_utilization: float = Field(default=EngineConfig.gpu_memory_utilization, ge=0, lt=1)
    """The part of a GPU's memory that weights and KV pages fill together; 0: 0.9, unless kv_memory is given."""
    kv_dtype: str = EngineConfig.kv_dtype
    """KV pages in "bf16" or "f32"; "auto": bf16 with triton, f32 with the others. In f32 triton takes twice the memory
    and several times as long to read them, and answers as the CPU does."""
    max_batch_tokens: int = Field(default=EngineConfig.max_batch_tokens, ge=1)
    """Tokens of one step on a shard; longer prompts run in chunks."""
    max_sequences: int = Field(default=EngineConfig.max_sequences, ge=1)
    """Sequences that run at once, on all shards together; more wait."""
    context_length: int = Field(default=EngineConfig.context_length, ge=0)
    """Most tokens of a prompt and its answer; 0: the model's."""
    prefix_cache: bool = EngineConfig.prefix_cache
    """Whether what prompts have in common from their beginning is computed once and kept, as far as KV memory goes."""
    int8_weights: list[str] = list(EngineConfig.int8_weights)
    """Kinds of bfloat16 weights to load as INT8, half the memory to read a token: of attention, shared, dense, head."""
    int4_weights: list[str] = list(EngineConfig.int4_weights)
    """Kinds of these weights to load as INT4 instead, in groups of 32, a quarter of the memory to read a token."""
    statistics: str = EngineConfig.statistics
    """Folder to gather activation statistics in while the engine runs, for quantizing with them; complete when it has
    stopped, "" for none. On a file system of all nodes; relative paths count from the configuration file."""
    moments_block: int = Field(default=EngineConfig.moments_block, ge=0)
    """With statistics, also second moments in blocks of so many columns, for error feedback; 0 for none. On disk the
    statistics of Kimi-K2.5 take 2.5 GB without them, about 50 GB with blocks of 128, twice that with 256."""
    redundant_experts: int = Field(default=EngineConfig.redundant_experts, ge=0)
    """Slots on each shard, in every layer, for experts that other shards hold too, so that they share their tokens.
    For prompts and large batches: where few tokens choose an expert, each replica is weights to read once more."""
    rebalance_interval_s: float = Field(default=EngineConfig.rebalance_interval_s, ge=0)
    """Every so many seconds experts move to other shards, while requests run, if that evens out the shards' load; 0:
    never."""
    transport: str = EngineConfig.transport
    """"ipc" (one node), "tcp", or "auto"."""
    start_timeout_s: float = Field(default=EngineConfig.start_timeout_s, gt=0)
    """Seconds from placement to ready."""
    step_timeout_s: float = Field(default=EngineConfig.step_timeout_s, gt=0)
    """Seconds after which a step counts as hung: a shard is lost."""
    silence_s: float = Field(default=EngineConfig.silence_s, gt=0)
    """Seconds without a sign of life after which a shard on another node counts as lost, with its machine or network; a
    process that ends is seen at once. With less it is noticed sooner, but so is a machine that only stands still."""
    shard_restarts: int = Field(default=EngineConfig.shard_restarts, ge=0)
    """How often within 5 minutes a shard that is lost is started again. The others keep their weights, requests wait
    and go on where they were. One more loss ends the engine, and a whole new one is started; 0: the first does."""


class EnginesSection(Section):
    """How many engines serve the model, each with `engine.shards` shards and weights of its own; a number N stands for
    {min: N, max: N}. The server starts with one at least, so that what is wrong with it is seen."""

    min: int = Field(default=1, ge=0)
    """Engines that stay when there is nothing to do. 0: the first request then has one started, and waits for it."""
    max: int = Field(default=1, ge=1)
    """Engines at most."""
    target_requests: int = Field(default=0, ge=0)
    """Requests, running and waiting, that an engine is wanted for: of twice as many the half goes to a second one. 0:
    `engine.max_sequences`, so that one more is wanted when requests wait."""
    up_delay_s: float = Field(default=10.0, ge=0)
    """Seconds for which more engines must have been wanted until they are started."""
    down_delay_s: float = Field(default=300.0, ge=0)
    """Seconds for which fewer engines must have sufficed until one is taken away."""
    drain_timeout_s: float = Field(default=300.0, ge=0)
    """Seconds that an engine which is taken away may take to end its requests, while new ones go to the others; then
    the others end them too."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise PydanticCustomError("engines", "must have a max of at least min: {min}", {"min": self.min})
        return self


class ServeSection(Section):
    """Where and how clients are let in."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen at; 0.0.0.0 for all of the machine's."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    front_replicas: int = Field(default=1, ge=1)
    """Processes that speak HTTP."""
    engines: Annotated[EnginesSection, BeforeValidator(_engines)] = EnginesSection()
    """How many engines, or between which numbers: 2, or {min: 1, max: 3, target_requests: 32}."""
    max_queue: int = Field(default=1024, ge=1)
    """Requests that may wait for their first token in a front replica; more get a 429."""
    default_max_tokens: int = Field(default=0, ge=0)
    """Most tokens of an answer whose request does not say; 0: what the context leaves."""
    recovery_timeout_s: float = Field(default=600.0, ge=0)
    """Seconds that requests, running and new ones, wait for an engine that comes back, or that is started for it, when
    theirs was lost; then they get a 503. It has to read its weights again. Before the first engine is ready there is
    nothing to wait for: a 503 says when to come back."""
    api_keys_file: str = ""
    """File of the keys that let clients in, made with `flyray key FILE NAME`, the same on all nodes of fronts; relative
    paths count from the configuration file. A change holds within a second, without a restart. "": everybody may come.
    The page's files, /health and /metrics need no key."""
    cors_origins: list[Annotated[str, AfterValidator(_origin)]] = []
    """Sites whose pages may ask this server from a browser, as "https://chat.example.com"; "*": all. flyray's own page
    needs none."""
    files: str = ""
    """Folder for the files of /v1/files and /v1/batches, on a file system of all nodes, for this server alone: one that
    is started on it again goes on with its batches. Relative paths count from the configuration file. "": there are no
    such endpoints; "temporary": a folder that is removed when the server ends, with all that is in it."""
    max_file_size: Annotated[int, BeforeValidator(_bytes)] = Field(default=512 << 20, ge=1)
    """Most bytes of an uploaded file."""


class RaySection(Section):
    """Where Ray runs."""

    address: str = "local"
    """"local": start a cluster on this machine and end it with the server; else a running cluster's address."""


class FlyrayConfig(Section):
    """The whole file."""

    model: ModelSection
    engine: EngineSection = EngineSection()
    serve: ServeSection = ServeSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _one_gathers(self) -> Self:
        if self.engine.statistics and self.serve.engines.max > 1:
            raise PydanticCustomError("engines", "'engine.statistics' are one engine's: 'serve.engines' must be 1")
        return self

    @property
    def model_name(self) -> str:
        """The model's name in requests."""
        return self.model.name or Path(self.model.path).name

    @property
    def cpus(self) -> int:
        """CPUs that engines and fronts ask Ray for at most: one for each front and router, and the shards' threads."""
        engine = 1 + self.engine.shards * self.engine.threads_per_shard
        return self.serve.front_replicas + self.serve.engines.max * engine

    @property
    def target_requests(self) -> int:
        """Requests that an engine is wanted for."""
        return self.serve.engines.target_requests or self.engine.max_sequences

    @model_validator(mode="after")
    def _files_reach_all_nodes(self) -> FlyrayConfig:
        if self.serve.files == TEMPORARY and self.ray.address != "local":
            raise PydanticCustomError(
                "files", "'serve.files': 'temporary' needs ray.address: local; name a folder that all nodes see"
            )
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's part. Raises ConfigError with the key at fault."""
        values = self.engine.model_dump()
        values["kv_memory_bytes"] = values.pop("kv_memory")
        for field in ("int8_weights", "int4_weights"):
            values[field] = tuple(values[field])
        values["kernels"] = tuple((operation, tuple(names)) for operation, names in self.engine.kernels.items())
        try:
            model = self.model
            return EngineConfig(model_path=model.path, precision=model.precision, weights=model.weights, **values)
        except ValueError as error:
            raise ConfigError(f"engine.{error}") from error


def load_config(path: str | Path) -> FlyrayConfig:
    """Reads and checks a file. Raises ConfigError."""
    file = Path(path)
    try:
        data = read_yaml(file, "configuration", "'model:' and 'serve:'")
    except YamlError as error:
        raise ConfigError(str(error)) from error
    try:
        config = FlyrayConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{file}: {first_error(error, FlyrayConfig, 'key')[1]}") from error
    folder = (file.parent / config.model.path).resolve()
    if not folder.is_dir():
        raise ConfigError(f"{file}: 'model.path': {folder} is no folder")
    changes: dict[str, Any] = {"model": config.model.model_copy(update={"path": str(folder)})}
    if config.engine.statistics:
        statistics = (file.parent / config.engine.statistics).resolve()
        changes["engine"] = config.engine.model_copy(update={"statistics": str(statistics)})
    if config.serve.api_keys_file:
        # Not resolved: a file that is replaced by way of a link, as Kubernetes does it, keeps its name alone.
        keys = (file.parent / config.serve.api_keys_file).absolute()
        changes["serve"] = config.serve.model_copy(update={"api_keys_file": str(keys)})
    if config.serve.files not in ("", TEMPORARY):
        files = (file.parent / config.serve.files).resolve()
        changes["serve"] = changes.get("serve", config.serve).model_copy(update={"files": str(files)})
    config = config.model_copy(update=changes)
    try:
        config.engine_config()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return config


def demo_config(port: int = 8000, precision: str = "w4a8", shards: int = 2) -> FlyrayConfig:
    """The packaged demo model on this machine's CPU: a thread a shard, answers of at most 1,024 tokens by default."""
    return FlyrayConfig(
        model=ModelSection(path=str(DEMO_MODEL), precision=precision),
        engine=EngineSection(shards=shards, threads_per_shard=1, kv_memory=64 << 20, max_sequences=32),
        serve=ServeSection(port=port, default_max_tokens=1024, files=TEMPORARY),
    )
