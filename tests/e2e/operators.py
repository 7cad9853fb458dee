"""What the operators of a served model were given and gave, held against both kinds of scales.

`watch` and `compare` run in a worker, by the `apply_model` of vLLM. Compiled graphs call operators
too; a CUDA graph that is replayed does not.
"""

import torch

NAMES = ("linear", "experts")
_calls: dict = {}
_originals: dict = {}


def watch(model: torch.nn.Module) -> None:
    """Record calls from now on, copies of what changes."""
    from vllm_ue8m0 import dispatch

    device = next(model.parameters()).device.type
    _calls.clear()
    for name in NAMES:
        backend = dispatch.choose(name, device).load()
        _originals[backend, name] = getattr(backend, name)
        setattr(backend, name, _recording(name, getattr(backend, name)))


def _recording(name, operator):
    def record(x, *args, **kwargs):
        given = x.clone()
        kept = [a.clone() if name == "experts" and i in (6, 7) else a for i, a in enumerate(args)]
        result = operator(x, *args, **kwargs)
        _calls.setdefault((name, args[0].data_ptr()), []).append((given, kept, result.clone()))
        return result

    return record


def compare(model: torch.nn.Module) -> dict:
    """{layer: [(rows, {"ue8m0": calc_diff, "fp32": calc_diff})]} of every layer of the method.

    To plain torch with activation scales of either kind; a layer without a call has no entry.
    """
    for (backend, name), original in _originals.items():
        setattr(backend, name, original)
    _originals.clear()
    found = {}
    for layer, module in model.named_modules():
        if not type(getattr(module, "quant_method", None)).__name__.startswith("Ue8m0"):
            continue
        name = "experts" if hasattr(module, "w13_weight") else "linear"
        weight = module.w13_weight if name == "experts" else module.weight
        calls = _calls.get((name, weight.data_ptr()), [])
        found[layer] = [(len(call[0]), _diffs(name, *call)) for call in calls]
    _calls.clear()
    return found


def _diffs(name, x, args, result):
    from vllm_ue8m0 import reference
    from vllm_ue8m0.agreement import calc_diff

    operator, diffs = getattr(reference, name), {}
    at = {"linear": 5, "experts": 10}[name]  # activation_scale, of what follows x
    for scale in ("ue8m0", "fp32"):
        args[at] = scale
        wanted = operator(x, *args)
        diffs[scale] = float(calc_diff(*(t.flatten().float() for t in (wanted, result))))
    return diffs
