"""ITContrast against its formula written out, its limits, its gradients, and processes.

This file is also the script that the processes run, in the form of test_processes.py: python test_itcontrast.py FOLDER RANK WORLD
"""
import math, sys
from pathlib import Path
import pytest, torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
sys.path.insert(0, str(Path(__file__).parent))
import test_processes as processes
from vlwb.core import make_generator, same_ids
from vlwb.losses.infonce import infonce
from vlwb.losses.itcontrast import itcontrast
from vlwb.losses.regulation import regulation_weights
from vlwb.losses.srcl import srcl
from vlwb.losses.tiled import Tiling

F64 = torch.float64
few = settings(max_examples=30, deadline=None)


def one_direction(anchors, others, queue, made, found, own_same, *, scale, lam, gamma, known, keep, queue_known, weights, multi):
    "L of one direction, sum by sum: nothing in logs, a loop over anchors."
    terms = []
    for i, a in enumerate(anchors):
        f = lambda x: (scale * x @ a).exp()
        candidates, positive = torch.cat([others, queue]), torch.cat([known[i], queue_known[i]])
        there = torch.cat([keep[i], torch.ones(len(queue), dtype=torch.bool)])
        if not (positive & there).any(): continue
        negatives = (weights[i] * f(candidates))[~positive & there].sum() + lam * f(made[i])[found[i]].sum()
        alive = own_same[1]
        negatives = negatives + gamma * f(anchors)[~own_same[0][i] & alive].sum()
        pull = f(candidates)[positive & there]
        terms.append(-(pull / ((pull.sum() if multi == 'spread' else pull) + negatives)).log().mean())
    return torch.stack(terms).mean()


def draw(n, m, s, d, seed, q=0):
    g = make_generator(seed)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=F64), dim=-1)
    b = dict(v=unit(n, d), t=unit(m, d), hv=unit(n, 3), ht=unit(m, 3), st=unit(n, s, d), si=unit(m, s, d), tq=unit(q, d), iq=unit(q, d), htq=unit(q, 3), hiq=unit(q, 3))
    ids, of = torch.randint(0, 4, (n,), generator=g), torch.randint(0, 4, (m,), generator=g)
    of[0] = ids[0]
    keep = torch.rand(n, m, generator=g) > 0.2; keep[0,0] = True
    return b, ids, of, torch.randint(0, 6, (q,), generator=g), keep, torch.rand(n, s, generator=g) > 0.3, torch.rand(m, s, generator=g) > 0.3


def by_formula(b, ids, of, qids, keep, ft, fi, scale, lam, gamma, weights, multi, **kw):
    known, q = same_ids(ids, of), len(b['tq'])
    def side(a, o, queue, ha, ho, hq, made, found, mine, kept, positive):
        queue_known = same_ids(mine, qids)
        both, every = torch.cat([positive, queue_known], 1), torch.cat([kept, torch.ones(len(a), q, dtype=torch.bool)], 1)
        w = torch.ones(both.shape, dtype=F64) if weights == 'none' else regulation_weights(a @ torch.cat([o, queue]).T, ha @ torch.cat([ho, hq]).T, positives=both, keep=every, **kw)
        return one_direction(a, o, queue, made, found, (same_ids(mine), kept.any(1)), scale=scale, lam=lam, gamma=gamma, known=positive, keep=kept, queue_known=queue_known, weights=w, multi=multi)
    return (side(b['v'], b['t'], b['tq'], b['hv'], b['ht'], b['htq'], b['st'], ft, ids, keep, known)
            + side(b['t'], b['v'], b['iq'], b['ht'], b['hv'], b['hiq'], b['si'], fi, of, keep.T, known.T)) / 2


@few
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 999), st.sampled_from([1., 14.]), st.sampled_from([0., 0.3, 2.]), st.sampled_from([0., 0.5]), st.sampled_from(['none', 'srcl']), st.sampled_from(['spread', 'each']), st.booleans())
def test_formula(n, m, s, seed, scale, lam, gamma, weights, multi, queue):
    b, ids, of, qids, keep, ft, fi = draw(n, m, s, 5, seed, 3 if queue else 0)
    settings = dict(alpha=0.4, similarity_temperature=0.5)
    wanted = by_formula(b, ids, of, qids, keep, ft, fi, scale, lam, gamma, weights, multi, **settings)
    for dtype, allowed in ((F64, 1e-12), (torch.float32, 2e-6)):
        x = {k: y.to(dtype) for k, y in b.items()}
        more = dict(text_queue=x['tq'], image_queue=x['iq'], aux_text_queue=x['htq'], aux_image_queue=x['hiq'], queue_ids=qids) if queue else {}
        for cut in (dict(form='tiled'), dict(form='tiled', tiling=Tiling(3, 2, 0)), *(() if queue else (dict(form='plain'),))):
            got = itcontrast(x['v'], x['t'], scale, synthetic_texts=x['st'], synthetic_images=x['si'], synthetic_text_found=ft, synthetic_image_found=fi, synthetic_weight=lam, intra_weight=gamma, weights=weights,
                             aux_image_features=x['hv'], aux_text_features=x['ht'], image_ids=ids, text_image_ids=of, keep=keep, multi_positive=multi, **settings, **more, **cut)
            assert got.dtype == dtype; assert_close(got.double(), wanted, rtol=allowed, atol=allowed)


@few
@given(st.integers(1, 8), st.integers(0, 999), st.sampled_from(['plain', 'tiled', 'auto']), st.sampled_from(['spread', 'each']), st.sampled_from([torch.float32, F64, torch.bfloat16]))
def test_without_synthetics_it_is_infonce_or_srcl_to_the_bit(n, seed, form, multi, dtype):
    b, ids, *_ = draw(n, n, 2, 6, seed)
    def values(loss):
        x, y, scale = b['v'].to(dtype).requires_grad_(), b['t'].to(dtype).requires_grad_(), torch.tensor(20., dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        value = loss(x, y, scale, image_ids=ids, form=form, multi_positive=multi)
        return value.detach(), *torch.autograd.grad(value, (x, y, scale))
    look = dict(aux_image_features=b['hv'], aux_text_features=b['ht'], alpha=0.5)
    made = dict(synthetic_texts=b['st'].to(dtype), synthetic_images=b['si'].to(dtype))
    for kw, other in ((dict(), infonce), (dict(weights='srcl', **look), lambda *a, **k: srcl(*a, **k, **look))):
        for zero in (dict(), dict(synthetic_weight=0., **made)):
            for x, y in zip(values(lambda *a, **k: itcontrast(*a, **k, **kw, **zero)), values(other)): assert torch.equal(x, y)


@pytest.mark.parametrize('form', ['plain', 'tiled'])
def test_small_numbers_by_hand(form):
    e, ln = torch.eye(3, dtype=F64), math.log
    itc = lambda *a, **kw: itcontrast(*a, form=form, **kw).item()
    assert itc(e, e, ln(3), synthetic_texts=e[[1, 0, 0]][:,None], synthetic_images=e[[1, 0, 0]][:,None], synthetic_weight=2.) == pytest.approx(ln(7/3))       # f = 3; 1, 1; 2
    assert itc(e[:2], e[:2], ln(3), intra_weight=1.) == pytest.approx(ln(5/3))
    assert itc(e[:1], e[:1], ln(3), intra_weight=1.) == 0                                                     # alone: nobody else in its modality
    assert itc(e[:1], e[:1], ln(3), synthetic_texts=e[None,:1]) == pytest.approx(ln(2)/2)                     # a synthetic on top of the positive
    same = e[:1].repeat(4, 1)
    assert itc(same, same, 50., intra_weight=1., synthetic_texts=same[:,None], synthetic_images=same[:,None]) == pytest.approx(ln(1 + 3 + 1 + 3))     # duplicates that nobody knows of
    assert itc(same, same, 50., image_ids=[0]*4, intra_weight=1., multi_positive='each') == 0                # and that somebody does


@pytest.mark.parametrize('form', ['plain', 'tiled'])
def test_a_synthetic_extreme_equals_a_second_real_negative(form):
    "One cold representative of all negatives repeats the hardest one: InfoNCE with its weight doubled."
    b, *_ = draw(6, 6, 1, 8, 3)
    v, t, eye = b['v'], b['t'], torch.eye(6, dtype=torch.bool)
    hardest = [(x @ y.T).masked_fill(eye, -2).argmax(1) for x, y in ((v, t), (t, v))]
    twice = [math.log(2) * F.one_hot(h, 6).to(F64) for h in hardest]
    got = itcontrast(v, t, 10., synthetic_texts=t[hardest[0]][:,None], synthetic_images=v[hardest[1]][:,None], form=form)
    assert_close(got, infonce(v, t, 10., log_weights_per_image=twice[0], log_weights_per_text=twice[1].T))


@pytest.mark.parametrize('form', ['plain', 'tiled'])
def test_with_the_synthesis_of_the_package(form):
    "One stratum: cold it repeats the hardest negative, hot it is the mean of all; without detaching the gradient reaches the negatives; half-precision features take its wider synthetics."
    from vlwb.negatives.synthesis import SynthesisConfig, synthesise
    b, *_ = draw(6, 6, 1, 8, 3)
    v, t, ids, eye = b['v'], b['t'], torch.arange(6), torch.eye(6, dtype=torch.bool)
    def loss(tau_h, v=v, t=t, **kw):
        config = SynthesisConfig(hardest=5, strata=1, hardness_temperature=tau_h, **kw)
        texts, images = (synthesise(a, n, config=config, anchor_ids=ids, negative_ids=ids) for a, n in ((v, t), (t, v)))
        return itcontrast(v, t, 10., synthetic_texts=texts.features, synthetic_images=images.features, synthetic_text_found=texts.found, synthetic_image_found=images.found, form=form)
    twice = [math.log(2) * F.one_hot((x @ y.T).masked_fill(eye, -2).argmax(1), 6).to(F64) for x, y in ((v, t), (t, v))]
    assert_close(loss(1e-5), infonce(v, t, 10., log_weights_per_image=twice[0], log_weights_per_text=twice[1].T))
    mean = lambda x: F.normalize((~eye).to(F64) @ x, dim=1)[:,None]
    assert_close(loss(math.inf), itcontrast(v, t, 10., synthetic_texts=mean(t), synthetic_images=mean(v)))
    x = t.clone().requires_grad_()
    constant, moving = (torch.autograd.grad(loss(0.1, t=x, detach=d), x)[0] for d in (True, False))
    assert not torch.allclose(constant, moving)
    assert loss(0.1, v=v.bfloat16(), t=t.bfloat16()).isfinite()


@pytest.mark.parametrize('form', ['plain', 'tiled'])
@pytest.mark.parametrize('multi', ['spread', 'each'])
def test_gradcheck(form, multi):
    b, ids, of, _, keep, ft, fi = draw(4, 5, 2, 4, 1)
    inputs = [b[k].requires_grad_() for k in ('v', 't', 'st', 'si')] + [torch.tensor(5., dtype=F64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda v, t, st, si, s: itcontrast(v, t, s, synthetic_texts=st, synthetic_images=si, synthetic_text_found=ft, synthetic_weight=0.6, intra_weight=0.3, image_ids=ids, text_image_ids=of, keep=keep, multi_positive=multi, form=form), inputs)


@pytest.mark.parametrize('form', ['plain', 'tiled'])
def test_what_is_not_there(form):
    "Nothing found, no synthetics in the list, everything taken out: finite values, no gradient into the filler."
    b, *_ = draw(5, 5, 3, 6, 2)
    plain = infonce(b['v'], b['t'], 10.)
    filler = torch.full((5, 3, 6), 7., dtype=F64, requires_grad=True)
    nothing = itcontrast(b['v'], b['t'], 10., synthetic_texts=filler, synthetic_text_found=torch.zeros(5, 3, dtype=torch.bool), form=form)
    nothing.backward()
    assert_close(nothing, plain); assert (filler.grad == 0).all()
    assert_close(itcontrast(b['v'], b['t'], 10., synthetic_texts=b['st'][:,:0], synthetic_images=b['si'][:,:0], form=form), plain)
    v = b['v'].clone().requires_grad_()
    gone = itcontrast(v, b['t'], 10., synthetic_texts=b['st'], intra_weight=1., keep=torch.zeros(5, 5, dtype=torch.bool), form=form)
    gone.backward()
    assert gone == 0 and (v.grad == 0).all()


@pytest.mark.parametrize('form', ['plain', 'tiled'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(form, dtype):
    b, ids, of, _, keep, ft, fi = draw(8, 8, 3, 16, 5)
    half = {k: x.to(dtype) for k, x in b.items()}
    half['v'].requires_grad_()
    kw = dict(synthetic_weight=0.5, intra_weight=0.5, synthetic_text_found=ft, image_ids=ids, text_image_ids=of, weights='srcl', form=form)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = itcontrast(half['v'], half['t'], 100., synthetic_texts=half['st'], synthetic_images=half['si'].float(), aux_image_features=half['hv'], aux_text_features=half['ht'], **kw)     # synthetics may be wider
    loss.backward()
    wide = {k: x.detach().double() for k, x in half.items()}
    exact = itcontrast(wide['v'], wide['t'], 100., synthetic_texts=wide['st'], synthetic_images=wide['si'], aux_image_features=wide['hv'], aux_text_features=wide['ht'], **kw)
    assert loss.dtype == torch.float32 and half['v'].grad.isfinite().all(); assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_mask_and_ids_say_the_same():
    b, *_ = draw(5, 5, 2, 6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3])
    for form in ('plain', 'tiled'):
        for names in (ids, ids.numpy(), [f'photo {i}' for i in ids]):
            assert_close(itcontrast(b['v'], b['t'], 10., synthetic_texts=b['st'], intra_weight=1., image_ids=names, form=form),
                         itcontrast(b['v'], b['t'], 10., synthetic_texts=b['st'], intra_weight=1., positives=same_ids(ids), form=form))


def test_tiles_hold_no_matrix():
    "The largest tensor of the tiled form, own modality and all, is a tile or the features."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        numel = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor))])
            return out
    b, *_ = draw(96, 96, 2, 4, 0)
    v = b['v'].requires_grad_()
    with Largest() as seen: itcontrast(v, b['t'], 10., synthetic_texts=b['st'], synthetic_images=b['si'], intra_weight=1., form='tiled', tiling=Tiling(16, 16, 0)).backward()
    assert seen.numel <= 96 * 2 * 4 < 96 * 96


@pytest.mark.parametrize('word, kw', [
    ('synthetic_texts', dict(synthetic_texts=torch.ones(3, 2, 6))), ('synthetic_images', dict(synthetic_images=torch.ones(5, 6))), ('synthetic_texts', dict(synthetic_texts=[1])),
    ('NaN', dict(synthetic_texts=torch.full((5, 1, 6), math.nan))), ('synthetic_text_found', dict(synthetic_text_found=torch.ones(5, 2, dtype=torch.bool))),
    ('synthetic_image_found', dict(synthetic_images=torch.ones(5, 2, 6), synthetic_image_found=torch.ones(5, 2))), ('synthetic_weight', dict(synthetic_weight=-0.1)), ('intra_weight', dict(intra_weight=math.nan)),
    ('weights', dict(weights='dcl')), ('aux', dict(weights='srcl', intra_weight=1.)), ('aux_text_queue', dict(weights='srcl', intra_weight=1., aux_image_features=torch.eye(5), aux_text_features=torch.eye(5), text_queue=torch.eye(6))),
    ('alpha', dict(weights='srcl', intra_weight=1., alpha=2.)), ('queues', dict(form='plain', intra_weight=1., text_queue=torch.eye(6))), ('whole rows', dict(weights='srcl', norm='softmax', alpha=0., similarity_temperature=0.01, intra_weight=1., form='tiled'))])
def test_errors_name_what_is_wrong(word, kw):
    b, *_ = draw(5, 5, 2, 6, 0)
    with pytest.raises(ValueError, match=word): itcontrast(b['v'].float(), b['t'].float(), 10., **kw)


# Processes ------------------------------------------------------------------------------------------------------------------------------------------

def process_case(queue=False, mask=False, captions=False, keep=False, **kw):
    def case(s):
        more = dict(positives=s.ids[:, None] == processes.everybody(s.ids, s)) if mask else dict(image_ids=s.ids)
        if captions: more |= dict(text_image_ids=s.caption_ids)
        if keep: more |= dict(keep=s.keep)
        if queue: more |= dict(text_queue=s.queue_text, image_queue=s.queue_image, queue_ids=s.queue_ids, aux_text_queue=s.queue_aux_text, aux_image_queue=s.queue_aux_image)
        synthetic = F.normalize(s.extra_text + 0.5 * s.image_features[:, None], dim=-1)                       # gradients go through the anchor
        return itcontrast(s.image_features, s.caption_features if captions else s.text_features, s.logit_scale, synthetic_texts=synthetic, synthetic_images=None if captions else s.extra_image, synthetic_weight=0.7,
                          synthetic_text_found=torch.arange(2) <= (s.ids % 2)[:, None], aux_image_features=s.aux_image, aux_text_features=s.aux_text, similarity_temperature=0.3, group=s.group, **more, **kw)
    return case


CASES = {'synthetics': process_case(), 'own modality': process_case(intra_weight=0.5, keep=True), 'own modality mask': process_case(intra_weight=0.5, mask=True, multi_positive='each'),
         'captions': process_case(captions=True, intra_weight=0.5), 'srcl queue': process_case(weights='srcl', alpha=0.4, queue=True, intra_weight=0.5)}


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='torch was built without gloo')
def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, '__file__', __file__)                              # the script that `run_world` starts is this file
    found = processes.run_world(2, tmp_path)
    for name, case in CASES.items():
        for key, counts, dtype, allowed in processes.runs(name, 2):
            wanted = processes.run_case(case, counts, dtype)
            for rank, results in enumerate(found):
                got = results[key]
                assert not isinstance(got, str), got
                for k in wanted: assert (got[k].double() - wanted[k].double()).norm() <= allowed * max(1., wanted[k].double().norm()), (key, rank, k)


if __name__ == '__main__':
    processes.CASES, processes.CHECKS = CASES, {}
    processes.worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
