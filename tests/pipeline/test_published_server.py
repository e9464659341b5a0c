"""The server that a recipe starts: what people are told there teaches the next model, so no clock has a say in it."""

from typer.main import get_command

from prairie.cli.main import app
from prairie.pipeline.publishing import serve_command
from prairie.serve.options import Dtype


def test_a_recipes_server_keeps_float32_and_is_compiled_first(tmp_path):
    """As the command itself reads it."""
    command = serve_command(tmp_path, "127.0.0.1", 8123)
    parser = get_command(app).get_command(None, command[0])
    asked = parser.make_context(command[0], command[1:]).params
    assert (asked["dtype"], asked["compile_first"]) == (Dtype.float32, True)
    assert (asked["host"], asked["port"], str(asked["home"])) == ("127.0.0.1", 8123, str(tmp_path))
    assert asked["quantize"] is None and asked["speculate"] is None
