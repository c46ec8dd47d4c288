# SPDX-License-Identifier: Apache-2.0
"""The settings: one typed model, filled from the command line and the environment.

    vllm serve MODEL --additional-config '{"hybrid_kv": {"unify_page_sizes": "lcm"}}'
    VLLM_HYBRID_KV_UNIFY_PAGE_SIZES=lcm vllm serve MODEL

The environment wins. An unknown name or an invalid value stops start-up.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from vllm_hybrid_kv.errors import HybridKVSettingsError, did_you_mean

SECTION = "hybrid_kv"
"""The key of our settings in vLLM's `--additional-config`."""

ENVIRONMENT_PREFIX = "VLLM_HYBRID_KV_"
"""The environment variable of a setting is this prefix and the setting's name in capitals."""

MISSPELT = 0.87
"""How similar, from 0 to 1, an unknown name must be to one of ours to count as misspelt.

`hybrid_kvs` and `VLLM_HYBRIDKV_DEBUG` count as misspelt, `hybrid` and `VLLM_HYBRID` do not.
"""

FROM_CONFIG = "--additional-config"

INTERPRETER = "interpreter"
"""The value of `cpu_isa` that runs the GPU kernels on a CPU, in Triton's interpreter."""

StrategyName = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """The settings of one engine. The first four are names of strategies, see `hooks.py`.

    Attributes:
        unify_page_sizes: The strategy that gives the pages of all layers one size.
        token_capacity_groups: The strategy that chooses which KV groups count in the reported
            capacity.
        coordinator: The strategy that makes the KV cache coordinator.
        prefix_match_unit: The strategy that chooses the match unit: cached prefixes are matched in
            multiples of this many tokens.
        boundary_layers: The number of attention layers at each end of a k8v4 model that stay
            unquantised, unless the model is hybrid. vLLM's own rule is 2.
        allow_unsafe_drafts: Whether an engine may start even if its draft tokens can corrupt cached
            states, as `check_drafts` describes.
        debug: Whether the kernels check block tables and slots before they use them.
        cpu_isa: The instruction set of the CPU kernels; `auto` is the fastest available one.
            `interpreter` runs the GPU kernels in Triton's interpreter, to check them without a
            GPU; a token then takes seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unify_page_sizes: StrategyName = "min_waste"
    token_capacity_groups: StrategyName = "stock"
    coordinator: StrategyName = "hybrid_aware"
    prefix_match_unit: StrategyName = "auto"
    boundary_layers: Annotated[int, Field(ge=0)] = 0
    allow_unsafe_drafts: bool = False
    debug: bool = False
    cpu_isa: Literal["auto", "amx", "avx512_vnni", "portable", "interpreter"] = "auto"

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("cpu_isa", mode="before")
    @classmethod
    def _rename(cls, value: object) -> object:
        if value != "avx512_bf16":
            return value
        warnings.warn(
            "cpu_isa=avx512_bf16 is now named avx512_vnni; the old name goes with the next minor "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        return "avx512_vnni"

    def source(self, field: str) -> str:
        """Return where a field's value comes from: the default, the command line or a variable."""
        return self._sources.get(field, "default")

    def kernel_isa(self) -> str:
        """Return the instruction set of the CPU kernels, or `INTERPRETER`.

        Raises:
            HybridKVSettingsError: This CPU lacks the instruction set, or TRITON_INTERPRET is unset.
        """
        from vllm_hybrid_kv.kernels.cpu import isa

        source = f"cpu_isa={self.cpu_isa!r} (from {self.source('cpu_isa')})"
        if self.cpu_isa == INTERPRETER:
            # Triton reads the variable when the first kernel is defined, which may be one of
            # Triton's own. So it is too late to set the variable here.
            if os.environ.get("TRITON_INTERPRET") != "1":
                raise HybridKVSettingsError(f"{source} needs TRITON_INTERPRET=1 in the environment")
        elif self.cpu_isa == "auto":
            return isa.available()[-1]
        elif self.cpu_isa not in isa.available():
            raise HybridKVSettingsError(
                f"{source} is not possible on this CPU: choose auto or one of "
                f"{', '.join(isa.available())}"
            )
        return self.cpu_isa


def environment_name(field: str) -> str:
    """Return the name of the environment variable that sets a field."""
    return ENVIRONMENT_PREFIX + field.upper()


def resolve(additional_config: object, environment: Mapping[str, str] | None = None) -> Settings:
    """Build the settings of one engine.

    Args:
        additional_config: The value of `--additional-config`. It holds no settings of ours unless
            it is a mapping.
        environment: The environment, by default this process's. An empty value counts as unset.

    Raises:
        HybridKVSettingsError: A name or a value is invalid. The message lists valid ones.
    """
    environment = os.environ if environment is None else environment
    variables = {environment_name(field): field for field in Settings.model_fields}
    config = additional_config if isinstance(additional_config, Mapping) else {}
    # Sections with other names belong to other plugins.
    problems = [
        f"unknown section {name!r} in {FROM_CONFIG}; did you mean {SECTION!r}?"
        for name in config
        if name != SECTION and did_you_mean(str(name).lower(), [SECTION], MISSPELT)
    ]
    section = config.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise HybridKVSettingsError(
            f"{FROM_CONFIG} {SECTION!r} must be an object of settings, got {section!r}; "
            f"valid: {', '.join(Settings.model_fields)}"
        )
    values: dict[str, Any] = {str(name): value for name, value in section.items()}
    sources = dict.fromkeys(values, FROM_CONFIG)
    for name, value in sorted(environment.items()):
        if name in variables and value:
            values[variables[name]], sources[variables[name]] = value, name
        elif value and (
            name.startswith(ENVIRONMENT_PREFIX)
            or (name.startswith("VLLM_") and did_you_mean(name, variables, MISSPELT))
        ):
            problems.append(
                f"unknown environment variable {name}; valid: {', '.join(variables)}"
                f"{did_you_mean(name, variables)}"
            )
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems += [_problem(details, values, sources) for details in error.errors()]
    if problems:
        raise HybridKVSettingsError("; ".join(problems))
    settings._sources.update(sources)
    return settings


def _problem(details: Any, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    field, fields = str(details["loc"][0]), Settings.model_fields
    if field not in fields:
        return (
            f"unknown setting {field!r} in {FROM_CONFIG} {SECTION!r}; valid: {', '.join(fields)}"
            f"{did_you_mean(field, fields)}"
        )
    suggestion = ""
    if details["type"] == "literal_error":
        suggestion = did_you_mean(str(values[field]), get_args(fields[field].annotation))
    reason = details["msg"][0].lower() + details["msg"][1:]
    return f"{field}={values[field]!r} (from {sources[field]}) is not valid: {reason}{suggestion}"
