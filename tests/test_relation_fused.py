"""The fused relation kernel: equal to float64 blocks, in Triton's interpreter and on a GPU; chosen where it fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from distill.objectives import relation_kl
from growth.errors import UserError

CASES = Path(__file__).parent / "fused_cases.py"
WITH_TRITON = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed (PyTorch for CPUs has none)")
LIMITS = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2}  # of gradients, which have the dtype of their tensors


def check(gaps: dict[str, float]) -> None:
    wrong = {case: gap for case, gap in gaps.items() for dtype, most in LIMITS.items() if dtype in case and gap > most}
    assert gaps and not wrong


@WITH_TRITON
def test_the_kernel_is_the_reference_in_tritons_interpreter():
    command, environment = [sys.executable, "-W", "ignore", str(CASES)], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout))


@pytest.mark.gpu
@WITH_TRITON
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_the_reference_on_a_gpu(dtype):
    from fused_cases import gaps

    check(gaps("cuda", dtype))


def test_blocks_are_what_fits_a_cpu():
    teacher, student, segments = torch.randn(2, 5, 8), torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    forms = {how: relation_kl(teacher, student, segments, 2, how=how) for how in ("auto", "blocks")}
    assert torch.equal(*forms.values())
    with pytest.raises(UserError, match=r"in a fused kernel: it (needs Triton|runs on a GPU).*how='blocks' does"):
        relation_kl(teacher, student, segments, 2, how="fused")
