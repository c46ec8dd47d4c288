# SPDX-License-Identifier: Apache-2.0
"""Test the fingerprint of pages that leave an engine, and which connectors can carry them."""

import contextlib
import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import psutil
import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata as nixl
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config as offloading
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.worker.worker_base import WorkerBase

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.settings import Settings
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer import connectors, fingerprint

K8V4 = "turboquant_k8v4"


@pytest.fixture(autouse=True)
def _active(unregistered):
    plugin.register()


def deactivate():
    """Make vLLM behave as on a server without the plugin."""
    STATE.active_patches.undo()


def transfer(connector, **more):
    return KVTransferConfig(kv_connector=connector, kv_role="kv_both", **more)


@pytest.fixture
def engine(make_config):
    """Return a function that makes the configuration of an engine with a connector."""

    def make(dtype=K8V4, connector="NixlConnector", **more):
        return make_config(kv_cache_dtype=dtype, kv_transfer_config=transfer(connector), **more)

    return make


def test_a_fingerprint_contains_what_two_engines_must_share(engine):
    found = fingerprint.fingerprint_of(engine(block_size=128))
    assert str(found) == (
        f"hybrid_kv {plugin.__version__}: k8v4 format 2, cpu_tiled, pages of 128 tokens, "
        "2 KV heads of 64, unquantised layers: none"
    )


@pytest.mark.parametrize(
    "field", ["plugin", "page_format", "arrangement", "page_tokens", "unquantised"]
)
def test_any_difference_changes_the_fingerprint(field, engine, monkeypatch):
    config = engine(block_size=128)
    before = fingerprint.fingerprint_of(config)
    if field == "plugin":
        monkeypatch.setattr(fingerprint, "__version__", "0.0.1")
    elif field == "page_format":
        monkeypatch.setattr(k8v4, "FORMAT_VERSION", 1)
    elif field == "arrangement":
        # Triton's interpreter runs the GPU kernels, whose pages have another layout.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("VLLM_HYBRID_KV_CPU_ISA", "interpreter")
        monkeypatch.setattr(STATE, "engine_settings", None)
    elif field == "unquantised":
        config.cache_config.kv_cache_dtype_skip_layers = ["3"]
    else:
        config.cache_config.block_size = 64
    after = fingerprint.fingerprint_of(config)
    assert after == replace(before, **{field: getattr(after, field)})
    assert str(after) != str(before)


@pytest.mark.parametrize("dtype", [K8V4, "auto"])
def test_the_nixl_handshake_contains_the_fingerprint_after_vllms_hash(dtype, engine):
    def compatibility():
        return nixl.compute_nixl_compatibility_hash(config, "TURBOQUANT", "pull")

    config = engine(dtype, block_size=128)
    suffix = f" [{fingerprint.fingerprint_of(STATE.engine_config)}]" if dtype == K8V4 else ""
    ours = compatibility()
    deactivate()
    assert ours == compatibility() + suffix


def none_hash(monkeypatch):
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", None, raising=False)
    monkeypatch.setattr(kv_cache_utils, "_NONE_HASH_SEED", None)
    kv_cache_utils.init_none_hash(sha256)
    return kv_cache_utils.NONE_HASH


def test_block_hashes_differ_from_those_of_a_server_without_the_plugin(engine, monkeypatch):
    engine(block_size=128)
    ours = none_hash(monkeypatch)
    assert kv_cache_utils.get_none_hash_seed().endswith(
        "2 KV heads of 64, unquantised layers: none]"
    )
    engine(block_size=64)
    assert none_hash(monkeypatch) != ours
    engine("auto")
    unquantised = none_hash(monkeypatch)
    deactivate()
    assert none_hash(monkeypatch) == unquantised != ours


def offloading_config(config):
    spec = FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=64, dtype=torch.uint8, state_content_bytes=100
    )
    cache = KVCacheConfig(8, [], [KVCacheGroupSpec(["layer"], spec)])
    return offloading.build_offloading_config(config, cache)


@pytest.mark.parametrize(
    ("coordinator", "chosen", "only_prompts"),
    [
        ("hybrid_aware", {}, False),
        ("hybrid_aware", {"offload_prompt_only": True}, True),
        ("stock", {}, None),
    ],
)
def test_answers_are_offloaded_with_hybrid_aware_unless_the_user_decides_otherwise(
    coordinator, chosen, only_prompts, engine
):
    config = engine(
        connector="OffloadingConnector", block_size=128, settings={"coordinator": coordinator}
    )
    config.kv_transfer_config.kv_connector_extra_config = chosen
    assert offloading_config(config).extra_config.get("offload_prompt_only") is only_prompts


def stored(config):
    """Set up vLLM's offloading tier `fs`. Returns the path and the description of its store."""
    built = offloading_config(config)
    mapper = FileMapper.from_offloading_spec("/store", SimpleNamespace(config=built))
    return mapper.base_path, mapper.get_run_config()


def test_the_name_of_an_offloading_store_contains_the_fingerprint(engine):
    config = engine(block_size=128)
    path, fields = stored(config)
    assert fields["dtype"] == f"{K8V4} [{fingerprint.fingerprint_of(STATE.engine_config)}]"
    deactivate()
    stock_path, stock_fields = stored(config)
    assert stock_fields == {**fields, "dtype": K8V4}
    assert path != stock_path


@pytest.fixture
def folder_of(engine, tmp_path):
    """Return a function that finds the folder in which ExampleConnector stores a prompt's pages."""

    def find(dtype=K8V4, rank=0, **more):
        # vLLM itself would disable the hybrid manager for this connector.
        config = engine(dtype, "ExampleConnector", disable_hybrid_kv_cache_manager=True, **more)
        options = config.kv_transfer_config.kv_connector_extra_config
        options["shared_storage_path"] = str(tmp_path)
        config.parallel_config.rank = rank
        role = example_connector.KVConnectorRole.WORKER
        connector = KVConnectorFactory.create_connector(config, role, None)
        return connector._generate_foldername_debug(torch.arange(8), [], create_folder=True)

    return find


def test_prompts_are_not_stored_where_a_server_without_the_plugin_looks(folder_of, tmp_path):
    ours = folder_of()
    words = str(fingerprint.fingerprint_of(STATE.engine_config))
    deactivate()
    assert ours != folder_of()
    (manifest,) = tmp_path.glob("*/hybrid_kv.json")
    assert ours.startswith(str(manifest.parent))
    assert json.loads(manifest.read_text())["words"] == words


def test_prompts_of_another_cache_are_stored_where_vllm_stores_them(folder_of, tmp_path):
    assert folder_of("auto").startswith(str(tmp_path))
    assert not list(tmp_path.glob("hybrid_kv*"))


def test_the_ranks_of_a_model_have_different_folders(folder_of):
    assert folder_of(rank=0) != folder_of(rank=1)


@pytest.mark.parametrize("readable", [True, False])
def test_stored_pages_of_format_1_are_not_read_and_a_warning_says_why(
    readable, folder_of, log, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(k8v4, "FORMAT_VERSION", 1)
        first = folder_of(block_size=128)
        assert folder_of(block_size=128) == first
        assert not log(logging.WARNING)
    if not readable:
        (manifest,) = tmp_path.glob("*/hybrid_kv.json")
        manifest.write_text("[]")
    assert folder_of(block_size=128) != first
    (line,) = log(logging.WARNING)
    theirs, ours = line.split(" This engine uses: ")
    assert theirs.startswith(f"{tmp_path} holds pages that this engine does not read: {tmp_path}/")
    assert ("k8v4 format 1, " if readable else "(of an unknown format)") in theirs
    assert "k8v4 format 2, " in ours


def receive_handshake(monkeypatch, local, remote):
    """Run the handshake of NIXL's worker with a peer's compatibility hash."""
    payload = nixl.NixlHandshakePayload(remote, b"")
    reply = [msgspec.msgpack.encode(payload), msgspec.msgpack.encode(0.0)]
    socket = SimpleNamespace(
        setsockopt=lambda *_: None, send=lambda _: None, recv_multipart=lambda: reply
    )
    monkeypatch.setattr(base_worker, "zmq_ctx", lambda *_: contextlib.nullcontext(socket))
    worker = object.__new__(base_worker.NixlBaseConnectorWorker)
    vars(worker).update(
        compat_hash=local,
        enforce_compat_hash=True,
        use_host_buffer=True,
        _is_csa_linear=False,
        transfer_topo=SimpleNamespace(handshake_target_ranks=lambda *_: [0]),
    )
    worker._nixl_handshake("localhost", 1, 1, "peer")


def test_a_peer_with_pages_of_format_1_is_rejected_with_both_formats(engine, monkeypatch):
    def compatibility():
        return nixl.compute_nixl_compatibility_hash(config, "TURBOQUANT", "pull")

    config = engine(block_size=128)
    ours = compatibility()
    with monkeypatch.context() as patch:
        patch.setattr(k8v4, "FORMAT_VERSION", 1)
        theirs = compatibility()
    message = (
        r"NIXL compatibility hash mismatch\. Local: .*k8v4 format 2, .*Remote: .*k8v4 format 1, "
    )
    with pytest.raises(RuntimeError, match=message):
        receive_handshake(monkeypatch, ours, theirs)


@pytest.fixture
def check(engine):
    """Return a function that checks a connector as start-up does, even if it is not installed."""
    config = engine()

    def run(*args, on_cpu=True, hash_algorithm="sha256", **more):
        config.kv_transfer_config = transfer(*args, **more)
        config.cache_config.prefix_caching_hash_algo = hash_algorithm
        connectors.check_connectors(config, on_cpu=on_cpu)

    return run


@pytest.mark.parametrize("name", sorted(connectors.REFUSED))
def test_a_connector_that_cannot_carry_pages_is_refused_with_those_that_can(name, check):
    message = (
        rf"KV connector {name} cannot carry {K8V4} pages: .*\. Use one of NixlConnector, .*, or "
        "serve the model with --kv-cache-dtype auto"
    )
    with pytest.raises(HybridKVError, match=message):
        check(name)


def test_a_connector_that_copies_with_cuda_is_refused_only_on_cpus(check):
    with pytest.raises(HybridKVError, match=r"copies with CUDA streams.* Use OffloadingConnector"):
        check("SimpleCPUOffloadConnector")
    check("SimpleCPUOffloadConnector", on_cpu=False)


def test_a_worker_refuses_a_host_tier_that_is_larger_than_the_memory(engine):
    config = engine("auto", connector="OffloadingConnector")
    room = psutil.virtual_memory().total
    config.kv_transfer_config.kv_connector_extra_config = {"cpu_bytes_to_use": room + (1 << 30)}
    with pytest.raises(HybridKVError, match=r"host tier .* GiB, but .* smaller --kv-offloading-"):
        WorkerBase(config, 0, 0, "")


def tiers(*secondary):
    """Make options of OffloadingConnector for secondary tiers."""
    return {
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 1 << 20,
            "secondary_tiers": list(secondary),
        }
    }


def test_a_worker_refuses_a_tier_that_processes_share_if_it_is_larger_than_shared_memory(
    engine, monkeypatch
):
    config = engine(connector="OffloadingConnector")
    config.kv_transfer_config.kv_connector_extra_config = options = {"cpu_bytes_to_use": 3 << 29}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    # Without secondary tiers, the memory of each process on a CPU is its own.
    WorkerBase(config, 0, 0, "")
    options["spec_name"] = "TieringOffloadingSpec"
    message = r"has 1\.50 GiB, but /dev/shm, which docker run --shm-size enlarges, has 1\.00 GiB"
    with pytest.raises(HybridKVError, match=message):
        WorkerBase(config, 0, 0, "")


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
def test_tiers_that_outlive_the_process_need_sha256_hashes(algorithm, check, tmp_path):
    options = tiers({"type": "fs", "root_dir": str(tmp_path / "tier")})
    check("OffloadingConnector", hash_algorithm=algorithm, **tiers())
    if algorithm.startswith("sha256"):
        check("OffloadingConnector", hash_algorithm=algorithm, **options)
        return
    message = (
        f"outlives this process, .* --prefix-caching-hash-algo is {algorithm}. Pass "
        "--prefix-caching-hash-algo sha256"
    )
    with pytest.raises(HybridKVError, match=message):
        check("OffloadingConnector", hash_algorithm=algorithm, **options)


def test_the_folder_of_a_file_tier_is_created_for_its_user_only(check, tmp_path):
    root = tmp_path / "more" / "tier"
    for _ in range(2):
        check("OffloadingConnector", **tiers({"type": "fs", "root_dir": str(root)}))
        assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_of_a_file_tier_that_others_can_access_is_refused(mode, check, tmp_path):
    tmp_path.chmod(mode)
    message = (
        f"access {tmp_path}, the root_dir of a file tier: it has mode {mode:o} .* Run chmod 700"
    )
    with pytest.raises(HybridKVError, match=message):
        check("OffloadingConnector", **tiers({"type": "fs", "root_dir": str(tmp_path)}))


def test_a_folder_of_a_file_tier_that_belongs_to_another_user_is_refused(
    check, tmp_path, monkeypatch
):
    monkeypatch.setattr(connectors.os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    tmp_path.chmod(0o700)
    with pytest.raises(HybridKVError, match=f"belongs to user {tmp_path.stat().st_uid}"):
        check("OffloadingConnector", **tiers({"type": "fs", "root_dir": str(tmp_path)}))


def test_a_file_where_the_folder_of_a_file_tier_should_be_is_refused(check, tmp_path):
    (tmp_path / "tier").touch()
    with pytest.raises(HybridKVError, match=r"root_dir of a file tier cannot be used: .*tier"):
        check("OffloadingConnector", **tiers({"type": "fs", "root_dir": str(tmp_path / "tier")}))


def test_a_refused_connector_stops_start_up(engine):
    with pytest.raises(HybridKVError, match="LMCacheConnectorV1 cannot carry"):
        engine(connector="LMCacheConnectorV1")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("auto", "LMCacheConnectorV1"),
        *((K8V4, name) for name in ("NixlConnector", "NixlPushConnector", "ExampleConnector")),
    ],
)
def test_a_supported_connector_and_any_with_another_cache_start(dtype, name, engine):
    assert engine(dtype, name).kv_transfer_config.kv_connector == name


def test_every_connector_of_vllm_is_classified():
    known = {*connectors.SUPPORTED, *connectors.REFUSED, "MultiConnector"}
    # ExampleHiddenStatesConnector carries hidden states and no pages.
    assert {*known, "ExampleHiddenStatesConnector"} == set(KVConnectorFactory._registry)


def test_each_child_of_a_multi_connector_is_checked(check):
    def check_all(*names):
        children = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
        check("MultiConnector", kv_connector_extra_config={"connectors": children})

    check_all("NixlConnector", "ExampleConnector")
    with pytest.raises(HybridKVError, match="MooncakeConnector"):
        check_all("NixlConnector", "MooncakeConnector")


def test_the_handshake_cannot_be_disabled(check):
    with pytest.raises(HybridKVError, match="Remove enforce_handshake_compat from its options"):
        check("NixlConnector", kv_connector_extra_config={"enforce_handshake_compat": False})


def test_a_connector_of_another_package_causes_a_warning(check, log):
    check("TheirConnector", kv_connector_module_path="theirs")
    (line,) = log(logging.WARNING)
    assert "The KV connector TheirConnector of theirs is not known to support" in line


def plan(padded_to, layers=2):
    """Make a plan with one group of layers whose pages hold 65,536 bytes and may be padded."""
    spec = FullAttentionSpec(
        block_size=128,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        page_size_padded=padded_to,
    )
    names = [f"layers.{number}" for number in range(layers)]
    return KVCacheConfig(10, [], [KVCacheGroupSpec(names, spec)])


@pytest.mark.parametrize(
    ("boundary_layers", "skipped", "advice"),
    [
        (2, [], "set boundary_layers=0 to quantise the outermost layers, too, or serve the model"),
        (
            0,
            ["3"],
            "remove --kv-cache-dtype-skip-layers to quantise all layers, or serve the model",
        ),
        (0, [], "serve the model"),
    ],
)
def test_padded_pages_are_refused_before_nixl_fails_to_cut_them(
    engine, boundary_layers, skipped, advice
):
    settings = {"boundary_layers": boundary_layers}
    config = engine(settings=settings, kv_cache_dtype_skip_layers=skipped)
    message = (
        r"NixlConnector cannot take pages that are padded, such as those of layer layers\.0, which "
        rf"use 65,536 of 76,800 bytes; {advice} with --kv-cache-dtype auto"
    )
    with pytest.raises(HybridKVError, match=message):
        connectors.check_pages(config, plan(76_800), Settings(**settings))


def test_pages_that_nixl_can_cut_are_accepted(engine):
    config = engine()
    settings = Settings()
    connectors.check_pages(config, plan(None), settings)
    connectors.check_pages(config, plan(65_536), settings)
    # A single layer has its own memory, so NIXL does not cut its pages.
    connectors.check_pages(config, plan(76_800, layers=1), settings)
    for other in (transfer("ExampleConnector"), None):
        config.kv_transfer_config = other
        connectors.check_pages(config, plan(76_800), settings)
