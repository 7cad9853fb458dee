"""What the operators of a served model were given and gave, held against both kinds of scales.

`watch` and `compare` run in a worker, by the `apply_model` of vLLM. Compiled graphs call operators
too; a CUDA graph that is replayed does not.
"""

import torch

NAMES = ("linear", "norm_linear", "latent_linear", "silu_mul_linear", "experts")
_calls: dict = {}
_originals: dict = {}


def watch(model: torch.nn.Module) -> None:
    """Record calls from now on, copies of what changes."""
    from vllm_ue8m0 import dispatch

    device = next(model.parameters()).device.type
    _calls.clear()
    for name in NAMES:
        backend = dispatch.choose("experts" if name == "experts" else "linear", device).load()
        _originals[backend, name] = getattr(backend, name)
        setattr(backend, name, _recording(name, getattr(backend, name)))


def _recording(name, operator):
    def record(x, *args, **kwargs):
        given, kept, called = x.clone(), args, name
        if name == "experts":
            kept = [a.clone() if i in (6, 7) else a for i, a in enumerate(args)]
        # Of what is before a layer, only how its result is quantized is compared.
        if name == "norm_linear":
            shared, factor = args[10:] or (None, 1.0)
            summed = x if shared is None else x * factor + shared
            called += "" if shared is None else " of experts"
            given, kept = _normed(summed, *args[:3]), args[4:10]
        elif name == "latent_linear":
            given, kept = _normed(x[:, : len(args[0])], *args[:2]), args[4:]
        elif name == "silu_mul_linear":
            given = _activated(x)
        result = operator(x, *args, **kwargs)
        product = result[0] if isinstance(result, list) else result
        call = called, given, list(kept), product.clone()
        _calls.setdefault(kept[0].data_ptr(), []).append(call)
        return result

    return record


def _normed(x, weight, eps, residual=None):
    from vllm_ue8m0 import dispatch

    norms = dispatch.choose("add_rms_norm", x.device.type).load()
    return norms.add_rms_norm(x, weight, eps, residual)[0]


def _activated(gate_up):
    if gate_up.device.type == "cpu":
        from vllm_ue8m0.reference import silu_mul
    else:
        from vllm_ue8m0.portable.quant import silu_mul
    return silu_mul(gate_up)


def compare(model: torch.nn.Module) -> dict:
    """{layer: [(operator, rows, {"ue8m0": calc_diff, "fp32": calc_diff})]}, the method's layers.

    To plain torch with activation scales of either kind; a layer without a call has no entry.
    """
    for (backend, name), original in _originals.items():
        setattr(backend, name, original)
    _originals.clear()
    found = {}
    for layer, module in model.named_modules():
        if not type(getattr(module, "quant_method", None)).__name__.startswith("Ue8m0"):
            continue
        weight = module.w13_weight if hasattr(module, "w13_weight") else module.weight
        calls = _calls.get(weight.data_ptr(), [])
        found[layer] = [(name, len(x), _diffs(name, x, *call)) for name, x, *call in calls]
    _calls.clear()
    return found


def _diffs(name, x, args, result):
    from vllm_ue8m0 import reference
    from vllm_ue8m0.agreement import calc_diff

    operator, diffs = reference.experts if name == "experts" else reference.linear, {}
    at = 10 if name == "experts" else 5  # activation_scale, of what follows x
    if name != "experts":  # a float32 result: rounded too, a large value would be a bf16 step away
        x = x.float()
    for scale in ("ue8m0", "fp32"):
        args[at] = scale
        wanted = operator(x, *args)
        diffs[scale] = float(calc_diff(*(t.flatten().float() for t in (wanted, result))))
    return diffs
