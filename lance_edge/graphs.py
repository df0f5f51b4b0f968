"""A bundle's graphs as sessions: plans of them where a folder has some, else on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lance_edge.bundle import Bundle, RefinerSpec
from lance_edge.cache import MappedArrays, open_weights, weights_path
from lance_edge.errors import BundleError
from lance_edge.weights import WEIGHTS
from lance_edge_engines import Session, SessionError, open_session

if TYPE_CHECKING:
    from lance_edge_engines.plan_record import PlanEntry, PlanRecord

Part = Literal["screener", "refiner"]
PARTS: tuple[Part, ...] = ("screener", "refiner")


@dataclass(frozen=True)
class Graphs:
    """A bundle's graphs, and where each of them runs.

    device   "auto" or one of `lance_edge_engines.BACKENDS`, for graphs without a plan; "auto" runs
             int8 graphs on the CPU
    threads  CPU threads for one run; None for one per physical core
    plans    what `lance-edge plan` built, by part; they lie in `folder`
    """

    bundle: Bundle
    device: str
    threads: int | None
    plans: Mapping[str, PlanEntry]
    folder: Path | None

    def screener(self) -> Session:
        """Raises SessionError; DeviceUnavailable and PlanStale are such."""
        if "screener" in self.plans:
            return self._planned("screener")
        spec = self.bundle.manifest.screener
        device = self._device(spec.precision)
        return open_session(self.bundle.read(spec.graph), device, self.threads)

    def weights(self, spec: RefinerSpec) -> MappedArrays | None:
        """The refiner's; None for a plan, which holds them. Raises RefinerMissing, BundleError."""
        return None if "refiner" in self.plans else open_weights(self.bundle, spec)

    def refiner(self, spec: RefinerSpec, weights: MappedArrays | None) -> Session:
        """Raises BundleError, SessionError."""
        if "refiner" in self.plans:
            return self._planned("refiner")
        device = self._device(spec.precision)
        graph = self.bundle.read(spec.graph)
        if weights is None:
            return open_session(graph, device, self.threads)
        with weights.being_copied():
            return open_session(graph, device, self.threads, weights)

    def has_refiner(self) -> bool:
        """Whether the bundle has a refiner, and its weights are on this machine."""
        spec = self.bundle.manifest.refiner
        return spec is not None and (
            "refiner" in self.plans or weights_path(self.bundle, spec).is_file()
        )

    def _device(self, precision: str) -> str:
        """ONNX Runtime's 8-bit products have no CUDA kernels: each would cross the bus to the CPU and back."""
        return "cpu" if self.device == "auto" and precision == "int8" else self.device

    def _planned(self, part: Part) -> Session:
        from lance_edge_engines.trt import open_plan  # the runtime, for those who have plans

        assert self.folder is not None
        return open_plan(self.folder, part, sources(self.bundle, part))


def open_graphs(
    bundle: Bundle, device: str, threads: int | None = None, plans: Path | None = None
) -> Graphs:
    """`plans` is a folder that `lance-edge plan` wrote.

    Raises SessionError if it is not, PlanStale if one of them was made from another bundle.
    """
    if plans is None:
        return Graphs(bundle, device, threads, {}, None)
    from lance_edge_engines.plan_record import check_sources, read_record

    record = read_record(plans)
    for part in planned_parts(plans, record):
        check_sources(plans, record, part, sources(bundle, part))
    return Graphs(bundle, device, threads, record.plans, plans)


def planned_parts(plans: Path, record: PlanRecord) -> list[Part]:
    """The parts that a folder has plans of. Raises SessionError if it has others."""
    if unknown := sorted(set(record.plans) - set(PARTS)):
        raise SessionError(f"{plans} has plans of {', '.join(unknown)}; build the plans again")
    return [part for part in PARTS if part in record.plans]


def sources(bundle: Bundle, part: Part) -> dict[str, str]:
    """What a part's plan is made from: the bundle's file names and their SHA-256.

    Raises BundleError if the bundle has no such part.
    """
    files = bundle.manifest.files
    if part == "screener":
        graph = bundle.manifest.screener.graph
        return {graph: files[graph].sha256}
    spec = bundle.manifest.refiner
    if spec is None:
        raise BundleError(f"{bundle.path} has no refiner")
    return {spec.graph: files[spec.graph].sha256, WEIGHTS: spec.weights.sha256}
