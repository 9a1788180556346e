"""The fused relation kernel beside float64 blocks: largest relative differences of loss and gradient, case by case.

Run as a script on a CPU it needs TRITON_INTERPRET=1 in the environment. Prints JSON.
"""

from __future__ import annotations

import json

import torch

from distill.objectives import relation_kl, relation_triton

SEGMENTS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 11 + [3], [2, 1] * 3 + [0] + [3] * 17])
WIDTHS = {(8, 16): 2, (6, 20): 2, (64, 33): 1}  # of relation heads, teacher and student: how many heads
LOCAL = {"window": 7}
CASES = [  # widths, which side is of two tensors, form
    *(((8, 16), mixed, {"causal": causal} | more) for mixed, causal, more in (
        ("neither", False, {}), ("neither", True, LOCAL), ("teacher", True, {}), ("both", False, LOCAL),
    )),
    *((widths, "both", {"causal": True, "reduction": "token"}) for widths in WIDTHS),
]  # fmt: skip


def draw(shape, width, seed, dtype):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sides(segments, widths, heads, dtype, mixed):
    """Teacher and student, each a pair; `mixed` says which of them are of two tensors."""
    (t, other_t, s, other_s) = (draw(segments.shape, heads * widths[i // 2], i, dtype) for i in range(4))
    return (t, t if mixed == "neither" else other_t), (s, other_s if mixed == "both" else s)


def solved(pairs, segments, heads, dtype, device, **form):
    """Loss and gradients."""
    made = {x: x.to(device, dtype) for pair in pairs for x in pair}
    teacher, student = ([made[x] for x in pair] for pair in pairs)
    learned = [x.requires_grad_() for x in dict.fromkeys(student)]
    loss = relation_kl(tuple(teacher), tuple(student), segments.to(device), heads, **form)
    return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, learned))]


def gap(dtype, widths, device, mixed="both", segments=SEGMENTS, **form) -> float:
    heads = WIDTHS[widths]
    pairs = sides(segments, widths, heads, dtype, mixed)
    ours = solved(pairs, segments, heads, dtype, device, how="fused", **form)
    exact = solved(pairs, segments, heads, torch.float64, "cpu", how="blocks", **form)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


def gaps(device: str, dtype: torch.dtype, cases=CASES) -> dict[str, float]:
    return {str((str(dtype), *case)): gap(dtype, case[0], device, case[1], **case[2]) for case in cases}


if __name__ == "__main__":
    relation_triton.OWN, relation_triton.OTHERS = 32, 16  # more tiles than one
    # float16, for Triton 3.9's interpreter multiplies the bits of bfloat16 as integers
    print(json.dumps(gaps("cpu", torch.float32) | gaps("cpu", torch.float16, CASES[1:3])))
