# SPDX-License-Identifier: Apache-2.0
"""A driver for Triton that runs kernels on CPU tensors, by executing their PTX.

    with PTXDevice(capability=90, seed=1):
        paged_attention(...)

Triton specialises, compiles and launches as on a GPU of that compute capability. Only the execution
of the compiled kernel is replaced. This does not work in a process in which Triton interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from testing.ptx.errors import PTXError
from testing.ptx.memory import GlobalMemory
from testing.ptx.program import Program
from vllm_hybrid_kv.kernels.triton import attention, plan

SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program may request, by compute capability."""


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.constants = [kind == "constexpr" for kind in source.signature.values()]
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: Any, function: str, *rest: Any) -> None:
        device, metadata = driver.active.device, self.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("kernels with scratch memory")
        arguments = [
            device.address(value) if isinstance(value, torch.Tensor) else value
            for value, constant in zip(rest[4:], self.constants, strict=True)
            if not constant
        ]
        device.launch(metadata, function, (x, y, z), arguments)


class _Driver:
    """The parts of Triton's driver that compiling and launching use."""

    launcher_cls = _Launcher

    def __init__(self, device: PTXDevice) -> None:
        self.device = device
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps kernels by device.
        return self.device.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.device.capability] * 1024}

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
        return None, binary.decode(), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


def _stop_at_ptx(*arguments: Any) -> Any:
    """Make Triton's last stage the PTX, because assembling it takes most of the time."""
    if not arguments:
        return "ptx", "ptx"
    stages = arguments[1]
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


class PTXDevice:
    """A GPU whose kernels run here while the context lasts.

    Args:
        capability: Its compute capability, 90 for 9.0.
        seed: See `Program.run`.
        edit: Changes the PTX of each kernel before it runs, for faults that must be found.
    """

    def __init__(
        self, capability: int, seed: int = 0, edit: Callable[[str], str] = lambda ptx: ptx
    ) -> None:
        self.capability, self.seed, self.edit = capability, seed, edit
        self.memory = GlobalMemory()
        self.launches: list[str] = []
        self._storages: dict[int, Any] = {}
        self._programs: dict[str, Program] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PTXDevice:
        empty = torch.empty

        def empty_and_uninitialised(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = empty(*args, **kwargs)
            if tensor.device.type == "cpu":
                self.address(tensor, initialised=False)
            return tensor

        replaced: list[Any] = [
            patch.object(torch, "empty", empty_and_uninitialised),
            patch.object(attention, "is_nvidia", lambda device: True),
            patch.object(plan, "capability_of", lambda device: divmod(self.capability, 10)),
            patch.object(driver, "_active", _Driver(self)),
            patch.object(knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx),
        ]
        for one in replaced:
            self._stack.enter_context(one)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def address(self, tensor: torch.Tensor, *, initialised: bool = True) -> int:
        """Return the address of a tensor, and let kernels access its storage."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._storages and storage.nbytes():
            # Keep the storage, so that no other storage gets its address.
            self._storages[start] = storage
            data = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
            self.memory.register(data, start, initialised=initialised)
        return tensor.data_ptr()

    def launch(
        self, metadata: Any, ptx: str, grid: tuple[int, int, int], arguments: list[Any]
    ) -> None:
        """Run a compiled kernel."""
        ptx = self.edit(ptx)
        if ptx not in self._programs:
            self._programs[ptx] = Program(ptx, metadata.num_warps, metadata.shared)
        program = self._programs[ptx]
        # The last parameters are addresses of scratch memory, which no kernel here uses.
        unused = [0] * (len(program.kernel.parameters) - len(arguments))
        self.launches.append(program.kernel.name)
        try:
            program.run(grid, [*arguments, *unused], self.memory, seed=self.seed)
        except PTXError as error:
            raise type(error)(f"{program.kernel.name}, {error}") from None
