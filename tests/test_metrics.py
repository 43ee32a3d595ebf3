"""What a run measures, averaged or the largest of, and found again by a run that resumes."""

import json

import torch
from accelerate import Accelerator

from latro.metrics import Meter


def measured():
    meter = Meter()
    for values in ([1.0, 3.0], [8.0], []):
        meter.add({"mean": torch.tensor(values)})
        meter.add_largest({"largest": torch.tensor(values), "none": torch.tensor([])})
        meter.count({"tokens": len(values)})
    return meter


EXPECTED = {"mean": 4.0, "largest": 8.0, "tokens": 3}


def test_means_weigh_elements_alike_and_begin_anew_but_counts_go_on():
    meter = measured()
    assert meter.take(Accelerator(cpu=True)) == EXPECTED
    assert meter.take(Accelerator(cpu=True)) == {}
    meter.add({"mean": torch.tensor([2.0])})
    meter.add_largest({"largest": torch.tensor([-5.0])})
    assert meter.take(Accelerator(cpu=True)) == {"mean": 2.0, "largest": -5.0, "tokens": 3}


def test_a_copy_has_nothing_of_what_is_added_later():
    meter = measured()
    copied = meter.copy()
    meter.add({"mean": torch.tensor([100.0])})
    meter.add_largest({"largest": torch.tensor([100.0])})
    meter.count({"tokens": 100})
    assert copied.take(Accelerator(cpu=True)) == EXPECTED


def test_a_resumed_run_goes_on_measuring():
    state = json.loads(json.dumps(measured().state()))
    other = Meter()
    other.add({"mean": torch.tensor([100.0])})
    other.restore(state, torch.device("cpu"))
    other.add({"mean": torch.tensor([9.0, -1.0])})
    other.add_largest({"largest": torch.tensor([9.0])})
    assert other.take(Accelerator(cpu=True)) == {"mean": 4.0, "largest": 9.0, "tokens": 3}
