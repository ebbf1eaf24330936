"""Exact sampling of autoregressive priors.

`generate` draws a `Request`'s codes, either by one whole forward per code (`full`) or
incrementally from a plan of the prior's weights (`cached`); both give the same codes for the same
seed (`draw` says why). `stream` draws sequences without end. The priors themselves, which call
this, live in `fastvq.models`.
"""

from fastvq.sampling.loop import eval_copy, generate, working_dtype
from fastvq.sampling.plan import PriorPlan, plan_prior
from fastvq.sampling.request import (
    METHODS,
    Conditioning,
    Request,
    check_method,
    check_seed,
    check_shape,
    make_request,
)
from fastvq.sampling.sequence import ConditionOf, OneRow, stream

__all__ = [
    "METHODS",
    "ConditionOf",
    "Conditioning",
    "OneRow",
    "PriorPlan",
    "Request",
    "check_method",
    "check_seed",
    "check_shape",
    "eval_copy",
    "generate",
    "make_request",
    "plan_prior",
    "stream",
    "working_dtype",
]
