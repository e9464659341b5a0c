"""`prairie keys`: who may call the server."""

from __future__ import annotations

from typing import Annotated

import typer

from prairie.cli.options import HomeOption, JsonOption, emit, open_home, say, table, when

app = typer.Typer(help="Make and revoke API keys of the server.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it once; from the first key on, every route but /healthz wants one."""
    with open_home(home, make=True) as store:
        secret = store.keys.create(name)
    emit({"name": name, "key": secret}, as_json, secret)
    say("This is shown once: only its hash is kept.")


@app.command("list")
def list_keys(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every key that was ever made; not the keys themselves."""
    with open_home(home) as store:
        keys = store.keys.all()
    rows = [(k.name, k.id, when(k.created), f"revoked {when(k.revoked)}" if k.revoked else "valid") for k in keys]
    shown = table(("NAME", "ID", "MADE", "STATE"), rows) if rows else "No keys: the server is open to who can reach it."
    emit({"keys": [key.to_json() for key in keys]}, as_json, shown)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or its id.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key. Revoking the last one does not open the server: it then refuses everyone."""
    with open_home(home) as store:
        store.keys.revoke(name)
        valid = sum(key.revoked is None for key in store.keys.all())
    emit({"revoked": name, "valid_keys": valid}, as_json, f"The key of {name} is revoked.")
    if not valid:
        say("No valid key is left: the server refuses every request until you make one.")
