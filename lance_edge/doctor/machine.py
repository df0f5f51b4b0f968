"""The facts about a machine, and the lines in which they are shown. Knows nothing of how they are found."""

from __future__ import annotations

from dataclasses import dataclass

from lance_edge.doctor.trials import LoadedLibrary, RuntimeReport
from lance_edge_engines.driver import Driver


@dataclass(frozen=True)
class Cpu:
    """`instructions` that matter to int8, out of INSTRUCTIONS; None if they cannot be read here."""

    name: str | None
    cores: int
    instructions: tuple[str, ...] | None


@dataclass(frozen=True)
class Memory:
    """`bytes` that this process may have (a container's limit counts), and how many are free."""

    bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class Clock:
    """A processor's clock and the range that it may move in; it is locked where both ends meet."""

    name: str
    mhz: int
    least_mhz: int
    most_mhz: int


@dataclass(frozen=True)
class Jetson:
    """A Jetson board; `l4t` is the release of its Jetson Linux, as in "36.4.3"."""

    model: str | None
    l4t: str | None
    power_mode: str | None
    clocks: tuple[Clock, ...] = ()

    @property
    def jetpack(self) -> int | None:
        """The major version of its JetPack."""
        release = int((self.l4t or "0").split(".")[0])
        return {35: 5, 36: 6}.get(release, 7 if release >= 38 else None)

    def shown(self) -> str:
        """The board in a line."""
        clocks = [
            f"{clock.name} {clock.mhz} MHz ({clock.least_mhz} to {clock.most_mhz})"
            for clock in self.clocks
        ]
        release = f"Jetson Linux {self.l4t or 'of unknown release'}"
        jetpack = f"JetPack {self.jetpack}" if self.jetpack else ""
        mode = f"power mode {self.power_mode or 'unknown'}"
        return ", ".join(filter(None, (self.model, release, jetpack, mode, *clocks)))


@dataclass(frozen=True)
class BundleState:
    """A bundle's name and version; `fault` is why its files cannot be trusted, None if they can.

    refiner        "none" in this bundle, "missing" on this machine, "damaged", or "ready"
    refiner_bytes  what `lance-edge pull` needs on the disk
    """

    path: str
    name: str | None = None
    fault: str | None = None
    refiner: str = "none"
    refiner_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What was found.

    packages        distribution -> version, of those in PACKAGES that are installed
    runtime         ONNX Runtime, tried in a process of its own
    tensorrt, rtx   the Python packages of TensorRT; None if this Python cannot see them
    jetpack_python  where JetPack keeps its TensorRT for Python, if it does
    driver          NVIDIA's; None if it is not installed
    driver_release  as in "580.65.06"
    nvidia_device   whether the bus has a GPU of NVIDIA, driver or not
    """

    system: str
    architecture: str
    python: tuple[int, int, int]
    cpu: Cpu
    memory: Memory | None
    packages: dict[str, str]
    runtime: RuntimeReport
    tensorrt: LoadedLibrary | None
    rtx: LoadedLibrary | None
    jetpack_python: str | None
    driver: Driver | None
    driver_release: str | None
    nvidia_device: bool | None
    jetson: Jetson | None
    cache: str
    cache_free_bytes: int | None
    bundle: BundleState

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each fact, as a person reads them; of what is not here, nothing."""
        python = ".".join(map(str, self.python))
        installed = [f"{name} {version}" for name, version in self.packages.items()]
        rows = [
            ("system", f"{self.system}, {self.architecture}"),
            ("cpu", self._cpu()),
            ("memory", self._memory()),
            ("python", ", ".join([python, *installed])),
            ("runs on", self._devices()),
            ("driver", self._driver()),
            ("jetson", "" if self.jetson is None else self.jetson.shown()),
            ("cache", f"{self.cache}, {_size(self.cache_free_bytes)} free"),
            ("bundle", f"{self.bundle.name or 'unreadable'}, {self.bundle.path}"),
        ]
        return [(name, value) for name, value in rows if value]

    def _cpu(self) -> str:
        known = self.cpu.instructions
        can = (
            "instructions unknown" if known is None else " ".join(known) or "no vector instructions"
        )
        return ", ".join(filter(None, (self.cpu.name, f"{self.cpu.cores} cores", can)))

    def _memory(self) -> str:
        if self.memory is None:
            return "unknown"
        return f"{_size(self.memory.bytes)}, {_size(self.memory.free_bytes)} free"

    def _devices(self) -> str:
        running = [name for name, refusal in self.runtime.refusals.items() if refusal is None]
        return ", ".join(running) or "nothing"

    def _driver(self) -> str:
        if self.driver is None:
            return "no NVIDIA driver"
        gpus = [f"{gpu.name}, {gpu.sm}, {_size(gpu.memory_bytes)}" for gpu in self.driver.gpus]
        release = f"NVIDIA {self.driver_release or 'of unknown release'}"
        return "; ".join([f"{release}, CUDA up to {self.driver.cuda or 'unknown'}", *gpus])


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
