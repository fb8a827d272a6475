"""`import layerboost` is quick, and transformers knows converted models whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerboost import Plan, convert
from tests.models import tiny_model

PLAN = "SLNW"
LOAD = """
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(loaded).__name__ == "LayerBoostLlamaForCausalLM", type(loaded)
print(layerboost.plan_of(loaded))
"""
LAYERBOOST_FIRST = """
import sys
import layerboost
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
"""
TRANSFORMERS_FIRST = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
import layerboost
assert "layerboost.modeling" not in sys.modules
assert AutoConfig.from_pretrained(sys.argv[1]).layerboost["plan"] == sys.argv[2]
"""


@pytest.mark.parametrize("start", [LAYERBOOST_FIRST, TRANSFORMERS_FIRST], ids=["layerboost", "transformers"])
def test_converted_checkpoints_load_whichever_is_imported_first(tmp_path, start):
    convert(tiny_model("llama", seed=0), Plan.parse(PLAN, 8)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", start + LOAD, str(tmp_path), PLAN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{PLAN}\n"), done.stderr


def test_a_function_keeps_its_name_although_its_file_has_the_same_one():
    script = (
        "import layerboost.convert; from layerboost import convert, plan_of\n"
        "assert convert.__name__ == layerboost.convert.__name__ == 'convert', (convert, layerboost.convert)\n"
        "assert all(hasattr(layerboost, name) for name in layerboost.__all__)\n"
        "assert not hasattr(layerboost, 'no_such_name')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
