"""What `VectorQuantize` accepts, and the one line it answers otherwise.

Lives here: arguments of the constructor that are out of scope, and those that exclude each other.
Shapes are checked where they are read, in `vector_layout.py`.
"""

from __future__ import annotations

from typing import Any

from fastvq.ops.checks import check_int

from .processes import world_size

# Arguments of the constructor that are out of scope, with their defaults.
_UNSUPPORTED: dict[str, Any] = {
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
}


def refuse_unsupported(where: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """ValueError for the first of these arguments that is not at its default."""
    for name, default in defaults.items():
        value = given[name]
        if value is not default and value != default:
            shown = value if isinstance(value, (bool, int, float)) else type(value).__name__
            raise ValueError(
                f"{where}: {name}={shown} is out of fastvq's scope; leave it at {default}, "
                "or see docs/migration.md for another way."
            )


def check_constructor(given: dict[str, Any]) -> bool:
    """Refuse arguments out of scope, out of range, or that exclude each other.

    Args:
        given: every argument by name.
    Returns:
        Whether the gradient is the rotation trick's, asked for or by default.
    """
    where = "VectorQuantize"
    for name in ("dim", "codebook_size", "codebook_dim", "heads"):
        if given[name] is not None or name != "codebook_dim":
            check_int(where, name, given[name])
    refuse_unsupported(where, given, _UNSUPPORTED)
    learnable, straight_through = bool(given["learnable_codebook"]), given["straight_through"]
    rotation = given["rotation_trick"]
    if rotation is None:
        rotation = given["dim"] > 1 and not straight_through
    for rule, broken in {
        "learnable_codebook=True excludes ema_update=True; "
        "a code is moved by the loss or by averages": learnable and bool(given["ema_update"]),
        "learnable_codebook=True excludes use_cosine_sim=True": (
            learnable and given["use_cosine_sim"]
        ),
        "learnable_codebook=True excludes straight_through=True": learnable and straight_through,
        "rotation_trick=True excludes straight_through=True": rotation and straight_through,
        "accept_image_fmap excludes accept_3d_fmap": (
            given["accept_image_fmap"] and given["accept_3d_fmap"]
        ),
        "in_place_codebook_optimizer needs learnable_codebook=True": (
            given["in_place_codebook_optimizer"] is not None and not learnable
        ),
        "sync_kmeans=False is refused with several processes; their codes would differ": (
            not given["sync_kmeans"] and given["sync_codebook"] is not False and world_size() > 1
        ),
    }.items():
        require(not broken, f"{where}: {rule}.")
    return bool(rotation)


def require(condition: bool, message: str) -> None:
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)
