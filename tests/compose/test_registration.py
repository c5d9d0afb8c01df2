"""Composed models are known to the auto classes, whatever was imported first."""

import subprocess
import sys

import pytest

FIRST = [
    "import omnimerge; assert not {'torch', 'transformers'} & set(sys.modules)",
    "import omnimerge.compose.modeling",
]

CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModel, AutoProcessor
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("omnimerge_omni")
assert type(config).__name__ == "OmniConfig"
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    assert auto._model_mapping[type(config)].__name__ == "OmniForConditionalGeneration"
assert AutoModel._model_mapping[type(config)].__name__ == "OmniModel"
assert PROCESSOR_MAPPING[type(config)].__name__ == "OmniProcessor"
"""


@pytest.mark.parametrize("first", FIRST)
def test_auto_classes_know_composed_models_in_any_order(first):
    code = f"import sys\n{first}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
