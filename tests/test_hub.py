"""Push and open through a local stand-in of the hub: the endpoints that huggingface_hub calls, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from typer.testing import CliRunner

from varkit import VAR, AutoPipeline, MultiScaleVQ, create_pipeline
from varkit.cli import app
from varkit.hub import plan_upload
from varkit.metrics.report import Report, Result, Score
from varkit.pipelines.auto import open_tokenizer

TOKEN = "hf_test"
COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    """Repositories in memory: name -> path -> bytes."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, parts = self.read(), urlsplit(self.path).path.strip("/").split("/")
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid token"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(name, {})
            self.hub.created.append(asked)
            return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        if "preupload" in parts:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]
            return self.answer(200, {"files": [{**m, "shouldIgnore": False} for m in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "commit" in parts:
            name = "/".join(parts[2:4])
            repo = self.hub.repos[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo[value["path"]] = self.hub.blobs[value["oid"]]
            return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        data = self.read()
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if api and "tree" in parts:
            rows = [{"type": "file", "path": k, "size": len(v), "oid": oid(v)} for k, v in repo.items()]
            return self.answer(200, rows)
        if api:
            siblings = [{"rfilename": path} for path in repo]
            return self.answer(200, {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        path = "/".join(parts[4:])
        self.hub.fetched.append(path)
        if path not in repo:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(200, repo[path], ETag=f'"{oid(repo[path])}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.fetched: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(name="hub")
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    use(hub.url, tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    assert hub.url == constants.ENDPOINT


def use(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")


@pytest.fixture(scope="module", name="pipeline")
def _pipeline() -> Any:
    torch.manual_seed(0)
    pipeline = create_pipeline("var_fashion", depth=1, hidden_size=16, num_heads=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def report(path: Path) -> Path:
    scores = [Score("fid", "FD(classifier)", 0.5, 0.4, 0.6, "lower", "3000 images")]
    results = [Result("guidance 2", "x", 3000, (32, 32), scores=scores)]
    results.append(Result("real images", "y", 3000, (32, 32), scores=scores, bound=True))
    made = Report(
        {"name": "fashion"}, {}, {"source": "fashion-mnist"}, results, {"command": "varkit eval x y -p fashion"}
    )
    made.write(path)
    return path


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_a_pipeline_comes_back_from_the_hub_as_it_was(hub: Hub, pipeline: Any, tmp_path: Path) -> None:
    url = pipeline.push_to_hub("me/toy", report=report(tmp_path / "r.json"), licence="mit", datasets=["fashion_mnist"])
    assert url == f"{hub.url}/me/toy"
    files = hub.repos["me/toy"]
    assert {Path(f).suffix for f in files} <= {".safetensors", ".json", ".md"}
    card = files["README.md"].decode()
    data = front_matter(card)
    assert (data["library_name"], data["license"], data["datasets"]) == ("varkit", "mit", ["fashion_mnist"])
    (metric,) = data["model-index"][0]["results"][0]["metrics"]  # the bound is no result of the model
    assert (metric["type"], metric["value"]) == ("fid", 0.5)
    assert metric["args"]["protocol"] == "fashion" and metric["args"]["command"] == "varkit eval x y -p fashion"
    assert "varkit eval x y -p fashion" in card.split("---", 2)[2]
    hub.repos["me/toy"]["evil.bin"] = b"x"
    opened = AutoPipeline.from_pretrained("me/toy")
    opened.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"class_labels": [1], "seed": 3, "output_type": "latent"}
    assert torch.equal(opened(**settings).images, pipeline(**settings).images)
    assert "evil.bin" not in hub.fetched


def test_models_come_back_by_their_class(hub: Hub, pipeline: Any) -> None:
    pipeline.transformer.push_to_hub("me/var")
    pipeline.image_tokenizer.push_to_hub("me/vq")
    pipeline.push_to_hub("me/toy")
    for found in (VAR.from_pretrained("me/var"), VAR.from_pretrained("me/toy", subfolder="transformer")):
        assert torch.equal(found.head.weight, pipeline.transformer.head.weight)
    for tokenizer in (MultiScaleVQ.from_pretrained("me/vq"), open_tokenizer("me/vq"), open_tokenizer("me/toy")):
        assert tokenizer.layout == pipeline.image_tokenizer.layout
    assert front_matter(hub.repos["me/var"]["README.md"].decode())["library_name"] == "varkit"
    with pytest.raises(ValueError, match="holds no pipeline"):
        AutoPipeline.from_pretrained("me/vq")


def test_nothing_else_leaves_the_machine_unless_named(hub: Hub, pipeline: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    pipeline.save_pretrained(folder)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / ".git").mkdir()
    for name in (".env.json", ".git/config.json", "notes.txt", "weights.bin", "train.log"):
        (folder / name).write_text("private")
    arguments = ["push", str(folder), "me/toy", "--private", "--include", "train.log"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and not hub.created and "library_name: varkit" in dry.output
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    kept = {"link.json", ".env.json", ".git/config.json", "notes.txt", "weights.bin"}
    assert "train.log" in hub.repos["me/toy"] and not kept & hub.repos["me/toy"].keys()
    assert all(f"stays here: {name}" in done.output for name in kept)
    assert hub.created[0].get("visibility", hub.created[0].get("private")) in ("private", True)
    for bad in ("../../secret.json", str(tmp_path / "secret.json"), "absent"):
        with pytest.raises(FileNotFoundError, match="include"):
            plan_upload(folder, "me/toy", include=[bad])


def test_a_card_that_is_there_is_kept_and_a_run_is_described(pipeline: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    (tmp_path / "recipe.yaml").write_text("name: toy\nloop: {steps: 10, batch_size: 4}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "seconds": 60.0, "validation/loss": 2.5}\n')
    card = str(plan_upload(folder, "me/toy").files["README.md"])
    assert "`varkit train toy`" in card and "loss 2.5" in card and "license" not in front_matter(card)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    plan = plan_upload(folder, "me/toy", report=report(tmp_path / "r.json"))
    card = str(plan.files["README.md"])
    assert card.endswith("# Mine\n") and front_matter(card)["license"] == "mit" and "model-index" in front_matter(card)
    assert "card/report.json" in plan.files


def test_each_failure_is_one_line_that_says_what_to_do(
    hub: Hub, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)

    def fails(arguments: list[str], *words: str) -> None:
        done = CliRunner().invoke(app, arguments)
        lines = done.stderr.strip().splitlines()
        assert done.exit_code == 2 and lines[-1].startswith("error: "), done.output
        assert all(word in lines[-1] for word in words), lines[-1]

    fails(["push", str(tmp_path / "absent"), "me/toy"], "no such folder")
    fails(["push", str(tmp_path), "me/toy"], "no saved model", "did you mean")
    fails(["sample", "me/absent"], "me/absent", "check the name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    fails(["push", str(folder), "me/toy"], "refuses this token", "hf auth login")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    fails(["push", str(folder), "me/toy"], "no Hugging Face token", "HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    fails(["push", str(folder), "me/toy"], "cannot be reached", "network")
    fails(["sample", "me/toy"], "cannot be reached", "network")
    use(hub.url, tmp_path, monkeypatch)
