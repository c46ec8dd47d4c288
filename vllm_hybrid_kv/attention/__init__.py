# SPDX-License-Identifier: Apache-2.0
"""The vLLM attention backend that stores and attends to k8v4 pages."""
