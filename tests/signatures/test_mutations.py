"""That a release which differs is seen: mutations of a real file, and small sources."""

import pytest

from tools.signatures.check import mismatch, override_mismatch, parse, problems
from tools.signatures.libraries import TRITON, VLLM
from tools.signatures.uses import Call, Object
from tools.signatures.walk import walk_texts

FOUND = VLLM.found()
NAMES = VLLM.load(VLLM.releases()[-1])
MOE = "vllm.model_executor.layers.fused_moe"
LINEAR = "vllm.model_executor.layers.linear"
EXPERTS = f"{MOE}.modular_kernel.FusedMoEExpertsModular"
QUANT_CONFIG = f"{MOE}.config.FusedMoEQuantConfig"
REPLACE = "vllm.model_executor.utils.replace_parameter"

MUTATIONS = {
    "a name that is imported goes": ("vllm.logger.init_logger", None, "has no vllm.logger"),
    "a lazy name goes": (f"{LINEAR}.LinearBase", None, f"has no {LINEAR}.LinearBase"),
    "a module goes": ("vllm.utils.import_utils", None, "has no vllm.utils.import_utils"),
    "a member of an enum goes": (f"{MOE}.activation.MoEActivation.SILU", None, "SILU"),
    "an attribute of an object goes": (f"{MOE}.RoutedExperts.expert_map", None, "expert_map"),
    "a field that we set goes": ("vllm.engine.arg_utils.EngineArgs.max_logprobs", None, "has no"),
    "an attribute that we inherit goes": (f"{EXPERTS}.w1_scale", None, "w1_scale"),
    "what vLLM reads of ours goes": (f"{MOE}.FusedMoEMethodBase.moe_kernel", None, "moe_kernel"),
    "a keyword is renamed": (
        f"{MOE}.config.fp8_w8a16_moe_quant_config",
        "def (w1_scale, w2_scale, block=...)",
        "unexpected keyword argument 'block_shape'",
    ),
    "an argument is added": (REPLACE, "def (layer, name, new, how)", "'how'"),
    "an argument becomes a keyword": (REPLACE, "def (layer, name, *, new)", "too many positional"),
    "a method's argument is added": (
        f"{MOE}.modular_kernel.FusedMoEKernel.apply",
        NAMES[f"{MOE}.modular_kernel.FusedMoEKernel.apply"].replace("self,", "self, stream,"),
        "missing a required argument: 'stream'",
    ),
    "a constructor's argument is added": (
        "vllm.model_executor.parameter.ModelWeightParameter.__init__",
        "def (self, output_dim, *, input_dim, data, weight_loader, tp)",
        "missing a required",
    ),
    "a base class's constructor changes": (
        f"{MOE}.FusedMoEMethodBase.__init__",
        "def (self, moe, layer)",
        "'layer'",
    ),
    "a hook's argument is renamed": (
        f"{LINEAR}.LinearMethodBase.apply",
        "abstract def (self, layer, input, bias=...)",
        "takes 'input' as 'x'",
    ),
    "a hook gets one more": (
        f"{EXPERTS}.workspace_shapes",
        NAMES[f"{EXPERTS}.workspace_shapes"].replace(")", ", alignment)"),
        "Ue8m0Experts.workspace_shapes",
    ),
    "a hook of a class that extends another of ours gets one more": (
        f"{EXPERTS}.workspace_shapes",
        NAMES[f"{EXPERTS}.workspace_shapes"].replace(")", ", alignment)"),
        "Ue8m0BatchedExperts.workspace_shapes",
    ),
    "a hook that such a class only inherits gets one more": (
        f"{EXPERTS}._supports_activation",
        NAMES[f"{EXPERTS}._supports_activation"].replace(")", ", device)"),
        "Ue8m0BatchedExperts._supports_activation",
    ),
    "an argument's attribute goes": (
        f"{MOE}.modular_kernel.ExpertTokensMetadata.expert_num_tokens",
        None,
        "expert_num_tokens",
    ),
    "a hook's optional argument changes place": (
        "vllm.model_executor.layers.quantization.base_config"
        ".QuantizationConfig.override_quantization_method",
        "class def (cls, hf_quant_cfg, hf_config=..., user_quant=...)",
        "takes 'hf_config' as 'user_quant'",
    ),
    "a hook becomes a property": (
        f"{EXPERTS}.finalize_weight_and_reduce_impl",
        "abstract property",
        "one is called",
    ),
    "a property becomes a method": (
        f"{MOE}.FusedMoEMethodBase.supports_eplb",
        "def (self)",
        "one is called",
    ),
    "a hook is added": (
        f"{EXPERTS}._supports_streams",
        "abstract static def ()",
        "Ue8m0Experts lacks _supports_streams",
    ),
    "objects are frozen": (QUANT_CONFIG, "frozen class", "attaches an attribute"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_mutation_of_a_release_is_seen(what):
    path, text, expected = MUTATIONS[what]
    assert text is None or NAMES.get(path) != text
    lines = problems(FOUND, "vllm X", {**NAMES, path: text})
    assert lines and all("vllm X" in line for line in lines)
    assert any(expected in line for line in lines), lines


def test_file_that_does_not_know_a_name_or_a_base_class_has_to_be_made_anew():
    names = {path: text for path, text in NAMES.items() if path != REPLACE}
    lines = problems(FOUND, "vllm X", names)
    assert any(f"not say whether there is {REPLACE}: python -m tools" in line for line in lines)
    names = {**NAMES, f"{LINEAR}.LinearMethodBase": "class"}
    (line,) = problems(FOUND, "vllm X", names)
    assert f"does not say which members {LINEAR}.LinearMethodBase has" in line


def test_class_may_leave_its_constructor_to_python():
    path = "vllm.model_executor.layers.quantization.base_config.QuantizationConfig.__init__"
    assert problems(FOUND, "vllm X", {**NAMES, path: None}) == []
    assert problems(FOUND, "vllm X", {**NAMES, path: "def (self, more)"}) != []


def test_one_alternative_is_enough_and_a_stub_is_none():
    found, names = TRITON.found(), TRITON.load("3.9.0")
    tma = "triton.experimental.gluon.language.nvidia.hopper.tma"
    assert names[f"{tma}.async_copy_global_to_shared"].startswith("removed ")
    lines = problems(found, "triton X", {**names, f"{tma}.async_load": None})
    assert any(f"no {tma}.async_load and no" in line for line in lines)
    lines = problems(found, "triton X", {**names, f"{tma}.async_load": "def (desc, coord)"})
    assert any("decode_gemm.py" in line and "too many positional" in line for line in lines)


SOURCE = {
    "ours/compat.py": """
from lib.names import old
try:
    from lib.new import thing
except ImportError:
    from lib.old import thing
""",
    "ours/user.py": """
from . import compat
from .compat import thing
def run(x):
    x.fine(1)
    x.ours_own(1)
    thing(1, size=2)
    compat.old(*x)
""",
}
LIB = {
    "lib.names": "module",
    "lib.names.old": "def (a, b)",
    "lib.new.thing": "def (a, size)",
    "lib.old.thing": None,
    "lib.Thing": "class",
    "lib.Thing.fine": "def (self, a)",
}


def small(**changes):
    objects = {"ours/user.py": {"x": Object("lib.Thing", ours=("ours_",))}}
    names = {**LIB, **{key.replace("__", "."): text for key, text in changes.items()}}
    return [
        line.partition(": ")[2]
        for line in problems(walk_texts("lib", SOURCE, objects), "lib 1", names)
    ]


def test_alternative_imports():
    assert small() == []
    assert small(lib__new__thing=None, lib__old__thing="def (a, size=...)") == []
    assert set(small(lib__new__thing=None)) == {"lib 1 has no lib.new.thing and no lib.old.thing"}
    # the one that is imported is the one that is called
    (line,) = small(lib__new__thing="def (a)", lib__old__thing="def (a, size)")
    assert "calls lib.new.thing(..., size=...); lib 1 has def (a)" in line


def test_name_that_is_two_things_is_refused():
    source = "def f():\n from lib.a import x\ndef g():\n from lib.b import x\n x()"
    with pytest.raises(ValueError, match=r"x is lib\.b\.x here and lib\.a\.x elsewhere"):
        walk_texts("lib", {"ours.py": source}, {})


def test_calls_through_objects_bring_self():
    assert small(lib__Thing__fine="class def (cls, a)") == []
    assert small(lib__Thing__fine="static def (a)") == []
    assert small(lib__Thing__fine="def (a)") != []
    assert small(lib__Thing__fine="static def (self, a)") != []


def test_star_arguments_may_be_any_number():
    assert small(lib__names__old="def (a, b, c, d)") == []
    assert mismatch(Call(3), parse("def (a, b)")) == "too many positional arguments"
    assert mismatch(Call(1, ("b",), star_star=True), parse("def (a, b, c)")) is None
    assert mismatch(Call(1, ("z",), star_star=True), parse("def (a, b, c)")) is not None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("def (self, a, b=...)", "def (self, a)"),
        ("def (self, a, *rest, **more)", "def (self, a, *args, **kwargs)"),
        ("static def (a)", "abstract class def (cls, a)"),
        ("class def (cls)", "def (self)"),
        ("property", "abstract property"),
        ("attribute", "property"),
        ("def (self, a, **more)", "def (self, a, *, b=...)"),
    ],
)
def test_overrides_that_fit(ours, theirs):
    assert override_mismatch(ours, theirs) is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("def (self, a, b)", "def (self, a)"),
        ("def (self, a, b)", "def (self, a, b=...)"),
        ("def (self, a)", "def (self, a, b=...)"),
        ("def (self, a, **more)", "def (self, a, b=...)"),
        ("def (self, b, a)", "def (self, a, b)"),
        ("def (self, a, *rest)", "def (self, a, b)"),
        ("def (self, a)", "def (self, a, **kwargs)"),
        ("def (self)", "property"),
    ],
)
def test_overrides_that_do_not_fit(ours, theirs):
    assert override_mismatch(ours, theirs) is not None
