"""Counts what PyTorch is asked to do: an operation that is no view is at least one kernel launch on a GPU."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# Views that are not marked as such, memory that is set aside without being written, and questions to the host.
NO_KERNEL = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched within it, by name. Composed ones count as what they are made of."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))
