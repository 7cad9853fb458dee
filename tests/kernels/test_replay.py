"""A launch that is replayed is the one Triton would make; in a process without the interpreter."""

from functools import cache

import pytest
from offline_compiler import report, target

pytest.importorskip("triton")


@cache
def results():
    return report(__file__)


def test_replayed_launches_are_tritons():
    """Same compiled kernel, grid and arguments, for every operator and kind of argument."""
    assert results()["wrong"] == "none"


def test_most_launches_of_equal_layers_are_replayed():
    assert results()["replayed"] == "every second one"


@pytest.mark.parametrize("kind", ["alignment", "rows", "strides", "dtype", "value"])
def test_other_kinds_are_asked_for_anew(kind):
    assert results()[kind] == "asked"


def test_nothing_is_replayed_while_off_or_where_tensors_begin_together():
    assert results()["off"] == "asked"
    assert results()["together"] == "asked"
    assert results()["the same twice"] == "replayed"
    assert results()["then two"] == "asked"
    assert results()["given"] == "True"


def test_tensors_are_not_kept():
    assert results()["alive"] == "none"


def test_a_tensor_that_was_not_given_is_refused():
    assert "w is no tensor" in results()["foreign"]


def test_kinds_kept_are_bounded():
    assert results()["kept"] == "at most MOST"
    assert results()["newest"] == "{'replayed'}"


class Compiled:
    """In place of a compiled kernel; notes what it is launched with."""

    def __init__(self, launched) -> None:
        self.launched, self.function, self.packed_metadata = launched, 0, ()

    def launch_metadata(self, *unused):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        self.launched.append((self, (x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, 0, 0, (), None, None, None, *arguments)


def fake_gpu(launched, asked):
    """Triton as on a GPU of sm_90, which compiles and launches nothing."""
    import triton
    from triton.runtime.jit import JITFunction

    target(90)
    driver = type(triton.runtime.driver.active)
    driver.get_current_device = staticmethod(lambda: 0)
    driver.get_current_stream = staticmethod(lambda device: 0)

    def compile_it(self, key, signature, device, *rest):
        kernel = Compiled(launched)
        self.device_caches[device][0][key] = kernel
        return kernel

    run = JITFunction.run

    def noted(self, *arguments, **options):
        asked.append(self)
        return run(self, *arguments, **options)

    JITFunction._do_compile, JITFunction.run = compile_it, noted


def same(got, want) -> bool:
    import torch

    (kernel, grid, arguments), (other, other_grid, others) = got, want
    return kernel is other and grid == other_grid and len(arguments) == len(others) and all(
        a.data_ptr() == b.data_ptr() if isinstance(a, torch.Tensor)
        else vars(a) | {"base": a.base.data_ptr()} == vars(b) | {"base": b.base.data_ptr()}
        if hasattr(a, "block_shape") else a is b or a == b
        for a, b in zip(arguments, others, strict=True)
    )  # fmt: skip


def check_every_operator(launched, asked) -> None:
    import importlib
    import os
    import pkgutil

    import torch

    from vllm_ue8m0 import kernels, portable, sm90, sm100
    from vllm_ue8m0.kernels import hopper_config, replay

    wrong, again = [], []
    scratch = torch.empty(1 << 22)
    replay._scratch = lambda size, like: scratch[:size]

    def checked(launch):
        def call(*arguments, **options):
            launched.clear()
            before = len(asked)
            launch(*arguments, **options)
            again.append(len(asked) == before)
            got = launched.pop()
            os.environ["VLLM_BATCH_INVARIANT"] = "1"  # is the callers' to look at
            what = launch.__wrapped__(*arguments, **options)
            del os.environ["VLLM_BATCH_INVARIANT"]
            filled = [scratch[: v.size] if isinstance(v, replay.Scratch) else v for v in what.args]
            what.kernel[what.grid](*filled, **what.options)
            if not same(got, launched.pop()):
                wrong.append(what.kernel.fn.__name__)

        return call

    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", "") == module.__name__ and hasattr(value, "known"):
                setattr(module, name, checked(value))
        if hasattr(module, "dependent_launch"):
            module.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}
    experts = importlib.import_module("vllm_ue8m0.sm90.experts")
    products = importlib.import_module("vllm_ue8m0.sm90.products")
    for module in (experts, products):
        module.counters = lambda w, count: torch.zeros(max(count, 64), dtype=torch.int32)
        module.device_of = lambda index: ("a GPU", 132)
    hopper_config.device_of = lambda index: ("a GPU", 132)

    for backend in (sm90, sm100, portable):
        for case in cases(backend):
            for _ in range(2):
                case()
    print("wrong:", " ".join(sorted(set(wrong))) or "none", flush=True)
    every = len(again) > 200 and sum(again) >= len(again) / 2
    print("replayed:", "every second one" if every else f"{sum(again)} of {len(again)}")


def cases(backend):
    """Calls with new tensors each time."""
    from itertools import product

    import torch

    def empty(*shape, dtype="bf16"):
        dtypes = {"u8": torch.uint8, "f32": torch.float32, "bf16": torch.bfloat16}
        dtypes |= {"i32": torch.int32, "i64": torch.int64, "e4m3": torch.float8_e4m3fn}
        return torch.empty(*shape, dtype=dtypes[dtype])

    def activations(M, K, offset):
        return torch.empty(M * K + 8, dtype=torch.bfloat16)[offset : offset + M * K].view(M, K)

    gran = (128, 128)
    for M, offset, kind in product((1, 16, 40, 65, 300), (0, 1), ("ue8m0", "fp32", "none")):

        def weight(N, K, *leading, kind=kind):
            sf = empty(
                *leading, -(-N // 128), -(-K // 128), dtype="f32" if kind == "fp32" else "u8"
            )
            return empty(*leading, N, K, dtype="e4m3"), sf

        for (N, K), extra in product(((384, 256), (200, 528)), (False, True)):

            def dense(M=M, N=N, K=K, offset=offset, kind=kind, extra=extra, weight=weight):
                c = empty(-(-N // 128), dtype="f32") if extra else None
                rest = *weight(N, K), c, empty(N) if extra else None, gran, kind
                x = activations(M, K, offset)
                backend.linear(x, *rest)
                residual = activations(M, K, offset) if extra else None
                if kind != "none":
                    backend.norm_linear(x, empty(K), 1e-6, residual, extra, *rest)
                    both = activations(M, K, offset), 2.5
                    backend.norm_linear(x, empty(K), 1e-6, residual, extra, *rest, *both)
                    backend.silu_mul_linear(activations(M, 2 * K, offset), *rest)
                    rows = activations(M, K + 160 + 32 * extra, offset)
                    backend.latent_linear(rows, empty(K), 1e-6, empty(160), 1e-6, *rest)

            yield dense

        for E, topk, on_input, mapped in ((16, 2, False, False), (4, 1, True, True)):

            def routed(
                M=M, E=E, topk=topk, on_input=on_input, mapped=mapped, kind=kind, offset=offset,
                weight=weight,
            ):  # fmt: skip
                (w13, sf13), (w2, sf2) = weight(512, 384, E), weight(384, 256, E)
                ids = torch.zeros(M, topk, dtype=torch.int64 if mapped else torch.int32)
                backend.experts(
                    activations(M, 384, offset), w13, sf13, None, w2, sf2, None,
                    empty(M, topk, dtype="f32"), ids, gran, gran, kind, on_input,
                    torch.zeros(2 * E, dtype=torch.int32) if mapped else None,
                )  # fmt: skip

            yield routed

        def batched(M=M, kind=kind, weight=weight):
            (w13, sf13), (w2, sf2) = weight(512, 384, 4), weight(384, 256, 4)
            backend.batched_experts(
                empty(4, M, 384), w13, sf13, None, w2, sf2, None,
                torch.zeros(4, dtype=torch.int32), gran, gran, kind,
            )  # fmt: skip

        yield batched


def check_kinds(launched, asked) -> None:
    import gc
    import weakref

    import torch
    import triton

    from vllm_ue8m0.kernels import replay
    from vllm_ue8m0.kernels.replay import Launch, replayed

    @triton.jit
    def _kernel(x, w, n, stride):
        pass

    @replayed
    def launch(x, w, n):
        return Launch(_kernel, (1,), x, w.view(torch.uint8), n, x.stride(0))

    def asks(*arguments) -> str:
        before = len(asked)
        launch(*arguments)
        return "asked" if len(asked) > before else "replayed"

    def x(offset=0, rows=4, step=1, dtype=torch.float32):
        return torch.empty(1000, dtype=dtype)[offset : offset + 40 * rows].view(rows, 40)[:, ::step]

    w = torch.empty(9, dtype=torch.int8)
    assert (asks(x(), w, 1), asks(x(), w, 1)) == ("asked", "replayed")
    print("alignment:", asks(x(offset=1), w, 1))
    print("rows:", asks(x(rows=5), w, 1))
    print("strides:", asks(torch.empty(4, 44)[:, :40], w, 1))
    print("dtype:", asks(x(dtype=torch.int32), w, 1))
    print("value:", asks(x(), w, 2))
    with replay.off():
        print("off:", asks(x(), w, 1))
    assert asks(x(), w, 1) == "replayed"
    both = torch.empty(4, 40)
    asks(both, both.view(-1), 3)
    print("together:", asks(both, both.view(-1), 3))
    twice = torch.empty(4, 40)
    asks(twice, twice, 3)
    print("the same twice:", asks(twice, twice, 3))
    print("then two:", asks(twice, torch.empty(4, 40), 3))

    @replayed
    def plain(x, y):
        return Launch(_kernel, (1,), x, y, 1, 1)

    plain(twice, twice)
    plain(twice, both)
    plain(twice, both)
    given = [arguments[:2] for _, _, arguments in launched[-3:]]
    wanted = [(twice, twice), (twice, both), (twice, both)]
    print("given:", all(x is a and y is b for (x, y), (a, b) in zip(given, wanted, strict=True)))
    launched.clear()
    tensor = x(rows=7)
    launch(tensor, w, 1)
    launched.clear()
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    print("alive:", "none" if alive() is None else "a tensor")

    @replayed
    def foreign(x):
        return Launch(_kernel, (1,), x, torch.empty(3), 1, 1)

    try:
        foreign(x())
    except AssertionError as error:
        print("foreign:", error)
    replay.MOST = 40
    for n in range(replay.MOST + 10):
        launch(x(), w, n)
        launched.clear()
    newest = [asks(x(), w, n) for n in range(replay.MOST + 9, replay.MOST, -1)]
    print("newest:", set(newest))
    print("kept:", "at most MOST" if 0 < len(launch.known) <= replay.MOST else len(launch.known))


if __name__ == "__main__":
    launched, asked = [], []
    fake_gpu(launched, asked)
    check_kinds(launched, asked)
    check_every_operator(launched, asked)
