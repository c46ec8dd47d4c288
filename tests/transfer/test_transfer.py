# SPDX-License-Identifier: Apache-2.0
"""What pages carry with them when they leave an engine, and who may carry them."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata as nixl
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config as offloading
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.file_mapper import FileMapper

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer import connectors, fingerprint

K8V4 = "turboquant_k8v4"


@pytest.fixture(autouse=True)
def _active(unregistered, monkeypatch):
    plugin.register()


def transfer(connector, role="kv_both", **more):
    return KVTransferConfig(kv_connector=connector, kv_role=role, **more)


@pytest.fixture
def engine(make_config):
    """Sets up an engine's configuration in this process."""

    def make(dtype=K8V4, connector="NixlConnector", role="kv_both", **more):
        wanted = transfer(connector, role)
        return make_config(kv_cache_dtype=dtype, kv_transfer_config=wanted, **more)

    return make


def test_a_fingerprint_says_what_two_engines_must_share(engine):
    config = engine(block_size=128)
    found = fingerprint.fingerprint_of(config)
    assert found.fields() == {
        "plugin": plugin.__version__,
        "page_format": 1,
        "arrangement": "cpu_tiled",
        "page_tokens": 128,
        "kv_heads": 2,
        "head_size": 64,
        "unquantised": "0 1 4 5",
        "words": f"hybrid_kv {plugin.__version__}: k8v4 format 1, cpu_tiled, pages of 128 tokens, "
        "2 KV heads of 64, unquantised layers: 0 1 4 5",
    }


@pytest.mark.parametrize(
    "field", ["plugin", "page_format", "arrangement", "page_tokens", "unquantised"]
)
def test_whatever_differs_makes_another_fingerprint(field, engine, monkeypatch):
    config = engine(block_size=128)
    before = fingerprint.fingerprint_of(config)
    if field == "plugin":
        monkeypatch.setattr(fingerprint, "__version__", "0.0.1")
    elif field == "page_format":
        monkeypatch.setattr(k8v4, "FORMAT_VERSION", 2)
    elif field == "arrangement":
        # As on GPUs, whose kernels the interpreter runs.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("VLLM_HYBRID_KV_CPU_ISA", "interpreter")
        monkeypatch.setattr(STATE, "engine_settings", None)
    elif field == "unquantised":
        config.cache_config.kv_cache_dtype_skip_layers = ["3"]
    else:
        config.cache_config.block_size = 64
    after = fingerprint.fingerprint_of(config)
    changed = {name for name, value in after.fields().items() if before.fields()[name] != value}
    assert changed == {field, "words"}
    assert after.digest != before.digest


def test_another_cache_has_none(engine):
    engine("auto")
    assert fingerprint.current_fingerprint() is None
    assert fingerprint.marked("vllm") == "vllm"


def compatibility(config):
    return nixl.compute_nixl_compatibility_hash(config, "TURBOQUANT", "pull")


def test_the_handshake_of_nixl_holds_it_in_words_behind_vllms_own_hash(engine):
    ours = compatibility(engine(block_size=128))
    STATE.active_patches.undo()
    theirs = compatibility(STATE.engine_config)
    assert ours == f"{theirs} [{fingerprint.current_fingerprint()}]"


def test_the_handshake_of_another_cache_is_vllms_own(engine):
    config = engine("auto")
    ours = compatibility(config)
    STATE.active_patches.undo()
    assert compatibility(config) == ours


def none_hash(monkeypatch):
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", None, raising=False)
    monkeypatch.setattr(kv_cache_utils, "_NONE_HASH_SEED", None)
    kv_cache_utils.init_none_hash(sha256)
    return kv_cache_utils.NONE_HASH


def test_the_hashes_of_blocks_differ_from_those_of_a_server_without_the_plugin(engine, monkeypatch):
    engine(block_size=128)
    ours = none_hash(monkeypatch)
    assert kv_cache_utils.get_none_hash_seed().endswith(
        "2 KV heads of 64, unquantised layers: 0 1 4 5]"
    )
    engine(block_size=64)
    assert none_hash(monkeypatch) != ours
    engine("auto")
    unquantised = none_hash(monkeypatch)
    STATE.active_patches.undo()
    assert none_hash(monkeypatch) == unquantised != ours


def stored(config):
    """What a store on disk is named and says of its pages, see vLLM's tier `fs`."""
    spec = FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=64, dtype=torch.uint8, state_content_bytes=100
    )
    cache = KVCacheConfig(8, [], [KVCacheGroupSpec(["layer"], spec)])
    built = offloading.build_offloading_config(config, cache)
    mapper = FileMapper.from_offloading_spec("/store", SimpleNamespace(config=built))
    return mapper.base_path, mapper.get_run_config()


def test_a_store_of_the_offloading_connector_is_named_by_it(engine):
    config = engine(block_size=128)
    path, fields = stored(config)
    assert fields["dtype"] == f"{K8V4} [{fingerprint.current_fingerprint()}]"
    STATE.active_patches.undo()
    stock_path, stock_fields = stored(config)
    assert stock_fields == {**fields, "dtype": K8V4}
    assert path != stock_path


@pytest.fixture
def folder_of(engine, tmp_path):
    """Where ExampleConnector keeps the pages of a prompt, for an engine of some settings."""

    def find(dtype=K8V4, rank=0, **more):
        config = engine(
            dtype,
            "ExampleConnector",
            # vLLM turns it off itself where it chooses.
            disable_hybrid_kv_cache_manager=True,
            **more,
        )
        options = config.kv_transfer_config.kv_connector_extra_config
        options["shared_storage_path"] = str(tmp_path)
        config.parallel_config.rank = rank
        role = example_connector.KVConnectorRole.WORKER
        connector = KVConnectorFactory.create_connector(config, role, None)
        return connector._generate_foldername_debug(torch.arange(8), [], create_folder=True)

    return find


def test_a_folder_of_prompts_is_not_where_a_server_without_the_plugin_looks(folder_of, tmp_path):
    ours = folder_of()
    words = str(fingerprint.current_fingerprint())
    STATE.active_patches.undo()
    theirs = folder_of()
    assert ours != theirs
    (manifest,) = tmp_path.glob("*/hybrid_kv.json")
    assert ours.startswith(str(manifest.parent))
    assert json.loads(manifest.read_text())["words"] == words


def test_another_cache_keeps_its_prompts_where_vllm_does(folder_of, tmp_path):
    assert folder_of("auto").startswith(str(tmp_path))
    assert not list(tmp_path.glob("hybrid_kv*"))


def test_two_processes_of_a_model_do_not_write_over_each_others_pages(folder_of):
    assert folder_of(rank=0) != folder_of(rank=1)


def test_pages_of_another_format_in_a_folder_are_named_and_not_read(folder_of, log, monkeypatch):
    first = folder_of(block_size=128)
    assert folder_of(block_size=128) == first
    assert not log.lines(logging.WARNING)
    monkeypatch.setattr(k8v4, "FORMAT_VERSION", 2)
    assert folder_of(block_size=128) != first
    (line,) = log.lines(logging.WARNING)
    assert "holds pages that this engine does not read" in line
    assert "They are: hybrid_kv" in line
    assert "k8v4 format 1, " in line
    assert "k8v4 format 2, " in line


def test_a_manifest_that_cannot_be_read_is_another_format(folder_of, tmp_path, log):
    broken = tmp_path / "hybrid_kv-0" / "hybrid_kv.json"
    broken.parent.mkdir()
    broken.write_text('{"words"')
    folder_of()
    (line,) = log.lines(logging.WARNING)
    assert f"unknown, for {broken} cannot be read" in line


@pytest.fixture
def check(engine):
    """Checks a connector as start-up does, whether or not what it needs is installed."""
    config = engine()

    def run(*args, **more):
        config.kv_transfer_config = transfer(*args, **more)
        connectors.check_connectors(config, on_cpu=True)

    return run


@pytest.mark.parametrize("name", sorted(connectors.REFUSED))
def test_a_connector_that_cannot_carry_its_pages_is_refused_by_name(name, check):
    with pytest.raises(HybridKVError, match=rf"KV connector {name} cannot carry {K8V4} pages: "):
        check(name)


@pytest.mark.parametrize("name", connectors.GPU_ONLY)
def test_offloading_to_memory_is_refused_where_the_cache_is_in_memory(name, check):
    with pytest.raises(HybridKVError, match=f"{name} .*: it copies between a GPU and"):
        check(name)
    # One that another package brings may do something else.
    check("OffloadingConnector", kv_connector_extra_config={"spec_module_path": "theirs"})


def test_on_gpus_offloading_to_memory_is_not_refused(engine):
    config = engine()
    for name in connectors.GPU_ONLY:
        config.kv_transfer_config = transfer(name)
        connectors.check_connectors(config, on_cpu=False)


def test_a_refusal_stops_start_up(engine):
    with pytest.raises(HybridKVError, match="LMCacheConnectorV1 cannot carry"):
        engine(connector="LMCacheConnectorV1")


def test_the_refusal_says_what_carries_them(check):
    with pytest.raises(HybridKVError, match=r"Use one of NixlConnector, .* --kv-cache-dtype auto"):
        check("DecodeBenchConnector")


def test_another_cache_may_have_any_connector(engine):
    assert engine("auto", "LMCacheConnectorV1").kv_transfer_config is not None


@pytest.mark.parametrize("name", ["NixlConnector", "NixlPushConnector", "ExampleConnector"])
def test_a_connector_that_carries_them_starts(name, engine):
    assert engine(connector=name).kv_transfer_config.kv_connector == name


def test_every_connector_of_vllm_is_known():
    known = {*connectors.CARRIERS, *connectors.REFUSED, *connectors.WITHOUT_PAGES, "MultiConnector"}
    assert known == set(KVConnectorFactory._registry)


def test_of_several_connectors_each_is_asked(check):
    def several(*names):
        children = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
        check("MultiConnector", kv_connector_extra_config={"connectors": children})

    several("NixlConnector", "ExampleConnector")
    with pytest.raises(HybridKVError, match="MooncakeConnector"):
        several("NixlConnector", "MooncakeConnector")


def test_the_handshake_cannot_be_switched_off(check):
    with pytest.raises(HybridKVError, match="Leave enforce_handshake_compat as it is"):
        check("NixlConnector", kv_connector_extra_config={"enforce_handshake_compat": False})


def test_of_a_connector_of_another_package_a_warning_says_what_is_not_known(check, log):
    check("TheirConnector", kv_connector_module_path="theirs")
    (line,) = log.lines(logging.WARNING)
    assert "Of the KV connector TheirConnector of theirs nothing is known" in line


def plan(padded_to, layers=2):
    """A plan with a group of so many layers whose pages hold 65,536 bytes."""
    spec = FullAttentionSpec(
        block_size=128,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        page_size_padded=padded_to,
    )
    names = [f"layers.{number}" for number in range(layers)]
    return KVCacheConfig(10, [], [KVCacheGroupSpec(names, spec)])


def test_padded_pages_are_refused_before_nixl_fails_to_cut_them(engine):
    config = engine()
    words = (
        r"NixlConnector cannot take pages that are padded, as those of layer layers\.0 are: 65,536 "
        r"bytes in 76,800; set boundary_layers, which is 2, to 0, or serve"
    )
    with pytest.raises(HybridKVError, match=words):
        connectors.check_pages(config, plan(76_800), 2)
    with pytest.raises(HybridKVError, match=r"76,800; serve the model with --kv-cache-dtype auto"):
        connectors.check_pages(config, plan(76_800), 0)


def test_pages_that_nixl_can_cut_are_not_refused(engine):
    config = engine()
    connectors.check_pages(config, plan(None), 2)
    connectors.check_pages(config, plan(65_536), 2)
    # One layer alone has the memory for itself.
    connectors.check_pages(config, plan(76_800, layers=1), 2)
    config.kv_transfer_config = transfer("ExampleConnector")
    connectors.check_pages(config, plan(76_800), 2)
    config.kv_transfer_config = None
    connectors.check_pages(config, plan(76_800), 2)
