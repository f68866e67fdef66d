"""The house's rules: dependencies run downwards only, files stay small, no word is said twice."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
from rooms import PACKAGE, PICTURE, ROOMS, draw, imports_of, module_of, room_of

FILES = sorted(PACKAGE.rglob("*.py"))
LARGEST_FUNCTION = 60  # without signature and docstring
LINES = {
    "files": 300, "config": 1_450, "data": 2_875, "model": 1_940, "task": 1_640, "launch": 1_480,
    "parallel": 3_490, "train": 260, "strategy": 6_510, "cost": 1_520, "report": 1_040,
    "run": 1_670, "compare": 2_520, "cli": 555, "__main__": 100,
}  # fmt: skip

# Where strategies are, and what they are called.
STRATEGIES = {
    file: names
    for file in (PACKAGE / "strategy").rglob("*.py")
    if (names := re.findall(r'^    name = "(\w+)"', file.read_text(), re.M))
}


# What torch keeps to itself and we use, by file: an upgrade that takes one away is named by it.
PRIVATE = {
    "cost.memory_tracker": (
        "torch.UntypedStorage._cdata", "torch._C._autograd",
        "torch._C._autograd._top_saved_tensors_default_hooks", "torch._C._current_graph_task_id",
        "torch.distributed._functional_collectives.AsyncCollectiveTensor",
        "torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._pytree.tree_iter",
    ),
    "cost.recorder": ("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",),
    "cost.traffic": (
        "torch._C.DispatchKey", "torch._ops.OpOverload._schema", "torch.library.Library._destroy",
    ),
    "data.augment": ("torch._standard_gamma",),
    "launch.hang_detector": (
        "torch._C._distributed_c10d", "torch._C._distributed_c10d._dump_fr_trace_json",
        "torch.distributed.distributed_c10d._get_default_store",
    ),
    "launch.preemption": ("torch.distributed.distributed_c10d._get_default_store",),
    "launch.rank_processes": (
        "torch.distributed.elastic.multiprocessing.api.MultiprocessContext._pc",
    ),
    "model.initialize": (
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
        "torch.nn.Module._apply",
    ),
    "model.layout": (
        "torch.Tensor._backward_hooks", "torch.nn.Module._buffers",
        "torch.nn.Module._non_persistent_buffers_set", "torch.nn.Module._parameters",
        "torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.instancenorm._InstanceNorm",
    ),
    "parallel.checks.rehearsal": ("torch.nn.Module._parameters",),
    "parallel.checks.unsaved_state": ("torch.nn.Module._non_persistent_buffers_set",),
    "parallel.optimizer": ("torch.optim.Optimizer._optimizer_step_post_hooks",),
    "parallel.fsdp_units": (
        "torch.distributed.distributed_c10d._get_default_store",
        "torch.distributed.fsdp.FSDPModule._get_fsdp_state",
        "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam._unsharded_param",
        "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._fsdp_param_groups",
    ),
    "strategy.fsdp": ("torch.distributed.tensor.placement_types._StridedShard",),
    "strategy.pipeline.schedule": (
        "torch.distributed.pipelining.schedules.ScheduleGPipe._get_pipeline_order",
        "torch.distributed.pipelining.schedules._ComputationType",
    ),
    "strategy.replicate": ("torch.distributed._composable.replicate_with_fsdp.replicate",),
    "strategy.tensor.layers": (
        "torch.Tensor._is_view",
        "torch.distributed.tensor._utils._compute_local_shape_and_global_offset",
        "torch.distributed.tensor.placement_types._StridedShard",
    ),
}  # fmt: skip
# Private names of others: Accelerate, DeepSpeed, Hydra, omegaconf, datasets, the system.
NOT_TORCHS = {"_reset_state", "_return_value", "_get_node", "_fingerprint", "_exit"}
OF_ENGINES = ("strategy.accelerate.", "strategy.deepspeed.")


def test_every_room_has_its_place() -> None:
    assert {room_of(module_of(file)) for file in FILES} - {"__init__"} == set(ROOMS) == set(LINES)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_dependencies_run_downwards(file: Path) -> None:
    """From room to room, types included."""
    room = room_of(module_of(file))
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    assert {name for name in imports_of(file) if room_of(name) not in below} == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Types included: take away what imports nothing, again and again; nothing may be left."""
    modules = {module_of(file): file for file in FILES}
    imports = {name: {*imports_of(file)} & {*modules} for name, file in modules.items()}
    while leaves := {name for name, below in imports.items() if not below & imports.keys()}:
        imports = {name: below for name, below in imports.items() if name not in leaves}
    assert set(imports) == set()


def test_the_picture_of_the_rooms_is_as_they_are() -> None:
    """Otherwise: `make rooms`."""
    assert PICTURE.read_text() == draw()


def test_the_page_on_the_rooms_names_files_that_there_are() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for name in re.findall(r"(?<![\w./])((?:\w+/)*\w+\.(?:py|yaml|svg))\b", page):
        assert any(PACKAGE.rglob(name)) or any(
            (PACKAGE.parent / part / name).exists() for part in ("", "docs")
        ), name


def test_models_import_torch_and_their_layout_alone() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        if file.stem in ("layout", "adapt", "own", "initialize"):  # what is done with models
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                roots = {(name or "").split(".")[0] for name in names}
                theirs = {"transformers", "pathlib", "typing"} if file.stem == "hf" else set()
                assert (
                    roots
                    <= {"torch", "math", "functools", "collections", "dtrain", "__future__"}
                    | theirs
                )
                assert all("distributed" not in (name or "") for name in names)


def test_the_loop_names_no_strategy_and_no_task() -> None:
    # torch's own
    text = (PACKAGE / "train.py").read_text().replace("Tensor", "").replace("tensors", "").lower()
    strategies = {name for names in STRATEGIES.values() for name in names}
    tasks = {file.stem for file in (PACKAGE / "task").glob("*.py")} - {"__init__", "base", "batch"}
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert not [name for name in strategies | tasks if re.search(rf"\b{name}\b", code)]


def test_each_strategy_has_its_yaml_and_its_picture() -> None:
    yamls = {file.stem for file in (PACKAGE.parent / "configs" / "strategy").glob("*.yaml")}
    for file, names in STRATEGIES.items():
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert all(any(yaml.startswith(name) for yaml in yamls) for name in names)
        assert "    " in docstring and "Cost" in docstring and "Source" in docstring, (
            f"{file} lacks its story"
        )


def test_what_is_shown_goes_through_one_door() -> None:
    """`report.terminal.Terminal`, which takes no name for a sequence or for markup."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
                names = {alias.name for alias in node.names}
                assert module_of(file) == "report.terminal" or not names & {"Console", "print"}, (
                    module_of(file)
                )
                assert not (names & {"escape"} or node.module == "rich.markup"), module_of(file)


def test_rooms_and_functions_stay_small() -> None:
    total: Counter[str] = Counter()
    for file in FILES:
        total[room_of(module_of(file))] += file.read_text().count("\n")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[ast.get_docstring(node) is not None and len(node.body) > 1]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= LARGEST_FUNCTION, (
                    f"{module_of(file)}.{node.name} has {length} lines"
                )
    assert {
        room: lines for room, lines in total.items() if room in LINES and lines > LINES[room]
    } == {}


def _private_names(file: Path) -> Iterator[str]:
    """Names with a leading underscore that a file takes from a module or object not its own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name.rpartition(".")[2] for name in names if "._" in name)
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            own = isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")
            if not own and node.attr not in ("_C", *NOT_TORCHS):
                yield node.attr


def test_private_names_of_torch_are_listed() -> None:
    for file in FILES:
        text = file.read_text()
        names = {path.rpartition(".")[2] for path in PRIVATE.get(module_of(file), ())}
        assert {name for name in names if name not in text} == set(), f"{file}: only in the list"
        if not module_of(file).startswith(OF_ENGINES):
            assert set(_private_names(file)) <= names, f"{file}: not in the list"


@pytest.mark.parametrize("path", sorted({path for paths in PRIVATE.values() for path in paths}))
def test_torch_has_the_private_names_that_we_use(path: str) -> None:
    """On a module or class, or, if a class gives it to its instances, in the class's source."""
    owner, _, name = path.rpartition(".")
    place = resolve_name(owner)
    users = ", ".join(module for module, paths in PRIVATE.items() if path in paths)
    assert hasattr(place, name) or name in inspect.getsource(place), f"{users}: no {path}"
