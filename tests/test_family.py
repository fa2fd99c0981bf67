"""What every loss of the family promises, whatever its formula: order and modality do not matter, known positives are never pushed, bad input is named."""
import math, warnings
from dataclasses import dataclass, field
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb import core
from vlwb.core import make_generator, same_ids
from vlwb.losses.albef import albef_itc
from vlwb.losses.cyclip import cyclip
from vlwb.losses.debiased import dcl, hcl
from vlwb.losses.gist import gist
from vlwb.losses.infonce import infonce
from vlwb.losses.itcontrast import itcontrast
from vlwb.losses.siglip import siglip
from vlwb.losses.soft import soft_targets
from vlwb.losses.srcl import srcl
from vlwb.losses.vse import vse

F64 = torch.float64
few = settings(max_examples=25, deadline=None)


@dataclass
class Batch:
    "Features of a batch and of a second model; the second model's carry no gradient."
    v: torch.Tensor
    t: torch.Tensor
    hv: torch.Tensor
    ht: torch.Tensor
    ids: object = None
    more: dict = field(default_factory=dict)

    def take(self, order): return Batch(self.v[order], self.t[order], self.hv[order], self.ht[order], None if self.ids is None else self.ids[order], self.more)
    def turned(self): return Batch(self.t, self.v, self.ht, self.hv, self.ids, self.more)
    def kw(self): return self.more if self.ids is None else dict(image_ids=self.ids, **self.more)


def made(b):
    "Synthetics of each anchor that move with it: its own features turned, which no order of the batch changes."
    if b.v.ndim != 2 or b.t.ndim != 2: return {}
    turned = lambda x: x.detach()[:, (torch.arange(x.shape[1]) + torch.tensor([[1], [2]])) % x.shape[1]]
    return dict(synthetic_texts=turned(b.v), synthetic_images=turned(b.t))


FAMILY = {
    'infonce': lambda b, s: infonce(b.v, b.t, s, **b.kw()),
    'infonce each': lambda b, s: infonce(b.v, b.t, s, multi_positive='each', **b.kw()),
    'infonce tiled': lambda b, s: infonce(b.v, b.t, s, form='tiled', **b.kw()),
    'srcl H': lambda b, s: srcl(b.v, b.t, s, aux_image_features=b.hv, aux_text_features=b.ht, **b.kw()),
    'srcl both': lambda b, s: srcl(b.v, b.t, s, aux_image_features=b.hv, aux_text_features=b.ht, alpha=0.4, multi_positive='each', form='tiled', **b.kw()),
    'srcl softmax': lambda b, s: srcl(b.v, b.t, s, alpha=0., norm='softmax', **b.kw()),
    'albef': lambda b, s: albef_itc(b.v, b.t, s, momentum_image_features=b.v.detach(), momentum_text_features=b.t.detach(), **b.kw()),
    'siglip': lambda b, s: siglip(b.v, b.t, s, **b.kw()),
    'vse max': lambda b, s: vse(b.v, b.t, **b.kw()),
    'vse sum': lambda b, s: vse(b.v, b.t, hardest=False, **b.kw()),
    'dcl': lambda b, s: dcl(b.v, b.t, s, **b.kw()),
    'hcl': lambda b, s: hcl(b.v, b.t, s, **b.kw()),
    'gist': lambda b, s: gist(b.v, b.t, s, guide_image_features=b.hv, guide_text_features=b.ht, **b.kw()),
    'gist intra': lambda b, s: gist(b.v, b.t, s, guide_image_features=b.hv, guide_text_features=b.ht, intra=True, **b.kw()),
    'itcontrast': lambda b, s: itcontrast(b.v, b.t, s, **made(b), **b.kw()),
    'itcontrast srcl intra': lambda b, s: itcontrast(b.v, b.t, s, weights='srcl', aux_image_features=b.hv, aux_text_features=b.ht, alpha=0.4, intra_weight=0.5, synthetic_weight=0.3, form='tiled', **made(b), **b.kw()),
    'cyclip': lambda b, s: cyclip(b.v, b.t, s, **b.kw()),
    'soft': lambda b, s: soft_targets(b.v, b.t, s, target_image_features=b.hv, target_text_features=b.ht, mix=0.5, **b.kw()),
}
SCALED = [n for n in FAMILY if not n.startswith('vse')]
names = pytest.mark.parametrize('name', FAMILY)


def make(n=6, d=5, seed=0, ids=True, dtype=F64):
    g = make_generator(seed)
    unit = lambda d: F.normalize(torch.randn(n, d, generator=g, dtype=F64), dim=1).to(dtype)
    return Batch(unit(d), unit(d), unit(d + 1), unit(d + 1), torch.randint(0, max(2, n - 2), (n,), generator=g) if ids else None)


@names
@few
@given(st.integers(1, 9), st.integers(2, 6), st.integers(0, 999), st.booleans(), st.sampled_from([1., 14., 100.]))
def test_order_and_modality_do_not_matter(name, n, d, seed, ids, scale):
    b, loss = make(n, d, seed, ids), FAMILY[name]
    value = loss(b, scale)
    assert value.shape == () and value.dtype == F64 and value.isfinite()
    assert_close(loss(b.take(torch.randperm(n, generator=make_generator(seed))), scale), value, rtol=1e-9, atol=1e-9)
    assert_close(loss(b.turned(), scale), value, rtol=1e-9, atol=1e-9)


@names
@few
@given(st.integers(2, 9), st.integers(0, 999))
def test_a_known_positive_is_never_pushed_as_a_negative(name, n, seed):
    "Take a batch of one image alone, seen many times: there is no negative, so nothing may be pushed apart for being one."
    b = make(n, 4, seed); b.ids = torch.zeros(n, dtype=torch.int64)
    same = Batch(*(x[:1].repeat(n, 1) for x in (b.v, b.t, b.hv, b.ht)), b.ids)
    same.v = same.v.clone().requires_grad_()
    loss = FAMILY[name](same, 10.)
    gradient = torch.autograd.grad(loss, same.v, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None: return
    along = (gradient * same.t).sum(1)                        # positive: features of pairs that match are driven apart
    if name in ('cyclip', 'gist intra'): assert (along <= 1e-6 + gradient.abs().max()).all()
    else: assert (along <= 1e-9).all()


@names
def test_second_opinions_carry_no_gradient(name):
    b = make(); b.hv.requires_grad_(); b.ht.requires_grad_(); b.v.requires_grad_()
    taken = torch.autograd.grad(FAMILY[name](b, 10.), (b.v, b.hv, b.ht), allow_unused=True)
    assert taken[0] is not None and taken[1] is None and taken[2] is None


@names
def test_one_pair_and_equal_features(name):
    one = FAMILY[name](make(1, ids=False), 10.)
    same = make(5, ids=False); same = Batch(*(x[:1].repeat(5, 1).clone().requires_grad_() for x in (same.v, same.t, same.hv, same.ht)))
    loss = FAMILY[name](same, 10.); loss.backward()
    assert one.isfinite() and loss.isfinite() and same.v.grad.isfinite().all()


@names
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    b = make(8, 16, dtype=dtype); b.v.requires_grad_()
    exact = make(8, 16); exact = Batch(*(x.detach().double() for x in (b.v, b.t, b.hv, b.ht)), b.ids)
    with torch.autocast('cpu', dtype=torch.bfloat16): loss = FAMILY[name](b, 50.)
    loss.backward()
    assert loss.dtype == torch.float32 and b.v.grad.dtype == dtype and b.v.grad.isfinite().all()
    assert_close(loss.double(), FAMILY[name](exact, 50.), rtol=1e-4, atol=1e-4)


@names
def test_everything_taken_out(name):
    b = make(5); b.more = dict(keep=torch.zeros(5, 5, dtype=torch.bool)); b.v.requires_grad_()
    loss = FAMILY[name](b, 10.)
    gradient = torch.autograd.grad(loss, b.v, allow_unused=True)[0] if loss.requires_grad else None
    assert loss == 0 and (gradient is None or (gradient == 0).all())
    b.more = dict(keep=same_ids(b.ids))                       # positives alone are left
    assert FAMILY[name](b, 10.).isfinite()


BAD = {
    'another width': lambda b: Batch(b.v, b.t[:, :3], b.hv, b.ht, b.ids),
    'not a matrix': lambda b: Batch(b.v[0], b.t, b.hv, b.ht, b.ids),
    'no pairs': lambda b: Batch(b.v[:0], b.t[:0], b.hv[:0], b.ht[:0], None),
    'NaN': lambda b: Batch(b.v * math.nan, b.t, b.hv, b.ht, b.ids),
    'infinity': lambda b: Batch(b.v, b.t / 0, b.hv, b.ht, b.ids),
    'another dtype': lambda b: Batch(b.v, b.t.float(), b.hv, b.ht, b.ids),
    'ids too short': lambda b: Batch(b.v, b.t, b.hv, b.ht, b.ids[:2]),
    'keep of another shape': lambda b: Batch(b.v, b.t, b.hv, b.ht, b.ids, dict(keep=torch.ones(2, 2, dtype=torch.bool))),
    'keep of numbers': lambda b: Batch(b.v, b.t, b.hv, b.ht, b.ids, dict(keep=torch.ones(6, 6))),
    'no positive': lambda b: Batch(b.v, b.t, b.hv, b.ht, None, dict(positives=torch.zeros(6, 6, dtype=torch.bool))),
}


@names
@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_named(name, what):
    if (name, what) == ('soft', 'no positive'): return         # its soft targets are something to pull towards
    with pytest.raises(ValueError) as e: FAMILY[name](BAD[what](make()), 10.)
    word = {'ids too short': 'ids', 'keep of another shape': 'keep', 'keep of numbers': 'keep', 'NaN': 'NaN', 'infinity': 'infinity', 'no positive': 'positive'}.get(what, 'features')
    assert word in str(e.value) and '\n' not in str(e.value), str(e.value)


@pytest.mark.parametrize('name', SCALED)
@pytest.mark.parametrize('scale', [0., -1., math.nan, math.inf, torch.ones(2)])
def test_bad_scale_is_named(name, scale):
    with pytest.raises(ValueError, match='logit_scale'): FAMILY[name](make(), scale)


@names
def test_unnormalised_features_warn_once_with_the_norm_seen(name):
    core.warned.clear()
    b = make(); b = Batch(3 * b.v, b.t, b.hv, b.ht, b.ids)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for _ in range(2): FAMILY[name](b, 10.)
    mine = [w for w in seen if 'image_features' in str(w.message)]
    assert len([w for w in mine if str(w.message).startswith('image_features')]) == 1 and '3' in str(mine[0].message) and mine[0].filename == __file__
