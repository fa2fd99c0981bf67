"Mining: the exact search is a stable sort whatever the tiles, masks, bounds and threads; nobody gets too few; faiss agrees."
import math, subprocess, sys
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vlwb.core import make_generator
from vlwb.negatives.mining import Allowed, Mined, allowed_pairs, hardest, in_threads, keep_best, mine, row_bounds, tile_sizes, upper_bounds


def by_sorting(anchors, pool, k, allowed=None):
    "All scores, a stable sort by falling similarity."
    scores = anchors @ pool.T
    if allowed is not None: scores = scores.masked_fill(~allowed, -math.inf)
    similarity, index = F.pad(scores, (0, max(0, k - len(pool))), value=-math.inf).sort(dim=1, descending=True, stable=True)
    similarity, index = similarity[:,:k], index[:,:k]
    return index.masked_fill(similarity == -math.inf, 0), similarity


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=make_generator(seed), dtype=dtype), dim=-1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(0, 120), st.integers(1, 40), st.integers(1, 4), st.integers(1, 45), st.integers(1, 130), st.integers(0, 2**20),
       st.sampled_from([torch.float32, torch.float64, torch.float16]), st.booleans(), st.booleans(), st.sampled_from([None, -1., 0., 2.]), st.sampled_from([-math.inf, 0., 1.]))
def test_equals_a_stable_sort(a, m, k, width, rows, columns, seed, dtype, with_ids, with_mask, upper, lower):
    "Whole numbers: products are exact, most scores tie, some are -0."
    g = make_generator(seed)
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=g).to(dtype) * (1 if seed % 2 else -1)
    x, y, ids, other = whole(a, width), whole(m, width), torch.randint(0, 4, (a,), generator=g), torch.randint(0, 4, (m,), generator=g)
    mask = torch.rand(a, m, generator=g) < torch.rand(a, 1, generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    scores = x.to(wide) @ y.to(wide).T
    allowed = scores >= lower
    if with_ids: allowed &= ids[:,None] != other
    if with_mask: allowed &= mask
    if upper is not None: allowed &= scores <= upper
    got = hardest(x, y, k, **(dict(anchor_ids=ids, pool_ids=other) if with_ids else {}), mask=mask if with_mask else None, upper=math.inf if upper is None else upper, lower=lower, rows=rows, columns=columns)
    index, similarity = by_sorting(x.to(wide), y.to(wide), k, allowed)
    assert torch.equal(got.index, index) and torch.equal(got.similarity, similarity) and torch.equal(got.found, similarity > -math.inf)
    assert got.similarity.dtype == wide and got.missing == int((similarity == -math.inf).sum())


@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_random_features_in_threads(threads, dtype):
    x, y = unit(301, 24, dtype=dtype), unit(777, 24, seed=1, dtype=dtype)
    ids, other = torch.arange(301) % 100, torch.arange(777) % 100
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = hardest(x, y, 12, anchor_ids=ids, pool_ids=other, rows=64, columns=200)
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    index, similarity = by_sorting(x, y, 12, ids[:,None] != other)
    assert_close(got.similarity, similarity)
    assert_close((x[:,None] * y[got.index]).sum(-1), similarity)
    assert (got.index == index).float().mean() > 0.999 and got.found.all()


def test_by_hand():
    "Similarities 1, 3, 2, 3 of one anchor; the first column is its positive."
    x, y = torch.tensor([[1.]]), torch.tensor([[1.], [3.], [2.], [3.]])
    assert hardest(x, y, 2).index.tolist() == [[1, 3]]
    assert hardest(x, y, 3, anchor_ids=['a'], pool_ids=['a', 'b', 'c', 'd']).index.tolist() == [[1, 3, 2]]
    assert hardest(x, y, 2, upper=2.5).index.tolist() == [[2, 0]]
    assert hardest(x, y, 3, lower=2.).found.tolist() == [[True] * 3] and hardest(x, y, 4, lower=2.).missing == 1
    nothing = hardest(x, y, 2, mask=torch.zeros(1, 4).bool())
    assert nothing.index.tolist() == [[0, 0]] and nothing.similarity.tolist() == [[-math.inf] * 2] and nothing.missing == 2
    one = hardest(torch.ones(1, 1), torch.ones(1, 1), 1)
    assert one.index.tolist() == [[0]] and one.similarity.tolist() == [[1.]]


def test_duplicates_come_in_order():
    "Everything is one item: the candidates are the first that are allowed, in any tiling and for any k."
    x, y, ids = torch.ones(5, 3), torch.ones(2000, 3), torch.arange(5)
    for rows, columns, k in ((None, None, 7), (2, 64, 7), (5, 300, 300), (1, 2000, 1)):
        got = hardest(x, y, k, anchor_ids=ids, pool_ids=torch.arange(2000) % 1000, rows=rows, columns=columns)
        for i in range(5): assert got.index[i].tolist() == [j for j in range(k + 2) if j != i][:k]


def test_a_bound_is_never_crossed_by_rounding():
    "A bound between two floats, as float64 can hold it, lets nothing above it through and keeps what equals it."
    y = torch.tensor([[0.1], [0.2], [0.3]])
    for j in range(3):
        exactly = float(y[j])
        assert hardest(torch.ones(1, 1), y, 1, upper=exactly).index.item() == j
        just_below = np.nextafter(exactly, -1.)
        got = hardest(torch.ones(1, 1), y, 1, upper=just_below)
        assert got.index.item() == max(j - 1, 0) and bool(got.found) == (j > 0)
    half = torch.tensor([[0.1]]).half()
    assert hardest(torch.ones(1, 1).half(), half, 1, positive_similarity=half[0]).found.item()           # as similar as the positive may be found


def test_margins():
    positive = torch.tensor([0.5, -0.5])
    assert_close(upper_bounds(2, positive, margin=0.1), torch.tensor([0.4, -0.6]).double())
    assert_close(upper_bounds(2, positive, relative_margin=0.2), torch.tensor([0.4, -0.6]).double())
    assert_close(upper_bounds(2, positive, margin=0.2, relative_margin=0.1, upper=0.25), torch.tensor([0.25, -0.7]).double())
    x, y = torch.ones(1, 1), torch.tensor([[0.5], [0.45], [0.39], [0.9]])
    assert hardest(x, y, 2, anchor_ids=[0], pool_ids=[0, 1, 2, 3], positive_similarity=positive[:1], margin=0.1).index.tolist() == [[2, 0]]


def test_few_positives_never_make_it_return_too_few():
    "A pool in which an anchor's hundred nearest are its positives: search-then-filter would find none."
    x = unit(20, 16)
    y = torch.cat([x.repeat_interleave(100, 0), unit(50, 16, seed=1)])
    ids = torch.cat([torch.arange(20).repeat_interleave(100), torch.full((50,), -1)])
    got = hardest(x, y, 40, anchor_ids=torch.arange(20), pool_ids=ids)
    assert got.missing == 0 and not (ids[got.index] == torch.arange(20)[:,None]).any()


def test_half_precision_is_widened():
    x, y = unit(40, 64), unit(90, 64, seed=1)
    for dtype in (torch.float16, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        got, wide = hardest(a, b, 6, columns=32), hardest(a.float(), b.float(), 6, columns=32)
        assert torch.equal(got.index, wide.index) and torch.equal(got.similarity, wide.similarity)


def test_no_gradient_and_inputs_untouched():
    x, y = unit(10, 4).requires_grad_(), unit(30, 4, seed=1).requires_grad_()
    before, mask = (x.detach().clone(), y.detach().clone()), torch.ones(10, 30).bool()
    got = hardest(x, y, 3, mask=mask, upper=0.5)
    assert not got.similarity.requires_grad and torch.equal(x, before[0]) and torch.equal(y, before[1]) and mask.all() and torch.is_grad_enabled()


class Largest(TorchDispatchMode):
    "The largest tensor that any operation gives."
    def __init__(self): super().__init__(); self.size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size] + [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def test_holds_no_full_matrix():
    "In tiles of 100 x 200 nothing is larger than the features and a few tiles; identical candidates are the worst case."
    x, y = unit(400, 8), unit(1200, 8, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)                                                 # the mode sees the calling thread alone
        for pool, most in ((y, 40000), (y[:1].expand(1200, 8).contiguous(), 60000)):
            with Largest() as seen: hardest(x, pool, 10, anchor_ids=torch.arange(400), pool_ids=torch.arange(1200) % 400, upper=2., rows=100, columns=200)
            assert seen.size <= most, seen.size
    finally: torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**20))
def test_row_bounds_are_lower_bounds(r, width, k, seed):
    scores = torch.randn(r, width, generator=make_generator(seed))
    bound = row_bounds(scores, k)
    if width < k: assert (bound == -math.inf).all()
    else: assert (bound <= scores.topk(k, dim=1).values[:,-1]).all() and (bound > -math.inf).all()


def test_keep_best_takes_tiles_one_by_one():
    scores = torch.randn(7, 160, generator=make_generator(3))
    best = torch.zeros(7, 0), torch.zeros(7, 0, dtype=torch.int64)
    for start in range(0, 160, 32): best = keep_best(scores[:,start:start+32].contiguous(), *best, start, 9)
    values, index = scores.topk(9, dim=1)
    assert torch.equal(best[0], values) and torch.equal(best[1], index)


def test_tile_sizes_cover_and_keep_all_threads_busy():
    cpu, before = torch.device('cpu'), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for a, m in ((0, 0), (1, 1), (1, 70000), (5000, 25000), (25000, 5000), (3073, 2561)):
            rows, columns = tile_sizes(a, m, cpu)
            assert 1 <= rows <= 1536 and 1 <= columns <= 2560
            if a > 1: assert -(-a // rows) % 2 == 0
    finally: torch.set_num_threads(before)


def test_threads_pass_errors_on_and_keep_order():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with in_threads(torch.device('cpu'), 5) as run: assert run(lambda i: i * i, range(20)) == [i * i for i in range(20)]
        with pytest.raises(KeyError):
            with in_threads(torch.device('cpu'), 5) as run: run({}.__getitem__, [1, 2])
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_pairs_are_judged_as_the_search_does():
    x, y = unit(9, 4), unit(31, 4, seed=1)
    mask = torch.rand(9, 31, generator=make_generator(2)) > 0.3
    allowed = allowed_pairs(x, y, torch.arange(9), torch.arange(31) % 9, mask, upper_bounds(9, upper=0.7), lower=-0.2)
    every = allowed.of(slice(None), torch.arange(31).expand(9, -1), x @ y.T)
    got = hardest(x, y, 31, anchor_ids=torch.arange(9), pool_ids=torch.arange(31) % 9, mask=mask, upper=0.7, lower=-0.2)
    assert torch.equal(torch.zeros(9, 31).bool().scatter(1, got.index, got.found) | (every & (torch.arange(31) == 0)), every)
    assert isinstance(allowed, Allowed) and isinstance(got, Mined)


@pytest.mark.parametrize('arguments, message', [
    (dict(k=0), 'k must be at least 1'), (dict(pool=torch.ones(3, 2)), 'share width'), (dict(anchors=torch.ones(4, 5).int()), 'floating point'), (dict(anchors=torch.full((4, 5), math.nan)), 'NaN or infinity in 4 of 4'),
    (dict(anchor_ids=[1, 2, 3, 4]), 'need pool_ids'), (dict(pool_ids=[1] * 6), 'pool_ids need anchor_ids'), (dict(anchor_ids=[1], pool_ids=[1] * 6), r'anchor_ids must be \(4,\)'),
    (dict(anchor_ids=torch.ones(4, 1), pool_ids=[1] * 6), r'got \(4, 1\)'), (dict(anchor_ids=list('abcd'), pool_ids=[1] * 6), 'of one kind'), (dict(mask=torch.ones(4, 6)), r'mask must be a bool tensor of shape \(4, 6\)'),
    (dict(mask=torch.ones(6, 4).bool()), r'got \(6, 4\)'), (dict(margin=0.1), 'need positive_similarity'), (dict(positive_similarity=torch.ones(3)), r'positive_similarity must be \(4,\)'),
    (dict(positive_similarity=torch.tensor([1., math.nan, 1., 1.])), 'first of anchor 1'), (dict(positive_similarity=torch.ones(4), relative_margin=-0.1), 'relative_margin must be'),
    (dict(upper=math.nan), 'upper must be a number'), (dict(lower=math.nan), 'lower must be a number')])
@pytest.mark.parametrize('search', [hardest, lambda *a, **kw: mine(*a, backend='faiss', **kw)])
def test_errors_name_what_does_not_fit(arguments, message, search):
    given = dict(anchors=torch.ones(4, 5), pool=torch.ones(6, 5), k=2) | arguments
    with pytest.raises(ValueError, match=message): search(given.pop('anchors'), given.pop('pool'), given.pop('k'), **given)


def test_backend_and_tiles_are_checked():
    x = torch.ones(4, 5)
    with pytest.raises(ValueError, match="'exact' or 'faiss'"): mine(x, x, 1, backend='scann')
    with pytest.raises(ValueError, match='rows and columns'): hardest(x, x, 1, rows=0)


def test_faiss_absent_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    with pytest.raises(ImportError, match=r'pip install "vlwb\[faiss\]"'): mine(torch.ones(4, 5), torch.ones(4, 5), 1, backend='faiss')
    assert mine(torch.ones(4, 5), torch.ones(4, 5), 1).found.all()


def test_import_loads_nothing_heavy():
    code = 'import sys, vlwb.negatives.mining; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'faiss', 'transformers', 'matplotlib', 'sklearn', 'scipy', 'pandas'} & set(loaded)


@pytest.mark.parametrize('kind, settings_, exact', [('Flat', '', True), ('IVF8,Flat', 'nprobe=8', True), ('HNSW16', 'efSearch=400', False), ('IVF8,Flat', 'nprobe=1', False)])
def test_faiss_agrees(kind, settings_, exact):
    pytest.importorskip('faiss')
    x, y = unit(150, 16), unit(1200, 16, seed=1)
    ids, other = torch.arange(150), torch.arange(1200) % 150
    positive = (x[other] * y).sum(1).view(8, 150).amin(0) + 0.5
    bounds = dict(anchor_ids=ids, pool_ids=other, positive_similarity=positive, relative_margin=0.1, lower=-0.3)
    plain, got = hardest(x, y, 10, **bounds), mine(x, y, 10, backend='faiss', index=kind, settings=settings_, **bounds)
    assert not (other[got.index] == ids[:,None])[got.found].any()
    assert (got.similarity[got.found] <= upper_bounds(150, positive, relative_margin=0.1)[:,None].expand(-1, 10)[got.found]).all()
    if exact:
        assert torch.equal(got.found, plain.found) and (got.index == plain.index).float().mean() > 0.999
        assert_close(got.similarity, plain.similarity)
    else:
        same = ((got.index[:,:,None] == plain.index[:,None]) & got.found[:,:,None] & plain.found[:,None]).any(2)
        assert same.sum() > (0.05 if 'nprobe' in settings_ else 0.9) * plain.found.sum()


def test_faiss_edges():
    pytest.importorskip('faiss')
    x = unit(5, 8)
    assert mine(x, x, 3, backend='faiss', anchor_ids=range(5)).missing == 0
    assert mine(x, x, 9, backend='faiss', anchor_ids=range(5)).found.sum(1).tolist() == [4] * 5
    assert mine(x[:0], x, 2, backend='faiss').index.shape == (0, 2) and mine(x, x[:0], 2, backend='faiss').missing == 10
    assert mine(x.half(), x.half(), 2, backend='faiss', mask=torch.eye(5).bool()).found.sum(1).tolist() == [1] * 5
    with pytest.raises(ValueError, match='no index'): mine(x, x, 2, backend='faiss', index='Nonsense7')


def test_benchmark_runs_small():
    from vlwb.bench.mining import bench_mining
    rows = bench_mining(tiny=True)
    assert all(r.met for r in rows if r.goal)
    assert all(r.value <= 1e-6 for r in rows if r.name.startswith('largest difference'))
    assert {r.peer for r in rows} == {'', 'torch.mm', 'torch.mm in tiles', 'torch.topk', "sentence-transformers' way"}
    floors = {r.name.partition(',')[0] for r in rows if r.peer.startswith('torch.mm') and r.unit == 's'}
    assert floors == {'product in tiles', 'product at once'} and all(r.peer in ('torch.mm', 'torch.mm in tiles') for r in rows if r.name.startswith('mining / floor'))
