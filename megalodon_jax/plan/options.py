"""The options of `megalodon plan`; importing this module is cheap."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compiles a run's training step for hardware you do not have, and prints what it costs.

    Example: megalodon plan paper_7b --topology v5p:4x4x8 --mesh.data 128
    """

    topology: str = ""
    """The devices, such as v5p:4x4x8, v5e:16x16, v6e:16x16x2slices, h100:8 or h200:8."""
    slices: int = 1
    """Number of such TPUs, connected by the data center's network."""
    sweep: bool = False
    """Try meshes and remat policies, and rank the plans that fit."""
    max_candidates: int = 8
    """Most plans to compile in a sweep."""
    json: str = ""
    """Also write the plan, or the list of a sweep's plans, to this file."""
