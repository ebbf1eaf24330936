"""`replace_modules`: swap the quantizers and masked convolutions of a model for fast ones.

What a host's class computes, and how it is recognised, is in the file named after its library.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from . import (
    dac,
    diffusers,
    encodec,
    llamagen,
    masked_conv,
    rosinality,
    taming,
    vector_quantize_pytorch,
)
from .adapter import Host, Unsupported
from .rehearsal import difference

HOSTS: tuple[Host, ...] = (
    *rosinality.HOSTS,
    *taming.HOSTS,
    *diffusers.HOSTS,
    *llamagen.HOSTS,
    *encodec.HOSTS,
    *dac.HOSTS,
    *vector_quantize_pytorch.HOSTS,
)
_CLASS_NAMES = frozenset(host.class_name for host in HOSTS)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class ModuleReport:
    """What `replace_modules` did with one module; `str()` is one line that names its path."""

    path: str  # as in named_modules(); "" is the model itself
    other_paths: tuple[str, ...]  # where the same module also hangs
    kind: str  # class and library, as recognised
    replaced: bool
    reason: str  # why it was left; "" if it was not

    def __str__(self) -> str:
        where = ", ".join(path or "(the model itself)" for path in (self.path, *self.other_paths))
        what = "replaced" if self.replaced else f"left: {self.reason}"
        return f"{where}: {self.kind}: {what}"


def replace_modules(model: nn.Module) -> list[ModuleReport]:
    """Swap, in place, every quantizer and masked convolution of `model` that has a fast equivalent.

    Recognised, without importing their libraries: the vector quantizers of
    vector-quantize-pytorch, rosinality/vq-vae-2-pytorch, taming-transformers, diffusers, LlamaGen,
    encodec and descript-audio-codec, and any Conv2d whose weight is multiplied by a mask of type
    A or B. A replacement holds the very parameters, buffers and submodules of the module it stands
    in for, under the same names: optimizers and state dicts stay valid in both directions. It
    takes the same arguments and returns the same types; indices are exact where the host's depend
    on rounding, and −1 for a vector that is not finite.

    A module is left, with a reason, when it has an option without an equivalent, hooks, a
    parametrization, a changed forward, or a forward whose results differ on a small random batch
    on which every module is tried before it is replaced.

    Args:
        model: changed in place. A quantizer that is itself the model has no parent that could
            hold its replacement; `equivalent` gives that.
    Returns:
        One report per recognised module, in the order of `model.named_modules()`.
    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"replace_modules: model must be a torch.nn.Module; got {type(model).__name__}."
        )
    at_path = dict(model.named_modules(remove_duplicate=False))
    paths: dict[nn.Module, list[str]] = {}
    for path, module in at_path.items():
        paths.setdefault(module, []).append(path)
    reports = {}
    for module in _children_first(model):
        kind, adapter, reason = _equivalent(module)
        if kind is None:
            continue
        if adapter is not None and module is model:
            adapter, reason = None, "it has no parent to hold a replacement; use equivalent()"
        first, *others = paths[module]
        reports[module] = ModuleReport(first, tuple(others), kind, adapter is not None, reason)
        if adapter is not None:
            for path in (first, *others):
                parent, _, name = path.rpartition(".")
                at_path[parent]._modules[name] = adapter
    return [reports[module] for module in paths if module in reports]


def _children_first(model: nn.Module) -> list[nn.Module]:
    """Every module once, after all it holds: a replaced parent takes replaced children over."""
    ordered: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child not in ordered:
                visit(child)
        ordered[module] = None

    visit(model)
    return list(ordered)


def equivalent(module: nn.Module) -> nn.Module:
    """The fast equivalent of one quantizer or masked convolution, which it shares all tensors with.

    Args:
        module: of a kind that `replace_modules` replaces. It is left as it is.
    Returns:
        A new module.
    Raises:
        ValueError: it is not of such a kind, or has no equivalent, with the reason.
    """
    _, adapter, reason = _equivalent(module)
    if adapter is None:
        raise ValueError(
            f"equivalent: {type(module).__name__} has none: {reason or 'it is not recognised'}."
        )
    return adapter


def _equivalent(module: nn.Module) -> tuple[str | None, nn.Module | None, str]:
    """What a module is (None: nothing known), its replacement, or why there is none."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    if cls.__module__.partition(".")[0] == "fastvq":
        return None, None, ""
    if masked_conv.find_mask(module) is not None:
        host = masked_conv.HOST
    else:
        candidates = [host for host in HOSTS if _fits(host, cls, module)]
        if not candidates:
            return _near_miss(cls)
        host = candidates[0]
    kind = f"{cls.__name__} ({host.library})"
    try:
        _check_untouched(module, host.bypassed)
        adapter = host.adapt(module)
        _check_rehearsal(module, adapter, host)
    except Unsupported as reason:
        return kind, None, str(reason)
    return kind, adapter, ""


def _fits(host: Host, cls: type, module: nn.Module) -> bool:
    return (
        cls.__name__ == host.class_name
        and all(hasattr(module, name) for name in host.attributes)
        and not any(hasattr(module, name) for name in host.without)
    )


def _near_miss(cls: type) -> tuple[str | None, None, str]:
    """Say why a module that looks like a known one is left; nothing of any other module."""
    for base in cls.__mro__:
        at_home = any(_defines(host, base) for host in HOSTS)
        if at_home and base is not cls:
            return cls.__name__, None, f"a subclass of {base.__name__} may compute something else"
        if at_home:
            return cls.__name__, None, "this version of it has other attributes"
    return None, None, ""


def _defines(host: Host, cls: type) -> bool:
    """Whether `cls` has the name and the import path of the host's class."""
    path = f".{cls.__module__}"
    return cls.__name__ == host.class_name and any(path.endswith(f".{end}") for end in host.modules)


def _check_untouched(module: nn.Module, bypassed: tuple[str, ...]) -> None:
    """Unsupported if something hangs on the module that a replacement would lose."""
    if "forward" in module.__dict__ or getattr(module, "_compiled_call_impl", None) is not None:
        raise Unsupported("its forward was replaced or compiled; replace modules before that")
    for name, part in (("", module), *((name, getattr(module, name)) for name in bypassed)):
        whose = f"its {name} has" if name else "it has"
        if parametrize.is_parametrized(part):
            raise Unsupported(f"{whose} a parametrization")
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            raise Unsupported(f"{whose} hooks")


def _check_rehearsal(module: nn.Module, adapter: nn.Module, host: Host) -> None:
    if any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
        raise Unsupported("its tensors are on the meta device; replace modules after loading")
    found = difference(module, adapter, host.probe, host.fill, host.dtype)
    if found is not None:
        raise Unsupported(found)
