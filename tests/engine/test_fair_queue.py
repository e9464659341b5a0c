"""Who waits is served in turn: nobody pays for another's flood."""

from types import SimpleNamespace

from test_constraint import engine

from prairie.engine.fair_queue import FairQueue
from prairie.engine.request import Request, SamplingParams


def waiting(owner, name, tokens=100):
    return SimpleNamespace(request=SimpleNamespace(owner=owner, id=name), max_length=tokens)


def drained(queue):
    order = []
    while queue:
        first = queue[0]
        assert queue.popleft() is first, "who is next does not change by looking"
        order.append(first.request.id)
    return order


def test_one_owner_is_a_plain_queue():
    queue = FairQueue()
    for n in range(20):
        queue.append(waiting("a", n, tokens=1 + 700 * (n % 3)))
    assert len(queue) == 20 and drained(queue) == list(range(20)) and len(queue) == 0 and not queue


def test_owners_share_by_tokens():
    """Twice as long requests come half as often."""
    queue = FairQueue()
    for n in range(40):
        queue.append(waiting("short", f"s{n}", 100))
        queue.append(waiting("long", f"l{n}", 200))
    order = drained(queue)
    first = order[:36]
    short, long = sum(name[0] == "s" for name in first), sum(name[0] == "l" for name in first)
    assert abs(short - 2 * long) <= 8, first
    assert [n for n in order if n[0] == "s"] == [f"s{n}" for n in range(40)], "each owner's own order holds"


def test_what_was_thrown_out_goes_first_and_may_leave():
    queue = FairQueue()
    a, b, c = (waiting("x", name) for name in "abc")
    queue.append(a)
    queue.append(b)
    queue.appendleft(c)
    assert queue[0] is c and set(map(id, queue)) == {id(a), id(b), id(c)}
    queue.remove(a)
    queue.remove(c)
    assert drained(queue) == ["b"]
    queue.append(a)
    queue.remove(a)
    assert not queue and not queue._credit, "nothing is kept of who left"


def test_a_flood_does_not_hold_up_another_user():
    """Fifty requests of one user wait; one of another is done among the first."""
    one = engine(max_batch=4)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for n in range(50):
        one.add(Request(f"flood-{n}", [5, 6, 7], params, owner="flood"))
    one.add(Request("other", [5, 6, 7], params, owner="other"))
    ended = []
    while one.has_work:
        ended += [output.request_id for output in one.step() if output.completion is not None]
    assert len(ended) == 51 and ended.index("other") < 12, ended.index("other")
    one.cache.pool.check([])
