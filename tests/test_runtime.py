"""The machine as a value: what it says of its own speed."""

import pytest

from prairie import runtime
from prairie.runtime import Runtime, gemm_flops


@pytest.mark.parametrize(
    ("bfloat16", "wanted"), [(0.02, "float32"), (1.0, "float32"), (1.2, "float32"), (2.0, "bfloat16")]
)
def test_the_best_dtype_is_bfloat16_only_where_it_is_clearly_faster(bfloat16, wanted, monkeypatch):
    rates = {"float32": 1.0, "bfloat16": bfloat16}
    monkeypatch.setattr(runtime, "gemm_flops", lambda dtype, *more: rates[dtype])
    assert Runtime().best_dtype() == wanted


def test_the_probe_measures_this_machine():
    """What it answers fits what a longer look finds, unless both are near each other."""
    ratio = gemm_flops("bfloat16", "cpu", 0.2, 256) / gemm_flops("float32", "cpu", 0.2, 256)
    if not 0.5 < ratio < 3:
        assert Runtime().best_dtype() == ("bfloat16" if ratio > 1 else "float32")


def test_the_threads_are_those_that_the_environment_wishes_but_for_torchruns(monkeypatch):
    monkeypatch.setattr(runtime, "usable_cores", lambda: 6)
    for wished, beside, threads in (("3", 1, 3), ("", 1, 6), ("3,2", 1, 6), ("0", 1, 6), ("1", 2, 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", wished)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
        assert Runtime.detect().threads == threads
        assert Runtime.detect(threads=2).threads == 2
