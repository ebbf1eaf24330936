"""Other libraries' quantizers, masked convolutions and checkpoints, on fastvq."""

from fastvq.compat.replace import ModuleReport, equivalent, replace_modules

__all__ = ["ModuleReport", "equivalent", "replace_modules"]
