"""A training step of thirty families, whole and by LoRA: packed as published. Compiled ones are slow."""

from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the package peft is not installed")

from tests.families import SUPPORTED
from tests.training_steps import FAMILIES, TOLERANCE, training_step

families = pytest.mark.parametrize("family", FAMILIES)
adapted = pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
# What PEFT says of GPT-2's own kind of linear layer, and of experts that it does not adapt.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


@adapted
@families
def test_a_step(family, lora):
    assert training_step(family, lora=lora, compiled=False) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of themselves
@adapted
@families
def test_a_compiled_step(family, lora):
    assert training_step(family, lora=lora, compiled=True) <= TOLERANCE


def test_the_documented_families():
    assert set(FAMILIES) <= set(SUPPORTED)
    lines = Path(__file__).parents[1].joinpath("docs", "models.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.count("|") == 6]
    documented = {family: outcomes for family, *outcomes in rows if family in FAMILIES}
    assert sorted(documented) == sorted(FAMILIES)
    assert all(outcomes[:2] == ["yes", "yes"] for outcomes in documented.values())
