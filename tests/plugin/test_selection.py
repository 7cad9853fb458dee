"""When the method is chosen, kept out or refused, and what the config class tells vLLM."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm_ue8m0.formats import ConfigError
from vllm_ue8m0.plugin import compat, register
from vllm_ue8m0.plugin.config import Ue8m0Config

CONFIGS = Path(__file__).parents[1] / "fixtures/configs"
SELECTED = ["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.1-terminus"]
REFUSED = ["deepseek-v3.2", "deepseek-v4-flash"]


def ask(name, user_quant, **changes):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    quant = {**config["quantization_config"], **changes}
    hf_config = SimpleNamespace(**{**config, "quantization_config": quant})
    return Ue8m0Config.override_quantization_method(quant, user_quant, hf_config=hf_config)


@pytest.mark.parametrize("name", SELECTED)
def test_selected_only_when_asked_for(name):
    assert ask(name, "ue8m0") == "ue8m0"
    assert ask(name, None) is None
    assert ask(name, "fp8") is None


@pytest.mark.parametrize("name", SELECTED)
def test_own_quant_method_needs_no_flag(name):
    assert ask(name, None, quant_method="ue8m0") == "ue8m0"
    assert ask(name, "fp8", quant_method="ue8m0") is None


@pytest.mark.parametrize("name", REFUSED)
def test_model_trees_of_their_own_are_refused_and_left_alone_unasked(name):
    assert ask(name, None) is None
    with pytest.raises(ConfigError, match="without --quantization ue8m0"):
        ask(name, "ue8m0")


def test_mtp_draft_is_answered_like_its_target():
    config = SimpleNamespace(model_type="deepseek_mtp")
    quant = json.loads((CONFIGS / "deepseek-v3.1.json").read_text())["quantization_config"]
    method = Ue8m0Config.override_quantization_method
    assert method(quant, "ue8m0", hf_config=config) == "ue8m0"
    assert method(quant, None, hf_config=config) is None


def test_incompatible_config_is_refused_before_loading():
    with pytest.raises(ConfigError, match="activation_scheme"):
        ask("deepseek-v3.1", "ue8m0", activation_scheme="static")
    # what --hf-overrides with an incomplete dict leaves behind
    with pytest.raises(ConfigError, match="--additional-config"):
        Ue8m0Config.override_quantization_method({"quant_method": ""}, "ue8m0")


def test_checkpoint_without_quantization_config_names_the_convert_command():
    with pytest.raises(ConfigError, match="vllm-ue8m0 convert"):
        Ue8m0Config()


def test_config_pickles():
    config = Ue8m0Config.from_config({"quant_method": "ue8m0"})
    assert pickle.loads(pickle.dumps(config)).spec == config.spec


def test_float16_is_not_among_the_supported_dtypes():
    import torch

    assert Ue8m0Config.get_supported_act_dtypes() == [torch.bfloat16, torch.float32]


def test_register_twice_keeps_one_name():
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    register()
    register()
    assert QUANTIZATION_METHODS.count("ue8m0") == 1
    assert get_quantization_config("ue8m0") is Ue8m0Config


def test_register_survives_a_broken_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_ue8m0.plugin.config", None)
    register()
    # getting here is the test: an exception would break every vLLM command


@pytest.mark.parametrize(("plugins", "known"), [("ue8m0", True), ("other", False), (None, True)])
def test_entry_point_follows_vllm_plugins(plugins, known):
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as names;"
        "import sys; print('ue8m0' in names, 'triton' in sys.modules)"
    )
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "TRITON_INTERPRET")}
    if plugins:
        env["VLLM_PLUGINS"] = plugins
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.split()[-2] == str(known), out.stderr[-2000:]


def test_version_warning_names_the_range():
    assert compat.version_warning("0.26.0") is None
    assert compat.version_warning("0.33.1+cpu") is None
    for version in ("0.25.1", "0.34.0", "1.0.0"):
        assert "0.26 to 0.33" in compat.version_warning(version)


def test_experts_refuse_what_dispatches_inside_experts():
    from vllm_ue8m0.plugin.moe import Ue8m0Experts

    supports = Ue8m0Experts._supports_parallel_config
    assert supports(SimpleNamespace())  # a release that has none of these kinds
    kinds = {"use_moonep_kernels": False, "use_passthrough_all2all": False}
    assert supports(SimpleNamespace(**kinds))
    for kind in kinds:
        assert not supports(SimpleNamespace(**{**kinds, kind: True}))


def test_import_of_the_package_loads_neither_triton_nor_vllm():
    code = "import vllm_ue8m0, sys; print(sorted({'vllm', 'triton', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
