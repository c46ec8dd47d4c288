# SPDX-License-Identifier: Apache-2.0
"""The devices that an engine can be planned for."""

GPU = "gpu"
CPU = "cpu"
DEVICES = (GPU, CPU)
