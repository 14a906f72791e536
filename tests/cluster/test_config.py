"""The configuration file: what is read, and what each error says."""

from pathlib import Path

import pytest

from flyray.cluster.config import ConfigError, demo_config, load_config


@pytest.fixture
def load(tmp_path: Path):
    (tmp_path / "model").mkdir()

    def read(text: str):
        file = tmp_path / "flyray.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file)

    return read


def test_defaults_and_values(load, tmp_path):
    config = load("model: {path: model, precision: w4a8}\nengine: {shards: 3, kv_memory: 1.5 GiB}\nserve: {port: 9000}")
    engine = config.engine_config()
    assert engine.model_path == str(tmp_path / "model")
    assert (engine.precision, engine.shards, engine.threads_per_shard) == ("w4a8", 3, 1)
    assert engine.kv_memory_bytes == 3 << 29
    assert config.model_name == "model"
    assert (config.serve.host, config.serve.port) == ("127.0.0.1", 9000)
    assert config.cpus == 3 + 2
    assert engine.prefix_cache


def test_weights_to_load_in_fewer_bits(load):
    config = load("model: {path: model}\nengine: {int8_weights: [head], int4_weights: [attention, dense]}")
    assert config.engine_config().int8_weights == ("head",)
    assert config.engine_config().int4_weights == ("attention", "dense")


def test_the_prefix_cache_may_be_off(load):
    assert not load("model: {path: model}\nengine: {prefix_cache: false}").engine_config().prefix_cache


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {path: model}\nengine: {shard: 2}", "unknown key 'engine.shard' (did you mean 'shards'?)"),
        ("model: {path: model}\nengin: {}", "unknown key 'engin' (did you mean 'engine'?)"),
        ("model: {path: model}\nengine: {shards: 0}", "'engine.shards': input should be greater than or equal to 1"),
        (
            "model: {path: model}\nengine: {shards: two}",
            "'engine.shards': input should be a valid integer, found 'two'",
        ),
        ("model: {path: model}\nengine: {kv_memory: 2 Gigs}", "'engine.kv_memory': must be a size such as '512 MiB'"),
        ("model: {path: model}\nengine: {backend: cuda}", "engine.backend: 'cuda' is none of cpu, reference"),
        ("model: {path: model}\nengine: {prompt_attention: long}", "engine.prompt_attention"),
        (
            "model: {path: model}\nengine: {prompt_attention: expanded}",
            "engine.prompt_attention: 'expanded', but the backend 'cpu' has none; reference, torch, triton, rocm do",
        ),
        (
            "model: {path: model}\nengine: {prompt_attention: expanded, backend: triton, kv_dtype: f32}",
            "engine.prompt_attention: 'expanded' multiplies in bfloat16 with 'triton', but kv_dtype 'f32' is for",
        ),
        ("model: {path: model}\nengine: {kv_dtype: f16}", "engine.kv_dtype: 'f16' is none of auto, bf16, f32"),
        ("model: {path: model}\nengine: {kv_dtype: bf16}", "engine.kv_dtype: 'bf16', but the backend 'cpu' keeps"),
        ("model: {path: model}\nengine: {int8_weights: [gate]}", "engine.int8_weights: 'gate' is unknown; known are"),
        (
            "model: {path: model}\nengine: {int8_weights: [head], int4_weights: [head]}",
            "engine.int4_weights: 'head' is in int8_weights too",
        ),
        ("model: {path: model}\nserve: {port: 70000}", "'serve.port': input should be less than or equal to 65535"),
        (
            "model: {path: model}\nserve: {engines: 0}",
            "'serve.engines.max': input should be greater than or equal to 1",
        ),
        (
            "model: {path: model}\nserve: {engines: {min: 3, max: 2}}",
            "'serve.engines': must have a max of at least min: 3",
        ),
        ("model: {path: model}\nserve: {engines: {most: 2}}", "unknown key 'serve.engines.most'"),
        (
            "model: {path: model}\nserve: {engines: 2}\nengine: {statistics: here}",
            "'engine.statistics' are one engine's: 'serve.engines' must be 1",
        ),
        ("model: {path: nowhere}", "'model.path'"),
        ("engine: {}", "'model' is missing"),
        ("model: {path: model}\nmodel: {path: model}", "key 'model' stands twice"),
        ("[1, 2]", "expected keys such as 'model:'"),
        ("model: {", "not YAML"),
    ],
)
def test_errors_name_the_key(load, text, says):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert says in str(caught.value)
    assert "flyray.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the configuration \(No such file"):
        load_config(tmp_path / "absent.yaml")


def test_the_demo_serves_two_shards_of_one_thread():
    engine = demo_config(port=8123).engine_config()
    assert (engine.shards, engine.threads_per_shard, engine.backend) == (2, 1, "cpu")
    assert Path(engine.model_path).name == "kimi-k2.5-nano"


def test_a_number_of_engines_is_its_least_and_most(load):
    config = load("model: {path: model}\nserve: {engines: 3}\nengine: {shards: 2, threads_per_shard: 4}")
    assert (config.serve.engines.min, config.serve.engines.max) == (3, 3)
    assert config.cpus == 1 + 3 * (1 + 2 * 4)
    assert config.target_requests == config.engine.max_sequences
