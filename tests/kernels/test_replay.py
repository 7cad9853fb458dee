"""An operator that is run again launches what it did; in a process without the interpreter."""

from functools import cache

import pytest
from offline_compiler import report, target

pytest.importorskip("triton")


@cache
def results():
    return report(__file__)


def test_runs_are_the_operators():
    """Same compiled kernels, grids, arguments, memory and results, for every operator and kind."""
    assert results()["wrong"] == "none"


@pytest.mark.parametrize(
    ("operator", "again"),
    [
        ("linear", "120 of 120"),
        ("norm_linear", "200 of 240"),  # others add experts' results without quantizing
        ("latent_linear", "80 of 120"),  # without quantizing, the last columns are copied
        ("silu_mul_linear", "120 of 120"),
    ],
)
@pytest.mark.parametrize("backend", ["sm90", "sm100", "portable"])
def test_layers_are_run_again(backend, operator, again):
    assert results()[f"{backend} {operator}"] == again


def test_experts_are_run_again():
    """Sm90's, of tokens that are not weighted before: that copies them."""
    assert results()["sm90 experts"] == "20 of 60"
    assert results()["portable experts"] == "0 of 60"


def test_others_are_run_again():
    assert results()["portable add_rms_norm"] == "30 of 30"
    assert results()["portable rotary_embedding"] == "60 of 60"  # with a cache and without
    assert results()["sm90 gate"] == "12 of 12" and results()["sm90 bmm"] == "6 of 6"


@pytest.mark.parametrize(
    "kind", ["alignment", "rows", "strides", "dtype", "value", "together", "invariant", "operator"]
)
def test_other_kinds_are_run_as_they_are(kind):
    assert results()[kind] == "asked"


@pytest.mark.parametrize("kind", ["off", "sum", "view", "foreign", "foreign counters", "within"])
def test_what_is_not_run_again(kind):
    assert results()[kind] == "asked"


def test_given_tensors_go_where_they_went():
    assert results()["given"] == "right"
    assert results()["counters"] == "right"


def test_errors_are_the_operators():
    assert results()["error"] == "ValueError, then replayed"


def test_tensors_are_not_kept():
    assert results()["alive"] == "none"


def test_kinds_kept_are_bounded():
    assert results()["newest"] == "{'replayed'}"
    assert results()["kept"] == "at most MOST"


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


def described(given, launches, result):
    """Launches and results with memory by number, in the order in which it is first met."""
    import torch

    numbers = {}

    def memory(tensor):
        number = numbers.setdefault(tensor.data_ptr(), len(numbers))
        return "memory", number, tensor.untyped_storage().nbytes()

    def value(argument):
        if isinstance(argument, torch.Tensor):
            return memory(argument)
        if hasattr(argument, "block_shape"):
            return type(argument), memory(argument.base), str(vars(argument) | {"base": None})
        return argument

    for tensor in given:
        memory(tensor)
    found = [(kernel, grid, *map(value, arguments)) for kernel, grid, arguments in launches]
    results = result if isinstance(result, (list, tuple)) else [] if result is None else [result]
    return found, [(memory(t), t.dtype, t.shape, t.stride()) for t in results]


def check_every_operator(launched, asked) -> None:
    import importlib
    import pkgutil
    from collections import Counter

    import torch

    from vllm_ue8m0 import kernels, portable, sm90, sm100
    from vllm_ue8m0.kernels import hopper_config, replay

    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if hasattr(module, "dependent_launch"):
            module.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}
    zeros = {}
    experts = importlib.import_module("vllm_ue8m0.sm90.experts")
    products = importlib.import_module("vllm_ue8m0.sm90.products")
    for module in (experts, products):
        module.counters = replay.lasting(
            lambda w, count: zeros.setdefault(
                (w.data_ptr(), count), torch.zeros(max(count, 64)).int()
            )
        )
        module.device_of = lambda index: ("a GPU", 132)
    hopper_config.device_of = lambda index: ("a GPU", 132)

    wrong, again, every = set(), Counter(), Counter()

    def checked(backend, name, *arguments, **options):
        operator = getattr(backend, name)
        given = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]

        def outcome(run):
            launched.clear()
            asked.clear()
            result = run()
            return described(given, launched, result)

        def ask_triton():
            with replay.off():
                return operator(*arguments, **options)

        wanted = outcome(ask_triton)
        assert wanted[0]
        call = lambda: replay.run(operator, *arguments, **options)  # noqa: E731
        label = f"{backend.__name__.rsplit('.', 1)[-1]} {name}"
        if outcome(call) != wanted or outcome(call) != wanted:
            wrong.add(label)
        every[label] += 1
        again[label] += not asked

    for backend in (sm90, sm100, portable):
        for name, arguments, options in cases(backend):
            owner = portable if name in ("add_rms_norm", "rotary_embedding") else backend
            checked(owner, name, *arguments, **options)
    print("wrong:", " ".join(sorted(wrong)) or "none", flush=True)
    for label, count in every.items():
        print(f"{label}: {again[label]} of {count}")


def cases(backend):
    """(operator, arguments, options)."""
    from itertools import product

    import torch

    def empty(*shape, dtype="bf16"):
        dtypes = {"u8": torch.uint8, "f32": torch.float32, "bf16": torch.bfloat16}
        return torch.empty(*shape, dtype=dtypes.get(dtype) or getattr(torch, dtype))

    def activations(M, K, offset):
        return torch.empty(M * K + 8, dtype=torch.bfloat16)[offset : offset + M * K].view(M, K)

    gran = (128, 128)
    for M, offset, kind in product((1, 16, 40, 65, 300), (0, 1), ("ue8m0", "fp32", "none")):

        def weight(N, K, *leading, kind=kind):
            sf = empty(
                *leading, -(-N // 128), -(-K // 128), dtype="f32" if kind == "fp32" else "u8"
            )
            return empty(*leading, N, K, dtype="float8_e4m3fn"), sf

        for (N, K), extra in product(((384, 256), (200, 528)), (False, True)):
            c = empty(-(-N // 128), dtype="f32") if extra else None
            layer = *weight(N, K), c, empty(N) if extra else None, gran, kind
            x = activations(M, K, offset)
            yield "linear", (x, *layer), {}
            residual = activations(M, K, offset) if extra else None
            norm = empty(K), 1e-6, residual, extra
            yield "norm_linear", (x, *norm, *layer), {}
            yield "norm_linear", (x, *norm, *layer, activations(M, K, offset), 2.5), {}
            yield "silu_mul_linear", (activations(M, 2 * K, offset), *layer), {}
            rows = activations(M, K + 160 + 32 * extra, offset)
            yield "latent_linear", (rows, empty(K), 1e-6, empty(160), 1e-6, *layer), {}
        for E, topk, on_input, mapped in ((16, 2, False, False), (4, 1, True, True)):
            (w13, sf13), (w2, sf2) = weight(512, 384, E), weight(384, 256, E)
            ids = torch.zeros(M, topk, dtype=torch.int64 if mapped else torch.int32)
            arguments = (
                activations(M, 384, offset), w13, sf13, None, w2, sf2, None,
                empty(M, topk, dtype="f32"), ids, gran, gran, kind, on_input,
                torch.zeros(2 * E, dtype=torch.int32) if mapped else None,
            )  # fmt: skip
            yield "experts", arguments, {"out": empty(M, 384)}
        if kind == "none":
            x, residual = activations(M, 7168, offset), activations(M, 7168, offset)
            yield "add_rms_norm", (x, empty(7168), 1e-6, residual), {}
            heads, table = activations(M, 6 * 24, offset).view(M, 6, 24), empty(9, 8)
            arguments = heads, activations(M, 8, offset), torch.zeros(M, dtype=torch.int64), table
            yield "rotary_embedding", arguments, {}
            cache = activations(4 * M, 40, offset).view(2, -1, 40)
            slots = torch.arange(M) - 1
            yield "rotary_embedding", (*arguments, activations(M, 32, offset), cache, slots), {}
        if hasattr(backend, "gate") and kind == "none" and M <= 64:
            for dtype in (torch.bfloat16, torch.float32):
                yield "gate", (activations(M, 1024, 8 * offset), empty(128, 1024), dtype), {}
            queries = activations(M, 3 * 192, 8 * offset).view(M, 3, 192)[..., :128].transpose(0, 1)
            yield "bmm", (queries, empty(3, 64, 128).mT, empty(3, M, 64)), {}


def check_kinds(launched, asked) -> None:
    import gc
    import os
    import weakref

    import torch
    import triton

    from vllm_ue8m0.kernels import replay
    from vllm_ue8m0.kernels.replay import Launch

    @triton.jit
    def _kernel(x, w, out, n, stride):
        pass

    @replay.launched
    def launch(x, w, out, n):
        return Launch(_kernel, (1,), x, w.view(torch.uint8), out, n, x.stride(0))

    def operator(x, w, n):
        out = torch.empty_like(x)
        launch(x, w, out, n)
        return out

    def asks(*arguments, of=operator) -> str:
        before = len(asked)
        replay.run(of, *arguments)
        return "asked" if len(asked) > before else "replayed"

    def x(offset=0, rows=4, step=1, dtype=torch.float32):
        return torch.empty(1000, dtype=dtype)[offset : offset + 40 * rows].view(rows, 40)[:, ::step]

    def again(of, *arguments):
        asks(*arguments, of=of)
        return asks(*arguments, of=of)

    w = torch.empty(9, dtype=torch.int8)
    assert (asks(x(), w, 1), asks(x(), w, 1)) == ("asked", "replayed")
    print("alignment:", asks(x(offset=1), w, 1))
    print("rows:", asks(x(rows=5), w, 1))
    print("strides:", asks(torch.empty(4, 44)[:, :40], w, 1))
    print("dtype:", asks(x(dtype=torch.int32), w, 1))
    print("value:", asks(x(), w, 2))
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    print("invariant:", asks(x(), w, 1))
    del os.environ["VLLM_BATCH_INVARIANT"]
    print("operator:", asks(x(), w, 1, of=lambda *arguments: operator(*arguments)))
    with replay.off():
        print("off:", asks(x(), w, 1))
    assert asks(x(), w, 1) == "replayed"

    both, one = torch.empty(4, 40), torch.empty(4, 40)
    print("together:", again(operator, both, both.view(-1), 3))
    assert again(operator, both, both, 3) == "replayed"
    asks(both, one, 3)
    launched.clear()
    for given in ((both, both), (both, one), (one, both)):
        replay.run(operator, *given, 3)
    found = [tuple(map(torch.Tensor.data_ptr, arguments[:2])) for _, _, arguments in launched]
    wanted = [
        tuple(map(torch.Tensor.data_ptr, g)) for g in ((both, both), (both, one), (one, both))
    ]
    print("given:", "right" if found == wanted else (found, wanted))

    def summed(x, w, n):
        return operator(x + 1, w, n)

    def viewed(x, w, n):
        return operator(x, w, n).view(-1)

    elsewhere = torch.empty(4, 40)

    def foreign(x, w, n):
        return operator(elsewhere, w, n)

    lasting = {}

    @replay.lasting
    def counters(w, count):
        return lasting.setdefault((w.data_ptr(), count), torch.zeros(count))

    def counted(x, w, n):
        return operator(x, counters(w, n), 1)

    def counted_elsewhere(x, w, n):
        return operator(x, counters(elsewhere, n), 1)

    for name, function in (
        ("sum", summed), ("view", viewed), ("foreign", foreign),
        ("foreign counters", counted_elsewhere), ("within", lambda *a: replay.run(summed, *a)),
    ):  # fmt: skip
        print(f"{name}:", again(function, x(), w, 5))
    assert again(counted, x(), w, 7) == "replayed"
    other = torch.empty(9, dtype=torch.int8)
    assert asks(x(), other, 7, of=counted) == "replayed"
    address = launched[-1][2][1].data_ptr()
    right = address == lasting[other.data_ptr(), 7].data_ptr() and len(lasting) == 3
    print("counters:", "right" if right else (address, lasting))

    def fails(x, w, n):
        operator(x, w, n)
        raise ValueError

    try:
        replay.run(fails, x(), w, 1)
    except ValueError as error:
        print(f"error: {type(error).__name__}, then {again(operator, x(), w, 6)}")

    tensor = x(rows=7)
    result = weakref.ref(replay.run(operator, tensor, w, 1))
    launched.clear()
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    print("alive:", "none" if alive() is result() is None else "a tensor")
    replay.MOST = 40
    for n in range(replay.MOST + 10):
        asks(x(), w, n)
        launched.clear()
    while len(replay._kept) > replay.MOST:
        del replay._kept[next(iter(replay._kept))]
    newest = [asks(x(), w, n) for n in range(replay.MOST + 9, replay.MOST, -1)]
    print("newest:", set(newest))
    print("kept:", "at most MOST" if len(replay._kept) <= replay.MOST else len(replay._kept))


if __name__ == "__main__":
    launched, asked = [], []
    fake_gpu(launched, asked)
    check_kinds(launched, asked)
    check_every_operator(launched, asked)
