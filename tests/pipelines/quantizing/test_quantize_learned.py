"""How many steps of learning an online quantization takes is the config's to say."""

import pytest
from families import FAMILIES
from pydantic import ValidationError

from trimfit import QuantizeConfig, QuantizeReport, quantize


def online(steps: int) -> QuantizeReport:
    config = QuantizeConfig(bits=3, group_size=16, block_size=16, transform="online", learned_steps=steps)
    return quantize(FAMILIES["llama"].build(), config)


def test_learning_lowers_the_weight_error_and_names_what_it_began_with():
    closed, learned = online(0), online(20)
    assert not any("learned" in record.transform for record in closed.layers)
    for before, after in zip(closed.layers, learned.layers, strict=True):
        if "learned" in after.transform:
            assert after.transform.endswith(before.transform.removeprefix("online ") or "identity")
    assert sum("online learned from" in record.transform for record in learned.layers) > len(learned.layers) / 2
    assert learned.weight_error < closed.weight_error
    assert learned.online_multiply_adds >= closed.online_multiply_adds


def test_it_learns_unless_told_otherwise_and_never_backwards():
    assert QuantizeConfig().learned_steps == 100
    with pytest.raises(ValidationError, match="learned_steps"):
        QuantizeConfig(learned_steps=-1)
