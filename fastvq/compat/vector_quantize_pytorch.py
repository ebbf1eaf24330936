"""vector-quantize-pytorch: its modules become `fastvq.nn`'s of the same names.

Lives here: reading a module's constructor arguments back from its attributes, and handing its
tensors over. What the arguments mean is `fastvq.nn`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.codebook import Codebook
from fastvq.nn.sim_vq import SimVQ
from fastvq.nn.vector_quantize import VectorQuantize

from .adapter import Host, Unsupported, adopt

# Arguments that are attributes of the module under their own names, and of its codebook. Where a
# release lacks one, the constructor's default stands.
_OF_MODULE = (
    *("dim", "heads", "separate_codebook_per_head", "codebook_size", "freeze_codebook"),
    *("channel_last", "accept_image_fmap", "accept_3d_fmap", "commitment_weight"),
    *("commitment_use_cross_entropy_loss", "orthogonal_reg_weight"),
    *("orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
    *("codebook_diversity_loss_weight", "codebook_diversity_temperature", "rotation_trick"),
    *("directional_reparam", "directional_reparam_variance", "learnable_codebook"),
    *("manual_in_place_optimizer_update", "sync_update_v", "return_zeros_for_masked_padding"),
    *("route_gradients_to_input", "use_cosine_sim"),
)
_OF_CODEBOOK = (
    *("decay", "eps", "kmeans_iters", "threshold_ema_dead_code", "sample_codebook_temp"),
    *("ema_update", "manual_ema_update", "vq_bridge", "affine_param", "sync_affine_param"),
    *("affine_param_batch_decay", "affine_param_codebook_decay"),
)


def _arguments(host: Any) -> dict[str, Any]:
    """The constructor arguments of a `VectorQuantize`, as far as its attributes tell."""
    book = host._codebook
    arguments = {name: getattr(host, name) for name in _OF_MODULE if hasattr(host, name)}
    arguments |= {name: getattr(book, name) for name in _OF_CODEBOOK if hasattr(book, name)}
    arguments["codebook_dim"] = book.embed.shape[-1]
    arguments["kmeans_init"] = not bool(book.initted)
    arguments["layernorm_after_project_in"] = any(
        isinstance(part, nn.LayerNorm) for part in host.project_in.modules()
    )
    sampling = getattr(book.gumbel_sample, "keywords", {})
    arguments["stochastic_sample_codes"] = sampling.get("stochastic", False)
    arguments["straight_through"] = sampling.get("straight_through", False)
    return arguments


def _adapt(host: Any) -> VectorQuantize:
    if getattr(host, "in_place_codebook_optimizer", None) is not None:
        raise Unsupported("in_place_codebook_optimizer is not supported")
    try:
        with torch.random.fork_rng(devices=[]):  # its own random codes are thrown away
            adapter = VectorQuantize(**_arguments(host))
    except (TypeError, ValueError) as error:
        raise Unsupported(str(error).rstrip(".")) from None
    adapter.project_in, adapter.project_out = host.project_in, host.project_out
    share_codebook(host._codebook, adapter._codebook)
    return adapter.train(host.training)


def share_codebook(host: Any, codebook: Codebook) -> None:
    """Give `codebook` the state of a host's: the very tensors, or float32 copies of others."""
    for name, own in codebook.state_dict(keep_vars=True).items():
        tensor = getattr(host, name)
        if tensor.shape != own.shape:
            raise Unsupported(f"its {name} has shape {tuple(tensor.shape)}, not {tuple(own.shape)}")
        if isinstance(own, nn.Parameter) != isinstance(tensor, nn.Parameter):
            raise Unsupported(f"its {name} is trained in one and not in the other")
        if tensor.dtype != own.dtype:
            if isinstance(tensor, nn.Parameter):
                raise Unsupported(
                    f"its {name} is {tensor.dtype}; codes that are trained must be {own.dtype}"
                )
            tensor = tensor.to(own.dtype)
        setattr(codebook, name, tensor)
    codebook._known_initted = False


def _fill(host: Any) -> None:
    book = host._codebook
    book.embed.copy_(F.normalize(torch.randn_like(book.embed), dim=-1))
    book.embed_avg.copy_(book.embed)
    book.cluster_size.fill_(1.0)
    book.initted.fill_(True)
    # Its losses on all distances take their gradient at the codes after the step's update, which
    # is written past autograd; ours take it at the codes that were compared.
    if host.commitment_use_cross_entropy_loss or host.codebook_diversity_loss_weight > 0:
        host.freeze_codebook = True


def _probe(host: Any) -> tuple[Tensor]:
    maps = host.accept_image_fmap or host.accept_3d_fmap
    sizes = (3, 2) if host.accept_image_fmap else (2, 1, 3) if host.accept_3d_fmap else (6,)
    shape = (2, *sizes, host.dim) if host.channel_last and not maps else (2, host.dim, *sizes)
    return (torch.randn(shape, dtype=torch.float64),)


def _adapt_sim_vq(host: Any) -> SimVQ:
    adapter = adopt(SimVQ, host)  # attributes, buffer and transform have the same names
    with torch.no_grad():
        adapter.dim = host.code_transform(host.frozen_codebook[:1]).shape[-1]
    return adapter


def _probe_sim_vq(host: Any) -> tuple[Tensor]:
    with torch.no_grad():
        dim = host.code_transform(host.frozen_codebook[:1]).shape[-1]
    return (torch.randn((2, dim, 6) if host.channel_first else (2, 6, dim)),)


def _fill_sim_vq(host: Any) -> None:
    host.frozen_codebook.normal_()


def _construct_instead(host: Any) -> nn.Module:
    name = type(host).__name__
    raise Unsupported(
        f"it is not swapped; construct fastvq.{name} with the same arguments and load its state"
    )


HOSTS = (
    Host(
        library="vector-quantize-pytorch",
        class_name="VectorQuantize",
        modules=("vector_quantize_pytorch.vector_quantize_pytorch",),
        attributes=frozenset(
            {"dim", "codebook_size", "heads", "project_in", "project_out", "_codebook"}
        ),
        without=frozenset({"in_proj"}),
        bypassed=("_codebook",),
        adapt=_adapt,
        probe=_probe,
        fill=_fill,
        dtype=torch.float32,  # both search in float32, whatever they are given
    ),
    Host(
        library="vector-quantize-pytorch",
        class_name="SimVQ",
        modules=("vector_quantize_pytorch.sim_vq",),
        attributes=frozenset(
            {
                *("codebook_size", "channel_first", "code_transform", "frozen_codebook"),
                *("rotation_trick", "input_to_quantize_commit_loss_weight", "commitment_weight"),
            }
        ),
        without=frozenset(),
        bypassed=(),
        adapt=_adapt_sim_vq,
        probe=_probe_sim_vq,
        fill=_fill_sim_vq,
    ),
    *(
        Host(
            library="vector-quantize-pytorch",
            class_name=class_name,
            modules=(f"vector_quantize_pytorch.{module}",),
            attributes=frozenset({"codebook_dim", "num_codebooks", "project_in", "project_out"}),
            without=frozenset(),
            bypassed=(),
            adapt=_construct_instead,
            probe=_probe,
            fill=_fill,
        )
        for class_name, module in (
            ("FSQ", "finite_scalar_quantization"),
            ("LFQ", "lookup_free_quantization"),
        )
    ),
)
