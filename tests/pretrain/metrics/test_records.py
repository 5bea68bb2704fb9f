from __future__ import annotations

import math

import pytest

from pretrain.metrics.records import (
    Rate,
    Throughput,
    evaluation_record,
    peak_memory_gib,
    training_record,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_step_is_in_no_later_figure() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.start(step=0, tokens=0, flops_per_token=1.0)
    clock.now += 60  # compiling
    assert throughput.measure(step=1, tokens=1000) == Rate(1000 / 60, 60.0, None)
    clock.now += 4
    assert throughput.measure(step=5, tokens=5000) == Rate(1000.0, 1.0, None)
    clock.now += 10
    assert throughput.measure(step=10, tokens=10_000) == Rate(500.0, 2.0, None)


def test_measuring_twice_after_one_step_repeats_the_answer() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.start(step=7, tokens=700, flops_per_token=1.0)
    clock.now += 2
    first = throughput.measure(step=8, tokens=800)
    clock.now += 5
    assert throughput.measure(step=8, tokens=800) == first == Rate(50.0, 2.0, None)


def test_paused_time_is_not_training_time() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.start(step=0, tokens=0, flops_per_token=1.0)
    clock.now += 1
    with throughput.paused():
        clock.now += 1000
    clock.now += 1
    assert throughput.measure(step=2, tokens=10).tokens_per_second == 5.0


def test_mfu_is_model_flops_over_the_peak_of_all_devices() -> None:
    clock = Clock()
    throughput = Throughput(peak=8 * 1e15, clock=clock)
    throughput.start(step=0, tokens=0, flops_per_token=6e9)
    clock.now += 10
    rate = throughput.measure(step=1, tokens=5_000_000)
    assert rate.mfu == pytest.approx(500_000 * 6e9 / 8e15)


def test_a_training_record_has_the_promised_keys() -> None:
    record = training_record(
        step=3,
        loss=2.5,
        terms={"lm_loss": 2.0, "balance": 0.5},
        grad_norm=1.5,
        lr=1e-3,
        tokens=3000,
        skipped_steps=1,
        rate=Rate(100.0, 10.0, None),
    )
    promised = ["step", "loss", "lm_loss", "grad_norm", "lr", "tokens", "tokens_per_second"]
    assert record["skipped_steps"] == 1
    assert set(promised) <= set(record)
    assert record["lm_loss"] == 2.0
    assert record["balance"] == 0.5
    assert "mfu" not in record
    assert ("peak_memory_gib" in record) == (peak_memory_gib() is not None)


def test_a_training_record_has_mfu_where_the_peak_is_known() -> None:
    record = training_record(
        step=1,
        loss=2.5,
        terms={},
        grad_norm=1,
        lr=1,
        tokens=1,
        skipped_steps=0,
        rate=Rate(1.0, 1.0, 0.4),
    )
    assert record["mfu"] == 0.4
    assert record["lm_loss"] == 2.5


def test_an_evaluation_record_converts_nats_to_perplexity_and_bits_per_byte() -> None:
    nats = 100 * math.log(8)  # each of 100 tokens is one of 8 equally likely ones
    record = evaluation_record(step=5, tokens=7, total_nats=nats, num_tokens=100, num_bytes=300)
    assert record["eval_loss"] == pytest.approx(math.log(8))
    assert record["perplexity"] == pytest.approx(8)
    assert record["bits_per_byte"] == pytest.approx(1.0)  # 3 bits per token of 3 bytes
    assert "bits_per_character" not in record


def test_an_evaluation_record_has_the_bits_of_a_character_and_of_groups_of_tokens() -> None:
    record = evaluation_record(
        step=5, tokens=7, total_nats=300 * math.log(2), num_tokens=300, num_bytes=300,
        num_characters=240, group_bits={"bits_of_byte_1": 1.5},
    )  # fmt: skip
    assert record["bits_per_byte"] == pytest.approx(1.0)
    assert record["bits_per_character"] == pytest.approx(1.25)
    assert record["bits_of_byte_1"] == 1.5


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    record = evaluation_record(step=1, tokens=1, total_nats=1e6, num_tokens=1, num_bytes=1)
    assert record["perplexity"] == math.inf
