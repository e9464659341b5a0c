"""The deployment on Ray Serve: two replicas on one home, started and asked as a user does."""

import json
import os
import socket
import time

import httpx
import pytest
from starlette.testclient import TestClient
from tiny_server import Home, ask, events

from prairie.errors import UsageError
from prairie.serve import cluster


def test_what_cannot_be_is_one_sentence(monkeypatch):
    import sys

    with pytest.raises(UsageError, match="unknown arguments of the deployment: got port, wanted names, home"):
        cluster.app({"port": "1"})
    with pytest.raises(UsageError, match="are numbers"):
        cluster.app({"replicas": "two"})
    with pytest.raises(UsageError, match="speculate has no such value: got draft, wanted ngram"):
        cluster.settings_of({"speculate": "draft"})
    with pytest.raises(UsageError, match="dtype and quantize both say how weights are kept"):
        cluster.settings_of({"dtype": "float32", "quantize": "int8"})
    told = {"dtype": "auto", "quantize": "int8", "speculate": "ngram"}
    assert cluster.settings_of({"quantize": "int8", "speculate": "ngram", "names": "spark"}) == told
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="the extra `cluster`, which is not installed"):
        cluster.app({})


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_replica_is_asked_for_what_the_deployment_says(home, dtype):
    """The server that Ray runs, without Ray."""
    server = cluster._server(["spark"], str(home.root), 1, cluster.settings_of({"dtype": dtype}), 8)
    service = server.state.service
    with TestClient(server, base_url="http://127.0.0.1") as http:
        until = time.monotonic() + 60
        while http.get("/readyz").status_code != 200:
            assert time.monotonic() < until, service.failure
            time.sleep(0.05)
        engines = [base.model.engine for base in service.models._bases.values()]
        assert [engine.runner.compiled.dtype for engine in engines] == [dtype]
        assert service.desk.max_pending == 8 and not service.settings.admin_without_key


@pytest.mark.slow
def test_two_replicas_answer_on_one_home(spark_root, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `cluster`)")
    import shutil

    from ray import serve

    shutil.copytree(spark_root, tmp_path / "home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for name in ("READY_CHECK", "HEALTH_CHECK"):  # of Ray's own proxy, on a machine that is busy with other tests
        monkeypatch.setenv(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "240")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(cluster.app({"names": "spark", "home": str(tmp_path / "home"), "replicas": "2"}), name="prairie")
        (told,) = serve.status().applications["prairie"].deployments.values()
        assert told.replica_states == {"RUNNING": 2}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while http.get("/readyz").status_code != 200:
                time.sleep(0.2)
            whole = [http.post("/v1/chat/completions", json=ask("spark")).json() for _ in range(12)]
            assert len({answer["choices"][0]["message"]["content"] for answer in whole}) == 1
            chunks = events(http.post("/v1/chat/completions", json=ask("spark", stream=True)).text)
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert text == whole[0]["choices"][0]["message"]["content"]
            refused = http.post("/v1/chat/completions", json=ask("nobody"))
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
            vote = {"response_id": whole[0]["id"], "kind": "thumb", "value": "up"}
            assert http.post("/v1/feedback", json=vote).status_code == 201
            assert http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}).status_code == 403
            left = ask("spark", stream=True, max_tokens=120, ignore_eos=True)
            with http.stream("POST", "/v1/chat/completions", json=left) as answer:
                id = json.loads(next(answer.iter_lines()).removeprefix("data: "))["id"]
            with Home(tmp_path / "home") as home:
                rows = {row.id: row for row in home.feedback.responses()}
                assert all(rows[answer["id"]].status == "done" for answer in whole)
                until = time.monotonic() + 20
                while home.feedback.get_response(id).status == "started":
                    assert time.monotonic() < until, "an answer that nobody reads goes on"
                    time.sleep(0.1)
    finally:
        serve.shutdown()
        ray.shutdown()
