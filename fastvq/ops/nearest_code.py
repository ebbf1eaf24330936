"""nearest_code: the exact index of the nearest codebook row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import kernels, reference_ops as reference

from . import checks
from .backends import choose
from .registration import register
