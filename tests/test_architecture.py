"""The dependency rules of docs/design.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vllm_ue8m0"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    # Peers are vLLM's kernels, timed beside ours; nothing that serves imports them. The others
    # are programs that run vLLM as its users do.
    "vllm": {
        "plugin/compat.py",
        "bench/*peers.py",
        "bench/e2e_engine.py",
        "evaluate/recorder.py",
        "start.py",
    },
    "triton": {"portable/*", "kernels/*"},
    # Backends are loaded by name.
    "vllm_ue8m0.sm90": {"sm90/*"},
    "vllm_ue8m0.sm100": {"sm100/*"},
    "vllm_ue8m0.plugin": {"plugin/*"},
    "vllm_ue8m0.cli": set(),
    "vllm_ue8m0.bench": {"bench/*", "cli.py", "cli_bench.py"},
    "matplotlib": {"pictures.py"},
}


def imports(path):
    """Absolute names of every module that a file imports, at any depth."""
    package = ("vllm_ue8m0", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    for name in imports(path):
        for target, allowed in MAY_IMPORT.items():
            if name == target or name.startswith(f"{target}."):
                assert any(relative.match(pattern) for pattern in allowed), (
                    f"{relative} imports {name}; only {sorted(allowed)} may"
                )


def test_rules_see_something():
    assert "vllm.logger" in set(imports(PACKAGE / "plugin/compat.py"))
    assert any(name.startswith("triton") for name in imports(PACKAGE / "kernels/gemm.py"))
    assert "vllm_ue8m0.formats" in set(imports(PACKAGE / "plugin/config.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


# Kernels without a product of floats, which could be fused with a sum.
NO_PRODUCTS = {
    "_combine_kernel", "_copy_kernel", "_count_kernel", "_empty_kernel", "_place_kernel",
    "_sum_parts_kernel", "_tiles_kernel",
}  # fmt: skip


def test_products_are_fused_with_sums_whatever_tritons_default():
    """A choice of its own for every kernel that multiplies and adds."""
    fused, apart, others = set(), set(), set()
    for path in sorted(PACKAGE.glob("kernels/*.py")):
        if path.stem == "replay":  # launches what the others describe
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Subscript):  # kernel[grid](...)
                kernel = node.func.value
            elif ast.unparse(node.func) == "Launch":  # Launch(kernel, grid, ...)
                kernel = node.args[0]
            else:
                continue
            options = {ast.unparse(k.value) for k in node.keywords if k.arg is None}
            chosen = fused if "FMA" in options else apart if "NO_FMA" in options else others
            chosen.add(ast.unparse(kernel))
    assert len(fused) > 10 and others == NO_PRODUCTS and apart == {"_rotary_kernel"}


def test_files_of_tests_have_names_of_their_own():
    """Without packages pytest imports them by name: of two, whichever is collected second fails."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))
