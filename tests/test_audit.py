"""The audit against brute force, its rows as known matches, and what importing it costs."""
import json, subprocess, sys
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.sparse import csr_array
from vlwb.core import make_generator
from vlwb.data.relevance import read_matches
from vlwb.negatives.audit import Evidence, _tiles, count_at_least, cross_pairs, find_suspects, own_scores, score_pairs, share_above, suspect_rows, suspect_threshold, suspects_per_batch, write_suspects

@st.composite
def evidence(draw, routes=('text', 'image', 'both')):
    generator = make_generator(draw(st.integers(0, 10_000)))
    n, m, route = draw(st.integers(2, 9)), draw(st.integers(2, 40)), draw(st.sampled_from(routes))
    whose = torch.randint(-1, n, (m,), generator=generator).numpy()
    unit = lambda k: F.normalize(torch.randn(k, 5, generator=generator), dim=1)
    parts = {}
    if route != 'image': parts |= dict(text_features=unit(m))
    if route != 'text': parts |= dict(image_features=unit(n), caption_features=unit(m))
    try: return Evidence(whose, num_images=n, pool=draw(st.sampled_from(['max', 'mean'])), **parts)
    except ValueError as e:                             # a set with too few cross pairs to standardise
        assert 'do not vary' in str(e)
        return Evidence(whose, num_images=n, text_features=unit(m))

def brute(e):
    "Scores (N,M) by a loop over pairs; own pairs and pairs without text evidence are -inf."
    out = np.full((e.num_images, e.num_captions), -np.inf)
    for i in range(e.num_images):
        own = np.flatnonzero(e.caption_image == i)
        for c in range(e.num_captions):
            if e.caption_image[c] == i: continue
            text = image = None
            if e.has_text:
                dots = [float(e.text_features[o] @ e.text_features[c]) for o in own]
                text = (max(dots) if e.pool == 'max' else sum(dots)/len(dots)) if dots else -np.inf
            if e.has_image: image = float(e.image_features[i] @ e.caption_features[c])
            if text is None or image is None: out[i, c] = image if text is None else text
            else: (tm, ts), (im, is_) = e.scale; out[i, c] = e.text_weight*(text - tm)/ts + (1 - e.text_weight)*(image - im)/is_
    return out

@settings(max_examples=40, deadline=None)
@given(evidence(), st.integers(1, 60), st.integers(1, 4), st.integers(0, 99))
def test_suspects_equal_brute_force(e, count, per_image, seed):
    known = np.random.RandomState(seed).rand(e.num_images, e.num_captions) < 0.2
    scores = np.where(known, -np.inf, brute(e))
    overall = find_suspects(e, count, known=csr_array(known), progress=False)
    best = np.sort(scores[np.isfinite(scores)])[::-1]
    np.testing.assert_allclose(overall.score, best[:count], atol=1e-5)
    each = find_suspects(e, None, per_image=per_image, known=known.nonzero(), progress=False)
    rows = [np.sort(r[np.isfinite(r)])[::-1][:per_image] for r in scores]
    np.testing.assert_allclose(each.score, np.sort(np.concatenate(rows))[::-1], atol=1e-5)
    for found in (overall, each):
        assert not known[found.image_index, found.caption_index].any()
        assert (e.caption_image[found.caption_index] != found.image_index).all()
        np.testing.assert_allclose(found.score, scores[found.image_index, found.caption_index], atol=1e-5)
        assert len({*zip(found.image_index.tolist(), found.caption_index.tolist())}) == len(found)
        if e.has_text: assert (e.caption_image[found.closest] == found.image_index).all()

@settings(max_examples=40, deadline=None)
@given(evidence(), st.integers(0, 99), st.floats(-1, 1))
def test_counts_equal_brute_force(e, seed, threshold):
    rng = np.random.RandomState(seed); scores = brute(e)
    if (np.abs(scores - threshold) < 1e-4).any(): return                     # on the edge either answer is right
    rows, columns = rng.rand(e.num_images), rng.rand(e.num_captions)
    np.testing.assert_allclose(count_at_least(e, [9., threshold, threshold, -9e9], rows, columns, progress=False),
        [0] + [((scores >= threshold) * rows[:,None] * columns).sum()]*2 + [(np.isfinite(scores) * rows[:,None] * columns).sum()], atol=1e-9)
    captions = np.flatnonzero(e.caption_image >= 0)
    if len(captions) < 2: return
    drawn = [scores[e.caption_image[a], b] >= threshold for a in captions for b in captions if a != b]
    np.testing.assert_allclose(suspects_per_batch(e, threshold, (7,), progress=False)[0]['suspects'], np.mean(drawn)*7*6, rtol=1e-9)

@pytest.mark.parametrize('pool', ['max', 'mean'])
@pytest.mark.parametrize('sizes', [(1, 3), (4, 7), (64, 8192)])
def test_tiles_do_not_change_scores(pool, sizes):
    generator = make_generator(0); unit = lambda k: F.normalize(torch.randn(k, 6, generator=generator), dim=1)
    e = Evidence([0,0,0,1,3,3,-1,-1,4,5,5,5], num_images=7, text_features=unit(12), image_features=unit(7), caption_features=unit(12), pool=pool)
    whole = np.full((7, 12), np.nan)
    for i, c, tile in _tiles(e, None, *sizes): whole[i:i+len(tile), c:c+tile.shape[1]] = tile
    np.testing.assert_allclose(whole, brute(e), atol=1e-5)
    finite = np.argwhere(np.isfinite(whole))
    np.testing.assert_allclose(score_pairs(e, *finite.T, chunk=5).score, whole[tuple(finite.T)], atol=1e-5)

def test_equal_scores_are_no_trouble():
    e = Evidence(np.repeat(np.arange(50), 3), text_features=F.normalize(torch.ones(150, 4), dim=1))
    found = find_suspects(e, 20, progress=False)
    assert len(found) == 20 and len(find_suspects(e, None, per_image=2, progress=False)) == 100
    assert share_above(e, found.score[:1], progress=False).tolist() == [1.]      # ties count against the pair: a constant score finds nothing
    assert suspect_threshold(e) == pytest.approx(1.) and len(own_scores(e)) == 150

def test_cross_pairs_are_uniform_over_cross_pairs():
    e = Evidence([0,0,1,-1], text_features=torch.eye(4))
    images, captions = cross_pairs(e, 60_000, make_generator(0))
    counts = np.zeros((2,4)); np.add.at(counts, (images, captions), 1)
    assert (counts[[0,0,1],[0,1,2]] == 0).all()
    np.testing.assert_allclose(counts[counts > 0]/counts.sum(), 1/5, atol=0.01)

def test_rows_come_back_as_known_matches(tmp_path):
    e = Evidence([0,0,1,1,2,2], text_features=F.normalize(torch.randn(6, 4, generator=make_generator(1)), dim=1))
    ids = dict(image_ids=['x', 'y', 'z'], caption_ids=[f'c{i}' for i in range(6)])
    found = find_suspects(e, 5, progress=False)
    captions = ['a "quoted" caption\nof two lines', 'ein Café', '一只狗', 'c', 'd', 'e']
    path = write_suspects(tmp_path/'suspects.jsonl', suspect_rows(found, captions, **ids))
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert [(r['image_id'], r['caption_id']) for r in rows] == [(ids['image_ids'][i], ids['caption_ids'][c]) for i, c in zip(found.image_index, found.caption_index)]
    assert all(set(r) == {'image_id', 'caption_id', 'caption', 'caption_image_id', 'score', 'why'} for r in rows)
    judged = [r | dict(verdict='match' if k < 3 else 'no match') for k, r in enumerate(rows)]
    write_suspects(path, judged)
    relevance = read_matches(path).align(**ids)
    assert relevance.matches.nnz == 3 and relevance.known.nnz == 5
    write_suspects(path, rows)
    known = read_matches(path, suspects_match=True).align(**ids).matches
    again = find_suspects(e, 100, known=known, progress=False)
    assert not {*zip(found.image_index, found.caption_index)} & {*zip(again.image_index, again.caption_index)} and len(again) == 12 - 5

def test_importing_the_audit_is_light():
    code = "import sys, vlwb.negatives.audit; print([m for m in ('transformers', 'pandas', 'sklearn', 'scipy', 'matplotlib', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
