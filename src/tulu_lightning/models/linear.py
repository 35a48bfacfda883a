"""Linear layers that multiply fp32 matrices with the library that is fast on this CPU (`core.matmul`)."""

from torch import Tensor, nn

from tulu_lightning.core.matmul import fp32_library, linear

__all__ = ["use_fast_linear"]


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_fast_linear(module: nn.Module) -> nn.Module:
    """Let every `nn.Linear` below a module multiply that way; names, parameters and `isinstance` stay as they are.

    Does nothing where PyTorch's own library is the fast one. Subclasses of `nn.Linear` are left alone.
    """
    if fp32_library() != "default":
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = _Linear
    return module
