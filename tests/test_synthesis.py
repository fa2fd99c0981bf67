"""Synthetic negatives against the formulas written out one anchor at a time; masks, gates, ties and edges by properties; draws by their frequencies."""
import math
import numpy as np
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare, norm
from torch.testing import assert_close
from vlwb.core import make_generator
from vlwb.losses.itcontrast import itcontrast
from vlwb.negatives.hardness import parents_mean, synthesis_summary
from vlwb.negatives.sampling import gumbel_noise, uniform_noise
from vlwb.negatives.synthesis import STRATEGIES, TYPES, SynthesisConfig, anchor_draws, draws_needed, profile_negatives, strata_places, synthesise

F64 = torch.float64


def units(seed, *shape, dtype=F64): return F.normalize(torch.randn(*shape, generator=make_generator(seed), dtype=F64), dim=-1).to(dtype)


@st.composite
def situations(draw):
    "Anchors, negatives with repeats, a mask with empty and nearly empty rows, a configuration, log weights or none, and the draws."
    a, m, d = draw(st.integers(1, 6)), draw(st.integers(1, 14)), draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10**6)); g = make_generator(seed)
    anchors, negatives = units(seed, a, d), units(seed + 1, m, d)
    if draw(st.booleans()): negatives = negatives[torch.randint(0, m, (m,), generator=g)]                    # duplicates
    mask = torch.rand(a, m, generator=g) < draw(st.sampled_from([0., 0.2, 0.7, 1.]))
    log_w = draw(st.sampled_from([None, 0.1, 3.])); weights = None if log_w is None else log_w * torch.randn(a, m, generator=g, dtype=F64)
    if weights is not None and draw(st.booleans()): weights[torch.rand(a, m, generator=g) < 0.3] = -math.inf
    hardest = draw(st.integers(1, 16))
    config = SynthesisConfig(draw(st.sampled_from(STRATEGIES)), hardest=hardest, strata=draw(st.integers(1, hardest)), hardness_temperature=draw(st.sampled_from([1e-30, 0.05, 1., math.inf])), mixed=draw(st.integers(0, 3)), with_anchor=draw(st.integers(1, 3)),
                             each=draw(st.integers(1, 3)), types=tuple(draw(st.permutations(range(1, 7)))[:draw(st.integers(1, 6))]), gate=draw(st.sampled_from([0., 0.5, 2.])) if weights is not None else 0., damp=draw(st.booleans()))
    return anchors, negatives, mask, config, weights, anchor_draws(a, draws_needed(config, d), seed, 0)


def usable(mask, weights, config): return mask if weights is None else mask & (weights > -math.inf) & (weights.exp() >= config.gate)


def picked(w, u):
    "The place where u falls on the line of weights, by a plain walk."
    w = np.asarray(w, dtype=np.float64); mark = u * w.sum()
    for k, upto in enumerate(np.cumsum(w)):
        if mark < upto: return k
    return int(np.nonzero(w)[0][-1])


def is_profile(order, anchor, negatives, allowed, config):
    "Whether the rows are the hardest of the allowed ones, hardest first, up to rounding."
    h = negatives @ anchor
    rest = sorted(set(allowed.nonzero().flatten().tolist()) - set(order))
    return (len(set(order)) == len(order) == min(config.hardest, int(allowed.sum())) and allowed[order].all() and bool((h[order].diff() <= 1e-12).all())
            and (not rest or not order or h[rest].max() <= h[order].min() + 1e-12))


def written_out(anchor, negatives, order, weights, config, u):
    "The synthetics of one anchor, None where there is none, from the formulas; order is its profile, u its row of uniforms."
    h = negatives @ anchor
    w = torch.ones(len(order), dtype=F64) if weights is None or not config.damp else weights[order].exp()
    unit = lambda x: x / x.norm()
    out = []
    if config.strategy == 'itcontrast':
        for places in np.array_split(np.arange(len(order)), config.strata):
            if len(places) == 0: out.append(None); continue
            n, s = negatives[[order[k] for k in places]], h[[order[k] for k in places]]
            share = ((s - s.max()) * min(1/config.hardness_temperature, 1e300) + w[places].log()).softmax(0)
            out.append(unit((share[:, None] * n).sum(0)))
        return out
    u, enough = u.tolist(), lambda k: len(order) >= k
    floored = (w / w.max()).clamp(min=1e-9).numpy() if len(order) else w.numpy()
    take = lambda k: [u.pop(0) for _ in range(k)]
    def one(us): return [negatives[order[picked(floored, x)]] if enough(1) else None for x in us]
    def two(us, vs):
        pairs = []
        for x, y in zip(us, vs):
            if not enough(2): pairs.append(None); continue
            i = picked(floored, x); rest = floored.copy(); rest[i] = 0
            pairs.append((negatives[order[i]], negatives[order[picked(rest, y)]]))
        return pairs
    def span(low_high, us): return [low_high[0] + (low_high[1] - low_high[0]) * x for x in us]
    def mixtures(k, low_high, form): out.extend(None if n is None else unit(form(s, n)) for n, s in [*zip(one(take(k)), span(low_high, take(k)))])
    def pairs(k, low_high): out.extend(None if n is None else unit(s*n[0] + (1 - s)*n[1]) for n, s in [*zip(two(take(k), take(k)), span(low_high, take(k)))])
    if config.strategy == 'mochi':
        pairs(config.mixed, config.mixed_range); mixtures(config.with_anchor, config.anchor_range, lambda s, n: s*anchor + (1 - s)*n)
        return out
    for kind in config.types:
        k = config.each
        if kind == 1: mixtures(k, config.interpolation, lambda s, n: s*anchor + (1 - s)*n)
        elif kind == 2: mixtures(k, config.extrapolation, lambda s, n: n + s*(n - anchor))
        elif kind == 3: pairs(k, config.mixup)
        elif kind == 4: out.extend(None if n is None else unit(n + config.noise * torch.from_numpy(norm.ppf(z))) for n, z in [*zip(one(take(k)), [np.array(take(len(anchor))) for _ in range(k)])])
        else:
            grad = torch.autograd.functional.jacobian(lambda n: n @ anchor, negatives[0])                # of sim(q, n) in n
            step = config.perturbed_step * grad if kind == 5 else config.adversarial_step * grad.sign()
            out.extend(None if n is None else unit(n + step) for n in one(take(k)))
    return out


@settings(max_examples=80, deadline=None)
@given(situations())
def test_equals_the_formulas_one_anchor_at_a_time(situation):
    anchors, negatives, mask, config, weights, u = situation
    made = synthesise(anchors, negatives, mask, config, log_weights=weights, draws=u if u.shape[1] else None)
    allowed = usable(mask, weights, config)
    profile = profile_negatives(anchors, negatives, mask, config, log_weights=weights)
    for i, anchor in enumerate(anchors):
        order = profile.index[i][profile.found[i]].tolist()
        assert is_profile(order, anchor, negatives, allowed[i], config)
        expected = written_out(anchor, negatives, order, None if weights is None else weights[i], config, u[i])
        assert len(expected) == len(made.kind) == made.features.shape[1]
        for k, x in enumerate(expected):
            assert made.found[i, k] == (x is not None)
            if x is not None: assert_close(made.features[i, k], x, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(situations(), st.sampled_from([F64, torch.float32, torch.float16, torch.bfloat16]))
def test_recipes_give_the_features_back_and_no_masked_negative_is_a_parent(situation, dtype):
    anchors, negatives, mask, config, weights, u = situation
    anchors, negatives = anchors.to(dtype), negatives.to(dtype)
    made = synthesise(anchors, negatives, mask, config, log_weights=weights, draws=u if u.shape[1] else None)
    wide = torch.promote_types(dtype, torch.float32)
    assert made.features.dtype == made.mixing.dtype == made.anchor_mix.dtype == wide and made.features.isfinite().all()
    assert_close(made.features.norm(dim=2), torch.ones(made.found.shape, dtype=wide))
    raw = made.anchor_mix[..., None] * anchors.to(wide)[:, None] + (made.mixing[..., None] * negatives.to(wide)[made.parents.clamp(min=0)]).sum(2)
    exact = made.found & made.exact_mixture
    assert_close(F.normalize(raw, dim=2)[exact], made.features[exact], rtol=1e-4, atol=1e-4)
    there = made.parents >= 0
    who = torch.arange(len(anchors))[:, None, None].expand_as(there)
    assert usable(mask, weights, config)[who[there], made.parents[there]].all()
    assert (made.mixing[~there] == 0).all() and (there.any(2) == made.found).all() and (made.anchor_mix[~made.found] == 0).all()


@settings(max_examples=40, deadline=None)
@given(situations(), st.data())
def test_a_share_of_the_anchors_makes_what_the_whole_makes(situation, data):
    anchors, negatives, mask, config, weights, u = situation
    a = len(anchors); start = data.draw(st.integers(0, a)); stop = data.draw(st.integers(start, a))
    run = lambda s, e: synthesise(anchors[s:e], negatives, mask[s:e], config, log_weights=None if weights is None else weights[s:e], draws=u[s:e] if u.shape[1] else None)
    part, whole = run(start, stop), run(0, a)
    assert torch.equal(part.parents, whole.parents[start:stop]); assert_close(part.features, whole.features[start:stop])
    needed = u.shape[1]
    assert torch.equal(anchor_draws(a, needed, 3, 4, stream=1, start=start, stop=stop), anchor_draws(a, needed, 3, 4, stream=1)[start:stop])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 12))
def test_strata_are_those_of_array_split(count, places, strata):
    count = min(count, places)
    where, there = strata_places(torch.tensor([count]), places, strata)
    assert where.shape == (1, strata, -(-places // strata))
    assert [w[t].tolist() for w, t in zip(where[0], there[0])] == [x.tolist() for x in np.array_split(np.arange(count), strata)]


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('weighted', [False, True])
def test_gradcheck(strategy, weighted):
    config = SynthesisConfig(strategy, hardest=5, strata=2, hardness_temperature=0.3, mixed=2, with_anchor=2, each=1, detach=False, gate=0.2 if weighted else 0.)
    mask = torch.rand(4, 9, generator=make_generator(3)) < 0.7; mask[3] = False; mask[2] = False; mask[2, 4] = True
    weights = torch.randn(4, 9, generator=make_generator(4), dtype=F64) if weighted else None
    u = anchor_draws(4, draws_needed(config, 5), 0, 0)
    make = lambda a, n: synthesise(a, n, mask, config, log_weights=weights, draws=u if u.shape[1] else None).features
    assert torch.autograd.gradcheck(make, (units(0, 4, 5).requires_grad_(), units(1, 9, 5).requires_grad_()))


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_gradient_is_finite_where_nothing_was_found_and_absent_when_detached(strategy):
    config = SynthesisConfig(strategy, hardest=4, strata=2, detach=False)
    a, n = units(0, 3, 5).requires_grad_(), torch.stack([units(1, 5), -units(1, 5)]).requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    synthesise(a, n, mask, config, generator=make_generator(0)).similarity(a).sum().backward()
    assert a.grad.isfinite().all() and n.grad.isfinite().all()
    made = synthesise(a, n, mask, SynthesisConfig(strategy, hardest=4, strata=2), generator=make_generator(0))
    assert not any(x.requires_grad for x in (made.features, made.mixing, made.anchor_mix))


def test_the_limits_of_the_temperature():
    a, n = units(0, 5, 8), units(1, 20, 8)
    profile = profile_negatives(a, n, config=SynthesisConfig(hardest=7))
    cold, hot = (synthesise(a, n, None, SynthesisConfig(hardest=7, strata=1, hardness_temperature=t)).features[:, 0] for t in (1e-300, math.inf))
    assert_close(cold, n[profile.index[:, 0]]); assert_close(hot, F.normalize(n[profile.index].mean(1), dim=1))
    single = synthesise(a, n.float().double(), None, SynthesisConfig(hardest=7, strata=7))
    assert_close(single.features, n.float().double()[profile.index])                                     # strata of one are the profile
    for low in (torch.float16, torch.bfloat16): assert synthesise(a.to(low), n.to(low), None, SynthesisConfig(hardest=7, strata=1, hardness_temperature=1e-300)).features.isfinite().all()


def test_equal_hardness_weighs_equally_and_ties_go_to_the_lower_row():
    e = torch.eye(6, dtype=F64); a = torch.full((1, 6), 6**-0.5, dtype=F64)
    made = synthesise(a, e, None, SynthesisConfig(hardest=4, strata=2))
    assert made.parents.tolist() == [[[0, 1], [2, 3]]]; assert_close(made.mixing, torch.full((1, 2, 2), 0.5, dtype=F64))
    assert_close(made.similarity(a), torch.full((1, 2), 3**-0.5, dtype=F64))


def test_damping_by_hand():
    e = torch.eye(3, dtype=F64)[:2]; a = F.normalize(torch.ones(1, 3, dtype=F64), dim=1)
    log_w = torch.tensor([[1., 3.]], dtype=F64).log()
    made = synthesise(a, e, None, SynthesisConfig(hardest=2, strata=1), log_weights=log_w)
    assert_close(made.mixing, torch.tensor([[[0.25, 0.75]]], dtype=F64)); assert_close(made.features[0, 0], torch.tensor([1., 3., 0.], dtype=F64) / 10**0.5)
    plain = synthesise(a, e, None, SynthesisConfig(hardest=2, strata=1, damp=False), log_weights=log_w)
    assert_close(plain.mixing, torch.full((1, 1, 2), 0.5, dtype=F64))
    gated = synthesise(a, e, None, SynthesisConfig(hardest=2, strata=1, gate=2.), log_weights=log_w)
    assert gated.parents.tolist() == [[[1, -1]]]; assert_close(parents_mean(gated, log_w.exp()), torch.tensor([[3.]], dtype=F64))


def test_the_gate_keeps_what_weighs_as_much_and_a_cold_softmax_keeps_the_weights_of_ties():
    e = torch.eye(3, dtype=F64); a = F.normalize(torch.ones(1, 3, dtype=F64), dim=1)
    log_w = torch.tensor([[1., 3., 2.]], dtype=F64).log()
    made = synthesise(a, e, None, SynthesisConfig(hardest=3, strata=1, gate=2., hardness_temperature=1e-300), log_weights=log_w)
    assert made.parents.tolist() == [[[1, 2, -1]]]; assert_close(made.mixing, torch.tensor([[[0.6, 0.4, 0.]]], dtype=F64))


def test_parents_that_cancel_have_no_direction():
    n = torch.stack([units(1, 5), -units(1, 5)])
    made = synthesise(units(0, 2, 5), n, None, SynthesisConfig(hardest=2, strata=1, hardness_temperature=math.inf))
    assert not made.found.any() and (made.parents == -1).all() and not made.mixing.any(); assert_close(made.features.norm(dim=2), torch.ones(2, 1, dtype=F64))


def test_draws_on_the_edge_between_two_and_far_down_the_line():
    e, a = torch.eye(4, dtype=F64), F.normalize(torch.tensor([[4., 3., 2., 1.]], dtype=F64), dim=1)
    config = SynthesisConfig('mochi', mixed=0, with_anchor=4)
    made = synthesise(a, e, None, config, draws=torch.tensor([[0., 0.25, 0.5, 0.75, 0., 0., 0., 0.]], dtype=F64))
    assert made.parents[0, :, 0].tolist() == [0, 1, 2, 3]; assert_close(made.features[0], e)
    log_w = torch.tensor([[0., -70., -70., -math.inf]], dtype=F64)                                        # far below the rounding of the first
    seen = synthesise(a, e, None, SynthesisConfig('mochi', mixed=400, with_anchor=0), log_weights=log_w, generator=make_generator(0)).parents[0]
    assert (seen[:, 0] == 0).all() and 150 < int((seen[:, 1] == 1).sum()) < 250 and (seen[:, 1] != 3).all()


def test_parents_come_as_often_as_their_weights_say():
    n, times = 5, 30000
    e = torch.eye(n, dtype=F64); a = F.normalize(torch.arange(n, 0, -1).double(), dim=0)[None]             # hardness falls with the row
    w = torch.tensor([[0.1, 2., 1e-12, 0.5, 1.]], dtype=F64); mask = torch.tensor([[True]*4 + [False]])
    made = synthesise(a, e, mask, SynthesisConfig('mochi', mixed=times, with_anchor=times), log_weights=w.log(), generator=make_generator(0))
    pairs, single = made.parents[0, :times], made.parents[0, times:, 0]
    p = w[0].masked_fill(~mask[0], 0.); p = p / p.sum()
    seen = single.bincount(minlength=n)
    assert seen[2] == 0 and seen[4] == 0 and (made.parents[0, times:, 1] == -1).all() and (pairs[:, 0] != pairs[:, 1]).all()
    big = p > 1e-6
    assert chisquare(seen[big].numpy(), (times * p[big] / p[big].sum()).numpy()).pvalue > 1e-3
    both = torch.stack([pairs[:, 0]*n + pairs[:, 1]]).flatten().bincount(minlength=n*n).view(n, n)
    expected = p[:, None] * p / (1 - p[:, None]); expected.fill_diagonal_(0); keep = expected > 1e-6
    assert chisquare(both[keep].numpy(), (times * expected[keep] / expected[keep].sum()).numpy()).pvalue > 1e-3
    few = synthesise(a, e, torch.tensor([[True, False, True, False, False]]), SynthesisConfig('mochi', mixed=200, with_anchor=1), log_weights=w.log(), generator=make_generator(1))
    assert few.found.all() and few.parents[0, :200].sort(dim=1).values.unique(dim=0).tolist() == [[0, 2]]         # of two, however unlike, both


def test_shares_and_noise_follow_their_distributions():
    times = 4000
    made = synthesise(units(0, 1, 16), units(1, 40, 16), None, SynthesisConfig('synco', hardest=40, each=(times, times, times, times, 1, 1), noise=0.02), generator=make_generator(2))
    mix = {k: made.anchor_mix[0, torch.tensor([x == k for x in made.kind])] for k in TYPES}
    assert 0 <= mix['interpolated'].min() < 0.01 and 0.49 < mix['interpolated'].max() < 0.5
    assert -1.5 < mix['extrapolated'].min() < -1.49 and -1.01 < mix['extrapolated'].max() <= -1
    assert_close(mix['perturbed'], torch.tensor([0.01], dtype=F64)); assert not mix['mixup'].any() and not mix['adversarial'].any()
    here = torch.tensor([k == 'noisy' for k in made.kind])
    parents = units(1, 40, 16)[made.parents[0, here, 0]]
    off = made.features[0, here] - parents
    assert abs(float(off.std()) - 0.02) < 0.001 and abs(float(off.mean())) < 0.001


def test_passing_and_the_summary_by_hand():
    e = torch.eye(4, dtype=F64); half = torch.full((1, 4), 0.5, dtype=F64)
    for strata, similarity, passing in ((1, 1., 1), (2, 0.5**0.5, 0), (4, 0.5, 0)):
        made = synthesise(half, e, None, SynthesisConfig(hardest=4, strata=strata))
        row = synthesis_summary(made, half, torch.tensor([0.9]))['all']
        assert row == dict(made=strata, missing=0, similarity=pytest.approx(similarity), passing=passing, passing_share=passing / strata)
    equal = synthesise(half, e[:1], None, SynthesisConfig(hardest=1, strata=1))
    assert not equal.passing(half, torch.tensor([0.5])).any()                                             # as close is not closer


def test_ids_and_masks_leave_out_the_same():
    a, n = units(0, 6, 4), units(1, 12, 4)
    ids, other = torch.arange(6) % 3, torch.arange(12) % 4
    config = SynthesisConfig(hardest=5, strata=2)
    by_ids, by_mask = synthesise(a, n, config=config, anchor_ids=ids, negative_ids=other), synthesise(a, n, ids[:, None] != other, config)
    assert torch.equal(by_ids.parents, by_mask.parents)
    both = synthesise(a, n, other.expand(6, 12) != 3, config, anchor_ids=ids, negative_ids=other)
    there = both.parents >= 0
    assert (other[both.parents[there]] != 3).all() and (other[both.parents] != ids[:, None, None])[there].all()


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_nothing_to_use(strategy):
    a, n, config = units(0, 3, 4), units(1, 5, 4), SynthesisConfig(strategy, hardest=4, strata=2)
    s = len(config.kinds)
    for negatives, mask in ((n, torch.zeros(3, 5, dtype=torch.bool)), (n[:0], None), (n[:0], torch.zeros(3, 0, dtype=torch.bool))):
        made = synthesise(a, negatives, mask, config, generator=make_generator(0))
        assert made.features.shape == (3, s, 4) and not made.found.any() and (made.parents == -1).all()
        assert synthesis_summary(made, a, torch.zeros(3))['all']['missing'] == 3*s and parents_mean(made, torch.zeros(3, len(negatives))).isnan().all()
    assert synthesise(a[:0], n, None, config, generator=make_generator(0)).features.shape == (0, s, 4)
    alone = synthesise(a[:1], n[:1], torch.zeros(1, 1, dtype=torch.bool), config, generator=make_generator(0))
    assert not alone.found.any()


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_autocast_changes_nothing(strategy):
    a, n = units(0, 6, 16, dtype=torch.float32), units(1, 30, 16, dtype=torch.float32)
    config = SynthesisConfig(strategy, hardest=12, detach=False)
    plain = synthesise(a, n, None, config, generator=make_generator(0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = synthesise(a, n, None, config, generator=make_generator(0)); similarity = low.similarity(a)
    assert torch.equal(plain.features, low.features) and torch.equal(similarity, plain.similarity(a))


def test_in_the_cost():
    "Detached or not, synthetics raise the loss; weight 0 and synthetics that all are left out change nothing."
    a, b = units(0, 8, 6), units(1, 8, 6)
    made = synthesise(a, b, ~torch.eye(8, dtype=torch.bool), SynthesisConfig(hardest=4, strata=2))
    real = 10 * a @ b.T
    def cost(made, anchors, real, weight): return (torch.cat([real, 10 * made.similarity(anchors) + math.log(weight)], 1).logsumexp(1) - real.diagonal()).mean()
    plain = -real.log_softmax(1).diagonal().mean()
    other = -real.T.log_softmax(1).diagonal().mean()
    for kw in (dict(synthetic_weight=0.), dict(synthetic_text_found=torch.zeros_like(made.found))): assert_close(itcontrast(a, b, 10., synthetic_texts=made.features, **kw), (plain + other) / 2)
    assert made.found.all() and cost(made, a, real, 0.5) > plain
    back = synthesise(b, a, ~torch.eye(8, dtype=torch.bool), SynthesisConfig(hardest=4, strata=2))
    both = itcontrast(a, b, 10., synthetic_texts=made.features, synthetic_images=back.features, synthetic_text_found=made.found, synthetic_image_found=back.found, synthetic_weight=0.5)
    assert_close(both, (cost(made, a, real, 0.5) + cost(back, b, real.T, 0.5)) / 2)


def test_from_a_batch_a_queue_and_a_mined_pool():
    "Material of three kinds below each other is one set of negatives; own rows never enter, whichever part they lie in; a pool of all that there is gives what the whole set gives."
    from vlwb.negatives.both_ways import MinedPool, Pool, synthesise_both_ways
    images, texts, owner = units(0, 20, 6), units(1, 60, 6), torch.arange(60) % 20
    ids = torch.arange(0, 20, 3); index = ids + 20                                                     # a batch: 7 images with their second captions
    config = SynthesisConfig(hardest=12, strata=3)
    queue = dict(image_queue=units(2, 9, 6), text_queue=units(3, 9, 6), queue_ids=torch.arange(9))
    mined = MinedPool(20, 60, 6, 5).double().mine_(images, texts, owner)
    for anchor, row in enumerate(mined.texts_of_images.tolist()):                                       # a plain sort
        assert row == [j for j in (images[anchor] @ texts.T).argsort(descending=True).tolist() if owner[j] != anchor][:5]
    rows = mined.of_batch(ids, index)
    assert not set(rows[0].tolist()) & set(index.tolist()) and not set(rows[1].tolist()) & set(ids.tolist())
    assert set(rows[0].tolist()) | set(index.tolist()) >= set(mined.texts_of_images[ids].flatten().tolist())
    pools = Pool(mined.text_features[rows[0]], owner[rows[0]]), Pool(mined.image_features[rows[1]], rows[1])
    made = synthesise_both_ways(images[ids], texts[index], ids, config, queue=queue, pools=pools)
    for one, anchors, other, pool, name in ((made.of_images, images[ids], texts[index], pools[0], 'text_queue'), (made.of_texts, texts[index], images[ids], pools[1], 'image_queue')):
        laid, whose = torch.cat([other, pool.features, queue[name]]), torch.cat([ids, pool.ids, queue['queue_ids']])
        assert_close(one.features, synthesise(anchors, laid, ids[:, None] != whose, config).features, rtol=0, atol=0)
        assert (whose[one.parents] != ids[:, None, None])[one.parents >= 0].all()
        assert {'batch', 'pool', 'queue'} == {'batch' if j < 7 else 'pool' if j < 7 + len(pool.ids) else 'queue' for j in one.parents.unique().tolist() if j >= 0}
    hard = synthesise_both_ways(images[ids], texts[index], ids, SynthesisConfig(hardest=4, strata=4), pools=tuple(Pool(f[r], w[r]) for f, r, w in zip((texts, images), (MinedPool(20, 60, 6, 4).double().mine_(images, texts, owner)).of_batch(ids, index), (owner, torch.arange(20)))))
    whole = synthesise(images[ids], texts, ids[:, None] != owner, SynthesisConfig(hardest=4, strata=4))
    assert_close(hard.of_images.features, whole.features)                                               # K mined for a profile of K: the hardest of the whole set


def test_confirmed_matches_are_not_mined_and_take_no_place():
    from vlwb.negatives.both_ways import MinedPool
    images, texts, owner = units(0, 8, 5), units(1, 24, 5), torch.arange(24) // 3
    known = torch.rand(8, 24, generator=make_generator(2)) < .3
    mined = MinedPool(8, 24, 5, 30).double().mine_(images, texts, owner, known=lambda i, j: known[i][:, j])
    for anchor, row in enumerate(mined.texts_of_images): assert sorted(row[row >= 0].tolist()) == [j for j in range(24) if owner[j] != anchor and not known[anchor, j]]
    for caption, row in enumerate(mined.images_of_texts): assert sorted(row[row >= 0].tolist()) == [i for i in range(8) if owner[caption] != i and not known[i, caption]]
    with pytest.raises(ValueError, match='k must be'): MinedPool(8, 24, 5, 0)


def test_an_index_of_faiss_mines_the_same():
    pytest.importorskip('faiss')
    from vlwb.negatives.both_ways import MinedPool
    images, texts, owner = units(0, 30, 6, dtype=torch.float32), units(1, 60, 6, dtype=torch.float32), torch.arange(60) // 2
    exact, flat, graph = (MinedPool(30, 60, 6, 4).mine_(images, texts, owner, backend=b, index=i) for b, i in (('exact', 'Flat'), ('faiss', 'Flat'), ('faiss', 'HNSW16')))
    assert exact.texts_of_images.equal(flat.texts_of_images) and exact.images_of_texts.equal(flat.images_of_texts)
    assert (graph.texts_of_images >= 0).all() and (owner[graph.texts_of_images.long()] != torch.arange(30)[:, None]).all()


def test_uniform_noise_is_what_gumbel_noise_is_made_of():
    u = uniform_noise((7, 9), 2, 3, stream=1)
    assert ((u > 0) & (u < 1)).all(); assert torch.equal(-(-u.log()).log(), gumbel_noise((7, 9), 2, 3, stream=1))
    assert not (anchor_draws(7, 9, 2, 3, stream=1) == u).any() and not (anchor_draws(7, 9, 2, 3) == anchor_draws(7, 9, 2, 4)).any()


@pytest.mark.parametrize('kw,message', [
    (dict(strategy='hard'), 'strategy must be one of'), (dict(strata=0), 'strata must lie'), (dict(hardest=3, strata=4), 'strata must lie'), (dict(hardness_temperature=math.nan), 'hardness_temperature'), (dict(gate=math.inf), 'gate'),
    (dict(types=(1, 1)), 'each once'), (dict(types=(0,)), 'types'), (dict(each=(1,)*5), 'each must be'), (dict(each=-1), 'each must be'), (dict(mixed=-1), 'mixed and with_anchor'), (dict(mixup=(0.5,)), 'mixup must be a range'),
    (dict(extrapolation=(2., 1.)), 'extrapolation'), (dict(interpolation=(0., 1.5)), '<= 1'), (dict(noise=math.nan), 'noise'), (dict(strategy='synco', each=0), 'makes no synthetic'), (dict(strategy='synco', types=()), 'makes no synthetic')])
def test_configurations_that_are_refused(kw, message):
    with pytest.raises(ValueError, match=message): SynthesisConfig(**kw)


def test_arguments_that_are_refused():
    a, n = units(0, 3, 4), units(1, 5, 4); mochi = SynthesisConfig('mochi', mixed=1, with_anchor=1)
    for kw, message in ((dict(config=mochi), 'either a generator or draws'), (dict(config=mochi, draws=torch.rand(3, 5), generator=make_generator(0)), 'either a generator'), (dict(config=mochi, draws=torch.rand(2, 5)), r'\(3, 5\)'), (dict(config=mochi, draws=torch.ones(3, 5)), r'\[0,1\)'),
                        (dict(config=mochi, draws=torch.full((3, 5), math.nan)), r'\[0,1\)'), (dict(mask=torch.ones(3, 5)), 'mask must be a bool'), (dict(log_weights=torch.zeros(5, 3)), 'log_weights must be'), (dict(log_weights=torch.full((3, 5), math.inf)), 'NaN or infinity'),
                        (dict(log_weights=[0.]), 'log_weights must be'), (dict(config=SynthesisConfig(gate=0.1)), 'needs log_weights')):
        with pytest.raises(ValueError, match=message): synthesise(a, n, **kw)
    for x, y in ((a, n[:, :3]), (a.float(), n), (a[0], n), (a * math.nan, n)):
        with pytest.raises(ValueError): synthesise(x, y)
    made = synthesise(a, n)
    with pytest.raises(ValueError, match='positive_similarity'): made.passing(a, torch.zeros(3, 1))
    with pytest.raises(ValueError, match='values'): parents_mean(made, torch.zeros(3, 2))


# Pictures -------------------------------------------------------------------------------------------------------------------------------------------

def test_a_plane_stays_where_it_was_laid(monkeypatch):
    "Principal components are those of the singular values; UMAP, which notebook 71 runs, gets its settings."
    import sys, types
    from vlwb.viz.synthesis import Projection
    x, y = units(0, 40, 8, dtype=torch.float32), units(1, 2, 3, 8, dtype=torch.float32)
    plane = Projection(x)
    before, centred = plane.transform(x), x.numpy() - x.numpy().mean(0)
    assert before.shape == (40, 2) and plane.transform(y).shape == (2, 3, 2) and plane.transform(y[:0]).shape == (0, 3, 2)
    np.testing.assert_allclose(plane.transform(y), np.stack([plane.transform(z) for z in y]), atol=1e-5)
    np.testing.assert_allclose(plane.transform(x), before, atol=1e-6)                                    # drawing others moved nothing
    np.testing.assert_allclose((before**2).sum(0), np.linalg.svd(centred, compute_uv=False)[:2]**2, rtol=1e-4)
    asked = []
    class UMAP:
        def __init__(self, **kw): asked.append(kw)
        def fit(self, x): return self
        def transform(self, x): return x[:, :2]
    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=UMAP))
    assert Projection(x[:6], 'umap', seed=3, neighbours=9).transform(y).shape == (2, 3, 2) and asked == [dict(n_neighbors=5, metric='cosine', random_state=3)]
    for bad, word in ((x[:2], 'at least three rows'), (x[:, :1], 'D at least 2'), (x * math.nan, 'NaN or infinity'), (x[0], 'at least three rows')):
        with pytest.raises(ValueError, match=word): Projection(bad)
    with pytest.raises(ValueError, match='width 8'): plane.transform(x[:, :3])
    with pytest.raises(ValueError, match="'pca' or 'umap'"): Projection(x, 'tsne')


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_a_picture_shows_what_a_synthetic_is_made_of(strategy):
    "As many lines as parents with a share, every kind in the legend; text when there is nothing to show."
    import matplotlib; matplotlib.use('Agg')
    from vlwb.viz.synthesis import Projection, plot_synthesis
    a, n = units(0, 2, 8, dtype=torch.float32), units(1, 30, 8, dtype=torch.float32)
    made = synthesise(a, n, torch.tensor([[True], [False]]).expand(2, 30), SynthesisConfig(strategy, hardest=6, strata=2, mixed=3, with_anchor=2, each=1), generator=make_generator(0))
    plane = Projection(n)
    draw = lambda i, **kw: plot_synthesis(plane.transform(a[i]), plane.transform(a[i]), plane.transform(n), plane.transform(made.features[i]), made.kind, made.parents[i], made.mixing[i], made.found[i], torch.arange(30) % 7 == 0, **kw)
    fig = draw(0, title='one anchor')
    ax = fig.axes[0]
    shares = ((made.parents[0] >= 0) & (made.mixing[0] != 0)).sum(1)
    assert len(ax.lines) == int(shares.clamp(max=12).sum()) and len(draw(0, most_lines=1).axes[0].lines) == int((shares > 0).sum())
    shown = [t.get_text() for t in fig.legends[0].get_texts()]
    assert set(dict.fromkeys(made.kind)) | {'anchor', 'its positive'} <= set(shown) and 'one anchor' in (ax.get_title(), ax.get_title('left'))
    assert f'{len(made.kind)} synthetics' in fig.alt
    empty = draw(1)
    assert 'too few negatives' in ' '.join(t.get_text() for t in [*empty.texts, *(t for x in empty.axes for t in x.texts)])
