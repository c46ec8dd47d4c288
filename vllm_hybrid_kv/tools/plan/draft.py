# SPDX-License-Identifier: Apache-2.0
"""The layers of a draft model, built as a server's drafter builds them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def build_draft(config: VllmConfig) -> None:
    """Build the draft model of an engine that has one; its layers join the target's.

    Args:
        config: The engine's configuration, whose target model is built.
    """
    speculative = config.speculative_config
    if speculative is None or not (speculative.use_eagle() or speculative.uses_draft_model()):
        return
    from vllm.v1.spec_decode import draft_model, llm_base_proposer
    from vllm.v1.spec_decode.dflash import DFlashProposer
    from vllm.v1.spec_decode.eagle import EagleProposer

    if speculative.uses_draft_model():
        kind = draft_model.DraftModelProposer
    else:
        kind = DFlashProposer if speculative.use_dflash() else EagleProposer
    # Its constructor allocates buffers on the device; building the model needs the configuration.
    proposer: Any = object.__new__(kind)
    proposer.vllm_config, proposer.speculative_config = config, speculative
    with ExitStack() as stack:
        for module in (draft_model, llm_base_proposer):
            stack.enter_context(patch.object(module, "get_model", _without_weights))
        proposer._get_model()


def _without_weights(
    vllm_config: VllmConfig, model_config: Any = None, prefix: str = "", **_: Any
) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model

    return initialize_model(vllm_config, model_config=model_config, prefix=prefix)
