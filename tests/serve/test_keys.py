"""API keys: as soon as one exists, everything but /healthz wants it. And a false name leads no browser here."""

import httpx
import pytest
from tiny_server import Settings, ask, running, wait_for

from prairie.serve.gate import loopback_names


def test_every_route_wants_a_key(home):
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/v1/models").status_code == 200
        key = home.keys.create("ann")
        wait_for(lambda: http.get("/v1/models").status_code == 401)
        with_key = {"Authorization": f"Bearer {key}"}
        walked = set()
        for route in server.app.routes:
            path = route.path.replace("{path:path}", "app.js").replace("{response_id}", "x").replace("{model}", "spark")
            for method in sorted(route.methods or {"GET"}):
                walked.add((method, route.path))
                bare = http.request(method, path)
                if route.path == "/healthz":
                    assert bare.status_code == 200
                    continue
                assert bare.status_code == 401, (method, path)
                assert bare.headers["www-authenticate"]
                assert http.request(method, path, headers=with_key).status_code != 401
        assert len(walked) >= 12
        for path in ("/v2/anything", "/healthz/", "//healthz", "/healthz/../v1/models", "/HEALTHZ"):
            assert http.get(path).status_code == 401, path
        error = http.post("/v1/chat/completions", json=ask("spark")).json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


def test_which_keys_are_good(home):
    key = home.keys.create("ann")
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=30) as http:

        def status(header):
            return http.get("/v1/models", headers={"Authorization": header}).status_code

        for wrong in (
            "Bearer wrong",
            "Bearer",
            key,
            f"Token {key}",
            "Basic !!",
            f"Bearer {key}x",
            "Basic eA==",
        ):
            assert status(wrong) == 401, wrong
        assert status(f"Bearer {key}") == 200 == status(f"bearer  {key}")
        assert http.get("/", auth=("anyone", key)).status_code == 200, "what a browser asks its user for"
        home.keys.revoke("ann")
        wait_for(lambda: status(f"Bearer {key}") == 401, 20)
        assert http.get("/healthz").status_code == 200


def test_tenants_do_not_share_cached_prompts(home):
    keys = {name: {"Authorization": f"Bearer {home.keys.create(name)}"} for name in ("ann", "bob")}
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=30) as http:

        def cached(name):
            body = ask("spark", "a long enough prompt " * 3)
            usage = http.post("/v1/chat/completions", json=body, headers=keys[name]).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        assert [cached(name) > 0 for name in ("ann", "ann", "bob", "bob")] == [False, True, False, True]


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("127.0.0.1:8000", True), ("localhost", True), ("localhost:8000", True), ("[::1]:8000", True), ("[::1]", True),
        ("192.168.1.5:80", True), ("a.localhost", True), ("", True),
        ("evil.example", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil", False),
    ],
)  # fmt: skip
def test_names_of_this_machine(host, good):
    assert loopback_names("127.0.0.1")(host) is good


def test_a_false_name_is_refused_until_there_are_keys(home):
    settings = Settings(host_allowed=loopback_names("127.0.0.1"))
    with running(home, ["spark"], settings) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        rebound = {"Host": "evil.example"}
        answer = http.get("/v1/models", headers=rebound)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
        key = home.keys.create("ann")
        with_key = rebound | {"Authorization": f"Bearer {key}"}
        wait_for(lambda: http.get("/v1/models", headers=with_key).status_code == 200)
