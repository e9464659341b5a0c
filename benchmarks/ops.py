"""The operators, fast form against plain form: the same values and gradients, forward and backward, on all cores.

    python -m benchmarks.ops [--quick] [--case "cross entropy 32k"] --json

Calls a second. The plain form is the reference that the tests hold the fast one to; where there is none but autograd's
own composition, it is that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Case, Found, run, timed
from benchmarks.workloads import our_runtime, preferences

Make = Callable[[], tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]
"""Fast form, plain form, the tensors that both take; those of floats get gradients."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 0.1


def cross_entropy(vocabulary: int) -> Make:
    def make() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        from prairie.ops.loss import linear_cross_entropy, linear_cross_entropy_reference

        labels = torch.randint(vocabulary, (1024,), generator=torch.Generator().manual_seed(0))
        labels[::3] = -100
        tensors = [normal(1024, 320), normal(vocabulary, 320)]
        return (lambda h, w: linear_cross_entropy(h, w, labels)), (
            lambda h, w: linear_cross_entropy_reference(h, w, labels)
        ), tensors  # fmt: skip

    return make


def logprobs() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    from prairie.ops.loss import linear_logprobs, linear_logprobs_reference

    labels = torch.randint(32768, (1024,), generator=torch.Generator().manual_seed(0))
    labels[::2] = -100
    tensors = [normal(1024, 320), normal(32768, 320)]
    return (lambda h, w: linear_logprobs(h, w, labels)), (lambda h, w: linear_logprobs_reference(h, w, labels)), tensors


def packed_attention() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    from prairie.ops.attention import PackedDocuments, attention_reference

    lengths = [300, 180, 160, 120, 90, 70, 64, 40]
    attend = PackedDocuments(lengths)
    tensors = [normal(sum(lengths), 5, 64) for _ in range(3)]
    return (lambda q, k, v: attend(0, q, k, v)), (lambda q, k, v: attention_reference(q, k, v, lengths)), tensors


def long_rows() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Enough work for the compiled loops; the plain form is torch's own fused kernel on rows of one length."""
    import torch.nn.functional as F

    from prairie.ops.attention import PackedDocuments

    attend = PackedDocuments([1024, 1024])

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.view(2, 1024, 8, 64).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*rows, is_causal=True)

    return (lambda q, k, v: attend(0, q, k, v)), torchs, [normal(2048, 8, 64) for _ in range(3)]


def shared_prompt() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Eight answers to one prompt; the plain form computes the prompt's attention for each."""
    from prairie.ops.attention import NO_PREFIX, PackedDocuments, Prefix

    (prompt, *_), *_ = given = preferences(1, 4, 4096)
    answers = [len(answer) for _, *both in given for answer in both]
    own = [len(prompt) + answers[0], *answers[1:]]
    attend = PackedDocuments(own, prefixes=[NO_PREFIX, *(Prefix(0, len(prompt)) for _ in answers[1:])])
    whole = PackedDocuments([len(prompt) + answer for answer in answers])
    shared, places_A = torch.arange(len(prompt)), torch.arange(len(prompt), sum(own))
    index = torch.cat([torch.cat([shared, answer]) for answer in places_A.split(answers)])
    tensors = [normal(sum(own), 5, 64) for _ in range(3)]
    return (lambda q, k, v: attend(0, q, k, v)), (lambda q, k, v: whole(0, q[index], k[index], v[index])), tensors


def adapters() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """A layer of three parts with eight adapters, each on its eighth of the tokens."""
    from prairie.ops.linear import Addition, adapted_linear, adapted_linear_reference

    def form(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *pairs: Tensor) -> Tensor:
            two = iter(pairs)
            additions = [
                (slice(i * 256, (i + 1) * 256), [Addition(next(two), next(two), at) for at in columns])
                for i in range(8)
            ]
            return operator(x, weight, None, additions)

        return call

    weight, columns = normal(960, 320), [slice(at, at + 320) for at in (0, 320, 640)]
    tensors = [normal(2048, 320), *(tensor for _ in range(24) for tensor in (normal(16, 320), normal(320, 16)))]
    return form(adapted_linear), form(adapted_linear_reference), tensors


def experts() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Eight experts, two for each token; the plain form computes every expert for every token."""
    from prairie.ops.experts import mix_experts, mix_experts_reference, route

    weights, chosen = route(normal(1024, 8), 2, sum_to_one=True)
    tensors = [normal(1024, 256), normal(8, 1024, 256), normal(8, 256, 512)]
    return (lambda x, up, down: mix_experts(x, weights, chosen, up, down, "silu")), (
        lambda x, up, down: mix_experts_reference(x, weights, chosen, up, down, "silu")
    ), tensors  # fmt: skip


def cross_attention() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Eight rows that look at eight others, side by side; the plain form takes one after the other."""
    import torch.nn.functional as F

    from prairie.ops.cross_attention import Memory

    read, asked = [120, 90, 90, 80, 70, 64, 60, 50], [60, 60, 50, 50, 40, 40, 30, 30]

    def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Memory(k, read, asked)(0, q, lambda _: (k, v))

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = zip(q.split(asked), k.split(read), v.split(read), strict=True)
        return torch.cat([
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in row)).transpose(0, 1) for row in rows
        ])  # fmt: skip

    return together, one_by_one, [normal(sum(asked), 5, 64), *(normal(sum(read), 5, 64) for _ in range(2))]


def relative_bias() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """The numbers that six layers add to the scores of a row of 256; the plain form looks them up in each."""
    from prairie.ops.relative import RelativeBias

    def once(table: Tensor) -> Tensor:
        bias = RelativeBias(table, 128, causal=False)
        return torch.stack([bias(0, 256, 256).sum() for _ in range(6)])

    def each_time(table: Tensor) -> Tensor:
        return torch.stack([RelativeBias(table, 128, causal=False)(0, 256, 256).sum() for _ in range(6)])

    return once, each_time, [normal(32, 8)]


def elementwise(name: str, *shapes: tuple[int, ...]) -> Make:
    def make() -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        from prairie.ops import elementwise as ops

        more = (1e-5,) if name == "rms_norm" else ()
        fast, plain = getattr(ops, name), getattr(ops, f"{name}_reference")
        return (lambda *x: fast(*x, *more)), (lambda *x: plain(*x, *more)), [normal(*shape) for shape in shapes]

    return make


def measured(make: Make, fast: bool, quick: bool) -> Found:
    our_runtime()
    fast_form, plain_form, tensors = make()
    form = fast_form if fast else plain_form
    for tensor in tensors:
        tensor.requires_grad_()

    def call() -> int:
        for tensor in tensors:
            tensor.grad = None
        form(*tensors).sum().backward()
        return 1

    return timed(call, 1.0 if quick else 4.0)


def case(name: str, make: Make, peer_name: str = "plain form") -> Case:
    return Case(
        name,
        peer_name,
        "calls/s",
        lambda quick: measured(make, True, quick),
        lambda quick: measured(make, False, quick),
    )


CASES = [
    case("cross entropy 4k", cross_entropy(4096)),
    case("cross entropy 32k", cross_entropy(32768)),
    case("logprobs 32k", logprobs),
    case("packed attention", packed_attention),
    case("attention of long rows", long_rows, "torch's fused kernel"),
    case("shared prompt", shared_prompt, "each row whole"),
    case("8 adapters", adapters, "one after the other"),
    case("experts", experts, "every expert for every token"),
    case("cross attention", cross_attention, "one row after the other"),
    case("relative bias", relative_bias, "looked up in each layer"),
    case("rms_norm", elementwise("rms_norm", (4096, 320), (320,))),
    case("swiglu", elementwise("swiglu", (4096, 1728))),
]

if __name__ == "__main__":
    run("ops", CASES)
