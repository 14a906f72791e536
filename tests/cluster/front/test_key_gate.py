"""Who is let in: keys in a file, what is refused, which sites' pages may ask."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flyray.cluster.cli import app as command_line
from flyray.cluster.config import ConfigError, FlyrayConfig, load_config
from flyray.cluster.front import api_keys
from flyray.cluster.front.api_keys import ApiKeys, ApiKeysError, add_key, new_key, read_digests
from flyray.cluster.front.gate import guard

PATHS = ("/", "/health", "/metrics", "/page/main.js", "/v1/models", "/cluster", "/page", "/healthy", "/v1/files/page/")


def client(keys: ApiKeys | None, *origins: str) -> TestClient:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def anything(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    guard(app, keys, origins)
    return TestClient(app)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    add_key(tmp_path / "keys", "ada", "fr-ada")
    add_key(tmp_path / "keys", "bob", "fr-bob")
    return tmp_path / "keys"


def test_only_the_page_health_and_metrics_are_open(file):
    http = client(ApiKeys(file))
    codes = {path: http.get(path).status_code for path in PATHS}
    assert [path for path, code in codes.items() if code == 200] == ["/", "/health", "/metrics", "/page/main.js"]
    assert set(codes.values()) == {200, 401}
    assert {client(None).get(path).status_code for path in PATHS} == {200}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "send it in the header 'Authorization: Bearer KEY'"),
        ("", "send it in the header"),
        ("Basic ZnItYWRh", "must be 'Bearer KEY'"),
        ("fr-ada", "must be 'Bearer KEY'"),
        ("Bearer", "must be 'Bearer KEY'"),
        ("Bearer fr-eve", "is not one of this server's"),
        ("Bearer fr-ada fr-bob", "is not one of this server's"),
        ("Bearer fr-ad\xe4", "is not one of this server's"),
    ],
)
def test_a_refusal_is_openais_error(file, header, says):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    refused = client(ApiKeys(file)).post("/v1/models", headers=headers, content=b"x" * 3_000_000)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert says in error["message"]


def test_every_key_of_the_file_lets_in(file):
    http = client(ApiKeys(file))
    for key in ("fr-ada", "fr-bob"):
        answer = http.post("/v1/models", headers={"Authorization": f"bearer  {key}"}, content=b"body")
        assert answer.json() == {"bytes": 4}


def test_pages_of_named_sites_may_ask(file):
    site, other = "https://chat.example.com", "https://evil.example.com"
    http = client(ApiKeys(file), site)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    allowed = http.options("/v1/chat/completions", headers={"Origin": site} | asks)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, site)
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert http.options("/v1/chat/completions", headers={"Origin": other} | asks).status_code == 400
    refused = http.get("/v1/models", headers={"Origin": site})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, site)
    assert "access-control-allow-origin" not in http.get("/health", headers={"Origin": other}).headers
    assert "access-control-allow-origin" not in client(None).get("/health", headers={"Origin": site}).headers


def test_a_changed_file_holds_without_a_restart(file, monkeypatch, caplog):
    monkeypatch.setattr(api_keys, "_LOOK_PERIOD_S", 0.0)
    keys = ApiKeys(file)
    add_key(file, "eve", "fr-eve")
    assert "fr-eve" in keys
    kept = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("ada"))
    file.with_name("new").write_text(kept)
    file.with_name("new").replace(file)
    assert "fr-ada" not in keys
    assert "fr-bob" in keys
    with caplog.at_level(logging.ERROR):
        file.write_text("fr-secret\n")
        assert "fr-bob" in keys
        file.unlink()
        assert "fr-bob" in keys
    assert "line 1: must be NAME:DIGEST" in caplog.text
    assert "No such file" in caplog.text
    assert "fr-secret" not in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no key in it"),
        ("# nobody\n\n", "there is no key in it"),
        ("sk-plain-secret", "line 1: must be NAME:DIGEST, which `flyray key FILE NAME` adds"),
        (f"a:{'0' * 64}\n\nb:{'0' * 63}", "line 3: must be NAME:DIGEST"),
        (f"a:{'0' * 64}\na:{'1' * 64}", "line 2: the name 'a' is there already"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_telling_what_is_in_it(tmp_path, text, says):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ApiKeysError) as refused:
        ApiKeys(file)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(ApiKeysError, match="is no text"):
        ApiKeys(tmp_path / "keys")
    with pytest.raises(ApiKeysError, match="No such file"):
        ApiKeys(tmp_path / "absent")


@settings(max_examples=20)
@given(names=st.lists(st.from_regex(r"[A-Za-z0-9_.@-]{1,9}", fullmatch=True), min_size=1, max_size=5, unique=True))
def test_what_is_added_is_read(names):
    made = {name: new_key() for name in names}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        for name, key in made.items():
            add_key(file, name, key)
        assert read_digests(file) == {name: hashlib.sha256(key.encode()).digest() for name, key in made.items()}
        keys = ApiKeys(file)
    assert all(key in keys for key in made.values())
    assert not any(key[:-1] in keys for key in made.values())


def test_the_command_prints_a_key_once_and_keeps_its_digest_for_its_owner_alone(tmp_path):
    file = tmp_path / "keys"
    done = CliRunner().invoke(command_line, ["key", str(file), "ada"])
    key = done.stdout.strip()
    assert key in ApiKeys(file)
    assert key not in file.read_text()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    again = CliRunner().invoke(command_line, ["key", str(file), "ada"])
    assert again.exit_code == 2
    assert "the name 'ada' is there already" in again.stderr
    assert CliRunner().invoke(command_line, ["key", str(file), "a b"]).exit_code == 2
    assert len(read_digests(file)) == 1


def test_the_configuration_finds_the_file_and_checks_origins(tmp_path):
    (tmp_path / "model").mkdir()
    config = tmp_path / "flyray.yaml"

    def load(serve: str) -> FlyrayConfig:
        config.write_text(f"model: {{path: model}}\nserve: {serve}")
        return load_config(config)

    assert load("{api_keys_file: keys}").serve.api_keys_file == str(tmp_path / "keys")
    assert load("{}").serve.api_keys_file == ""
    assert load("{cors_origins: ['*', 'http://localhost:3000']}").serve.cors_origins[1] == "http://localhost:3000"
    for wrong in ("chat.example.com", "https://a.example/", "https://a.example/path", "ftp://a"):
        with pytest.raises(ConfigError, match=r"serve\.cors_origins.*must be as 'https://chat\.example\.com'"):
            load(f"{{cors_origins: ['{wrong}']}}")
