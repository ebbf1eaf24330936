"""The definition of truth: every op in plain, differentiable PyTorch.

One file per op, under the op's name. These functions say what each op computes,
on any device and in any floating dtype up to float64; kernels are held equal to
them. They are obvious rather than fast, share no code with what they judge, and
import nothing but torch. They trust their arguments: checks live in `fastvq.ops`.
"""
