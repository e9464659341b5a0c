"""Foreign jinja within bounds: no attribute of Python is reached, and every rendering ends soon.

A chat template is code that came with a model. Jinja's sandbox keeps it from Python's internals, but not from turning a
loop a billion times or doubling a string until memory is gone, and a thread cannot be stopped from outside. So every
rendering has fuel, counted in characters: each turn of a loop, call, filter, operator and comparison spends by the size
of what goes in and comes out, before it is computed where it could grow. The count is the same on every machine, and
in proportion to the conversation. Of Python's and jinja's functions only those that templates need are there.

Not here: what a template is given (`chat_template`).
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from prairie.errors import TemplateError

FUEL = 1_000_000
"""Characters that any rendering may spend; it is gone within about a second, whatever it is spent on."""
FUEL_PER_CHARACTER = 100
"""Further ones for each character of the conversation, its tools and options."""
STEP, CALL, ITEM = 10, 40, 5
"""What a turn of a loop, a call and an item of a list cost, in the time that a character costs."""
LONGEST_SOURCE = 1_000_000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    """abs attr capitalize count d default dictsort e escape first float forceescape format groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
    title trim unique upper"""
)
_BY_REFERENCE = _words("""attr count d default first items last length list map reject rejectattr select selectattr""")
"""Filters that hand on what is in a list without reading it."""
_COMPARING_TESTS = _words("in eq == equalto ne != lt < lessthan gt > greaterthan le <= ge >=")
_METHODS = _words(
    """capitalize copy count endswith find format get index isalnum isalpha isdecimal isdigit islower isnumeric isspace
    istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rpartition rsplit
    rstrip split splitlines startswith strip title upper values"""
)
_SIZED = (str, list, tuple, dict)
_WIDTHS = re.compile(r"\d{3}|\*|\{[^{}]*\{")
"""In a format string: a width of three digits, or one that an argument gives."""
_LARGEST = 100_000
"""Of a number that a filter or method is given."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers (trimmed blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`),
    with fuel. One may render in many threads at once."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, *extensions: type[Extension]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_spend_on_output,
            extensions=["jinja2.ext.loopcontrols", *extensions],
        )
        self._tank = threading.local()
        known = {name: cast("Callable[..., Any]", self.filters[name]) for name in _FILTERS} | {
            "tojson": self._to_json,
            "join": self._join,
        }
        self.filters = {name: self._guarded(name, function) for name, function in known.items()}
        self.filters |= {"_each": self._each, "_joined": self._joined, "_whole": self._whole}
        self.filters |= {"_read": self._read, "_sliced": self._sliced}
        for name in _COMPARING_TESTS:
            self.tests[name] = self._guarded(name, cast("Callable[..., Any]", self.tests[name]))
        self.globals = {"range": self.globals["range"], "namespace": _Namespace, "dict": self._dict}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def load(self, source: str) -> Callable[[Mapping[str, Any]], str]:
        """A function from variables to text, which raises whatever a foreign template may raise.

        Raises TemplateError if `source` is no jinja that can be run here.
        """
        if len(source) > LONGEST_SOURCE:
            raise TemplateError("the chat template is too long", got=len(source), wanted=f"{LONGEST_SOURCE} characters")
        self._tank.left = FUEL
        try:
            template = self.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise TemplateError("the chat template is no jinja", got=str(error), wanted="a jinja template") from None

        def render(variables: Mapping[str, Any]) -> str:
            self._tank.left = FUEL + FUEL_PER_CHARACTER * _weight(dict(variables), None)
            return template.render(variables)

        return render

    def spend(self, cost: int) -> None:
        """Raises SecurityError once the fuel is gone."""
        self._tank.left -= cost
        if self._tank.left < 0:
            raise SecurityError("it does more than any conversation of this length needs, as an endless loop would")

    def weigh(self, value: Any) -> int:
        """Characters and items of a value, each counted as often as it would be written."""
        if type(value) is str:
            return len(value)
        return _weight(value, self._tank.left)

    # ---- jinja's hooks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Metered().visit(tree)
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reaches for the attribute {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else self._guarded("format", wrapped, value.__self__)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every `f(...)` of a template; the names are jinja's, so that a template's keywords cannot meet them."""
        self, function = __self, __obj
        owner = getattr(function, "__self__", None)
        self.spend(CALL + sum(map(_size, args)) + sum(map(_size, kwargs.values())))
        if isinstance(owner, str | list | tuple | dict | int | float):
            if function.__name__ not in _METHODS:
                raise SecurityError(f"it calls {type(owner).__name__}.{function.__name__}, which templates do not need")
            args = tuple(map(_at_once, args))
            self._foresee(function.__name__, (owner, *args), kwargs)
        result = super().call(__context, function, *args, **kwargs)
        self.spend(_size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # what templates do most
            self.spend(STEP + len(left) + len(right))
            return left + right
        self.spend(STEP)
        if operator == "+":
            self.spend(_size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                raise SecurityError("it computes with numbers of thousands of digits")
        elif operator == "*":
            times = next((number for number in (left, right) if isinstance(number, int)), 1)
            self.spend(max(0, times) * (_size(left) + _size(right)))
        elif operator == "%":
            self._foresee("format", (left, right), {})
        result = super().call_binop(context, operator, left, right)
        return self._whole(result) if isinstance(result, list | tuple) else result

    # ---- what spends

    def _guarded(self, name: str, function: Callable[..., Any], *owner: Any) -> Callable[..., Any]:
        """A filter, test or method that pays for what it reads and writes, and cannot grow without paying first."""
        passes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if name == "trim" and len(args) == 1 and not kwargs and type(args[0]) is str:
                self.spend(CALL + 2 * len(args[0]))
                return args[0].strip()
            if name not in _BY_REFERENCE:
                args = tuple(map(_at_once, args))
            given = owner + (args[1:] if passes_context else args)
            if name in _BY_REFERENCE:
                self.spend(CALL + _size(given[0]))
            else:
                read = self.weigh([*given, *kwargs.values()])
                self.spend(CALL + read * (20 if name in ("sort", "dictsort", "groupby", "unique", "min", "max") else 1))
            self._foresee(name, given, kwargs)
            result = function(*args, **kwargs)
            self.spend(_size(result))
            return result

        return guarded

    def _foresee(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Pays in advance for what a few functions can make of little."""
        more = [*args[1:], *kwargs.values()]
        if any(isinstance(value, int) and abs(value) > _LARGEST for value in more):
            raise SecurityError(f"it gives {name} a number above {_LARGEST}")
        if not isinstance(text := args[0], str):
            return
        if name == "replace" and len(more) >= 2:
            found = text.count(str(more[0])) if str(more[0]) else len(text) + 1
            self.spend(found * len(str(more[1])))
        elif name == "join" and more:
            self.spend(self.weigh(more[0]) + len(text) * _size(more[0]))
        elif name == "indent":
            width = more[0] if more else 4
            self.spend(text.count("\n") * (len(width) if isinstance(width, str) else int(width)))
        elif name == "format":
            if _WIDTHS.search(text):
                raise SecurityError("it formats with a width")
            self.spend((text.count("%") + text.count("{")) * self.weigh(more))
        elif name.startswith("r") or name.endswith(("strip", "trim")):  # these search slowly for what is long
            if any(isinstance(value, str) and len(value) > 64 for value in more):
                raise SecurityError(f"it searches by {name} for a long text")
            self.spend(len(text))

    def _each(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        """The turns of a loop; `cost` is the text in its body."""
        for value in values:
            self.spend(STEP + cost)
            yield value

    def _joined(self, parts: Sequence[Any]) -> str:
        """`a ~ b`."""
        self.spend(STEP + self.weigh(parts))
        return "".join(map(str, parts))

    def _whole(self, value: Any) -> Any:
        """A list that a template writes down: it may hold itself twice, and grow so."""
        self.spend(STEP + _weight(value, self._tank.left, texts=False))
        return value

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        items = list(values if attribute is None else map(make_attrgetter(self, attribute), values))
        self.spend(self.weigh(items) + len(separator) * len(items))
        return separator.join(map(str, items))

    def _read(self, value: Any) -> Any:
        """A side of a comparison."""
        self.spend(STEP + self.weigh(value))
        return value

    def _sliced(self, value: Any) -> Any:
        self.spend(STEP + _size(value))
        return value

    def _dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        value: dict[Any, Any] = self._whole(dict(*args, **kwargs))
        return value

    def _to_json(self, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options)
        parts = []
        for part in encoder.iterencode(value):  # with an indent, part by part: deep lists grow with their depth
            self.spend(len(part))
            parts.append(part)
        return "".join(parts)


@functools.lru_cache(maxsize=8)
def load_trusted(source: str, *extensions: type[Extension]) -> Callable[[Mapping[str, Any]], str]:
    """As `Sandbox.load`, for a template of our own: without fuel it renders in half the time. A new model of a line has
    its predecessor's template, which is not compiled again while the line is served."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", *extensions]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    template = environment.from_string(source)
    return lambda variables: template.render(variables)


class _Namespace(Namespace):
    """Jinja's, without names that Python gives a meaning to."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name in (attributes := dict(*rest, **kwargs)):
            _Namespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"it sets the attribute {name!r}")


class _Metered(NodeTransformer):
    """Puts a filter that spends around what jinja runs without asking the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.recursive:
            raise jinja2.TemplateAssertionError("recursive loops cannot be used", node.lineno)
        cost = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _filter("_each", node.iter, nodes.Const(cost))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_whole", node) if node.items else node

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_whole", node) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _read(node.expr)
        for operand in node.ops:
            operand.expr = _read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_sliced", node) if isinstance(node.arg, nodes.Slice) else node


def _filter(name: str, node: nodes.Expr | nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, list(args), [], None, None, lineno=node.lineno)


def _read(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter("_read", node)


@pass_context
def _spend_on_output(context: Context, value: Any) -> Any:
    sandbox = cast(Sandbox, context.environment)
    sandbox.spend(STEP + (len(value) if type(value) is str else sandbox.weigh(value)))
    return value


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if _WIDTHS.search(form):
        raise SecurityError("it formats with a width")
    return datetime.now().strftime(form)


def _at_once(value: Any) -> Any:
    """A list instead of what makes its items one by one, so that it can be weighed."""
    return list(value) if isinstance(value, Iterator) else value


def _size(value: Any) -> int:
    """Of a value that is handed on: its own characters or items."""
    return len(value) if isinstance(value, _SIZED) else 1


def _weight(value: Any, limit: int | None, *, texts: bool = True) -> int:
    """Characters (with `texts`) and items of a value and all in it, counted as often as they are reached.

    Raises SecurityError above `limit`.
    """
    if isinstance(value, str):
        return len(value) if texts else 1
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            total += ITEM + (len(each) if texts else 0)
        elif isinstance(each, Mapping):
            total += ITEM
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            total += ITEM
            waiting += each
        elif isinstance(each, Namespace):
            attributes = each._Namespace__attrs
            total += ITEM
            waiting += attributes.values()
        else:
            total += ITEM
        if limit is not None and total + ITEM * len(waiting) > limit:
            raise SecurityError("it makes more than any conversation of this length needs")
    return total
