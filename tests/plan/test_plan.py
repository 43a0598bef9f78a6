"""Plans of a tiny run on TPUs and GPUs, compiled ahead of time."""

import dataclasses
import json
import math

import jax
import pytest

from megalodon_jax import chips
from megalodon_jax.cli.main import main
from megalodon_jax.compiled import topologies
from megalodon_jax.compiled.collectives import Collective
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig, load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import check_fits, make_mesh
from megalodon_jax.plan import run as plan_run
from megalodon_jax.plan import sweep as sweep_module
from megalodon_jax.plan.machine import describe_machine
from megalodon_jax.plan.options import PlanOptions
from megalodon_jax.plan.plan import Plan, make_plan
from megalodon_jax.plan.report import format_plan, format_ranking
from megalodon_jax.plan.roofline import make_roofline
from megalodon_jax.plan.sweep import find_meshes, rank, sweep
from megalodon_jax.presets import configs_dir

needs_cuda_compiler = pytest.mark.skipif(
    not topologies.has_cuda_compiler(),
    reason="jax-cuda13-plugin is not installed: pip install -e '.[aot]'",
)
needs_tpu_compiler = pytest.mark.skipif(
    not topologies.has_tpu_compiler(), reason="libtpu is not installed: pip install -e '.[aot]'"
)
# The recurrences of the reference implementations compile soonest.
CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=3, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48,
        cema_ndim=4, chunk_size=16, vocab_size=64, norm_num_groups=4,
        cema_implementation="reference", timestep_norm_implementation="reference",
        attention_implementation="xla",
    ),
    data=DataConfig(batch_size=4, seq_len=64),
    loss_chunk_size=64,
)  # fmt: skip
SMALL_CHIP = chips.Chip(
    name="small",
    memory_bytes=2**24,
    flops_per_second=1e9,
    memory_bytes_per_second=1e9,
    link_bytes_per_second=1e8,
)
TOML = """
loss_chunk_size = 64
[model]
num_layers = 1
model_dim = 32
z_dim = 16
value_dim = 32
num_heads = 2
ffn_hidden_dim = 48
cema_ndim = 4
chunk_size = 16
vocab_size = 64
norm_num_groups = 4
attention_implementation = "xla"
cema_implementation = "reference"
timestep_norm_implementation = "reference"
[data]
batch_size = 4
seq_len = 64
"""


def known(value):
    assert value is not None
    return value


def products_per_token(config):
    """FLOPs per token of all products with weights, forward and backward, from their shapes."""
    params = abstract_model(config.model)[1]
    sizes = [
        math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    return 6 * sum(sizes)


@pytest.fixture(autouse=True, scope="module")
def cpu_is_a_chip():
    """CPU devices stand for a chip: they compile a small step in seconds, TPUs in a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "cpu", SMALL_CHIP)
        yield


@pytest.fixture(scope="module")
def plan(cpu_is_a_chip):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, model=2))
    return make_plan(config, jax.devices()[:4])


@pytest.mark.slow
def test_memory(plan):
    assert plan.fits
    assert (plan.chip, plan.devices, plan.tokens_per_step) == ("small", 4, 256)
    memory = known(plan.memory)
    whole = sum(4 * math.prod(p.shape) for p in jax.tree.leaves(abstract_model(CONFIG.model)[1]))
    # Matrices are sharded over `data`, vectors are not.
    assert whole / 4 < memory.parameters < whole / 2
    assert memory.optimizer == 2 * memory.parameters + 8
    assert memory.parameters + memory.optimizer < memory.arguments <= memory.peak
    assert memory.available == SMALL_CHIP.memory_bytes


def test_flops_of_all_layers(plan):
    # Attention comes on top of the products with weights.
    least = products_per_token(CONFIG)
    assert least < plan.compiled_flops_per_token < 2 * least
    fewer = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
    assert plan.compiled_flops_per_token > 2 * products_per_token(fewer)


def test_collectives_run_over_the_axes_in_use(plan):
    assert {axis for total in plan.collectives for axis in total.axes.split("+")} == {
        "data",
        "model",
    }
    (gathered,) = (
        total for total in plan.collectives if (total.kind, total.axes) == ("all-gather", "data")
    )
    # FSDP: every layer's weights, forward and backward.
    assert gathered.count >= 2 * CONFIG.model.num_layers


def test_report_and_json(plan):
    text = format_plan(plan)
    assert "4 x small" in text
    assert "estimated tokens/s" in text
    assert "cema reference" in text
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@needs_tpu_compiler
@pytest.mark.slow
def test_tpu_kernels_are_compiled():
    model = dataclasses.replace(
        CONFIG.model, num_layers=2, model_dim=256, z_dim=128, value_dim=256, chunk_size=128,
        dtype="bfloat16", cema_implementation=None, timestep_norm_implementation=None,
        attention_implementation=None,
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, model=model, data=DataConfig(batch_size=4, seq_len=1024))
    config = dataclasses.replace(config, mesh=MeshConfig(data=4))
    plan = make_plan(config, topologies.find_devices("v5e:2x2"))
    assert set(plan.implementations) == {"cema", "timestep_norm", "chunk_attention", "rowwise"}
    # Forward and backward in each layer.
    assert plan.implementations["cema"] == "pallas_tpu (4 calls)"
    assert plan.implementations["chunk_attention"] == "pallas_tpu (4 calls)"
    assert plan.implementations["timestep_norm"].startswith("pallas_tpu")
    assert plan.implementations["rowwise"] == "xla"


@needs_cuda_compiler
@pytest.mark.slow
def test_two_h200s_run_the_kernels_on_their_sequence_shards():
    model = dataclasses.replace(
        CONFIG.model, num_layers=1, model_dim=256, z_dim=64, value_dim=256, ffn_hidden_dim=256,
        chunk_size=512, dtype="bfloat16", norm_num_groups=8, cema_implementation=None,
        timestep_norm_implementation=None, attention_implementation=None,
        rowwise_implementation="mosaic_gpu",
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, model=model, data=DataConfig(batch_size=1, seq_len=1024))
    config = dataclasses.replace(config, mesh=MeshConfig(chunk=2))
    plan = make_plan(config, topologies.find_devices("h200:2"))
    assert plan.chip == "h200"
    assert plan.fits
    assert known(plan.roofline).compiler is None
    assert products_per_token(config) < plan.compiled_flops_per_token
    assert known(plan.memory).peak >= known(plan.memory).arguments
    kinds = {name.partition(" ")[0] for name in plan.implementations.values()}
    assert kinds == {"mosaic_gpu"}
    # States of CEMA and of two TimestepNorms, and positions, of which XLA may combine two; and
    # weights, in combined gathers.
    gathers = {total.axes: total for total in plan.collectives if total.kind == "all-gather"}
    assert gathers.keys() == {"chunk"}
    assert gathers["chunk"].count > 3
    # The gradients of the same states and weights.
    scatters = {total.axes: total for total in plan.collectives if total.kind == "reduce-scatter"}
    assert scatters.keys() == {"chunk"}
    assert scatters["chunk"].count > 3
    assert plan.implementations["cema"] == "mosaic_gpu (4 calls)"
    assert plan.implementations["timestep_norm"] == "mosaic_gpu (8 calls)"
    # A kernel that only repairs what another left out has none.
    unstated = "kernels that state no FLOPs, counted as 0: chunk_attention_repair"
    assert [note for note in plan.notes if "FLOPs" in note] in ([], [unstated])


@needs_tpu_compiler
@pytest.mark.slow
def test_a_run_that_does_not_fit_is_a_plan_and_exit_code_1(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(TOML)
    arguments = ["plan", str(tmp_path / "run.toml"), "--topology", "v5e:1x1"]
    # The compiler refuses an embedding of 8 GiB with its moments.
    arguments += ["--model.vocab_size", "67108864", "--json", str(tmp_path / "plan.json")]
    assert main(arguments) == 1
    plan = Plan.from_dict(json.loads((tmp_path / "plan.json").read_text()))
    assert not plan.fits
    assert plan.memory is None
    assert "RESOURCE_EXHAUSTED" in plan.problem
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out
    assert "compiling" in captured.err


@pytest.mark.slow
def test_too_large_for_the_chip(plan, monkeypatch):
    less = dataclasses.replace(SMALL_CHIP, memory_bytes=known(plan.memory).arguments - 1)
    monkeypatch.setitem(chips.CHIPS, "cpu", less)
    small = make_plan(CONFIG, jax.devices()[:1])
    assert not small.fits
    assert small.collectives == ()
    assert f"needs {known(small.memory).peak:,} bytes" in small.problem
    assert "DOES NOT FIT" in format_plan(small)


@pytest.mark.slow
def test_sweep_of_two(monkeypatch, plan):
    monkeypatch.setattr(sweep_module, "_REMAT_POLICIES", ("block",))
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
    lines = []
    plans = sweep(config, jax.devices()[:2], max_candidates=2, progress=lines.append)
    assert {(each.mesh["data"], each.mesh["chunk"]) for each in plans} == {(2, 1), (1, 2)}
    speeds = [known(each.roofline).tokens_per_second_serial for each in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert sum("candidate" in line for line in lines) == 2
    misfit = dataclasses.replace(plan, fits=False, roofline=None, problem="too large")
    assert rank([misfit, plans[0]]) == [plans[0], misfit]
    assert "does not fit" in format_ranking([plans[0], misfit])


@needs_tpu_compiler
def test_meshes_that_cannot_hold_the_weights_are_not_tried():
    config = load_config(configs_dir() / "paper_7b.toml")
    meshes = find_meshes(config, topologies.find_devices("v5e:16x16"))
    assert meshes[0] == MeshConfig(data=128, chunk=2)
    # 16 bytes for each of 7.4e9 weights on 16 GiB.
    assert all(mesh.data * mesh.model >= 7 for mesh in meshes)
    assert all(mesh.model <= 4 for mesh in meshes)
    with pytest.raises(ConfigError, match="no mesh of 1 devices suits this run"):
        find_meshes(config, topologies.find_devices("v5e:1x1"))


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("name", "sizes", "count", "rates"),
    [
        # The whole of a 16 x 16 torus: two links of 50 GB/s in each dimension.
        ("v5e:16x16", {"data": 256}, 256, {"data": 200e9}),
        ("v5p:4x4x8", {"data": 128}, 128, {"data": 600e9}),
        # `model` takes one dimension of 4, which is a ring.
        ("v5p:4x4x8", {"data": 32, "model": 4}, 128, {"data": 400e9, "model": 200e9}),
        # Four by four is no ring on v6e.
        ("v6e:4x4", {"data": 4, "model": 4}, 16, {"data": 100e9, "model": 100e9}),
        # A JAX device is a whole chip on v4, and half a chip on tpu7x.
        ("v4:2x2x1", {"data": 4}, 4, {"data": 100e9}),
        ("tpu7x:2x2x1", {"data": 8}, 8, {"data": 100e9}),
    ],
)
def test_links(name, sizes, count, rates):
    devices = topologies.find_devices(name)
    assert len(devices) == count
    machine = describe_machine(make_mesh(MeshConfig(**sizes), devices))
    assert machine.chip.name == name.partition(":")[0]
    assert {axis: machine.link_bytes_per_second([axis]) for axis in rates} == rates


@needs_tpu_compiler
def test_several_slices():
    devices = topologies.find_devices("v5p:2x2x2x2slices")
    machine = describe_machine(make_mesh(MeshConfig(replica=2, data=8), devices))
    assert (machine.num_slices(["replica"]), machine.num_slices(["data"])) == (2, 1)
    gradient = Collective("all-reduce", ("replica", "data"), 16, 1600, 1, "")
    estimate = make_roofline(
        machine, flops=1, hbm_bytes=1, collectives=[gradient], cycles=0, tokens=1
    )
    # Inside a slice 2 * 7/8 of the bytes; over the network an eighth there and back.
    assert estimate.links["replica+data"] == pytest.approx(2 * 7 / 8 * 1600 / 300e9)
    assert estimate.network == pytest.approx(200 / 6.25e9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"no topology 'v9:2x2'; there are: v4:2x2x1"),
        ("v5e", "no topology 'v5e'"),
        ("v5e:2x2x2", "v5e is a torus of 2 dimensions"),
        ("h200:16", "h200:1 to h200:8"),
        ("h100:9", "h100:1 to h100:8"),
        ("h100:2x2slices", "GPUs are those of one host"),
        ("a100-80gb:1", "no topology 'a100-80gb:1'; there are: v4:2x2x1"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(ConfigError, match=message):
        topologies.find_devices(name)


def test_missing_compilers(monkeypatch):
    monkeypatch.setattr(topologies, "has_tpu_compiler", lambda: False)
    topologies.tpu_devices.cache_clear()
    with pytest.raises(ConfigError, match=r"libtpu, is not installed: pip install -e '\.\[aot\]'"):
        topologies.find_devices("v5e:2x4")


@needs_cuda_compiler
def test_hosts_of_h100s():
    devices = topologies.find_devices("h100:8")
    assert {device.device_kind for device in devices} == {"NVIDIA H100 80GB HBM3"}
    machine = describe_machine(make_mesh(MeshConfig(data=8), devices))
    h200 = describe_machine(make_mesh(MeshConfig(), topologies.find_devices("h200:1")))
    assert machine.chip.name == "h100"
    assert machine.mesh.size == 8
    # The H200 is an H100 with another memory.
    assert machine.flops_per_second == h200.flops_per_second
    assert machine.memory_bytes < h200.memory_bytes
    assert machine.memory_bytes_per_second < h200.memory_bytes_per_second
    assert machine.link_bytes_per_second(["data"]) == h200.link_bytes_per_second(["data"])


def test_without_a_mesh_the_simplest_is_taken():
    lines = []
    config = plan_run._with_mesh(CONFIG, jax.devices()[:4], lines.append)
    assert config.mesh == MeshConfig(data=4)
    assert lines == [
        "no mesh given for 4 devices; taking --mesh.replica 1 --mesh.data 4 --mesh.chunk 1 "
        "--mesh.model 1"
    ]
    own = dataclasses.replace(CONFIG, mesh=MeshConfig(model=2))
    assert plan_run._with_mesh(own, jax.devices()[:4], lines.append) == own


def test_command_line_errors(capsys):
    assert main(["plan", "--topology", "v5e:2x2"]) == 2
    assert "no config given" in capsys.readouterr().err
    assert main(["plan", "first_run"]) == 2
    assert "no topology given" in capsys.readouterr().err
    assert main(["plan", "first_run", "--topology", "v5e:2x2", "--mesh.dada", "2"]) == 2
    with pytest.raises(ConfigError, match="no topology given; name one with --topology"):
        plan_run.run(PlanOptions(), CONFIG)


@pytest.mark.parametrize("path", sorted((configs_dir() / "pods").glob("*.toml")), ids=str)
def test_shipped_pods_are_the_papers_run(path):
    config, paper = load_config(path), load_config(configs_dir() / "paper_7b.toml")
    sizes = dataclasses.asdict(config.mesh)
    assert math.prod(sizes.values()) == int(path.stem.split("_")[1])
    check_fits(config, sizes)
    same = dataclasses.replace(config, mesh=paper.mesh, run_dir=paper.run_dir, model=paper.model)
    assert same == paper
    assert dataclasses.replace(config.model, remat=paper.model.remat) == paper.model
