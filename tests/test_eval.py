"""Retrieval and semantics against plain readings of their definitions."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from vlwb.eval import retrieval
from vlwb.eval.retrieval import (TIES, as_matches, coco_1k_5fold, own_matches, precision_at_r, recall_at, retrieval_metrics, standings)
from vlwb.eval.semantics import anchor_auroc, detection, detection_by_weight, graded_spearman

KS = (1, 2, 5)


def sorted_reading(scores, relevance, ks, ties):
    "One direction by sorting each row; ties broken for or against the matches. The way of eccv_caption: P@k where position k holds a match, summed over the first R, divided by R."
    figures, best, left_out = {name: [] for name in [f'R@{k}' for k in ks] + ['mAP@R', 'R-Precision']}, [], 0
    for row, match in zip(scores, relevance):
        if not match.any(): left_out += 1; continue
        order = np.lexsort((match if ties == 'pessimistic' else ~match, -row))
        hits = match[order]; R = int(hits.sum())
        precision = np.cumsum(hits) / (np.arange(len(hits)) + 1)
        best.append(np.flatnonzero(hits)[0] + 1)
        for k in ks: figures[f'R@{k}'].append(hits[:k].any())
        figures['mAP@R'].append((precision * hits)[:R].sum() / R)
        figures['R-Precision'].append(hits[:R].mean())
    return {k: 100 * np.mean(v) for k, v in figures.items()} | dict(median_rank=np.median(best), queries=len(best), left_out=left_out)


@st.composite
def worlds(draw, largest=9):
    "Small whole-number features, so that scores are exact and often tie, with any relevance that holds a match."
    n, m, d = draw(st.integers(1, largest)), draw(st.integers(1, 2 * largest)), draw(st.integers(1, 3))
    features = [draw(hnp.arrays(np.float32, (size, d), elements=st.integers(-2, 2).map(float))) for size in (n, m)]
    relevance = draw(hnp.arrays(bool, (n, m)))
    relevance[draw(st.integers(0, n - 1)), draw(st.integers(0, m - 1))] = True
    tile = draw(st.tuples(st.integers(1, n + 2), st.integers(1, m + 2)))
    return *features, relevance, tile


@settings(max_examples=80, deadline=None)
@given(worlds(), st.sampled_from(['pessimistic', 'optimistic']))
def test_equals_sorting(world, ties):
    images, texts, relevance, tile = world
    got = retrieval_metrics(torch.tensor(images), torch.tensor(texts), relevance, KS, ties, tile)
    scores = images @ texts.T
    for side, s, r in (('i2t', scores, relevance), ('t2i', scores.T, relevance.T)):
        want = sorted_reading(s, r, KS, ties)
        assert got[side].keys() == want.keys()
        np.testing.assert_allclose(list(got[side].values()), list(want.values()), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(worlds(largest=4), st.integers(0, 2**31))
def test_expected_is_the_mean_over_random_orders(world, seed):
    images, texts, relevance, tile = world
    rng, scores, n = np.random.default_rng(seed), images @ texts.T, 1500
    got = retrieval_metrics(torch.tensor(images), torch.tensor(texts), relevance, KS, 'expected', tile)['i2t']
    draws = []
    for _ in range(n):
        order = rng.permutation(scores.shape[1])
        hits = relevance[:,order]
        ranked = np.take_along_axis(hits, np.argsort(-scores[:,order], axis=1, kind='stable'), 1)
        ranked = ranked[ranked.any(1)]; R = ranked.sum(1, keepdims=True); inside = np.arange(scores.shape[1]) < R
        precision = np.cumsum(ranked, 1) / (np.arange(scores.shape[1]) + 1)
        draws.append([*(ranked[:,:k].any(1).mean() for k in KS), ((precision * ranked * inside).sum(1) / R[:,0]).mean(), ((ranked * inside).sum(1) / R[:,0]).mean()])
    draws = 100 * np.array(draws)
    slack = 6 * draws.std(0) / n**0.5 + 1e-9
    assert (np.abs(draws.mean(0) - [got[k] for k in ('R@1', 'R@2', 'R@5', 'mAP@R', 'R-Precision')]) <= slack + 0.02).all()


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_ties_are_ordered_and_recall_only_agrees(world):
    images, texts, relevance, tile = world
    images, texts = torch.tensor(images), torch.tensor(texts)
    low, mid, high = (retrieval_metrics(images, texts, relevance, KS, ties, tile) for ties in ('pessimistic', 'expected', 'optimistic'))
    for side in ('i2t', 't2i'):
        for name in ('R@1', 'R@2', 'R@5', 'mAP@R', 'R-Precision'):
            assert low[side][name] <= mid[side][name] + 1e-9 <= high[side][name] + 2e-9
        fast = retrieval_metrics(images, texts, relevance, KS, tile=tile, recall_only=True)[side]
        assert fast == {k: v for k, v in mid[side].items() if k in fast} and 'mAP@R' not in fast


def test_both_ways_of_counting_agree(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (23, 310))     # no ties by rounding
    truth = torch.rand(23, 310, generator=generator) < torch.rand(1, 310, generator=generator)
    one = retrieval_metrics(images, texts, truth, tile=(7, 50))
    for heavy in (0, 5, 10**6):
        monkeypatch.setattr(retrieval, 'HEAVY', heavy)
        assert retrieval_metrics(images, texts, truth, tile=(7, 50)) == one
    want = sorted_reading((images @ texts.T).numpy(), truth.numpy(), (1, 5, 10), 'pessimistic')
    np.testing.assert_allclose([one['i2t'][k] for k in want], list(want.values()), atol=1e-9)


@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_change_nothing(threads):
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(50, 8, generator=generator), torch.randn(200, 8, generator=generator)
    relevance, before = own_matches(np.arange(200) // 4, 50), torch.get_num_threads()
    want = retrieval_metrics(images, texts, relevance)
    try:
        torch.set_num_threads(threads)
        assert retrieval_metrics(images, texts, relevance, tile=(9, 31)) == want
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)


def test_an_error_in_a_thread_comes_out(monkeypatch):
    def fail(*args): raise RuntimeError('broken tile')
    monkeypatch.setattr(retrieval, '_tile_scores', fail)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match='broken tile'): retrieval_metrics(torch.eye(3), torch.eye(3), np.eye(3, dtype=bool), tile=(1, 1))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize('width', [3, 64, 500, 1000, 1280])
@pytest.mark.parametrize('kind', ['ones', 'random'])
def test_a_constant_score_is_no_better_than_guessing(width, kind):
    v = torch.ones(1, width) if kind == 'ones' else torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    v = torch.nn.functional.normalize(v, dim=1)
    relevance = own_matches(np.arange(303) // 3, 101)
    figures = retrieval_metrics(v.expand(101, -1).contiguous(), v.expand(303, -1).contiguous(), relevance, tile=(33, 100))
    np.testing.assert_allclose([figures['t2i'][f'R@{k}'] for k in (1, 5, 10)], 100 * np.array([1, 5, 10]) / 101)
    np.testing.assert_allclose(figures['i2t']['R@1'], 100 / 101)
    assert figures['t2i']['median_rank'] == 51
    worst = retrieval_metrics(v.expand(101, -1).contiguous(), v.expand(303, -1).contiguous(), relevance, ties='pessimistic')
    assert worst['rsum'] == 0 and worst['t2i']['median_rank'] == 101


def test_one_image_and_an_image_without_match():
    one = retrieval_metrics(torch.eye(2)[:1], torch.eye(2), np.array([[False, True]]), ks=(1, 2))
    assert one['i2t'] == {'R@1': 0, 'R@2': 100, 'mAP@R': 0, 'R-Precision': 0, 'median_rank': 2, 'queries': 1, 'left_out': 0}
    assert one['t2i'] == {'R@1': 100, 'R@2': 100, 'mAP@R': 100, 'R-Precision': 100, 'median_rank': 1, 'queries': 1, 'left_out': 1}
    left = retrieval_metrics(torch.eye(3), torch.eye(3), torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]]).bool())
    assert left['i2t']['queries'] == 2 and left['i2t']['left_out'] == 1 and left['t2i']['left_out'] == 0


def test_forms_of_relevance_and_gradients():
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(12, 4, generator=generator, requires_grad=True), torch.randn(30, 4, generator=generator)
    truth = torch.rand(12, 30, generator=generator) < .2
    class Holder: matches = sparse.csr_array(truth.numpy())
    forms = [truth, truth.numpy(), truth.int(), sparse.coo_matrix(truth.numpy()), Holder()]
    assert all(retrieval_metrics(images, texts, form) == retrieval_metrics(images, texts, truth) for form in forms)
    doubled = retrieval_metrics(images.double(), texts.double(), truth)
    assert abs(doubled['rsum'] - retrieval_metrics(images, texts, truth)['rsum']) < 1e-9
    stored_false = sparse.csr_array((np.array([True, False]), (np.array([0, 0]), np.array([0, 1]))), shape=(1, 2))
    assert as_matches(stored_false, 1, 2).nnz == 1


def test_relevance_of_the_data_room():
    from vlwb.data.relevance import from_scenes
    from vlwb.data.scenes import holds, make_captions, make_scenes
    scenes = make_scenes(30, seed=0); captions = make_captions(scenes, per_scene=2, seed=0)
    images, texts = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    assert retrieval_metrics(images, texts, from_scenes(scenes, captions)) == retrieval_metrics(images, texts, holds(scenes, captions))


def test_wrong_input():
    eye, truth = torch.eye(3), np.eye(3, dtype=bool)
    nan = eye.clone(); nan[1,1] = torch.nan
    with pytest.raises(ValueError, match='text_features holds NaN'): retrieval_metrics(eye, nan, truth)
    with pytest.raises(ValueError, match=r'\(3, 3\), got \(2, 3\)'): retrieval_metrics(eye, eye, truth[:2])
    with pytest.raises(ValueError, match='ties must be'): retrieval_metrics(eye, eye, truth, ties='any')
    with pytest.raises(ValueError, match='tile must be'): retrieval_metrics(eye, eye, truth, tile=(0, 5))
    with pytest.raises(ValueError, match='every match counted'): precision_at_r(standings(eye, eye, ~truth, best_only=True)[0])
    with pytest.raises(ValueError, match='need 5000 images'): coco_1k_5fold(eye, eye, [0, 1, 2])


def test_folds_take_captions_with_their_images():
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(20, 6, generator=generator), torch.randn(60, 6, generator=generator)
    owner = torch.randperm(60, generator=generator).numpy() % 20                # captions in any order
    got = coco_1k_5fold(images, texts, owner, size=4)
    folds = []
    for a in range(0, 20, 4):
        mine = np.flatnonzero((owner >= a) & (owner < a + 4))
        folds.append(sorted_reading((images[a:a+4] @ texts[mine].T).numpy(), owner[mine] == np.arange(a, a + 4)[:,None], (1, 5, 10), 'pessimistic'))
    for name in ('R@1', 'R@5', 'mAP@R', 'median_rank'): np.testing.assert_allclose(got['i2t'][name], np.mean([f[name] for f in folds]))
    assert got['i2t']['queries'] == 20 and got['t2i']['queries'] == 60


def test_torchmetrics_agrees_where_it_is_installed():
    functional = pytest.importorskip('torchmetrics.functional.retrieval')
    generator = torch.Generator().manual_seed(4)
    images, texts = torch.randn(9, 5, generator=generator), torch.randn(40, 5, generator=generator)
    truth = torch.rand(9, 40, generator=generator) < .3
    i2t, _ = standings(images, texts, truth)
    for row, match, precision, hit in zip(images @ texts.T, truth, precision_at_r(i2t)[1], recall_at(i2t, 3)):
        if not match.any(): continue
        assert float(functional.retrieval_r_precision(row, match)) == pytest.approx(precision)
        assert float(functional.retrieval_hit_rate(row, match, top_k=3)) == pytest.approx(hit)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_chance_of_the_right_order(items):
    scores, labels = np.array([s for s, _ in items], float), np.array([l for _, l in items])
    got = detection(scores, labels)
    if labels.all() or not labels.any(): assert np.isnan(got['auroc']); return
    pairs = scores[labels][:,None] - scores[~labels][None]
    assert got['auroc'] == pytest.approx(((pairs > 0) + .5 * (pairs == 0)).mean())
    scrambled = np.random.default_rng(0).permutation(len(items))
    assert detection(scores[scrambled], labels[scrambled]) == pytest.approx(got)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, (4, 7), elements=st.integers(0, 3).map(float)), hnp.arrays(bool, (4, 7)), hnp.arrays(bool, (4, 7)), hnp.arrays(bool, (4, 7)))
def test_anchor_auroc_is_detection_row_by_row(scores, truth, positives, keep):
    scores, truth, positives, keep = map(torch.tensor, (scores, truth, positives, keep))
    used = ~positives & keep
    want = [detection(scores[i][used[i]], truth[i][used[i]])['auroc'] if used[i].any() else np.nan for i in range(4)]
    np.testing.assert_allclose(anchor_auroc(scores, truth, positives, keep), want, atol=1e-12)
    if used.any(): assert detection_by_weight(-scores, truth, positives, keep) == pytest.approx(detection(scores[used], truth[used]), nan_ok=True)


def test_spearman_of_stored_grades_only():
    similarity = np.array([[.1, .2, 9.], [.3, .4, -9.]])
    grades = sparse.csr_array((np.array([0., 1, 2, 3]), (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))), shape=(2, 3))
    assert graded_spearman(similarity, grades) == pytest.approx(1)
    assert graded_spearman(torch.tensor(similarity), grades) == pytest.approx(1)
    with pytest.raises(ValueError, match='at least'): graded_spearman([.1], [1.])
    assert TIES[0] == 'expected'
