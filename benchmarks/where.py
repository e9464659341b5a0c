"""Where a benchmark's time goes on our side: the share of each kind of operator, by torch's profiler.

    python -m benchmarks.where dpo full [--quick] [--json]

Self time on the CPU of the whole case, warming up included. Profiling slows small operators down, so shares are sound
and speeds are not given.
"""

from __future__ import annotations

import argparse
import importlib
import json

from benchmarks.measure import Case, machine, revision

KINDS = {
    "products of the blocks and the head": "mm addmm linear",
    "products in batches (attention written out, adapters)": "addmm_ bmm baddbmm baddbmm_",
    "attention, flash kernel": "_scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_flash_attention_for_cpu_backward",
    "by elements": "mul mul_ add add_ sub sub_ div div_ neg silu silu_ silu_backward sigmoid pow rsqrt exp exp_ where"
    " threshold_backward gelu gelu_backward",
    "softmax, sums and maxima": "_softmax _softmax_backward_data _log_softmax log_softmax logsumexp sum mean max amax",
    "fills and copies": "fill_ zero_ copy_ cat index_select index index_put_ _index_put_impl_ index_add_"
    " gather scatter_ embedding_dense_backward",
    "optimiser": "_fused_adamw_ _foreach_norm linalg_vector_norm",
}


def shares(case: Case, quick: bool) -> dict[str, float]:
    """Share of the self time of each kind of operator, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        case.ours(quick)
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names.split()}
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of.get(event.key, "everything else")
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {kind: round(time / total, 3) for kind, time in sorted(times.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=["dpo", "pretrain", "sft"])
    parser.add_argument("case")
    parser.add_argument("--quick", action="store_true", help="little work")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    cases = {case.name: case for case in importlib.import_module(f"benchmarks.{args.benchmark}").CASES}
    if args.case not in cases:
        parser.error(f"{args.benchmark} has no case {args.case!r}; it has {', '.join(cases)}")
    found = shares(cases[args.case], args.quick)
    if args.json:
        about = {"benchmark": args.benchmark, "case": args.case, "machine": machine(), "revision": revision()}
        print(json.dumps({**about, "shares": found}))
        return
    for kind, share in found.items():
        print(f"{share:6.1%}  {kind}")


if __name__ == "__main__":
    main()
