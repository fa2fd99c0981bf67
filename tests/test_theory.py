"Property tests of the theory's worlds and of the sampling of negatives: nothing that one draw or one table could pass by luck."
import math
import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import make_generator
from vlwb.negatives.sampling import gumbel_noise, negative_log_probabilities, sample_negatives
from vlwb.negatives.theory import (DiscreteWorld, GaussianWorld, bound_limit, centred, information_bound, mean_one, negative_information,
                                   optimal_critic, random_world, ring_information, ring_world, self_weighted_critic)

few = settings(max_examples=25, deadline=None)
seeds, sharpnesses, batch_sizes = st.integers(0, 10**6), st.floats(0, 3), st.sampled_from([2, 3, 7, 64, 1000, 10**6, math.inf])


def a_world(seed, sharpness, shape=(4, 5)):
    g = make_generator(seed)
    return random_world(*shape, sharpness, g), g


def normal(g, *shape): return torch.randn(shape, generator=g, dtype=torch.float64)


# --- theory

@few
@given(seeds, sharpnesses, batch_sizes, st.floats(0, 4))
def test_no_critic_and_no_batch_size_breaks_the_bound(seed, sharpness, size, noise):
    world, g = a_world(seed, sharpness)
    best = information_bound(world, world.log_ratio, size)
    assert information_bound(world, world.log_ratio + noise*normal(g, 4, 5), size) <= best + 1e-8
    assert best <= min(world.mutual_information, math.log(size)) + 1e-8


@few
@given(seeds, sharpnesses, batch_sizes, st.floats(0, 2))
def test_dependent_negatives_are_bounded_by_the_divergence(seed, sharpness, size, dependence):
    world, g = a_world(seed, sharpness)
    negatives = (dependence*normal(g, 4, 5)).softmax(1)
    given = world.joint / world.image_marginal[:,None]
    best = information_bound(world, (given/negatives).log(), size, negatives=negatives)
    assert information_bound(world, normal(g, 4, 5), size, negatives=negatives) <= best + 1e-8 <= bound_limit(world, negatives=negatives) + 2e-8


@few
@given(seeds, sharpnesses, st.floats(0, 1))
def test_eq_26_holds_for_added_false_negatives(seed, sharpness, share):
    world, _ = a_world(seed, sharpness)
    negatives = (1 - share)*world.text_marginal + share * world.joint/world.image_marginal[:,None]
    assert bound_limit(world, negatives=negatives) <= world.mutual_information - negative_information(world, negatives) + 1e-10


@few
@given(seeds, st.floats(0.1, 3), st.floats(0.1, 2))
def test_eq_40_fails_for_independent_negatives_and_holds_for_importance_weights(seed, sharpness, beta):
    world, g = a_world(seed, sharpness)
    log_w = mean_one(world, -beta*world.log_ratio)
    assert world.mean(log_w.exp(), independent=True) == pytest.approx(1, abs=1e-9) and world.mean(world.log_ratio.exp(), independent=True) == pytest.approx(1, abs=1e-9)
    assert world.mean(world.log_ratio, independent=True) < 0 < -world.mean(log_w, independent=True)
    negatives = (1 - 0.7)*world.text_marginal + 0.7 * world.joint/world.image_marginal[:,None]
    importance = (world.text_marginal/negatives).log()
    assert_close(mean_one(world, importance, negatives), importance)
    assert -float((world.image_marginal[:,None]*negatives*importance).sum()) == pytest.approx(negative_information(world, negatives), abs=1e-9)
    assert_close(information_bound(world, world.log_ratio, math.inf, log_weights=importance, negatives=negatives), torch.tensor(world.mutual_information, dtype=torch.float64))


@few
@given(seeds, st.floats(0, 1.5), st.sampled_from([2, 5, 50, 10**7]))
def test_the_integral_is_the_expectation(seed, scale, size):
    "Anchors of one world differ by a constant that the loss cannot see, and two texts of which one never scores leave a binomial sum."
    g = make_generator(seed); high = float(scale*normal(g)); low = -40.
    world = DiscreteWorld(torch.tensor([[0.3, 0.2], [0.1, 0.4]], dtype=torch.float64))
    log_f = torch.tensor([[high, low], [high, low]], dtype=torch.float64)
    p = float(world.text_marginal[0])
    counts = torch.arange(min(size - 1, 60) + 1, dtype=torch.float64)
    if size <= 50:
        chance = torch.tensor(scipy.stats.binom.pmf(counts.numpy(), size - 1, p))
        log_sum = lambda own: torch.logaddexp(torch.tensor(own, dtype=torch.float64), torch.logaddexp(counts.log() + high, (size - 1 - counts).log() + low))
        expected = sum(float(world.joint[:,k].sum()) * (math.log(size) + own - float((chance*log_sum(own)).sum())) for k, own in enumerate((high, low)))
        assert float(information_bound(world, log_f, size)) == pytest.approx(expected, abs=1e-7)
    assert_close(information_bound(world, log_f + 3*normal(g, 2, 1), size), information_bound(world, log_f, size), rtol=0, atol=1e-7)


@pytest.mark.parametrize('far', [0., 30., 200.])
def test_the_integral_with_a_critic_far_from_sensible(far):
    "N = 2 is a mean over pairs of texts; the positive far above or below the negatives."
    world, g = a_world(1, 1., (2, 3))
    log_f = normal(g, 2, 3); log_f[0,0] += far; log_f[1,1] -= far
    given = world.joint / world.image_marginal[:,None]
    expected = sum(float(world.image_marginal[v]*given[v,a]*world.text_marginal[b]) * (math.log(2) - math.log1p(math.exp(min(float(log_f[v,b] - log_f[v,a]), 700)))) for v in range(2) for a in range(3) for b in range(3))
    assert float(information_bound(world, log_f, 2)) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_a_world_without_noise():
    world = ring_world(8, 1)
    values = [float(information_bound(world, world.log_ratio, n)) for n in (2, 8, 64, 10**6, math.inf)]
    assert values == sorted(values) and values[-1] == pytest.approx(math.log(8)) == pytest.approx(world.mutual_information)


def test_the_integral_has_the_right_gradient():
    world, g = a_world(0, 1., (3, 4))
    table, log_w = normal(g, 3, 4).requires_grad_(), normal(g, 3, 4)
    for size in (2, 30, math.inf): torch.autograd.gradcheck(lambda f: information_bound(world, f, size, log_weights=log_w), table)


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.2, 1.2))
def test_the_optimum_is_ratio_over_weight_in_the_limit(seed, spread):
    world, g = a_world(seed, 1.)
    log_w = spread*normal(g, 4, 5)
    assert_close(optimal_critic(world, math.inf, log_weights=log_w), centred(world, world.log_ratio - log_w), rtol=0, atol=1e-4)
    assert_close(optimal_critic(world, 7), centred(world, world.log_ratio), rtol=0, atol=1e-4)
    far = [float((optimal_critic(world, n, log_weights=log_w) - centred(world, world.log_ratio - log_w)).abs().max()) for n in (64, 4096)]
    assert far[1] < far[0]/8 + 1e-4


@settings(max_examples=6, deadline=None)
@given(seeds, st.floats(0., 0.6))
def test_own_similarity_is_a_temperature(seed, kappa):
    world, _ = a_world(seed, 1.)
    assert_close(self_weighted_critic(world, kappa, math.inf), centred(world, world.log_ratio) / (1 - kappa), rtol=0, atol=1e-3)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(1, 3))
def test_ring_in_closed_form(classes, matches, noise, each):
    matches = min(matches, classes)
    world = ring_world(classes, matches, noise, each)
    assert world.mutual_information == pytest.approx(ring_information(matches/classes, noise), abs=1e-9)
    if matches < classes and noise < 0.999: assert world.false_negative_share == pytest.approx(matches/classes)


@few
@given(st.integers(1, 6), st.floats(-0.95, 0.95), st.floats(-0.95, 0.95))
def test_gaussian_in_closed_form(dims, rho, other):
    world = GaussianWorld(dims, rho)
    assert world.mean_log_ratio <= 1e-12 <= world.mutual_information + 1e-11
    assert world.divergence(other) >= -1e-9 and world.divergence(0.) == pytest.approx(world.mutual_information) and world.divergence(rho) == pytest.approx(0, abs=1e-9)
    joint = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64))
    v, t = normal(make_generator(dims), 2, 3, dims)
    alone = torch.distributions.Normal(torch.tensor(0.).double(), torch.tensor(1.).double())
    expected = (joint.log_prob(torch.stack([v, t], -1)) - alone.log_prob(v) - alone.log_prob(t)).sum(-1)
    assert_close(world.log_ratio(v, t), expected)


# --- sampling

@few
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.sampled_from([0., 1., 100., 1e6, 1e300]), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_a_draw_never_fails_and_never_takes_what_it_must_not(seed, n, m, share, scale, dtype):
    g = make_generator(seed)
    similarity = torch.rand(n, m, generator=g).mul(2).sub(1).to(dtype)
    positives, keep = torch.rand(n, m, generator=g) < share/2, torch.rand(n, m, generator=g) >= share/2
    log_weights = torch.randn(n, m, generator=g).mul(1e30).masked_fill(torch.rand(n, m, generator=g) < 0.2, -math.inf)
    got = sample_negatives(similarity, positives, scale, log_weights=log_weights, keep=keep, generator=g)
    allowed = ~positives & keep & (log_weights > -math.inf)
    assert torch.equal(got.found, allowed.any(1)) and got.missing == int((~allowed.any(1)).sum())
    assert allowed[torch.arange(n), got.index][got.found].all() and (got.index[~got.found] == 0).all()


@settings(max_examples=8, deadline=None)
@given(seeds, st.floats(0, 10), st.booleans())
def test_frequencies_are_the_softmax(seed, scale, by_noise):
    g, times = make_generator(seed), 20000
    similarity, positives = torch.rand(1, 6, generator=g), torch.tensor([[True, False, False, False, False, False]])
    keep = ~positives.flip(1)
    source = dict(noise=gumbel_noise((times, 6), seed, 0)) if by_noise else dict(generator=g)
    drawn = sample_negatives(similarity.expand(times, 6), positives.expand(times, 6), scale, keep=keep.expand(times, 6), **source).index
    p = negative_log_probabilities(similarity, positives, scale, keep=keep).exp()[0].double()
    assert_close(p[1:5], (similarity[0,1:5].double()*scale).softmax(0), rtol=1e-5, atol=1e-7)
    seen = drawn.bincount(minlength=6).double()
    assert seen[0] == seen[5] == 0
    assert ((seen - times*p).abs() <= 6*(times*p*(1 - p)).sqrt() + 3).all()


@few
@given(seeds, st.integers(0, 1000), st.integers(1, 12), st.integers(1, 12), st.data())
def test_a_share_of_the_rows_draws_what_one_process_does(seed, step, n, m, data):
    a = data.draw(st.integers(0, n)); b = data.draw(st.integers(a, n))
    whole = gumbel_noise((n, m), seed, step, stream=1)
    part = gumbel_noise((n, m), seed, step, stream=1, start=a, stop=b)
    assert torch.equal(part, whole[a:b]) and whole.isfinite().all()
    similarity, positives = torch.rand(n, m, generator=make_generator(seed)), torch.rand(n, m, generator=make_generator(step)) < 0.3
    one, here = sample_negatives(similarity, positives, 5., noise=whole), sample_negatives(similarity[a:b], positives[a:b], 5., noise=part)
    assert torch.equal(here.index, one.index[a:b]) and torch.equal(here.found, one.found[a:b])


@few
@given(seeds, st.floats(1e-3, 30), st.floats(-5, 5))
def test_a_constant_of_a_row_changes_nothing(seed, scale, shift):
    g = make_generator(seed); similarity = torch.randn(3, 5, generator=g, dtype=torch.float64); noise = gumbel_noise((3, 5), seed, 1)
    none = torch.zeros(3, 5).bool()
    assert torch.equal(sample_negatives(similarity + shift, none, scale, noise=noise).index, sample_negatives(similarity, none, scale, noise=noise).index)


@pytest.mark.parametrize('name', ['similarity', 'log_weights', 'noise'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_a_number_is_one_clear_error(name, value):
    kw = dict(similarity=torch.zeros(3, 4), log_weights=torch.zeros(3, 4), noise=torch.zeros(3, 4))
    kw[name][2,1] = value
    with pytest.raises(ValueError, match=f'{name}.* first row 2'): sample_negatives(positives=torch.zeros(3, 4).bool(), **kw)
