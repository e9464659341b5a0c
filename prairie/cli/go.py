"""`prairie go`: a Go line as a GTP engine, and matches against other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit, open_home
from prairie.errors import UsageError

app = typer.Typer(help="Play Go: a line as a GTP engine, matches against other engines.", no_args_is_help=True)

LineOption = Annotated[str, typer.Option(help="The line or version that plays.")]
NetOption = Annotated[
    Path | None, typer.Option(help="A net from elsewhere instead: a KataGo .bin.gz or a tower folder.")
]
VisitsOption = Annotated[int | None, typer.Option(min=2, help="Positions looked at for each move; default: 200.")]
SecondsOption = Annotated[float | None, typer.Option(min=0.01, help="Time for each move, with or without --visits.")]


@app.command()
def gtp(
    line: LineOption = "go9",
    net: NetOption = None,
    visits: VisitsOption = None,
    seconds: SecondsOption = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer the Go Text Protocol on stdin and stdout, until `quit`."""
    import sys

    from prairie.games.gtp import Engine, serve

    if as_json:
        raise UsageError("an engine answers GTP, not JSON", mend="leave --json out; `prairie go match` has it")
    player, name, boards = _player(line, net, visits, seconds, threads, home)
    serve(Engine(player, size=max(boards, default=19), name="Prairie", version=name), sys.stdin, sys.stdout)


@app.command()
def match(
    opponent: Annotated[str, typer.Argument(help='Whom to play: gtp:"gnugo --mode gtp --chinese-rules".')],
    line: LineOption = "go9",
    net: NetOption = None,
    games: Annotated[int, typer.Option(min=1, help="How many games the match has.")] = 48,
    color: Annotated[str, typer.Option(help="Ours: black, white or both in turn.")] = "both",
    komi: Annotated[float, typer.Option(help="Points that White is given.")] = 7.5,
    size: Annotated[int | None, typer.Option(min=2, max=19, help="Lines of the board; default: the net's own.")] = None,
    opening_moves: Annotated[
        int, typer.Option(min=0, help="Random moves at the beginning, the same for both games of a pair.")
    ] = 0,
    visits: VisitsOption = None,
    seconds: SecondsOption = None,
    engine_seconds: Annotated[float, typer.Option(min=0.1, help="An engine silent for so long has hung.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of the openings and of the search.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the games go; default: HOME/matches/NAME.")] = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Play a match against an engine; every game is kept as SGF, the same command goes on where it stopped."""
    import sys

    from prairie.games.match import Engine, Played, Terms, play_match

    kind, _, command = opponent.partition(":")
    if kind != "gtp" or not command.strip():
        raise UsageError("no such opponent", got=opponent, wanted='gtp:"a command that speaks GTP"')
    if color not in ("black", "white", "both"):
        raise UsageError("no such colour", got=color, wanted="black | white | both")
    player, name, boards = _player(line, net, visits, seconds, threads, home, seed)
    budget = f"{player.visits} visits" + (f", {seconds:g} s" if seconds else "")
    terms = Terms(
        f"{name}, {budget}", command, size or max(boards, default=19), komi, games, color, opening_moves, seed
    )
    folder = out or _folder(terms, home)
    done: list[Played] = []
    with Engine(command, limit_s=engine_seconds) as engine:
        for played in play_match(terms, player, engine, folder):
            done.append(played)
            side = "black" if played.color == 1 else "white"
            print(f"game {played.number + 1}: {side}, {played.result}, {played.moves} moves", file=sys.stderr)
    found = summary(done)
    emit({**found, "size": terms.size, "komi": komi, "player": terms.player, "engine": command, "folder": str(folder)},
         as_json, _text(found, folder))  # fmt: skip


def summary(done: list[Any]) -> dict[str, Any]:
    """Wins, losses, draws, Elo and the 95% interval of the win rate (Wilson) of played games."""
    from prairie.evals.arena import win_rate
    from prairie.evals.statistics import wilson

    outcomes = [played.outcome for played in done]
    rate, interval = win_rate(outcomes), wilson(sum(outcomes), len(outcomes))
    by_color = {
        side: {"games": len(part), "won": sum(part)}
        for side, number in (("black", 1), ("white", 2))
        for part in [[played.outcome for played in done if played.color == number]]
        if part
    }
    return {
        "games": len(done), "wins": rate.wins, "losses": rate.losses, "draws": rate.ties, "win_rate": rate.value,
        "interval": {"low": interval.low, "high": interval.high, "confidence": interval.confidence},
        "elo": _elo(rate.value), "elo_interval": {"low": _elo(interval.low), "high": _elo(interval.high)},
        "by_color": by_color,
    }  # fmt: skip


def _elo(share: float) -> float | None:
    """None where it has no bound: JSON has no infinity."""
    import math

    return None if share <= 0 or share >= 1 else round(-400 * math.log10(1 / share - 1), 1)


def _text(found: dict[str, Any], folder: Path) -> str:
    interval, elo = found["interval"], found["elo"]
    return (
        f"{found['wins']} won, {found['draws']} drawn, {found['losses']} lost: {found['win_rate']:.1%} "
        f"[{interval['low']:.1%}, {interval['high']:.1%}], Elo {'without bound' if elo is None else f'{elo:+.0f}'}\n"
        f"games: {folder}"
    )


def _player(
    line: str, net: Path | None, visits: int | None, seconds: float | None, threads: int | None, home: Path | None,
    seed: int = 0,
) -> tuple[Any, str, tuple[int, ...]]:  # fmt: skip
    """The player, its name, the board sizes of its net."""
    from prairie.games import require

    require()
    from prairie.games.features import TowerJudge
    from prairie.games.player import Player
    from prairie.models.katago import load_katago
    from prairie.models.tower import load_tower
    from prairie.runtime import Runtime

    runtime = Runtime.detect(threads=threads)
    if net is not None:
        tower, name = load_katago(net) if net.name.endswith(".bin.gz") else load_tower(net), net.name
    else:
        with open_home(home) as store:
            version = store.registry.resolve(line)
            tower, name = load_tower(store.artifacts.get(version.artifact_id).path), version.name
    judge = TowerJudge(tower, device=runtime.device, seed=seed)
    return Player(judge, visits=visits, seconds=seconds, seed=seed), name, tower.config.boards


def _folder(terms: Any, home: Path | None) -> Path:
    """HOME/matches/NAME, where the name says who played and a hash says on which terms."""
    import hashlib
    import json
    import re
    from dataclasses import asdict

    from prairie.store.home import default_home

    same = json.dumps({**asdict(terms), "games": None}, sort_keys=True)
    who = re.sub(r"[^a-z0-9@.]+", "-", f"{terms.player}-{terms.engine}".lower())[:60].strip("-")
    root = home.expanduser() if home is not None else default_home()
    return root / "matches" / f"{who}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
