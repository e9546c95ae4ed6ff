"""Counting what a GPU would be asked to do, without one."""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tex.parallel.compiled import Leaf

NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::split", "aten::unbind", "aten::_unsafe_view")
# torch's kernels over lists of tensors take so many chunks of so many elements in one launch.
CHUNK, CHUNKS = 1 << 16, 320


class Launches(TorchDispatchMode):
    """Counts the operations inside, but for views and allocations; a leaf function is one, as compiled.

    Attributes:
        names: how often each was called.
        kernels: launches of them where operations over lists take several, as large lists do.
    """

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.kernels = 0
        self._in_a_leaf = False

    @property
    def count(self):
        """Operations."""
        return self.names.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        made = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) or "_foreach_" in name or "_fused_" in name
        if made and not self._in_a_leaf and not func.is_view and not name.startswith(NO_KERNEL):
            self.names[name] += 1
            self.kernels += _kernels(name, args)
        return result

    def __enter__(self):
        call, counting = Leaf.__call__, self

        def counted(leaf, *args, **kwargs):
            counting.names[leaf.__name__] += 1
            counting.kernels += 1
            counting._in_a_leaf = True
            try:
                return leaf.eager(*args, **kwargs)
            finally:
                counting._in_a_leaf = False

        Leaf.__call__, self._call = counted, call
        return super().__enter__()

    def __exit__(self, *error):
        Leaf.__call__ = self._call
        return super().__exit__(*error)


def _kernels(name, args):
    if "_foreach_" not in name and "_fused_" not in name:
        return 1
    listed = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
    return -(-sum(-(-tensor.numel() // CHUNK) for tensor in listed) // CHUNKS)
