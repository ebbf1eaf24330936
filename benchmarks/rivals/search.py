"""Nearest rows by libraries with their own thread pools; each returns (N,) indices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]


def faiss(arrays: Arrays, threads: int) -> Callable[[], np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(arrays["x"].shape[1])
    index.add(arrays["codebook"])
    return lambda: index.search(arrays["x"], 1)[1].reshape(-1)


def scikit_learn(arrays: Arrays, threads: int) -> Callable[[], np.ndarray]:
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    return lambda: pairwise_distances_argmin(arrays["x"], arrays["codebook"])


def keops(arrays: Arrays, threads: int) -> Callable[[], np.ndarray]:
    from pykeops.numpy import LazyTensor

    x, codebook = LazyTensor(arrays["x"][:, None]), LazyTensor(arrays["codebook"][None])
    distances = ((x - codebook) ** 2).sum(-1)
    # Its threads are OpenMP's, which the environment sets.
    return lambda: distances.argmin(axis=1).reshape(-1)
