from __future__ import annotations

import pytest

from morsr.adapters import MoRConfig
from morsr.errors import ConfigError


def test_defaults_are_the_papers():
    config = MoRConfig()
    assert (config.num_ranks, config.num_shared, config.top_k, config.num_zero) == (40, 8, 8, 4)
    assert (config.num_slots, config.num_experts, config.stored_ranks) == (36, 32, 40)


def test_zero_slots_among_the_experts_have_no_ranks():
    config = MoRConfig(zero_slots="among")
    assert (config.num_slots, config.num_experts, config.stored_ranks) == (32, 28, 36)


@pytest.mark.parametrize(
    ("kind", "slots", "experts", "balance"),
    [
        ("mor", 36, 32, "degradation"),
        ("mor_v2", 36, 32, "plain"),
        ("mor_v1", 32, 32, "plain"),
        ("lora_moe", 8, 8, "plain"),
        ("lora", 0, 0, "plain"),
    ],
)
def test_kinds(kind, slots, experts, balance):
    config = MoRConfig.of_kind(kind)
    assert (config.num_slots, config.num_experts, config.balance) == (slots, experts, balance)
    assert config.stored_ranks == config.num_ranks == 40
    assert MoRConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 37}, "top_k=37: expected 1 to 36"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_shared": 40}, "num_shared=40"),
        ({"num_shared": 41, "top_k": 0, "num_zero": 0}, "num_shared=41"),
        ({"num_zero": 32, "zero_slots": "among"}, "no real expert"),
        ({"expert_rank": 5}, "expert_rank=5 does not divide"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"num_ranks": 4.0}, "num_ranks"),
        ({"num_zero": -1}, "num_zero"),
        ({"router": "cnn"}, "router: expected one of linear, mlp"),
        ({"gate": "sigmoid"}, "gate"),
        ({"router_init_std": 0.0}, "router_init_std"),
        ({"scale": float("nan")}, "scale"),
        ({"logit_noise": -1.0}, "logit_noise"),
        ({"dtype": "int8"}, "dtype"),
        ({"targets": "to_q"}, "targets"),
        ({"targets": ()}, "targets"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(ConfigError, match=message):
        MoRConfig(**settings)


def test_unknown_setting_and_kind():
    with pytest.raises(ConfigError, match="num_rank;"):
        MoRConfig.from_dict({"num_rank": 4})
    with pytest.raises(ConfigError, match="lora_moe"):
        MoRConfig.of_kind("moe")


def test_noise_falls_to_zero_at_a_fifth_of_the_training():
    config = MoRConfig(logit_noise=2.0)
    assert config.noise_at(0.0) == 2.0
    assert config.noise_at(0.1) == pytest.approx(1.0)
    assert config.noise_at(0.2) == config.noise_at(0.9) == 0.0
    assert MoRConfig(logit_noise_until=0.0).noise_at(0.0) == 0.0
