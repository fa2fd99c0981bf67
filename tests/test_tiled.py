"""The tiled kernel against the plain form: odd sizes, any cut, any id pattern, queues, extra negatives; memory; who may see a gradient."""
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import make_generator, same_ids
from vlwb.losses.gist import gist
from vlwb.losses.infonce import anchor_losses, infonce
from vlwb.losses.regulation import regulation_log_weights
from vlwb.losses.srcl import srcl
from vlwb.losses.tiled import Positives, Tiling, Weighting, contrast, find_positives

F64 = torch.float64
few = settings(max_examples=60, deadline=None)
cuts = st.builds(Tiling, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0., 1e-4, 1e-3, math.inf]))
alphas = st.sampled_from([None, 0., 0.4, 1.])           # None is InfoNCE
temperatures = st.sampled_from([0.1, 0.5, math.inf])


@st.composite
def batches(draw, dtype=F64):
    "Features of a model and of H, a queue and extra negatives, ids with repeats, a keep mask that may empty whole rows."
    n, m, d, q, k = draw(st.integers(1, 12)), draw(st.integers(1, 15)), draw(st.integers(2, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    g = make_generator(draw(st.integers(0, 999)))
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=F64), dim=-1).to(dtype)
    some = draw(st.integers(1, 5))
    ids, of, of_queue = (torch.randint(0, some, (size,), generator=g) for size in (n, m, q)); of[0] = ids[0]
    keep = torch.rand(n, m, generator=g) < draw(st.sampled_from([0., 0.5, 1.]))
    log_weights = lambda size: torch.randn(size, k, generator=g, dtype=F64).to(dtype).masked_fill(torch.rand(size, k, generator=g) < 0.3, -math.inf)
    return dict(v=unit(n, d).requires_grad_(), t=unit(m, d).requires_grad_(), hv=unit(n, d+1), ht=unit(m, d+1), tq=unit(q, d), iq=unit(q, d), htq=unit(q, d+1), hiq=unit(q, d+1),
                et=unit(n, k, d).requires_grad_(), ei=unit(m, k, d), lt=log_weights(n), li=log_weights(m), ids=ids, of=of, of_queue=of_queue, keep=keep)


def call(b, scale, alpha, norm='mean', tau_s=0.5, **kw):
    if alpha is None: return infonce(b['v'], b['t'], scale, image_ids=b['ids'], text_image_ids=b['of'], **kw)
    return srcl(b['v'], b['t'], scale, aux_image_features=b['hv'], aux_text_features=b['ht'], alpha=alpha, norm=norm, similarity_temperature=tau_s, image_ids=b['ids'], text_image_ids=b['of'], **kw)


def same_loss_and_gradients(a, b, leaves, **tolerance):
    assert_close(a, b, **tolerance)
    if not a.requires_grad: return
    zero = lambda x: [torch.zeros_like(l) if g is None else g for l, g in zip(leaves, torch.autograd.grad(x, leaves, allow_unused=True))]
    for x, y in zip(zero(a), zero(b)): assert_close(x, y, **tolerance)


@few
@given(batches(), cuts, alphas, st.sampled_from(['mean', 'softmax']), st.sampled_from(['spread', 'each']), st.sampled_from([1., 20., 100., 700.]), temperatures)
def test_equals_the_plain_form(b, cut, alpha, norm, form, scale, tau_s):
    scale = torch.tensor(scale, dtype=F64, requires_grad=True)
    kw = dict(alpha=alpha, norm=norm, tau_s=tau_s, keep=b['keep'], multi_positive=form)
    same_loss_and_gradients(call(b, scale, form='plain', **kw), call(b, scale, form='tiled', tiling=cut, **kw), (b['v'], b['t'], scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('alpha', [None, 0., 0.4, 1.])
@pytest.mark.parametrize('n, m', [(1, 1), (1, 300), (257, 300), (300, 257), (512, 512)])
def test_float32_to_one_part_in_a_million(n, m, alpha):
    "The size at which the public functions take tiles by themselves, and others, against the plain form in float32."
    g = make_generator(n)
    unit = lambda k, d: F.normalize(torch.randn(k, d, generator=g), dim=1)
    b = dict(v=unit(n, 64).requires_grad_(), t=unit(m, 64).requires_grad_(), hv=unit(n, 32), ht=unit(m, 32), ids=torch.arange(n) // 2, of=torch.arange(m) // 3)
    plain, tiled = (call(b, 14.3, alpha, form=form, **cut) for form, cut in (('plain', {}), ('tiled', dict(tiling=Tiling(100, 64, 0.05)))))
    assert_close(plain, tiled, rtol=1e-6, atol=1e-6)
    for x, y in zip(torch.autograd.grad(plain, (b['v'], b['t'])), torch.autograd.grad(tiled, (b['v'], b['t']))): assert (x - y).abs().max() <= 1e-6 * max(1., float(x.abs().max())) 


def by_columns(b, scale, alpha, norm, form):
    "Queue and extra negatives as columns of one matrix, in either direction."
    def direction(anchors, others, queue, extra, log_weights, h_anchors, h_others, h_queue, ids, of):
        own, positives = anchors @ torch.cat([others, queue]).T, torch.cat([same_ids(ids, of), same_ids(ids, b['of_queue'])], 1)
        w = torch.zeros_like(own) if alpha is None else regulation_log_weights(own, h_anchors @ torch.cat([h_others, h_queue]).T, alpha=alpha, norm=norm, similarity_temperature=0.5, positives=positives)
        logits = scale * torch.cat([own, torch.einsum('ad,akd->ak', anchors, extra)], 1)
        none = torch.zeros_like(log_weights, dtype=torch.bool)
        losses = anchor_losses(logits, torch.cat([positives, none], 1), log_weights=torch.cat([w, log_weights], 1), multi_positive=form)
        return losses.sum() / positives.any(1).sum().clamp(min=1)
    return (direction(b['v'], b['t'], b['tq'], b['et'], b['lt'], b['hv'], b['ht'], b['htq'], b['ids'], b['of'])
            + direction(b['t'], b['v'], b['iq'], b['ei'], b['li'], b['ht'], b['hv'], b['hiq'], b['of'], b['ids'])) / 2


@few
@given(batches(), cuts, alphas, st.sampled_from(['mean', 'softmax']), st.sampled_from(['spread', 'each']))
def test_queue_and_extra_negatives_are_columns(b, cut, alpha, norm, form):
    scale = torch.tensor(9., dtype=F64, requires_grad=True)
    queues = dict(text_queue=b['tq'], image_queue=b['iq'], queue_ids=b['of_queue'], extra_text_features=b['et'], extra_image_features=b['ei'], extra_text_log_weights=b['lt'], extra_image_log_weights=b['li'])
    if alpha is not None: queues |= dict(aux_text_queue=b['htq'], aux_image_queue=b['hiq'])
    same_loss_and_gradients(by_columns(b, scale, alpha, norm, form), call(b, scale, alpha, norm, multi_positive=form, tiling=cut, **queues), (b['v'], b['t'], b['et'], scale), rtol=1e-9, atol=1e-9)


@few
@given(batches(), cuts, alphas, st.sampled_from(['spread', 'each']))
def test_invariances(b, cut, alpha, form):
    "The order of images and texts does not matter, nor which modality comes first."
    kw = dict(multi_positive=form, form='tiled', tiling=cut)
    value, g = call(b, 12., alpha, **kw), make_generator(1)
    p, r = torch.randperm(len(b['ids']), generator=g), torch.randperm(len(b['of']), generator=g)
    shuffled = dict(v=b['v'][p], hv=b['hv'][p], ids=b['ids'][p], t=b['t'][r], ht=b['ht'][r], of=b['of'][r])
    turned = dict(v=b['t'], t=b['v'], hv=b['ht'], ht=b['hv'], ids=b['of'], of=b['ids'])
    for other in (shuffled, turned): assert_close(call(other, 12., alpha, **kw), value, rtol=1e-9, atol=1e-9)


@few
@given(batches(), cuts)
def test_positives_are_no_negatives(b, cut):
    "Moving a known positive changes no sum over negatives; in the 'each' form it moves no other pair's term."
    positives = find_positives((len(b['ids']), len(b['of'])), b['ids'], b['of'])
    c = contrast(b['v'], b['t'], 5., positives, tiling=cut)
    alone = (5*b['v'] @ b['t'].T).masked_fill(positives.mask(), -math.inf)
    assert_close(c.row_lse, alone.logsumexp(1)); assert_close(c.column_lse, alone.logsumexp(0))


@few
@given(batches(), cuts, st.sampled_from([0.4, 1.]))
def test_weights_carry_no_gradient(b, cut, alpha):
    b = b | dict(hv=b['hv'].clone().requires_grad_(), ht=b['ht'].clone().requires_grad_())
    loss = call(b, 9., alpha, form='tiled', tiling=cut)
    taken = torch.autograd.grad(loss, (b['v'], b['hv'], b['ht']), allow_unused=True) if loss.requires_grad else (None, None, None)
    assert taken[1] is None and taken[2] is None


def test_backward_twice_and_no_grad():
    g = make_generator(0)
    v, t = (F.normalize(torch.randn(20, 8, generator=g), dim=1).requires_grad_() for _ in range(2))
    loss = infonce(v, t, 10., form='tiled', tiling=Tiling(7, 7))
    first, = torch.autograd.grad(loss, v, retain_graph=True); second, = torch.autograd.grad(loss, v)
    assert torch.equal(first, second)
    with torch.no_grad(): assert torch.equal(infonce(v, t, 10., form='tiled', tiling=Tiling(7, 7)), loss.detach())
    only_text, = torch.autograd.grad(infonce(v.detach(), t, 10., form='tiled'), t)
    assert_close(only_text, torch.autograd.grad(infonce(v.detach(), t, 10., form='plain'), t)[0])


def test_extreme_rows_in_one_tile():
    "A tile whose rows lie far apart at a high scale: one row of duplicates, one of opposites, one with everything removed or known."
    d = F.normalize(torch.randn(1, 6, generator=make_generator(0), dtype=F64), dim=1)
    v = torch.cat([d, -d, d, F.normalize(torch.randn(3, 6, generator=make_generator(1), dtype=F64), dim=1)]).requires_grad_()
    t = torch.cat([d, d, -d, F.normalize(torch.randn(3, 6, generator=make_generator(2), dtype=F64), dim=1)]).requires_grad_()
    keep = torch.ones(6, 6).bool(); keep[3] = False; keep[:, 4] = False
    for scale in (100., 1000.):
        for ids in ([0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5]):
            for dtype, close in ((F64, 1e-9), (torch.float32, 1e-5)):
                a, b = (x.detach().to(dtype).requires_grad_() for x in (v, t))
                plain, tiled = (infonce(a, b, scale, image_ids=ids, keep=keep, form=form, tiling=Tiling(3, 4)) for form in ('plain', 'tiled'))
                assert_close(plain, tiled, rtol=close, atol=close)
                for x, y in zip(torch.autograd.grad(plain, (a, b)), torch.autograd.grad(tiled, (a, b))): assert y.isfinite().all(); assert_close(x, y, rtol=close, atol=close*scale)


def test_no_matrix_in_memory():
    "The largest tensor that a step makes is a tile or a feature matrix, not B x B."
    B, D = 3000, 16
    v, t = (F.normalize(torch.randn(B, D, generator=make_generator(s)), dim=1).requires_grad_() for s in range(2))
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor): self.size = max(self.size, x.untyped_storage().nbytes())
            return out
    with Largest() as seen: infonce(v, t, 10., image_ids=torch.arange(B) // 5).backward()
    assert seen.size <= 4 * 1024 * 1024, f'{seen.size} bytes'
    with Largest() as seen: infonce(v, t, 10., image_ids=torch.arange(B) // 5, form='plain')
    assert seen.size >= 4 * B * B


def test_half_precision():
    g = make_generator(0)
    v, t = (F.normalize(torch.randn(50, 16, generator=g), dim=1) for _ in range(2))
    for dtype in (torch.float16, torch.bfloat16):
        a, b = v.to(dtype).requires_grad_(), t.to(dtype)
        extra, queue = (F.normalize(torch.randn(*shape, generator=g), dim=-1).to(dtype) for shape in ((50, 2, 16), (30, 16)))
        with torch.autocast('cpu', dtype=torch.bfloat16): loss = infonce(a, b, 100., form='tiled', tiling=Tiling(16, 16), extra_text_features=extra, image_queue=queue)
        loss.backward()
        exact = infonce(a.detach().double().requires_grad_(), b.double(), 100., extra_text_features=extra.double(), image_queue=queue.double())
        wide = a.detach().float().requires_grad_()
        infonce(wide, b.float(), 100., form='tiled', tiling=Tiling(16, 16), extra_text_features=extra.float(), image_queue=queue.float()).backward()
        assert loss.dtype == torch.float32 and a.grad.dtype == dtype
        assert (a.grad.float() - wide.grad).abs().max() <= 0.01 * wide.grad.abs().max()       # three parts, each rounded, are added in half precision
        assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_positives_by_mask_by_ids_and_on_the_diagonal_agree():
    for made in (find_positives((5, 5)), find_positives((5, 5), ['a', 'b', 'c', 'd', 'e']), find_positives((5, 5), positives=torch.eye(5).bool())):
        assert isinstance(made, Positives) and made.mask().equal(torch.eye(5).bool())
    assert Weighting(norm='softmax', similarity_temperature=0.05).sharp and not Weighting(norm='softmax').sharp and not Weighting(similarity_temperature=0.05).sharp
    with pytest.raises(ValueError, match='form must be'): infonce(torch.eye(3), torch.eye(3), 5., form='fast')
    with pytest.raises(ValueError, match='not with tiles'): infonce(torch.eye(3), torch.eye(3), 5., form='tiled', log_weights_per_image=torch.zeros(3, 3))


def test_a_small_loss_keeps_its_digits():
    "A confident batch at scale 100: the loss is a difference of numbers near 100 if one writes it so."
    g = make_generator(0)
    v = F.normalize(torch.randn(300, 32, generator=g, dtype=F64), dim=1)
    t = F.normalize(v + 0.13*torch.randn(300, 32, generator=g, dtype=F64), dim=1)
    exact = infonce(v, t, 100., form='plain')
    assert 1e-6 < exact < 1e-2
    assert_close(infonce(v.float(), t.float(), 100., form='tiled').double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize('scale', [20., 72., 100.])
def test_guide_in_float32(scale):
    "A guide that takes out the candidates nearest to some rows of a tile, with and without the other direction."
    g = make_generator(0)
    for seed in range(30):
        g = make_generator(seed)
        unit = lambda n, d: F.normalize(torch.randn(n, d, generator=g), dim=1)
        d = 1 + seed % 3
        v, t, hv, ht = unit(6, d).requires_grad_(), unit(6, d).requires_grad_(), unit(6, 3), unit(6, 3)
        kw = dict(guide_image_features=hv, guide_text_features=ht)
        for symmetric in (True, False):
            plain, tiled = (gist(v, t, scale, symmetric=symmetric, form=form, tiling=Tiling(4, 2, 0), **kw) for form in ('plain', 'tiled'))
            assert_close(plain, tiled, rtol=1e-5, atol=1e-4)
            for x, y in zip(torch.autograd.grad(plain, (v, t)), torch.autograd.grad(tiled, (v, t))): assert_close(x, y, rtol=1e-3, atol=1e-4*scale)


@pytest.mark.parametrize('delta, tau_s, reach', [(11., 1., 1.), (1., 0.1, 1.), (1., 1., 6.), (31., math.inf, 1.)])
def test_sharp_softmax_weights(delta, tau_s, reach):
    "Exponents delta/s in the tens and thousands: the tiled form holds them, in float64 exactly, in float32 as the plain form does."
    g = make_generator(0)
    unit = lambda n, d: F.normalize(torch.randn(n, d, generator=g, dtype=F64), dim=1)
    v, t, aux = unit(12, 6).requires_grad_(), unit(12, 6).requires_grad_(), reach*(2*torch.rand(12, 12, generator=g, dtype=F64) - 1)
    kw = dict(alpha=1., norm='softmax', delta=delta, similarity_temperature=tau_s)
    plain, tiled = (srcl(v, t, 72., aux_similarity=aux, form=form, tiling=Tiling(5, 4, 0), **kw) for form in ('plain', 'tiled'))
    same_loss_and_gradients(plain, tiled, (v, t), rtol=1e-7, atol=1e-7)
    narrow = srcl(v.float(), t.float(), 72., aux_similarity=aux.float(), form='tiled', **kw)
    assert narrow.dtype == torch.float32 and abs(narrow - plain) < 1e-2 * abs(plain)
    with pytest.raises(ValueError, match='whole rows'): srcl(v, t, 5., alpha=0., norm='softmax', similarity_temperature=0.01, form='tiled')


def test_changes_between_forward_and_backward_are_errors():
    g = make_generator(0)
    v, t, h, keep = F.normalize(torch.randn(9, 4, generator=g), dim=1).requires_grad_(), F.normalize(torch.randn(9, 4, generator=g), dim=1), torch.randn(9, 9, generator=g), torch.ones(9, 9).bool()
    for changed, change in ((keep, lambda: keep.fill_(False)), (h, lambda: h.neg_())):
        loss = srcl(v, t, 10., aux_similarity=h, keep=keep, form='tiled', tiling=Tiling(4, 4, 0)); change()
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
        change() if changed is h else keep.fill_(True)


def test_nothing_is_kept_after_backward_or_without_a_gradient():
    g = make_generator(0)
    v, t = (F.normalize(torch.randn(300, 8, generator=g), dim=1).requires_grad_() for _ in range(2))
    node = lambda loss: next(n for n in _nodes(loss.grad_fn) if 'Contrast' in type(n).__name__)
    loss = infonce(v, t, 10., tiling=Tiling(100, 100, math.inf)); found = node(loss)
    assert len(found.kept) == 9
    loss.backward(retain_graph=True); assert len(found.kept) == 0
    first = v.grad.clone(); v.grad = None; loss.backward(); assert torch.equal(first, v.grad)


def _nodes(node):
    seen, queue = set(), [node]
    while queue:
        n = queue.pop()
        if n is None or n in seen: continue
        seen.add(n); queue += [k for k, _ in n.next_functions]
        yield n


def test_two_threads_on_one_graph():
    from concurrent.futures import ThreadPoolExecutor
    g = make_generator(0)
    v, t = (F.normalize(torch.randn(200, 8, generator=g), dim=1).requires_grad_() for _ in range(2))
    loss = infonce(v, t, 10., form='tiled', tiling=Tiling(30, 30, 0))
    exact, = torch.autograd.grad(loss, v, retain_graph=True)
    with ThreadPoolExecutor(2) as pool: found = list(pool.map(lambda _: torch.autograd.grad(loss, v, retain_graph=True)[0], range(8)))
    for x in found: assert torch.equal(x, exact)


@pytest.mark.parametrize('what', [dict(image_ids=torch.ones(6, 1)), dict(image_ids=[1, 2]), dict(image_ids='abcdef'), dict(image_ids=torch.arange(6), text_image_ids=list('abcdef')), dict(positives=torch.ones(5, 6).bool())])
@pytest.mark.parametrize('form', ['plain', 'tiled'])
def test_ids_are_refused_alike_in_both_forms(what, form):
    x = F.normalize(torch.randn(6, 4, generator=make_generator(0)), dim=1)
    with pytest.raises(ValueError, match='ids|positives'): infonce(x, x, 5., form=form, **what)
    with pytest.raises(ValueError, match='known positive'): infonce(x, x, 5., form=form, positives=torch.zeros(6, 6).bool(), keep=torch.ones(6, 6).bool())
