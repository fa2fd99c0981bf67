"Hard negatives: the reader, accuracies by kind, exact mirrors in the scenes world, and the measures of modality."
import json, math
import numpy as np
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import sparse
from scipy.stats import binomtest
from vlwb.core import DataError, data_folder, make_generator
from vlwb.data.hard import SUGARCREPE, HardCaptions, other_captions, place, read_sugarcrepe
from vlwb.data.pairs import Pairs, read_pairs
from vlwb.data.scenes import hard_negative_captions, holds, make_captions, make_scenes, wrong_facts
from vlwb.eval.hard import Score, by_kind, cluster_weights, compare, flat_scores, hard_accuracy, hard_report, judge_sugarcrepe, mirror_accuracy, mirrored, text_accuracy, wilson
from vlwb.eval.modality import alignment, modality_gap, modality_probe, modality_report, positive_pairs, uniformity

few = settings(max_examples=40, deadline=None)
unit = lambda n, d, seed=0: F.normalize(torch.randn(n, d, generator=make_generator(seed), dtype=torch.float64), dim=1)


# The reader -----------------------------------------------------------------------------------------------------------------------------------------

def write(folder, name, content):
    (folder/name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder/name


def published(file='000000000042.jpg', caption='a cat', negative='a dog'): return dict(filename=file, caption=caption, negative_caption=negative)


def test_published_files_and_json_lines_say_the_same(tmp_path):
    for i, kind in enumerate(SUGARCREPE): write(tmp_path, f'{kind.replace("_obj", "_ent")}.json', {str(k): published(f'{k + i:012d}.jpg', f'{kind} {k}', f'not {kind} {k}') for k in range(3)})
    write(tmp_path, 'notes.json', [1, 2])
    hard = read_sugarcrepe(tmp_path)
    assert len(hard) == 21 and list(dict.fromkeys(hard.kinds)) == list(SUGARCREPE) and hard.image_ids[:3] == ['0', '1', '2'] and hard.files is None
    lines = ''.join(json.dumps(dict(type=k, image_id=int(i), caption=c, negative=n)) + '\n' for i, c, n, k in zip(hard.image_ids, hard.captions, hard.negatives, hard.kinds))
    again = read_sugarcrepe(write(tmp_path, 'ours.jsonl', lines))
    for name in ('image_ids', 'captions', 'negatives'): assert getattr(again, name) == getattr(hard, name)
    assert (again.kinds == hard.kinds).all() and read_sugarcrepe(tmp_path, kinds=('swap_obj', 'add_att')).counts == dict(swap_obj=3, add_att=3)


def test_images_stay_in_their_folder(tmp_path):
    (tmp_path/'photos').mkdir(); (tmp_path/'out.jpg').write_bytes(b'x'); (tmp_path/'photos/1.jpg').write_bytes(b'x')
    source = write(tmp_path, 'add_obj.json', {'0': published('1.jpg'), '1': published('../out.jpg'), '2': published('2.jpg'), '3': published('/etc/hostname')})
    with pytest.raises(DataError, match='row 1.*leads outside'): read_sugarcrepe(source, images=tmp_path/'photos')
    some = read_sugarcrepe(source, images=tmp_path/'photos', on_error='skip')
    assert [f.name for f in some.files] == ['1.jpg'] and len(some.problems) == 3
    assert len(read_sugarcrepe(source)) == 4                       # names alone are not opened


@pytest.mark.parametrize('word, rows', [
    ('row 0: the caption', {'0': published(caption=' ')}), ('row 7: the negative', {'7': published(negative=None)}), ('same sentence', {'0': published(caption='a  dog')}), ('row 0: must be an object', {'0': 'cat'}),
    ('neither an image', {'0': dict(caption='a', negative_caption='b')}), ('object of rows', [1]), ('not JSON', '{"0": '), ('empty', ''), ('stands twice', '{"0": 1, "0": 2}')])
def test_reader_names_file_and_row(tmp_path, word, rows):
    with pytest.raises(DataError, match=word) as e: read_sugarcrepe(write(tmp_path, 'add_att.json', rows))
    assert 'add_att.json' in str(e.value)


def test_reader_refuses_unknown_kinds(tmp_path):
    with pytest.raises(DataError, match="line 1.*'negate'"): read_sugarcrepe(write(tmp_path, 'x.jsonl', json.dumps(dict(type='negate', image_id=1, caption='a', negative='b'))))
    with pytest.raises(ValueError, match='negate'): read_sugarcrepe(tmp_path, kinds=('negate',))
    with pytest.raises(DataError, match='replace_obj.json'): read_sugarcrepe(tmp_path)
    with pytest.raises(ValueError, match='one length'): HardCaptions(['1'], ['a'], ['b'], [])


def test_other_captions_leave_out_the_caption_itself():
    pairs = Pairs.from_arrays(None, ['A cat .', 'two cats', 'a dog'], [0, 0, 1], ['1', '2'])
    hard = HardCaptions(['2', '1', '9', '1'], ['a dog', 'a cat', 'x', 'a bird'], ['b']*4, ['add_obj']*4)
    assert place(hard, pairs).tolist() == [1, 0, -1, 0]
    assert [x.tolist() for x in other_captions(hard, pairs)] == [[1, 3, 3], [1, 0, 1]]


@pytest.mark.skipif(data_folder() is None, reason='VLWB_DATA is not set')
def test_the_small_coco_set():
    home = data_folder()/'coco_mini'
    hard, pairs = read_sugarcrepe(home/'sugarcrepe_ours.jsonl', images=home/'images'), read_pairs(home/'images.jsonl', images=False)
    assert len(hard) == 764 and set(hard.counts) == set(SUGARCREPE) and (place(hard, pairs) >= 0).all() and all(f.is_file() for f in hard.files)
    n, m, k = pairs.num_images, len(pairs), len(hard)
    report = judge_sugarcrepe(hard, pairs, unit(n, 8), unit(m, 8, 1), unit(k, 8, 2), unit(k, 8, 3))
    assert set(report) == {'texts', 'captions'} and report['texts']['all'].count == k and abs(report['texts']['all'].accuracy - 0.5) < 0.1


# Shares ---------------------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n, share, level):
    k = round(share * n)
    np.testing.assert_allclose(wilson(k, n, level), tuple(binomtest(k, n).proportion_ci(level, 'wilson')), atol=1e-12)


@few
@given(st.lists(st.tuples(st.sampled_from([0., 0.5, 1.]), st.sampled_from('abc'), st.integers(0, 5)), min_size=1, max_size=40), st.booleans())
def test_by_kind_counts(rows, clustered):
    scores, kinds, clusters = map(np.array, zip(*rows))
    found = by_kind(scores, kinds, clusters if clustered else None)
    assert list(found) == sorted(set(kinds)) + ['mean', 'all']
    for kind in set(kinds): assert found[kind].accuracy == pytest.approx(scores[kinds == kind].mean()) and found[kind].count == (kinds == kind).sum()
    assert found['all'].accuracy == pytest.approx(scores.mean()) and found['mean'].accuracy == pytest.approx(np.mean([found[k].accuracy for k in set(kinds)]))
    for s in found.values(): assert -1e-9 <= s.low <= s.accuracy + 1e-9 and s.accuracy <= s.high + 1e-9 <= 1 + 2e-9


def test_intervals_of_a_mean_over_kinds_hold():
    "The interval of the mean over kinds, and the bootstrap over clusters, hold the truth about as often as they say."
    g, inside, clustered = np.random.default_rng(0), 0, 0
    kinds, truth = np.repeat(['a', 'b', 'c'], 40), np.repeat([0.6, 0.8, 0.95], 40)
    for _ in range(300):
        s = by_kind(g.random(120) < truth, kinds)['mean']
        inside += s.low <= truth.mean() <= s.high
        photo = np.repeat(g.random(40) < 0.7, 3)
        s = by_kind(photo, np.full(120, 'a'), np.repeat(np.arange(40), 3))['a']
        clustered += s.low <= 0.7 <= s.high
    assert 0.91 < inside/300 < 0.99 and 0.89 < clustered/300 < 0.99


def test_draws_are_repeatable():
    a, b, c = (cluster_weights(['x', 'y', 'x', 'z'], seed=s) for s in (0, 0, 1))
    assert a[0].tolist() == [0, 1, 0, 2] and (a[1] == b[1]).all() and (a[1] != c[1]).any() and (a[1].sum(1) == 3).all()
    rows = np.random.default_rng(0).random(30) < 0.5
    assert by_kind(rows, ['a']*30, range(30), seed=3) == by_kind(rows, ['a']*30, range(30), seed=3)


# Accuracies -----------------------------------------------------------------------------------------------------------------------------------------

def test_hard_accuracy_by_a_loop():
    v, t, u = unit(50, 6), unit(50, 6, 1), unit(50, 6, 2)
    u[::7] = t[::7]                                                  # ties
    kinds = np.array(['a', 'b'])[np.arange(50) % 2]
    for dtype in (torch.float64, torch.float32):
        found = hard_accuracy(v.to(dtype), t.to(dtype), u.to(dtype), kinds)
        for kind in 'ab': assert found[kind].accuracy == pytest.approx(np.mean([0.5 if (t[i] == u[i]).all() else float(v[i] @ t[i] > v[i] @ u[i]) for i in np.flatnonzero(kinds == kind)]))
    assert compare(torch.tensor([1., 0., 3.]), torch.tensor([0., 0., 4.])).tolist() == [1, 0.5, 0]
    assert hard_accuracy(v.bfloat16(), t.bfloat16(), t.bfloat16(), kinds)['all'].accuracy == 0.5


def test_text_accuracy_by_a_loop():
    t, u, others = unit(20, 5), unit(20, 5, 1), unit(30, 5, 2)
    g = np.random.default_rng(0)
    rows, columns = g.integers(0, 15, 60), g.integers(0, 30, 60)
    found = text_accuracy(t, u, others, rows, columns, ['a']*20)
    want = [float(np.mean([(t[i] @ others[c] - u[i] @ others[c]).item() for c in columns[rows == i]]) > 0) for i in range(20) if (rows == i).any()]
    assert found['a'].accuracy == pytest.approx(np.mean(want)) and found['a'].count == len(want)


def test_mirrors_are_exact_and_groups_are_all_four():
    scenes = make_scenes(120, seed=3, split='test'); captions = make_captions(scenes, per_scene=2, seed=3)
    hard = hard_negative_captions(scenes, captions, 1)
    mirror, true, own = mirrored(scenes, captions, hard), holds(scenes, hard), holds(scenes, captions)[:,hard.source]
    k = np.flatnonzero(mirror >= 0)
    assert len(k) and true[mirror[k],k].all() and not own[mirror[k],k].any() and not (true & ~own)[:,mirror < 0].any()
    assert (wrong_facts(scenes, hard)[hard.scene,np.arange(len(hard))] >= 1).all()
    v, w, t, u = (unit(len(k), 4, s) for s in range(4))
    found = mirror_accuracy(v, w, t, u, hard.kind[k])
    dot = lambda a, b: (a*b).sum(1)
    group = (dot(v, t) > dot(v, u)) & (dot(v, t) > dot(w, t)) & (dot(w, u) > dot(v, u)) & (dot(w, u) > dot(w, t))
    assert found['group']['all'].accuracy == pytest.approx(group.double().mean().item()) and found['images']['all'].accuracy == pytest.approx((dot(v, t) > dot(w, t)).double().mean().item())


def test_exact_features_are_right_everywhere_and_constant_ones_tie():
    "Features that hold the truth of every caption in every scene win all; features that are all equal tie, and win no group."
    scenes = make_scenes(60, seed=5, split='test'); captions = make_captions(scenes, per_scene=2, seed=5)
    hard = hard_negative_captions(scenes, captions, 0)
    truth = torch.from_numpy(np.concatenate([holds(scenes, captions), holds(scenes, hard)], 1)).double()
    sentences = torch.eye(truth.shape[1], dtype=torch.float64)
    report = hard_report(truth, sentences[:len(captions)], sentences[len(captions):], scenes, captions, hard)
    assert all(report[side]['all'].accuracy == 1 for side in ('texts', 'images', 'group')) and report['texts']['all'].count == len(hard) and report['captions']['all'].accuracy == 0.5
    same = unit(1, 4)
    flat = hard_report(same.expand(60, 4), same.expand(len(captions), 4), same.expand(len(hard), 4), scenes, captions, hard)
    assert {side: s['all'].accuracy for side, s in flat.items()} == dict(texts=0.5, images=0.5, group=0, captions=0.5)
    assert flat_scores(flat)['hard_texts_all'] == 50 and flat_scores(dict(x=dict(y=Score(.25, 0, 1, 4))), 'z') == dict(z_x_y=25.)
    one = make_captions(scenes, per_scene=1, seed=5)                                        # nobody else to speak for a caption
    assert 'captions' not in hard_report(truth[:,:60], sentences[:60,:60], sentences[:len(hard_negative_captions(scenes, one)),:60], scenes, one, hard_negative_captions(scenes, one))


# Modality -------------------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.5, 2.]), st.integers(1, 40))
def test_uniformity_is_the_definition(n, d, seed, temperature, block):
    x = unit(n, d, seed)
    want = torch.pdist(x).square().mul(-temperature).exp().mean().log().item()
    assert uniformity(x, temperature, block) == pytest.approx(want, abs=1e-9)


def test_measures_by_hand():
    e = torch.eye(3)
    assert modality_gap(e[:1], e[1:2]) == pytest.approx(math.sqrt(2)) and modality_gap(e, e) == 0
    assert alignment(e, e, [1, 2, 0]) == 2 and alignment(e, e, [0, 1, 0]) == pytest.approx(2/3) and alignment(e, e, torch.ones(3, 3, dtype=torch.bool), power=1) == pytest.approx(2/3*math.sqrt(2))
    assert uniformity(e) == pytest.approx(-4) and uniformity(e[[0, 0, 0]]) == 0
    for own in ([1, 2, 0], torch.tensor([1, 2, 0]), np.eye(3, dtype=bool)[[1, 2, 0]].T, sparse.csr_array(np.eye(3, dtype=bool)[[1, 2, 0]].T)):
        assert sorted(zip(*(x.tolist() for x in positive_pairs(own, 3, 3)))) == [(0, 2), (1, 0), (2, 1)]


def test_probe_finds_a_shift_and_nothing_in_noise():
    a, b = torch.randn(400, 6, generator=make_generator(0)), torch.randn(900, 6, generator=make_generator(1))
    assert abs(modality_probe(a, b)['accuracy'] - 0.5) < 0.06 and modality_probe(a, b + 2)['accuracy'] > 0.95 and abs(modality_probe(a, b + 2, centred=True)['accuracy'] - 0.5) < 0.07
    assert modality_probe(a, b, most=100, seed=1) == modality_probe(a, b, most=100, seed=1)


def test_partners_share_a_fold():
    "Pairs that could be recognised by their partner alone, each a cloud of its own: shared folds keep the probe at chance."
    centres = torch.randn(300, 200, generator=make_generator(0))
    own = torch.arange(300)
    assert abs(modality_probe(centres, centres, own)['accuracy'] - 0.5) < 1e-9                 # partner and item fall on one side of the plane


def test_report_agrees_with_its_parts():
    v, t, own = unit(40, 5), unit(80, 5, 1), torch.arange(80) % 40
    r = modality_report(v, t, own)
    mask = own[None] == torch.arange(40)[:,None]
    assert r['gap'] == modality_gap(v, t) and r['alignment'] == pytest.approx(2 - 2*r['cosine_own']) and r['uniformity_texts'] == uniformity(t)
    assert r['cosine_own'] == pytest.approx((v @ t.T)[mask].mean().item()) and r['cosine_other'] == pytest.approx((v @ t.T)[~mask].mean().item()) and r['probe'] == modality_probe(v, t, own)['accuracy']
    assert modality_report(v.half(), t.half(), own)['gap'] == pytest.approx(r['gap'], abs=1e-3)


@pytest.mark.parametrize('word, call', [
    ('at least one row', lambda x: modality_gap(x[:0], x)), ('width', lambda x: modality_gap(x, x[:,:2])), ('NaN', lambda x: uniformity(x * math.nan)), ('two items', lambda x: uniformity(x[:1])), ('power', lambda x: alignment(x, x, range(4), power=-1)),
    ('own', lambda x: alignment(x, x, [0.5]*4)), ('no match', lambda x: alignment(x, x, torch.zeros(4, 4, dtype=torch.bool))), ('folds', lambda x: modality_probe(x, x, folds=1)), ('too few', lambda x: modality_probe(x[:1], x[:1]))])
def test_modality_errors(word, call):
    with pytest.raises(ValueError, match=word): call(torch.eye(4))


# Studies --------------------------------------------------------------------------------------------------------------------------------------------

def test_a_study_is_kept_under_its_names(tmp_path, monkeypatch):
    "Run side by side or read back: one result for each description, in the order that was asked for, in a folder of its own."
    from vlwb.eval.hard_study import run_all_hard, run_hard
    from vlwb.eval.study import RunSpec, WorldSpec, run_name
    from vlwb.train.backbone import BackboneConfig
    from vlwb.train.loop import TrainConfig
    from vlwb.train.objectives import LossConfig
    from vlwb.train.recipe import Recipe
    monkeypatch.setenv('VLWB_CACHE', str(tmp_path))
    world = WorldSpec(scenes=150, val_scenes=40, test_scenes=40, clean_scenes=100)
    spec = lambda name: RunSpec(world, Recipe(LossConfig(name), TrainConfig(steps=3, device='cpu'), 0), backbone=BackboneConfig(steps=5, scenes=200))
    asked = [spec('mochi'), spec('infonce'), spec('mochi')]
    found = run_all_hard(asked, processes=0)
    assert sorted(p.stem for p in (tmp_path/'hard').iterdir()) == sorted({run_name(s) for s in asked})
    assert found[0] == found[2] != found[1] and [f['spec']['recipe']['loss']['name'] for f in found] == ['mochi', 'infonce', 'mochi']
    monkeypatch.setattr('vlwb.eval.hard_study.train_run', None)                                         # nothing is trained again
    assert run_all_hard(asked[:2], processes=0, name='again') == found[:2] and run_hard(asked[1]) == found[1]
    assert run_name(spec('mochi')) == run_name(RunSpec(world, Recipe(LossConfig('mochi', mined=0, mined_every=100, miner='exact'), TrainConfig(steps=3, device='cpu'), 0), backbone=BackboneConfig(steps=5, scenes=200)))       # what is left as it is has no part in a name
