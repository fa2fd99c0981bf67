"""The loss room as a whole: properties over shapes, dtypes and id patterns; limits; what its import costs."""
import math, subprocess, sys, warnings
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb import core
from vlwb.core import make_generator, same_ids
from vlwb.losses.infonce import anchor_losses, infonce, symmetric_loss
from vlwb.losses.regulation import known_positives, regulation_log_weights, regulation_weights
from vlwb.losses.srcl import srcl, srcl_weights
from vlwb.negatives.weights import alpha_schedule, effective_temperature, hard_removal, removal_log_weights, row_moments

few = settings(max_examples=40, deadline=None)
F64 = torch.float64
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
norms, forms = st.sampled_from(['mean', 'softmax']), st.sampled_from(['spread', 'each'])
temperatures = st.sampled_from([0.01, 0.05, 0.3, 1., math.inf])
alphas = st.sampled_from([0., 1e-3, 0.4, 1.])

def unit(n, d, g, dtype=F64): return F.normalize(torch.randn(n, d, generator=g, dtype=F64), dim=1).to(dtype)

@st.composite
def batches(draw, dtypes=st.just(F64), square=False):
    "Features of a model and of H, ids with repeats, a keep mask that may empty whole rows."
    n, d, g = draw(st.integers(1, 7)), draw(st.integers(2, 6)), make_generator(draw(st.integers(0, 999)))
    m = n if square else draw(st.integers(1, 9))
    dtype = draw(dtypes)
    v, t, hv, ht = unit(n, d, g, dtype), unit(m, d, g, dtype), unit(n, d+1, g, dtype), unit(m, d+1, g, dtype)
    ids = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    of = ids if square else torch.tensor(draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)))
    of = of.clone(); of[0] = ids[0]                     # at least one known positive
    keep = torch.rand(n, m, generator=g) < draw(st.sampled_from([0., 0.5, 1.]))
    return dict(v=v, t=t, hv=hv, ht=ht, ids=ids, of=of, keep=keep)

def written_out(v, t, scale, positives, keep, w_image, w_text, form):
    "Equations 4 and 5 in float64, one anchor and one positive at a time."
    f = (scale * v.double() @ t.double().T).exp()
    def direction(f, positives, keep, w):
        losses = []
        for i in range(len(f)):
            mine = (positives[i] & keep[i]).nonzero().flatten().tolist()
            if not mine: continue
            rest = sum(f[i,j]*w[i,j] for j in range(f.shape[1]) if keep[i,j] and not positives[i,j])
            below = lambda p: rest + (f[i,mine].sum() if form == 'spread' else f[i,p])
            losses.append(-sum(torch.log(f[i,p]/below(p)) for p in mine) / len(mine))
        return sum(losses)/len(losses) if losses else torch.tensor(0., dtype=F64)
    return (direction(f, positives, keep, w_image) + direction(f.T, positives.T, keep.T, w_text.T)) / 2

# --- regulation -----------------------------------------------------------------------------------------------------

@few
@given(batches(dtypes), alphas, temperatures, norms, st.sampled_from([0.1, 1., 20.]))
def test_mean_weight_is_one(batch, alpha, tau_s, norm, delta):
    own, aux = batch['v'] @ batch['t'].T, batch['hv'] @ batch['ht'].T
    positives, keep = same_ids(batch['ids'], batch['of']), batch['keep']
    log_w = regulation_log_weights(own, aux, alpha=alpha, delta=delta, similarity_temperature=tau_s, norm=norm, positives=positives, keep=keep)
    assert log_w.dtype == (F64 if own.dtype == F64 else torch.float32) and not log_w.isnan().any()
    assert (log_w[positives & keep] == 0).all() and (log_w[~keep] == -math.inf).all() and log_w[keep].isfinite().all()
    negatives = ~positives & keep
    count = negatives.sum(1); mean = log_w.exp().masked_fill(~negatives, 0).sum(1)[count > 0] / count[count > 0]
    assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-12 if own.dtype == F64 else 2e-6)

@few
@given(batches(), alphas, st.sampled_from([0.05, 0.3, 1.]))
def test_negative_covariance_under_mean_norm(batch, alpha, tau_s):
    own, aux = batch['v'] @ batch['t'].T, batch['hv'] @ batch['ht'].T
    negatives = ~same_ids(batch['ids'], batch['of'])
    w = regulation_weights(own, aux, alpha=alpha, similarity_temperature=tau_s, positives=~negatives)
    s = alpha*(aux/tau_s).exp() + (1-alpha)*(own/tau_s).exp()
    log_s = s.log().masked_fill(~negatives, 0)
    for x in (log_s, s / s.amax(1, keepdim=True)):
        m = row_moments(w, x, negatives); several = negatives.sum(1) > 1
        assert (m['covariance'][several] <= 1e-12).all()
        varied = several & torch.tensor([len(set(r[n].tolist())) > 1 and float(r[n].std()) > 1e-3 for r, n in zip(x, negatives)])
        assert (m['covariance'][varied] < 0).all()

@few
@given(batches(), norms, temperatures)
def test_values_at_positives_and_removed_pairs_do_not_matter(batch, norm, tau_s):
    own, positives, keep = batch['v'] @ batch['t'].T, same_ids(batch['ids'], batch['of']), batch['keep']
    other = own.masked_fill(positives | ~keep, -0.9)
    kw = dict(alpha=0, similarity_temperature=tau_s, norm=norm, positives=positives, keep=keep)
    assert_close(regulation_log_weights(other, **kw), regulation_log_weights(own, **kw))

def test_regulation_values_by_hand():
    own, aux = torch.tensor([[1., 0., 0., 0.]], dtype=F64), torch.tensor([[0., math.log(2), 0., 0.]], dtype=F64)
    first = torch.tensor([[True, False, False, False]])
    assert_close(regulation_weights(own, aux, positives=first), torch.tensor([[1., .6, 1.2, 1.2]], dtype=F64))
    s = 0.5*aux.exp() + 0.5*own.exp()                   # 1.5, 1, 1 among the negatives
    assert_close(regulation_weights(own, aux, alpha=0.5, positives=first)[:,1:], torch.tensor([[0.75, 1.125, 1.125]], dtype=F64))
    assert_close(regulation_weights(own, aux, alpha=0.5, norm='softmax', delta=3., positives=first)[:,1:], 3*torch.softmax(3/s[:,1:], 1))
    assert_close(regulation_weights(own, aux, delta=7., positives=first), regulation_weights(own, aux, positives=first), rtol=0, atol=0)

# --- the losses against the equations written out -------------------------------------------------------------------

@few
@given(batches(), forms, st.sampled_from([1., 10., 100.]))
def test_infonce_is_the_equation(batch, form, scale):
    v, t, positives, keep = batch['v'], batch['t'], same_ids(batch['ids'], batch['of']), batch['keep']
    g = make_generator(len(v)); lw_image, lw_text = (torch.randn(positives.shape, generator=g, dtype=F64) for _ in range(2))
    got = infonce(v, t, scale, image_ids=batch['ids'], text_image_ids=batch['of'], keep=keep, log_weights_per_image=lw_image, log_weights_per_text=lw_text, multi_positive=form)
    assert_close(got, written_out(v, t, scale, positives, keep, lw_image.exp(), lw_text.exp(), form), rtol=1e-9, atol=1e-9)

@few
@given(batches(), forms, norms, alphas, st.sampled_from([0.1, 1.]))
def test_srcl_is_the_equation(batch, form, norm, alpha, tau_s):
    v, t, positives, keep = batch['v'], batch['t'], same_ids(batch['ids'], batch['of']), batch['keep']
    s = alpha*(batch['hv'] @ batch['ht'].T / tau_s).exp() + (1-alpha)*(v @ t.T / tau_s).exp()
    negatives = ~positives & keep
    raw = (1/s - (1/s).masked_fill(~negatives, 0).amax(1, keepdim=True), 1/s - (1/s).masked_fill(~negatives, 0).amax(0, keepdim=True))
    def w(d):
        x = (1/s if norm == 'mean' else raw[1-d].exp()).masked_fill(~negatives, 0)
        return x * negatives.sum(d, keepdim=True) / x.sum(d, keepdim=True)
    kw = dict(image_ids=batch['ids'], text_image_ids=batch['of'], keep=keep, multi_positive=form)
    got = srcl(v, t, 1/tau_s, aux_image_features=batch['hv'], aux_text_features=batch['ht'], alpha=alpha, similarity_temperature=tau_s, norm=norm, **kw)
    assert_close(got, written_out(v, t, 1/tau_s, positives, keep, w(1), w(0), form), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('scale', [1., 14.3, 100.])
def test_equals_open_clip(scale):
    g = make_generator(0); v, t = unit(64, 32, g, torch.float32).requires_grad_(), unit(64, 32, g, torch.float32).requires_grad_()
    s = torch.tensor(scale, requires_grad=True); labels = torch.arange(64)
    theirs = (F.cross_entropy(s * v @ t.T, labels) + F.cross_entropy(s * t @ v.T, labels)) / 2    # open_clip's ClipLoss, one process
    ours = infonce(v, t, s)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, (v, t, s)), torch.autograd.grad(theirs, (v, t, s))): assert_close(a, b, rtol=1e-5, atol=1e-6*scale)

def test_values_by_hand():
    a, b = 2/math.sqrt(5), 1/math.sqrt(5)               # every row and column has f = 4, 2, 1
    v, t, scale = torch.eye(3), torch.tensor([[a, 0., b], [b, a, 0.], [0., b, a]]), math.log(2)*math.sqrt(5)
    h = torch.tensor([[0., 1, 0], [0, 0, 1], [1, 0, 0]])*math.log(2)
    assert_close(infonce(v, t, scale), torch.tensor(math.log(7/4)))
    assert_close(srcl(v, t, scale, aux_similarity=h), torch.tensor(math.log(5/3)))
    same = torch.ones(12, 1)
    assert_close(infonce(same, same, 30.), torch.tensor(math.log(12)))
    assert_close(infonce(same, same, 30., image_ids=[0]*12), torch.tensor(math.log(12)))          # 'spread' cannot go below log |P|
    assert infonce(same, same, 30., image_ids=[0]*12, multi_positive='each').item() == 0

# --- gradients ------------------------------------------------------------------------------------------------------

@settings(max_examples=12, deadline=None)
@given(batches(), forms)
def test_gradcheck(batch, form):
    v, t, s = batch['v'].requires_grad_(), batch['t'].requires_grad_(), torch.tensor(5., dtype=F64, requires_grad=True)
    w = srcl_weights(v, t, alpha=0, similarity_temperature=0.5, image_ids=batch['ids'], text_image_ids=batch['of'], keep=batch['keep'])
    run = lambda v, t, s: infonce(v, t, s, image_ids=batch['ids'], text_image_ids=batch['of'], keep=batch['keep'], log_weights_per_image=w.log_weights_per_image, log_weights_per_text=w.log_weights_per_text, multi_positive=form)
    assert torch.autograd.gradcheck(run, (v, t, s))

@few
@given(batches(), forms, norms, alphas)
def test_weights_carry_no_gradient(batch, form, norm, alpha):
    leaves = [batch[k].requires_grad_() for k in ('v', 't', 'hv', 'ht')]
    kw = dict(image_ids=batch['ids'], text_image_ids=batch['of'])
    how = dict(aux_image_features=leaves[2], aux_text_features=leaves[3], alpha=alpha, similarity_temperature=0.3, norm=norm)
    w = srcl_weights(*leaves[:2], **how, **kw)
    assert not w.log_weights_per_image.requires_grad and not w.log_weights_per_text.requires_grad
    ours = torch.autograd.grad(srcl(*leaves[:2], 5., **how, **kw, multi_positive=form), leaves, allow_unused=True)
    fixed = infonce(*leaves[:2], 5., log_weights_per_image=w.log_weights_per_image, log_weights_per_text=w.log_weights_per_text, **kw, multi_positive=form)
    for a, b in zip(ours, torch.autograd.grad(fixed, leaves[:2])): assert_close(a, b)
    assert ours[2] is None and ours[3] is None
    leaf = torch.zeros(w.log_weights_per_image.shape, dtype=F64, requires_grad=True)
    infonce(*leaves[:2], 5., log_weights_per_image=leaf, log_weights_per_text=leaf, **kw).backward()
    assert leaf.grad is None

@few
@given(batches())
def test_each_form_leaves_other_positives_out(batch):
    logits = (5*batch['v'] @ batch['t'].T).requires_grad_(); positives = same_ids(batch['ids'], batch['of'])
    got = anchor_losses(logits, positives, log_weights=torch.full_like(logits, 3.), multi_positive='each')
    def alone(l, mine): return [torch.logsumexp(torch.cat([l[p,None], (l + 3.)[~mine]]), 0) - l[p] for p in mine.nonzero().flatten()]     # each with the negatives only
    assert_close(got, torch.stack([sum(alone(l, mine), start=0*l[0]) / mine.sum().clamp(min=1) for l, mine in zip(logits, positives)]))

@few
@given(batches(), forms)
def test_log_weights_at_positives_are_ignored(batch, form):
    positives = same_ids(batch['ids'], batch['of']); logits = 5*batch['v'] @ batch['t'].T
    g = make_generator(1); lw = torch.randn(logits.shape, generator=g, dtype=F64)
    for filling in (0., 4., -math.inf):
        assert_close(anchor_losses(logits, positives, log_weights=lw.masked_fill(positives, filling), multi_positive=form), anchor_losses(logits, positives, log_weights=lw, multi_positive=form))

# --- invariances and limits -----------------------------------------------------------------------------------------

@few
@given(batches(), forms, norms, alphas, st.integers(0, 99))
def test_order_and_modalities(batch, form, norm, alpha, seed):
    g = make_generator(seed); r, c = torch.randperm(len(batch['v']), generator=g), torch.randperm(len(batch['t']), generator=g)
    how = dict(alpha=alpha, similarity_temperature=0.2, norm=norm, multi_positive=form)
    run = lambda v, t, hv, ht, ids, of, keep: srcl(v, t, 10., aux_image_features=hv, aux_text_features=ht, image_ids=ids, text_image_ids=of, keep=keep, **how)
    v, t, hv, ht, ids, of, keep = (batch[k] for k in ('v', 't', 'hv', 'ht', 'ids', 'of', 'keep'))
    value = run(v, t, hv, ht, ids, of, keep)
    assert_close(run(v[r], t[c], hv[r], ht[c], ids[r], of[c], keep[r][:,c]), value)
    assert_close(run(t, v, ht, hv, of, ids, keep.T), value)

@few
@given(batches(square=True), forms, norms)
def test_limits_of_srcl(batch, form, norm):
    v, t, kw = batch['v'], batch['t'], dict(image_ids=batch['ids'], keep=batch['keep'], multi_positive=form)
    plain = infonce(v, t, 20., **kw)
    assert_close(srcl(v, t, 20., alpha=0, similarity_temperature=math.inf, norm=norm, **kw), plain)
    assert_close(srcl(v, t, 20., aux_similarity=torch.full((len(v), len(t)), 0.3), norm=norm, **kw), plain)
    assert_close(srcl(v, t, 20., alpha=0, similarity_temperature=0.05, norm=norm, keep=torch.eye(len(v)).bool()), torch.tensor(0., dtype=F64), rtol=0, atol=0)
    assert_close(srcl(v[:1], t[:1], 100., alpha=0, norm=norm, multi_positive=form), torch.tensor(0., dtype=F64), rtol=0, atol=0)
    double = [torch.cat([x, x]) for x in (v, t)]        # every pair twice, known as positives: negatives double, weights stay
    twice = srcl(*double, 20., alpha=0, similarity_temperature=0.3, norm=norm, image_ids=torch.cat([batch['ids']]*2), multi_positive=form)
    assert twice.isfinite()
    if form == 'spread': assert_close(twice, srcl(v, t, 20., alpha=0, similarity_temperature=0.3, norm=norm, image_ids=batch['ids']) + math.log(2))

@few
@given(st.integers(2, 30), st.sampled_from([0.05, 0.1]), st.sampled_from([0.03, 0.05, 0.1, 0.3, math.inf]), st.integers(0, 99))
def test_own_similarity_is_a_temperature(n, tau, tau_s, seed):
    cosines = torch.rand(1, n, generator=make_generator(seed), dtype=F64)*2 - 1
    first = torch.zeros(1, n).bool(); first[0,0] = True
    logits = (cosines/tau).requires_grad_()
    anchor_losses(logits, first, log_weights=regulation_log_weights(cosines, alpha=0, similarity_temperature=tau_s, positives=first)).sum().backward()
    push = logits.grad[0,1:]
    if push.sum() < 1e-12: return
    assert_close(push/push.sum(), torch.softmax(cosines[0,1:]/effective_temperature(tau, tau_s), 0), rtol=1e-6, atol=1e-9)

@few
@given(batches(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])), forms, norms, alphas)
def test_precision_and_gradients_finite_at_scale_100(batch, form, norm, alpha):
    kw = dict(image_ids=batch['ids'], text_image_ids=batch['of'], keep=batch['keep'], multi_positive=form)
    how = lambda to: dict(aux_image_features=to(batch['hv']), aux_text_features=to(batch['ht']), alpha=alpha, similarity_temperature=0.05, norm=norm)
    v, t = batch['v'].requires_grad_(), batch['t'].requires_grad_()
    out = srcl(v, t, 100., **how(lambda x: x), **kw); out.backward()
    assert out.dtype == torch.float32 and v.grad.isfinite().all() and t.grad.isfinite().all() and v.grad.dtype == v.dtype
    exact = srcl(v.detach().double(), t.detach().double(), 100., **how(lambda x: x.double()), **kw)
    if norm == 'mean': assert_close(out.detach().double(), exact, rtol=1e-4, atol=1e-3)
    plain = infonce(v, t, 100., **kw)
    assert_close(plain.detach().double(), infonce(v.detach().double(), t.detach().double(), 100., **kw), rtol=1e-5, atol=1e-4)

def test_autocast_does_not_round_the_logits():
    g = make_generator(0); v, t = unit(16, 8, g, torch.float32), unit(16, 8, g, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = infonce(v, t, 100.), srcl(v, t, 100., alpha=0)
    assert_close(inside, (infonce(v, t, 100.), srcl(v, t, 100., alpha=0)), rtol=0, atol=0)

@pytest.mark.parametrize('form', ['spread', 'each'])
def test_an_anchor_left_with_nothing_has_no_nan_gradient(form):
    logits = torch.randn(3, 4, generator=make_generator(0), dtype=F64).requires_grad_()
    positives = torch.zeros(3, 4).bool(); positives[0,0] = True                   # anchors 1 and 2 have no positive
    gone = torch.full((3,4), -math.inf); gone[1] = 0
    anchor_losses(logits, positives, log_weights=gone, multi_positive=form).sum().backward()
    assert_close(logits.grad, torch.zeros(3, 4, dtype=F64), rtol=0, atol=0)

def test_sharp_similarity_temperature_does_not_overflow():
    own = torch.tensor([[1., -1., -0.99, 0.5]])
    w = regulation_weights(own, alpha=0, norm='softmax', similarity_temperature=0.005, positives=torch.tensor([[True, False, False, False]]))
    assert_close(w, torch.tensor([[1., 3., 0., 0.]]), rtol=0, atol=0)             # delta/s = e^200 is beyond float32: all weight on the least similar
    assert_close(regulation_weights(own, alpha=0, similarity_temperature=0.005, positives=torch.zeros(1,4).bool()).sum(), torch.tensor(4.))

def test_removal_equals_dropping_the_columns():
    g = make_generator(0); own = 2*torch.rand(4, 9, generator=g, dtype=F64) - 1
    first = torch.zeros(4, 9).bool(); first[:,0] = True
    keep = hard_removal(regulation_weights(own, alpha=0, similarity_temperature=0.3, positives=first), 0.7, first)
    got = anchor_losses(10*own, first, log_weights=removal_log_weights(keep))
    assert_close(got, torch.stack([torch.logsumexp(10*r[k], 0) - 10*r[0] for r, k in zip(own, keep)]))
    assert keep[:,0].all() and not keep.all()
    assert_close(symmetric_loss(10*own[:,:4], torch.eye(4).bool(), keep=torch.eye(4).bool()), torch.tensor(0., dtype=F64))

@few
@given(st.sampled_from(['linear', 'cosine', 'step']), st.integers(1, 50), st.integers(1, 5))
def test_alpha_goes_down_from_one_to_zero(kind, total, drops):
    values = [alpha_schedule(kind, s, total, drops=drops) for s in range(total + 3)]
    assert values[0] == 1 and values[total] == values[-1] == 0 and all(a >= b for a, b in zip(values, values[1:])) and all(0 <= a <= 1 for a in values)

# --- edges ----------------------------------------------------------------------------------------------------------

def test_warnings_come_once():
    core.warned.clear()
    g = make_generator(0); v, t = unit(4, 3, g), unit(4, 3, g)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for _ in range(3): infonce(3*v, t, 10.); srcl(v, t, 10., alpha=0, similarity_temperature=0.01)
    assert [w.category for w in seen] == [UserWarning]*2 and all(w.filename == __file__ for w in seen)
    assert 'image_features' in str(seen[0].message) and 'from 3 to 3' in str(seen[0].message) and 'similarity_temperature 0.01' in str(seen[1].message)

@pytest.mark.parametrize('change,message', [
    (dict(text_features=torch.eye(4)), 'share width'), (dict(image_features=torch.ones(3)), 'image_features must be'), (dict(image_features=torch.eye(3).long()), 'floating'),
    (dict(image_features=torch.eye(3)*math.inf), 'image_features holds NaN or infinity'), (dict(logit_scale=0.), 'logit_scale'), (dict(logit_scale=math.nan), 'logit_scale'), (dict(logit_scale=torch.ones(2)), 'logit_scale'),
    (dict(image_ids=[1, 2]), 'image_ids must hold one id for each of the 3 images, got 2'), (dict(image_ids=[1, 2, 3], text_image_ids=[1]), 'text_image_ids'), (dict(positives=torch.eye(3)), 'positives must be a bool tensor'),
    (dict(positives=torch.eye(3).bool(), image_ids=[1, 2, 3]), 'not both'), (dict(positives=torch.zeros(3, 3).bool()), 'none of the 3 x 3 pairs'), (dict(keep=torch.eye(2).bool()), r'keep must be a bool tensor of shape \(3, 3\), got \(2, 2\)'),
    (dict(multi_positive='all'), 'multi_positive'), (dict(text_features=torch.eye(3)[:2]), 'no diagonal'), (dict(image_features=torch.eye(3)[:0]), 'at least one image')])
@pytest.mark.parametrize('loss', [infonce, lambda **kw: srcl(alpha=0, **kw)])
def test_bad_input_names_the_argument(loss, change, message):
    with pytest.raises(ValueError, match=message): loss(**(dict(image_features=torch.eye(3), text_features=torch.eye(3), logit_scale=10.) | change))

def test_importing_a_loss_is_light():
    code = "import sys, vlwb.losses.infonce, vlwb.losses.srcl, vlwb.negatives.weights; print([m for m in ('transformers','umap','matplotlib','sklearn','pandas','scipy','datasets','seaborn') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
