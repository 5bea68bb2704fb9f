"""Each study runs, on a few steps, and its yardsticks are right."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from models.daria_former.model import FAMILY
from models.layer_counts import count_parameters
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.evidence import (
    chains,
    cost,
    depth,
    drafts,
    hybrid,
    infilling,
    language,
    layer_cost,
    layer_language,
    layer_memory,
    mood,
    patch_recall,
    patches,
    recall,
    thinking,
)
from tests.evidence.prose import curriculum, fetch
from tests.evidence.training import IGNORED, future_leak


def test_every_question_is_answered_once_and_only_beyond_the_window():
    tokens, labels = recall.draw(recall.FULL, 4, torch.Generator().manual_seed(0))
    for row, answers in zip(tokens, labels, strict=True):
        questions = (answers != IGNORED).nonzero().flatten()
        assert len(questions) == recall.PAIRS
        for question in questions:
            (stored,) = (row[:question] == row[question]).nonzero().flatten()
            assert row[stored + 1] == answers[question]
            assert 128 <= question - stored <= 448


def test_arms_of_recall_have_equal_parameters():
    counts = [FAMILY.num_parameters(recall.config_of(arm)) for arm in recall.ARMS]
    assert max(counts) < 1.02 * min(counts)


def test_recall_runs():
    stages = (recall.Stage(recall.SHORT, 2, 2), recall.Stage(recall.FULL, 1, 2))
    result = recall.run("local + memory", seed=0, stages=stages, rows=4)
    assert result.leak == 0.0


def test_floor_of_the_mood_falls_with_reach_to_that_of_plain_enumeration():
    source = mood.Source.random(0)
    batch = source.draw(4, torch.Generator().manual_seed(0))
    floors = [source.floor(batch, reach=reach) for reach in (1, 7, mood.LENGTH)]
    assert floors == sorted(floors, reverse=True)
    # With the last token alone, the prediction is the mean of the tables.
    chances = source.tables.mean(dim=0)[batch.tokens, batch.labels][:, mood.BURN_IN :]
    torch.testing.assert_close(floors[0], float(-chances.log().mean()))


def test_without_its_readers_the_emotion_state_has_no_influence():
    source = mood.Source.random(0)
    on, off = (mood.run(source, with_state=state, seed=0, steps=2) for state in (True, False))
    assert on.influence > 0.0 == off.influence
    assert on.leak == off.leak == 0.0


def test_language_sees_tokens_by_the_ratio_of_flops():
    corpus = _random_corpus()
    llama, ours = language.ARMS["llama"], language.ARMS["daria_former"]
    assert 1000 < language.steps_of(llama, 1000) < 2000
    trained = language.fit(ours, corpus, lr=1e-3, seed=0, steps=2)
    assert 7.0 < language.bits_per_byte(trained, ours, corpus.test, rows=16) < 9.0


def test_cost_prints_its_tables():
    assert cost.step_table(shapes=((256, 64),), rounds=2).rows
    assert cost.context_table(contexts=(128,), rounds=1).rows
    assert cost.cache_table(contexts=(128,)).rows


def test_future_leak_sees_one():
    class Peeking(SequentialModel):
        def forward(self, inputs, cache=None):
            logits = super().forward(inputs, cache).logits
            return logits + inputs.tokens.float().mean()

    config = mood.config()
    model = Peeking(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    assert future_leak(model, tokens, vocab_size=mood.VOCAB) > 0.1


def test_depth_scores_by_the_causal_rule_and_shows_the_oracle_beside_it():
    corpus = _random_corpus()
    arm = depth.ARMS["mod, gamma 0.25"]
    assert depth.own_steps(depth.ARMS[depth.REFERENCE], 10) == 10 < depth.own_steps(arm, 10)
    found = depth.score(language.fit(arm, corpus, lr=1e-3, seed=0, steps=2), arm, corpus, rows=16)
    assert found.leak == 0.0 < found.oracle_leak
    assert 0.0 < found.share < 1.0
    assert 7.0 < found.causal < 9.0


def test_hybrid_trains_at_equal_flops_and_decodes_with_drafts():
    corpus = _random_corpus()
    ours = hybrid.ARMS["dual, blocks of 8"]
    assert hybrid.own_steps(ours, 100) < 100 < hybrid.own_steps(hybrid.ARMS["llama, 2 layers"], 100)
    trained = hybrid.fit(ours, corpus, seed=0, steps=1)
    prompt = torch.zeros(1, hybrid.PROMPT, dtype=torch.long)
    written = hybrid.written(trained, ours, prompt, "speculative")
    assert written.tokens.shape == (1, hybrid.TOTAL)
    assert 0 < written.num_passes <= 2 * (hybrid.TOTAL - hybrid.PROMPT)
    rows = torch.randint(256, (2, infilling.TOTAL), generator=torch.Generator().manual_seed(0))
    hidden = infilling.gaps(8)
    for filled in (
        infilling.by_diffusion(trained, ours.config, rows, num_steps=2),
        infilling.by_prefix(trained, ours.config, rows),
    ):
        assert torch.equal(filled[:, ~hidden], rows[:, ~hidden])
        assert (filled[:, hidden] != rows[:, hidden]).any()
    nats = infilling.losses(trained, ours.family, rows)
    scored = infilling.score(rows, rows, 8, nats, nats)
    assert scored.found == 1.0
    assert scored.own_gaps == pytest.approx(float(nats[:, hidden].mean()))
    norms = hybrid.gradient_norms(trained, ours, corpus.test, draws=3)
    assert 0 < norms[0] < norms[1] < norms[2]


def test_drafts_are_timed_and_decoded_with(monkeypatch):
    size = (64, 2)
    monkeypatch.setattr(drafts, "TOTAL", drafts.PROMPT + 2 * drafts.TRAINED_BLOCK)
    passes, decoding = drafts.tables(1, steps=1, sizes=(size,), trained_size=size, rounds=2)
    assert len(passes.rows) == len(drafts.BLOCK_SIZES)
    assert all(float(row[-1]) > 0 for row in passes.rows)
    for row in decoding.rows:
        # A cycle keeps at least the byte of the check, and at most the block and that byte.
        assert 0.9 < float(row[2]) <= drafts.TRAINED_BLOCK + 1
        assert row[-1].count("x") == 1


def test_patches_are_compared_at_equal_flops_on_the_same_bytes_and_scored_by_place():
    corpus = _random_corpus()
    flops = [arm.family.flops(arm.config, language.LENGTH) for arm in patches.ARMS.values()]
    assert max(flops) < 1.02 * min(flops)
    start = patches.Start(1e-3, 0.02)
    name = "agiformer, causal head"
    found = patches.run(name, corpus, start=start, seed=0, steps=1, rows=16).score
    assert 7.0 < found.bits < 9.0
    assert sum(found.by_place) / 4 == pytest.approx(found.bits)
    assert patches.order_zero_bits(corpus.train, corpus.test) == pytest.approx(8.0, abs=0.2)
    text = bytes(corpus.test.numpy())
    assert patches.compressed_bits(text) > 8.0 > 2.0 > patches.compressed_bits(text, after=text)


def test_at_equal_time_an_arm_takes_the_steps_that_fit_into_the_seconds_of_llama():
    per_step = patches.seconds_per_step(_random_corpus(), rounds=1)
    assert per_step.keys() == patches.ARMS.keys()
    own = patches.equal_time_steps(per_step, 1000)
    assert own[patches.REFERENCE] == 1000
    for name, steps in own.items():
        assert steps * per_step[name] == pytest.approx(1000 * per_step["llama"], rel=1e-2)


def test_texts_of_a_folder_are_cut_into_parts_by_document(tmp_path):
    fetch.write(tmp_path / "texts", [f"text {number}" for number in range(21)])
    corpus = language.Corpus.of_folder(tmp_path / "texts")
    assert bytes(corpus.test.numpy()) == b"text 0\ntext 20"
    assert bytes(corpus.tuning.numpy()) == b"text 10"
    assert bytes(corpus.train.numpy()).count(b"\n") == 17


def test_pairs_are_asked_for_beyond_the_reach_of_the_attention():
    gap = 8
    tokens, labels = patch_recall.draw(4, gap, 3, torch.Generator().manual_seed(0))
    reach = patch_recall.SHAPE["num_layers"] * (patch_recall.SHAPE["window_size"] - 1)
    for row, answers in zip(tokens, labels, strict=True):
        questions = (answers != IGNORED).nonzero().flatten()
        assert len(questions) == 4
        for question in questions:
            (told,) = (row[:question] == row[question]).nonzero().flatten()
            assert row[told + 1] == answers[question]
            assert told % 4 == question % 4 == 0
            assert question // 4 - (told // 4 + 1) > reach  # the latent after a pair holds it
    stages = (patch_recall.Stage(4, (8, 8), 1),)
    assert patch_recall.run("plasticity 0.99", seed=0, stages=stages, rows=2).leak == 0.0


def test_thinking_is_counted_by_the_kind_of_answer():
    batch, kinds = thinking.draw_digits(4, torch.Generator().manual_seed(0))
    a, b = _questions(batch, 4)[..., :2].unbind(-1)
    answers = batch.labels.unflatten(1, (-1, 2, 4))[:, :, 1]
    assert (answers[kinds == 0] == a[kinds == 0].unsqueeze(-1)).all()
    assert (answers[kinds == 1][:, 0] == (a + b)[kinds == 1] % 16).all()
    found = thinking.run("digits", "weight 0.01", seed=0, steps=1, rows=8)
    assert found.leak == 0.0
    assert all(1.0 <= steps <= 4.0 for steps in found.steps.values())


def test_an_answer_is_where_the_permutations_of_its_question_lead():
    batch, kinds = thinking.draw_permutations(4, torch.Generator().manual_seed(0))
    scored = batch.labels[batch.labels != IGNORED].tolist()
    questions = _questions(batch, thinking.TASKS["permutations"].patch).flatten(0, 1).tolist()
    assert len(scored) == len(questions) == kinds.numel()
    for (state, *moves, _), kind, answer in zip(
        questions, kinds.flatten().tolist(), scored, strict=True
    ):
        for move in moves[: kind + 1]:
            state = int(thinking.MOVES[move - thinking.STATES, state])
        assert moves[kind + 1 :] == [2 * thinking.STATES] * (3 - kind)
        assert state == answer
    found = thinking.run("permutations", "one step", seed=0, steps=1, rows=8)
    assert set(found.steps.values()) == {1.0}


def _questions(batch, patch):
    tokens = torch.cat((batch.tokens[:, 1:], batch.tokens[:, :1]), dim=1)
    return tokens.unflatten(1, (-1, 2, patch))[:, :, 0]


def _random_corpus() -> language.Corpus:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(256, (3, 5000), dtype=torch.uint8, generator=generator)
    return language.Corpus(*texts)


def test_zeroing_the_memory_of_a_fine_tuned_model_leaves_out_what_it_adds_alone():
    corpus = _random_corpus()
    task = layer_memory.causal_task(corpus, base_steps=1, steps=3, rows=8)
    # With the first weights and rates of the study three steps add as little as rounding does.
    task = task._replace(rates=layer_memory.Rates(memory=0.1, rest=0.01))
    wide = {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.5}
    base = layer_memory.base_llama(task, **wide)
    before = statistics.fmean(layer_memory.held_out(base, task))
    found = layer_memory.tune(base, "memory alone", task, seed=0)
    assert found.without == pytest.approx(before, abs=1e-6)  # the base was not touched
    assert found.bits != pytest.approx(found.without, abs=1e-3)
    others = layer_memory.tune(base, "everything, no memory", task, seed=0)
    assert others.bits != pytest.approx(before, abs=1e-3)


def test_a_masked_model_is_scored_where_it_is_masked_alone():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
    base = BertForMaskedLM(BertConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randint(5, 64, (2, 500), generator=generator)
    tokens = layer_memory.Tokens(train, test, first=1, last=2, mask=3)
    task = layer_memory.masked_task(tokens, steps=2, rows=8)
    for inputs in task.test:
        hidden, labels = inputs["input_ids"], inputs["labels"]
        assert ((hidden == 3) == (labels != IGNORED)).all()
        assert (hidden[:, 0] == 1).all()
        assert (hidden[:, -1] == 2).all()
    found = layer_memory.tune(base, "everything", task, seed=0)
    assert found.bits != found.without
    assert found.bits == pytest.approx(statistics.fmean(layer_memory.held_out(base, task)), abs=1)


def test_memory_from_scratch_and_attention_residuals_are_compared_at_equal_flops_per_byte():
    flops = [a.family.flops(a.config, language.LENGTH) for a in layer_language.ARMS.values()]
    assert max(flops) < 1.005 * min(flops)
    arm = layer_language.ARMS["attention residuals"]
    specs = arm.family.layer_specs(arm.config)
    assert arm.family.num_parameters(arm.config) == count_parameters(specs)
    corpus = _random_corpus()
    trained = language.fit(arm, corpus, lr=1e-3, seed=0, steps=2)
    assert 7.0 < language.bits_per_byte(trained, arm, corpus.test, rows=16) < 9.0
    sample = language.rows_at(corpus.test, torch.tensor([0])).tokens
    assert future_leak(trained.model, sample, vocab_size=language.VOCAB) == 0.0


def test_attention_residuals_are_a_softmax_over_the_outputs_before():
    """The first mixture weighs all alike, whatever their sizes; a query prefers what points its
    way."""
    mixture = layer_language.Mixture(layer_language.ARMS["attention residuals"].config)
    small, large = torch.eye(64)[:2] * torch.tensor([[1.0], [5.0]])
    with torch.no_grad():
        mixture.query.zero_()
        torch.testing.assert_close(mixture((small, large)), (small + large) / 2)
        mixture.query[0] = 0.5  # rmsnorm makes 8 of the 1
        weight = torch.tensor(4.0).sigmoid()
        expected = weight * small + (1 - weight) * large
        torch.testing.assert_close(mixture((small, large)), expected)


def test_answers_of_chains_follow_the_facts_of_their_row():
    batch = chains.draw(4, torch.Generator().manual_seed(0))
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        facts = dict(divmod(token, chains.NODES) for token in tokens[: chains.NODES])
        assert len(facts) == chains.NODES
        assert labels[: chains.NODES] == [IGNORED] * chains.NODES
        questions = [token - chains.FACTS for token in tokens[chains.NODES :]]
        assert sorted(questions) == list(range(chains.HOPS * chains.NODES))
        for question, answer in zip(questions, labels[chains.NODES :], strict=True):
            hops, node = divmod(question, chains.NODES)
            for _ in range(hops + 1):
                node = facts[node]
            assert node == answer
    flops = [arm.family.flops(arm.config, chains.LENGTH) for arm in chains.ARMS.values()]
    assert max(flops) < 1.005 * min(flops)
    assert chains.run("memory, qk", seed=0, steps=2, rows=2, test_rows=4).leak == 0.0
    assert all(0.2 < share < 0.5 for share in chains.most_frequent_value(512))


def test_cost_of_a_layer_is_compared_with_its_flops():
    sizes = layer_cost.SIZES | {"hidden_size": 96, "intermediate_size": 96}
    training, where, *decoding = layer_cost.tables(
        1, sizes=sizes, length=16, rounds=2, kinds=layer_cost.KINDS[:1]
    )
    assert len(decoding) == len(layer_cost.BATCHES)
    (_, *shares, whole), *_ = where.rows
    assert float(whole) == 1.0 == pytest.approx(sum(map(float, shares)), abs=0.02)
    for table in (training, *decoding):
        for row in table.rows:
            ours, formula = float(row[1]), float(row[2])
            assert 1.0 < ours < formula  # which applies the query's half of the MLP four times


def test_arms_of_the_curriculum_see_the_same_rows():
    corpora = {source: _random_corpus() for source in curriculum.FOLDERS}
    texts = {source: corpus.train for source, corpus in corpora.items()}
    ordered, mixed = (
        curriculum.batches(texts, ordered=order, seed=0, steps=20) for order in (True, False)
    )
    rows = [torch.cat([batch.tokens for batch in arm]).tolist() for arm in (ordered, mixed)]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])
    assert curriculum.first_steps(20) == [0, 3, 8, 20]
    assert sum(curriculum.shares().values()) == pytest.approx(1.0)
    found = curriculum.run("curriculum", corpora, seed=0, steps=2, rows=1)
    assert found.leak == 0.0
    assert all(7.0 < bits < 9.0 for bits in found.bits.values())
