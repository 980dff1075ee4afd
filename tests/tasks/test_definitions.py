"""What the generators publish: group tables, distributions, grammars, metrics."""

from __future__ import annotations

import math

import pytest
import torch

from linnet.evaluation.scoring import count_right
from linnet.tasks import IGNORE, TaskData, build_task, seeded
from linnet.tasks.groups import group_table, permutation_group
from linnet.tasks.recall import distinct
from linnet.tasks.ruler import FAMILIES, make_question, string_match
from linnet.tasks.selectivbench import Grammar, SelectivBench, compressibility, kgram_entropy, lzw_complexity


class TestGroups:
    @pytest.mark.parametrize(
        ("name", "size"),
        [("Z2", 2), ("Z60", 60), ("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60), ("S5", 120), ("A4xZ5", 60)],
    )
    def test_tables_are_groups(self, name: str, size: int) -> None:
        table = group_table(name)
        elements = torch.arange(size)
        assert table.shape == (size, size)
        assert torch.equal(table[0], elements)
        assert torch.equal(table[:, 0], elements)
        assert torch.equal(table.sort(0).values, elements[:, None].expand(size, size))
        assert torch.equal(table.sort(1).values, elements.expand(size, size))
        a, b, c = torch.randint(size, (3, 500), generator=seeded(0))
        assert torch.equal(table[table[a, b], c], table[a, table[b, c]])

    def test_composition(self) -> None:
        elements, table = permutation_group("S4"), group_table("S4")
        for a in (3, 7, 22):
            for b in (1, 9, 14):
                p, q = elements[a], elements[b]
                assert elements[int(table[a, b])] == tuple(p[q[i]] for i in range(4))

    def test_a5_is_its_own_commutator_group(self) -> None:
        """So it is not solvable, which is what makes its word problem hard; S4 is."""
        for name, simple in (("A5", True), ("S4", False)):
            table = group_table(name)
            n = len(table)
            inverse = (table == 0).int().argmax(1)
            a, b = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
            reached = set(table[table[a, b], table[inverse[a], inverse[b]]].tolist())
            while True:
                pairs = torch.tensor(sorted(reached))
                more = set(table[pairs][:, pairs].flatten().tolist())
                if more == reached:
                    break
                reached = more
            assert (len(reached) == n) == simple

    @pytest.mark.parametrize("group", ["S3", "S4", "S5", "A4", "A5"])
    def test_two_generators_generate(self, group: str) -> None:
        task = build_task({"name": "group", "group": group, "generators": "two"})
        reached, table = {0}, task.table
        while True:
            more = reached | {int(table[a, b]) for a in reached for b in task.generators}
            if more == reached:
                break
            reached = more
        assert len(reached) == len(table)

    def test_start_token(self) -> None:
        task = build_task("group(group='S4', start=True)")
        tokens, targets, *_ = TaskData(task, length=6, batch_size=8).sample(0)
        assert (task.vocab_size, tokens[:, 1:].max() < 24) == (25, True)
        assert (tokens[:, 0] == 24).all()
        assert (targets[:, 0] == IGNORE).all()
        assert torch.equal(targets[:, 1], tokens[:, 1])
        assert torch.equal(targets[:, 2], group_table("S4")[tokens[:, 1], tokens[:, 2]])


class TestRecall:
    def test_mqar_queries_come_early(self) -> None:
        """The slots follow the power law: the first one most often, half of the queries in the first tenth."""
        task = build_task("mqar(pairs=1, vocab_size=64, fill=False)")
        targets = TaskData(task, length=202, batch_size=4000).sample(0).targets
        slot = ((targets != IGNORE).nonzero()[:, 1] - 2) // 2
        share = slot.bincount(minlength=100) / 4000
        expected = torch.arange(1, 101, dtype=torch.float64) ** (0.01 - 1)
        expected /= expected.sum()
        assert (targets != IGNORE).sum() == 4000
        assert (share - expected).abs().max() < 5 * (expected.max() / 4000) ** 0.5

    def test_mqar_rows(self) -> None:
        tokens, targets, *_ = TaskData(build_task("mqar(pairs=8)"), length=64, batch_size=32).sample(0)
        keys, values = tokens[:, :16:2], tokens[:, 1:16:2]
        assert (keys >= 1).all()
        assert (keys < 4096).all()
        assert (values >= 4096).all()
        assert all(len(set(row)) == 8 for x in (keys, values) for row in x.tolist())
        assert ((targets != IGNORE).sum(1) == 8).all()
        assert (targets[:, :16] == IGNORE).all()

    def test_mqar_rows_as_full_as_they_are_long(self) -> None:
        data = TaskData(build_task("mqar(tokens_per_pair=8, fill=False)"), length=[64, 256], batch_size=4)
        assert [int((data.sample(step).targets != IGNORE).sum(1).unique()) for step in range(2)] == [8, 32]

    @pytest.mark.parametrize(("count", "high"), [(4, 9), (5, 5), (9, 50)])
    def test_distinct_numbers_are_evenly_spread(self, count: int, high: int) -> None:
        """Every number comes as often as every other at every place, whichever way they are drawn."""
        found = distinct(20000, count, high, seeded(0))
        assert all(len(set(row)) == count for row in found[:50].tolist())
        for place in (0, count - 1):
            share = found[:, place].bincount(minlength=high) / 20000
            assert (share - 1 / high).abs().max() < 5 * (1 / high / 20000) ** 0.5

    def test_copying_the_input_is_at_chance(self) -> None:
        for spec in ("mqar(vocab_size=64)", "induction_heads", "selective_copy", "mad_recall"):
            tokens, targets, *_ = TaskData(build_task(spec), length=128, batch_size=64).sample(0)
            scored = targets != IGNORE
            assert (tokens == targets)[scored].double().mean() < 0.2

    def test_palindromes_read_the_same_both_ways(self) -> None:
        tokens, targets, *_ = TaskData(build_task("palindrome(vocab_size=9)"), length=32, batch_size=4).sample(0)
        assert (tokens[:, 16] == 8).all()
        assert torch.equal(tokens[:, 17:], targets[:, 16:-1])
        assert torch.equal(targets[:, 16:].flip(1), tokens[:, :16])
        assert (targets[:, :16] == IGNORE).all()

    def test_copies_repeat_in_order(self) -> None:
        tokens, targets, *_ = TaskData(build_task("copy(vocab_size=9)"), length=32, batch_size=4).sample(0)
        assert torch.equal(targets[:, 16:], tokens[:, :16])
        assert torch.equal(tokens[:, 17:], tokens[:, :15])
        assert build_task("copy").vocab_size == 27

    def test_hops_follow_the_latest_occurrence(self) -> None:
        row = torch.tensor([[0, 1, 0, 0, 2, 1, 0]])
        one, two = (build_task(f"k_hop(hops={k}, tokens=3)").solve(row)[0].tolist() for k in (1, 2))
        assert one == [3, 3, 1, 0, 3, 0, 2]
        assert two == [3, 3, 3, 0, 3, 1, 3]
        task = build_task("k_hop(hops=3, tokens=4)")
        tokens, targets, *_ = TaskData(task, length=60, batch_size=8).sample(0)
        assert torch.equal(task.solve(tokens), targets)

    def test_one_place_of_a_row_is_kept(self) -> None:
        tokens, targets, *_ = TaskData(build_task("keep_nth"), length=40, batch_size=8).sample(0)
        assert torch.equal(targets[:, -1], tokens[:, 4])
        assert (targets[:, :-1] == IGNORE).all()

    def test_stacks_are_spread_and_popped_when_they_hold_something(self) -> None:
        task = build_task("stacks(stacks=4, elements=8)")
        tokens, targets, *_ = TaskData(task, length=302, batch_size=64).sample(0)
        kinds, stacks = tokens[:, 0::3], tokens[:, 1::3]
        assert ((kinds == 12) | (kinds == 13)).all()
        assert ((stacks >= 8) & (stacks < 12)).all()
        pops = kinds == 13
        assert 0.4 < pops.double().mean() < 0.5
        assert torch.equal(targets[:, 1::3] != IGNORE, pops)
        assert (targets[:, 0::3] == IGNORE).all()
        assert (targets[:, 2::3] == IGNORE).all()
        for stack in range(8, 12):
            change = torch.where(stacks == stack, 1 - 2 * pops.long(), 0)
            assert change.cumsum(1).min() == 0

    def test_memorization_has_one_dictionary(self) -> None:
        task = build_task("mad_memorize")
        for split in ("train", "test"):
            tokens, targets, *_ = TaskData(task, length=32, batch_size=8, split=split).sample(0)
            assert torch.equal(targets[:, 1::2], task.values[tokens[:, 0::2]])
        assert sorted(task.values.tolist()) == list(range(127, 254))

    def test_reachability_is_not_given_away(self) -> None:
        """Whether edges leave the source and enter the target says nothing: both always do."""
        tokens, targets, *_ = TaskData(build_task("reachability"), length=62, batch_size=200).sample(0)
        for row, answer in zip(tokens.tolist(), targets[:, -1].tolist(), strict=True):
            after = dict(zip(row[0:-2:2], row[1:-2:2], strict=True))
            assert after[row[-2]] != row[-2]
            assert row[-1] in {b for a, b in after.items() if a != b}
            assert answer in (0, 1)
        assert abs(targets[:, -1].double().mean() - 0.5) < 0.12


class TestSelectivBench:
    def test_grammar(self) -> None:
        grammar = Grammar(10, seed=1)
        assert grammar.states == 101
        assert len(set(grammar.starts.tolist())) == 4
        assert 0 not in grammar.starts
        letters = grammar.successor[1:, 1:]
        degree = (letters >= 0).double().sum(1)
        assert abs(degree.mean() - 4) < 3 * (10 * 0.4 * 0.6 / 100) ** 0.5
        assert (grammar.symbol(letters.clamp(min=1))[letters >= 0] == (letters >= 0).nonzero()[:, 1] + 1).all()
        assert (grammar.reach[1:] >= grammar.reach[:-1]).all()
        assert grammar.reach.min() >= 0
        assert grammar.reach.max() <= 1 + 1e-12
        assert grammar.entropy() == pytest.approx(math.log(0.4 * 10), abs=0.15)

    def test_strings_are_those_of_rejection(self) -> None:
        """Walks with the h-transform have the distribution of plain walks of which the long ones are thrown away."""
        grammar = Grammar(4, longest=12, seed=2)
        walks = grammar.strings(6000, 12, seeded(0))
        ends = (walks == 0).int().argmax(1)
        assert (walks == 0).any(1).all()
        lengths = torch.bincount(ends, minlength=12).double() / 6000
        state, expected = torch.zeros(grammar.states, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
        state[grammar.starts] = 0.25
        step = torch.zeros(grammar.states, grammar.states, dtype=torch.float64)
        source, symbol = (grammar.successor >= 0).nonzero(as_tuple=True)
        step[source, grammar.successor[source, symbol]] = grammar.edge[source, symbol]
        for t in range(1, 12):
            state = state @ step
            expected[t], state[0] = state[0].clone(), 0
        expected /= expected.sum()
        assert (lengths - expected).abs().max() < 5 * (0.25 / 6000) ** 0.5

    def test_replay(self) -> None:
        """From the true start, the symbols lead through the targets; after the end comes a start."""
        task = SelectivBench(letters=8, grammar_seed=4)
        tokens, targets, *_ = TaskData(task, length=100, batch_size=4).sample(0)
        assert tokens.shape == (4, 200, 9)
        assert (tokens[:, 1::2] == 0).all()
        assert torch.equal(targets[:, 0::2], targets[:, 1::2])
        for states, symbols in zip(targets[:, 0::2].tolist(), tokens[:, 0::2].argmax(2).tolist(), strict=True):
            for before, state, symbol in zip([0, *states], states, symbols, strict=False):
                assert state in task.grammar.starts if before == 0 else task.grammar.successor[before, symbol] == state

    def test_next_symbols_have_the_probabilities_of_their_state(self) -> None:
        """Which elements are shown does not depend on the target; drawn targets cost what their entropy is."""
        options = {"letters": 6, "gap": "0-2", "longest": 400, "grammar_seed": 4}
        states, drawn = (
            TaskData(SelectivBench(target=target, **options), length=100, batch_size=200).sample(0)
            for target in ("state", "symbol")
        )
        assert torch.equal(states.tokens, drawn.tokens)
        assert states.elements is not None
        assert drawn.probabilities is not None
        scored = drawn.targets != IGNORE
        assert torch.equal(scored, (states.targets != IGNORE) & (states.elements < 99))
        grammar = Grammar(6, longest=400, seed=4)
        odds = drawn.probabilities[scored].double()
        assert (odds.sum(1) - 1).abs().max() < 1e-6
        edges = (grammar.successor[states.targets[scored]] >= 0).double()  # each is as likely; the end follows the end
        edges[states.targets[scored] == 0, 0] = 1
        assert (odds - edges / edges.sum(1, keepdim=True)).abs().max() < 1e-6
        first = scored.clone()  # once an element
        first[:, 1:] &= states.elements[:, 1:] != states.elements[:, :-1]
        odds = drawn.probabilities[first].double()
        cost = -odds.gather(1, drawn.targets[first][:, None]).log()
        entropy = float(torch.special.entr(odds).sum(1).mean())
        assert 0.5 < entropy < math.log(6)
        assert float(cost.mean()) == pytest.approx(entropy, abs=0.01)

    def test_distractors_are_foreign(self) -> None:
        task = SelectivBench(letters=8, gap="0", distractors=0.5, quiet=20, grammar_seed=4)
        tokens, targets, elements, _ = TaskData(task, length=60, batch_size=8).sample(0)
        assert elements is not None
        again = elements[:, 1:] == elements[:, :-1]
        scored = targets[:, 1:] != IGNORE
        assert (elements[:, 1:][again & scored] >= 20).all()
        symbols = tokens.argmax(2)[:, 1:][again & scored]
        states = targets[:, :-1][again & scored]
        assert torch.equal(states, targets[:, 1:][again & scored])
        assert (task.grammar.successor[states, symbols] < 0).all()
        assert len(states) == pytest.approx(8 * 40 * 0.5, rel=0.25)

    def test_gaps_and_noise(self) -> None:
        task = SelectivBench(letters=6, gap="1-10", noise=0.2)
        tokens, targets, elements, _ = TaskData(task, length=50, batch_size=20).sample(0)
        assert elements is not None
        inside = targets != IGNORE
        sizes = torch.stack([((elements == i) & inside).sum(1) for i in range(50)], 1) - 1
        count = sizes.flatten().bincount(minlength=11) / 1000
        assert count[0] == 0
        assert count[2:10].mean() == pytest.approx(1 / 9, abs=0.01)
        assert count[[1, 10]].mean() == pytest.approx(1 / 18, abs=0.02)
        assert tokens.min() >= 0
        assert tokens[tokens < 1].max() < 0.2

    def test_metric(self) -> None:
        """An element is judged by the sum over its positions; padding does not count."""
        task = SelectivBench(letters=6, gap="1-10")
        sample = TaskData(task, length=20, batch_size=4).sample(0)
        assert sample.elements is not None
        first = torch.ones_like(sample.targets, dtype=torch.bool)
        first[:, 1:] = sample.elements[:, 1:] != sample.elements[:, :-1]
        logits = torch.zeros(*sample.targets.shape, task.vocab_size)
        logits.scatter_(2, sample.targets.clamp(min=0).unsqueeze(2), 20.0 * first.unsqueeze(2))
        right, scored = count_right(logits, sample)
        assert scored.sum() == 80
        assert torch.equal(right, scored)
        wrong = torch.zeros_like(logits)
        wrong.scatter_(2, ((sample.targets + 1) % task.vocab_size).clamp(min=0).unsqueeze(2), 20.0)
        assert not count_right(torch.where(first.unsqueeze(2), logits, wrong), sample)[0].all(1).any()

    def test_windows_of_symbols(self) -> None:
        """What a predictor that sees the last two symbols can reach: about .49."""
        grammar = Grammar(10, seed=0)
        states = grammar.strings(300, 64, seeded(1))
        symbols = grammar.symbol(states)
        pairs = torch.zeros(11, 11, grammar.states)
        pairs.index_put_(
            (symbols[:, :-1].flatten(), symbols[:, 1:].flatten(), states[:, 1:].flatten()),
            torch.ones(()),
            accumulate=True,
        )
        assert float(pairs.amax(2).sum() / pairs.sum()) == pytest.approx(0.487, abs=0.08)

    def test_complexity(self) -> None:
        regular, random = [1, 2] * 200, torch.randint(50, (400,), generator=seeded(0)).tolist()
        assert kgram_entropy(regular) == pytest.approx(0.0, abs=1e-6)
        assert compressibility(regular) < 0.2 < compressibility(random)
        assert lzw_complexity(regular) < 0.2 < lzw_complexity(random)
        assert lzw_complexity([7]) == 1


class TestRuler:
    def test_budget_is_kept(self) -> None:
        for family in FAMILIES:
            question = make_question(family, 4000, seeded(1), reserve=200)
            assert 1500 < len(question.prompt) <= 3800
            assert question.answers
        with pytest.raises(ValueError, match="budget: expected more than 100"):
            make_question("vt", 100, seeded(0))
        with pytest.raises(ValueError, match="family: expected one of"):
            make_question("qa_1", 4000, seeded(0))

    def test_answers_are_hidden_in_the_text_and_nowhere_else(self) -> None:
        for family in FAMILIES:
            if family.startswith("niah"):
                question = make_question(family, 3000, seeded(2))
                for answer in question.answers:
                    assert question.prompt.count(answer) == 1

    def test_needles_lie_everywhere(self) -> None:
        places = []
        for n in range(60):
            question = make_question("niah_single_1", 2000, seeded(3, n))
            places.append(question.prompt.index(question.answers[0]) / len(question.prompt))
        assert min(places) < 0.25
        assert max(places) > 0.6

    def test_string_match(self) -> None:
        assert string_match("It is 12 and ABC.", ("12", "abc")) == 1
        assert string_match("112", ("12",)) == 1  # as in RULER
        assert string_match("one: x", ("x", "y")) == 0.5
