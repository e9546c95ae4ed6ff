"""The paper's sections 2, 3 and 5.2 as primitives: meshes, collectives, sharding, replay.

Public is what an author of layers needs: :class:`TexModule` and what it declares and is given. Collectives are in
``lightning_tex.parallel.collectives``.
"""

from lightning_tex.parallel.activation_layout import ActivationLayout, Replicated, SequenceSharded
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.sharding import ParameterSharding, TexModule
from lightning_tex.parallel.topology import Axis, Topology

__all__ = [
    "ActivationLayout",
    "Axis",
    "Box",
    "Communication",
    "Layout",
    "ParameterSharding",
    "Replicated",
    "SequenceSharded",
    "TexModule",
    "Topology",
]
