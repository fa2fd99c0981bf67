"The regulation lab: its numbers against the losses, its controls, its bad cases, and the view in a real browser."
import math, time
import numpy as np, pytest, torch, traitlets
from torch.testing import assert_close
from vlwb.bench import browser
from vlwb.core import make_generator
from vlwb.data.pairs import Pairs
from vlwb.data.relevance import from_pairs
from vlwb.eval.semantics import detection_by_weight
from vlwb.losses.infonce import infonce
from vlwb.losses.probe import infonce_gradient, similarity_gradient
from vlwb.losses.srcl import pair_weights, srcl
from vlwb.negatives.weights import weight_auroc
from vlwb.widgets.charts import Histogram, LineChart
from vlwb.widgets.gallery import Gallery
from vlwb.widgets.regulation import FINE, PAIR_KINDS, RegulationLab, RegulationState, count_weights, kinds_of_batch, read_out_words


def unit(x): return torch.nn.functional.normalize(x, dim=1)

def batch(n=40, captions=1, groups=10, judged=None, aux=True, seed=0, texts=None):
    "n images in groups that match each other; `judged` limits the truth to that many rows."
    draw, group = make_generator(seed), np.arange(n) % groups
    middle = torch.randn(groups, 16, generator=draw)
    view = lambda rows: unit(middle[torch.from_numpy(rows)] + .8*torch.randn(len(rows), 16, generator=draw))
    image = np.repeat(np.arange(n), captions)
    pairs = Pairs.from_arrays(None, texts or [f'caption {j}' for j in range(len(image))], image, image_ids=[f'i{k}' for k in range(n)])
    rows = [(i, j) for i in range(n if judged is None else judged) for j in range(len(image))]
    relevance = None if judged == 0 else from_pairs([f'i{i}' for i, _ in rows], [pairs.caption_ids[j] for _, j in rows], [bool(group[i] == group[image[j]]) for i, j in rows]).restrict(pairs)
    return Gallery(pairs, view(group), view(group[image]), relevance, *((view(group), view(group[image])) if aux else (None, None)))


@pytest.mark.parametrize('captions', [1, 3])
@pytest.mark.parametrize('settings', [dict(), dict(alpha=.4, similarity_temperature=.1), dict(alpha=1., norm='softmax', delta=2.), dict(temperature=.3)])
def test_numbers_are_those_of_the_losses(captions, settings):
    g = batch(12, captions, 4); s = RegulationState(g, **settings); scale = 1/s.temperature
    wanted = dict(alpha=s.alpha, delta=s.delta, similarity_temperature=s.similarity_temperature, norm=s.norm, aux_similarity=g.aux_similarity, positives=g.own)
    features = g.image_features, g.text_features
    assert s.before()[0] == pytest.approx(float(infonce(*features, scale, positives=g.own)), abs=1e-5)
    assert s.after()[0] == pytest.approx(float(srcl(*features, scale, **wanted)), abs=1e-5)
    assert_close(s.after()[1], similarity_gradient(lambda v, t: srcl(v, t, scale, form='plain', **wanted), g.similarity)[1], rtol=1e-4, atol=1e-6)
    weights = pair_weights(g.similarity, g.aux_similarity, positives=g.own, **{k: wanted[k] for k in ('alpha', 'delta', 'similarity_temperature', 'norm')})
    for side, log_w in (('images', weights.log_weights_per_image), ('texts', weights.log_weights_per_text)):
        s.anchors = side
        assert_close(s.of_anchors(s.used()), log_w)
        assert s.counted().auroc == pytest.approx(detection_by_weight(log_w, torch.from_numpy(g.truth == 1), g.own)['auroc'], abs=2e-3)
        assert s.conditions()['mean'] == pytest.approx(1, abs=1e-6)


def test_closed_form_gradient():
    s, own = 2*torch.rand(9, 13, generator=make_generator(0), dtype=torch.float64) - 1, torch.zeros(9, 13).bool()
    own[torch.arange(8), torch.arange(8)] = True; own[0, 9:] = True               # the last image and some texts have no positive
    w = torch.randn(9, 13, generator=make_generator(1), dtype=torch.float64); w[2, 5] = w[:, 12] = -math.inf
    value, gradient = infonce_gradient(s, own, 6., log_weights_per_image=w, log_weights_per_text=-w.masked_fill(w.isinf(), math.inf))
    slow = similarity_gradient(lambda v, t: infonce(v, t, 6., positives=own, log_weights_per_image=w, log_weights_per_text=-w.masked_fill(w.isinf(), math.inf)), s)
    assert value == pytest.approx(float(slow[0]), abs=1e-12); assert_close(gradient, slow[1], rtol=0, atol=1e-12)


def test_counts():
    draw = make_generator(0); w, kinds = .5*torch.randn(60, 70, generator=draw) + .5, torch.randint(0, 5, (60, 70), generator=draw)
    w[kinds == 1] -= .6
    c = count_weights(w, kinds)
    truth, own = kinds == 1, kinds == 0
    assert c.auroc == pytest.approx(detection_by_weight(w, truth, own, keep=kinds != 4)['auroc'], abs=1e-4)
    for n, k in enumerate(PAIR_KINDS[1:], 1): assert c.total[k] == int((kinds == n).sum()) and c.medians[k] == pytest.approx(float(w[kinds == n].exp().median()), rel=2e-3)
    w[0, :] = -math.inf
    assert sum(count_weights(w, kinds).total.values()) == int((kinds > 0).sum())                       # the removed ones are counted too
    with pytest.raises(ValueError, match='one shape'): count_weights(w, kinds[:5])


@pytest.mark.parametrize('norm', ['mean', 'softmax'])
@pytest.mark.parametrize('tau_s', [10., .05, .02, .01, .004])
def test_counts_of_very_small_weights(tau_s, norm):
    "AUROC, medians and quantiles over the whole range of the slider, against the exact ones."
    g = batch(200, groups=20); s = RegulationState(g, similarity_temperature=tau_s, norm=norm)
    log_w, c = s.weights().log_weights_per_image, s.counted()
    assert c.auroc == pytest.approx(weight_auroc(log_w, torch.from_numpy(g.truth == 1), g.own), abs=5e-4) and s.read_outs()['auroc'] == c.auroc
    for n, k in ((1, 'false_negatives'), (2, 'hard_negatives'), (3, 'negatives')):
        exact = float(log_w[s.kinds == n].median())
        assert c.log_medians[k] == pytest.approx(exact, abs=.01, rel=5e-3)
    for q in (.02, .3, .9): assert c.log_quantiles(q)[0] == pytest.approx(float(log_w[s.kinds > 0].sort().values[int(q*int((s.kinds > 0).sum()))]), abs=.05, rel=1e-2)
    counts, edges = c.coarse()
    assert (np.diff(edges) > 0).all() and np.isfinite(np.log(edges)).all() and sum(v.sum() for v in counts.values()) == int((s.kinds > 0).sum())
    lab = RegulationLab(g, similarity_temperature=tau_s, norm=norm); assert np.isfinite(lab.histogram.edges).all()
    axis = lab.figure().axes[0]; low, high = axis.get_xlim(); assert sum(low <= t <= high for t in axis.get_xticks()) >= (2 if tau_s < 1 else 1)


def test_counts_of_what_is_no_number():
    w, kinds = torch.randn(6, 50, generator=make_generator(0)), torch.full((6, 50), 3); kinds[:, :10] = 1
    w[2], w[0, 0], kinds[0, 0] = -math.inf, math.nan, 0
    c = count_weights(w, kinds); assert sum(c.total.values()) == 299 and c.edges[-1] < 10 and math.isfinite(c.auroc)
    tied = count_weights(torch.zeros(4, 4), torch.tensor([[1, 1, 3, 2]]*4)); assert tied.auroc == .5 and tied.medians['negatives'] == pytest.approx(1, abs=1e-5)
    assert count_weights(torch.zeros(0, 0), torch.zeros(0, 0)).total['own'] == 0


def test_colours_hold_the_weights():
    for tau_s, most in ((1., .02), (.05, .02), (.02, .02), (.01, .1)):
        lab = RegulationLab(batch(200, groups=20), similarity_temperature=tau_s); w = lab.state.values(); info = lab.matrix._data['weight'][1]
        assert info['low']*info['high'] == pytest.approx(1) and info['high'] >= 1.25 and info['high'] < 2**127
        inside = w[~w.isnan()]; assert len(inside) == 200*199 and float(((inside < info['low']*.999) | (inside > info['high']*1.001)).float().mean()) <= most
        layer = lab.matrix._data['weight'][0]; assert float(((layer == 0) | (layer == 254)).float().mean()) <= max(most, .05) or tau_s == .01
    lab.state.similarity_temperature = lab.state.traits()['similarity_temperature'].min; w = lab.state.values(); assert int((~w.isnan()).sum()) == 200*199


def test_kinds():
    g = batch(12, 2, 4, judged=5); kinds, truth = kinds_of_batch(g, 2), torch.from_numpy(g.truth)
    assert ((kinds == 2).sum(1)[:5] == 2).all() and not (kinds[5:] == 2).any() and (kinds == 4).equal((truth < 0) & ~g.own) and (kinds == 1).equal((truth == 1) & ~g.own)
    assert not (kinds_of_batch(g, 0) == 2).any() and set(kinds_of_batch(batch(6, judged=0)).unique().tolist()) == {0, 4}


def test_removal_and_read_outs():
    g = batch(); s = RegulationState(g, treatment='remove', threshold=.8, similarity_temperature=.1)
    gone = (s.weights().weights_per_image < .8) & ~g.own
    assert s.used().log_weights_per_image.isneginf().equal(gone) and s.read_outs()['removed'] == pytest.approx(float(gone.sum()/(40*39)))
    assert (s.used().log_weights_per_image[~gone] == 0).all() and s.read_outs()['emptied'] == 0 and s.conditions()['mean'] == pytest.approx(1 - float(gone.sum()/(40*39)))
    s.treatment = 'both'
    assert_close(s.used().log_weights_per_image[~gone], s.weights().log_weights_per_image[~gone])
    s.similarity_temperature, s.threshold = s.traits()['similarity_temperature'].max, 3.                                                     # nothing is left
    assert s.read_outs()['emptied'] == 40 and s.after()[0] == pytest.approx(0, abs=1e-6) and math.isnan(s.read_outs()['false_share_after']) and 'none left' in ' '.join(read_out_words(s))
    s.treatment = 'weigh'; s.similarity_temperature = .05
    assert s.read_outs()['effective_temperature'] < 0 and 'round' in ' '.join(read_out_words(s))


def test_only_what_depends_is_computed():
    s = RegulationState(batch()); s.read_outs(); kept = lambda: s._kept['before'][1]; weights, before, counted = s.weights(), kept(), s.counted()
    s.temperature = .1; s.read_outs(); assert s.weights() is weights and s.counted() is counted and kept() is not before
    before = kept(); s.delta = 5.; assert s.weights() is weights                                    # cancels under 'mean'
    s.alpha = .5; s.read_outs(); assert s.weights() is not weights and kept() is before
    weights = s.weights(); s.let_go(); assert s.weights() is weights; s.let_go(most=10); assert s.weights() is not weights


def test_controls_and_state_are_linked():
    lab = RegulationLab(batch(texts=['<script>alert(1)</script>'] + [f'{j} ' + 'long '*400 for j in range(38)] + ['صورة ' * 30])); s = lab.state
    sent = []; lab.matrix.put = lambda name, *a, **k: sent.append(name)
    lab.controls['alpha'].value = .7; assert s.alpha == .7 and sent == ['weight']
    s.threshold = 1.; assert lab.controls['threshold'].value == 1. and lab.controls['threshold'].disabled and sent == ['weight']          # nothing is removed: nothing is sent
    lab.controls['treatment'].value = 'remove'; assert not lab.controls['threshold'].disabled and sent == ['weight']*2 and '1: removal threshold' in lab.histogram.summary
    lab.controls['layer'].value = 'push after'; s.layer = 'second view'; assert sent[2:] == ['push after', 'second view']
    s.temperature = .2; assert len(sent) == 4                                                           # the second view has no temperature
    lab.matrix.cell = [5, 0]
    assert s.cell == [5, 0] and lab.pair_card.cards[0]['texts'][0]['text'] == '<script>alert(1)</script>' and '<script>' not in lab.status.value + lab.table.value
    s.cell = []; assert lab.pair_card.cards == []
    assert [m['visible'] for m in lab.matrix.marks] == [True]*3; lab.controls['marks'].value = False; assert not s.marks and not any(m['visible'] for m in lab.matrix.marks) and len(sent) == 4
    with pytest.raises(traitlets.TraitError, match='within 40 x 40'): s.cell = [40, 0]
    with pytest.raises(traitlets.TraitError): s.similarity_temperature = 0.
    assert f'{s.read_outs()["loss_after"]:.4g} after' in lab.status.value and set(lab._repr_mimebundle_()) == {'image/png', 'text/plain'}


def test_where_something_is_missing():
    one = RegulationLab(batch(1, groups=1)); assert 'no negatives' in one.status.value and one.figure().alt == one.state.trouble
    none = RegulationLab(batch(4).select(slice(0, 0))); assert 'empty' in none.status.value; none.state.temperature = .5
    blind = RegulationLab(batch(judged=0, aux=False)); assert 'No AUROC' in blind.status.value and blind.controls['alpha'].disabled and 'second view' not in [x for x in blind.controls['layer'].options]
    with pytest.raises(traitlets.TraitError, match='second view'): blind.state.alpha = .1
    with pytest.raises(traitlets.TraitError, match='second view'): blind.state.layer = 'second view'
    g = batch(); g.similarity[3] = math.nan; g.aux_similarity[:, 7] = math.nan; holes = RegulationLab(g, alpha=.5)
    assert holes.state.left_out == 79 and '79 pairs' in holes.status.value and math.isfinite(holes.state.after()[0]) and holes.state.values()[3].isnan().all()
    holes.state.cell = [3, 4]; assert 'left out' in holes.pair_card.cards[0]['badges'][0]['text'] and 'nan' in holes.pair_card.cards[0]['note']
    kept = torch.ones(40, 40).bool(); kept[3] = kept[:, 7] = False
    assert holes.state.before()[0] == pytest.approx(float(infonce(g.image_features, g.text_features, 1/.07, keep=kept)), abs=1e-5)


def test_gaps_leave_out_pairs_not_kinds():
    g = batch(); own = g.similarity.clone(); g.similarity[3, 5] = math.inf; g.similarity[7] = math.nan; g.aux_similarity[:, 9] = math.nan
    s = RegulationState(g); assert s.left_out == 41 and ((s.kinds == 2).sum(1)[[i for i in range(40) if i != 7]] == 3).all() and not (s.kinds[7] > 0).any()
    assert s.similarity.isfinite().all() and s.similarity[0].equal(own[0])
    lab = RegulationLab(g); hard = [m['count'] for m in lab.matrix.marks if m['name'] == 'hard_negatives']; assert hard == [117]
    before = lab.state.losses()[0]; lab.state.alpha = .5                                                 # now the second view has a say
    assert lab.state.left_out == 80 and '80 pairs' in lab.status.value and not (lab.state.kinds[:, 9] > 0).any() and lab.state.losses()[0] != before
    assert {m['name']: m['count'] for m in lab.matrix.marks}['hard_negatives'] == int((lab.state.kinds == 2).sum())
    lab.state.layer = 'second view'; assert lab.state.values()[:, 9].isnan().all() and lab.state.values()[7, :9].isfinite().all()
    lab.state.alpha = 0.; assert lab.state.left_out == 41 and lab.state.losses()[0] == before
    s.treatment, s.threshold = 'remove', 0.; assert s.read_outs()['emptied'] == 0                        # nothing was there to be removed
    s.threshold, s.similarity_temperature = 3., s.traits()['similarity_temperature'].max; assert s.read_outs()['emptied'] == 39


@pytest.mark.parametrize('treatment', ['weigh', 'remove', 'both'])
def test_a_pair_has_the_push_of_its_matrix(treatment):
    g = batch(12, 2, 4); g.similarity[2, 3] = math.nan
    s = RegulationState(g, alpha=.5, treatment=treatment, threshold=.9); before, after, unit = s.before()[1], s.after()[1], s.pushes()['unit']
    for i, j in ((0, 0), (0, 5), (2, 3), (11, 20), (4, 1)):
        p = s.pair(i, j); assert (p['push_before']*unit, p['push_after']*unit) == pytest.approx((float(before[i, j]), float(after[i, j])), abs=1e-6)
        assert p['weight_per_text'] == float(s.used().log_weights_per_text[i, j].exp())


def test_memory_of_a_large_batch():
    "Of matrices only the two of weights are kept in floats; kinds, places and what the canvas sends are bytes."
    g = batch(300, groups=30, judged=10); lab = RegulationLab(g, alpha=.5, treatment='both', threshold=.8, layer='push after')
    for x in ('weight', 'push before', 'push after'): lab.state.layer = x
    given, kept = {x.data_ptr() for x in (g.similarity, g.aux_similarity, g.own)}, {}
    def visit(x):
        if isinstance(x, torch.Tensor): kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict): [visit(v) for v in x.values()]
        elif isinstance(x, (tuple, list)): [visit(v) for v in x]
        elif type(x).__name__ in ('PairWeights',): visit(list(vars(x).values()))
    visit([vars(lab.state), lab.matrix._data])
    small = 8*len(PAIR_KINDS)*FINE; beyond = lambda: sum(v for k, v in kept.items() if k not in given and v != small)
    assert 2*4*90000 <= beyond() < 4*4*90000
    lab.state.let_go(most=10); kept.clear(); visit([vars(lab.state), lab.matrix._data]); assert beyond() < 2*4*90000


def test_charts():
    chart = LineChart('curves', 'x', 'y'); chart.put({'<b>a</b>': ([2, 1], [4., math.nan]), 'b': ([], [])}, dashed=['b'])
    assert '&lt;b&gt;a' in chart.legend.value and '1 point, last 4' in chart.summary and 'b: no number' in chart.summary and chart.curves['<b>a</b>'][0].tolist() == [1, 2]
    bars = Histogram('h', 'x', log=True); bars.put(dict(negatives=torch.tensor([0., 1, 10, math.inf]), unknown=[1.])); marks = [m.model_id for m in bars.chart.marks]
    assert bars.left_out == dict(negatives=2, unknown=0) and bars.counts['negatives'].sum() == 2 and bars.medians['negatives'] == 5.5
    bars.put(dict(negatives=[2.], unknown=[3.]), at={'line': 2.5}); assert [m.model_id for m in bars.chart.marks][:4] == marks and len(bars.chart.marks) == 5


def test_a_change_is_fast_enough(capsys):
    "The kernel's share of a change at N = 1,000, in processor time: the machine may be busy."
    lab = RegulationLab(batch(1000, groups=100, judged=50), alpha=.5); threads = torch.get_num_threads(); torch.set_num_threads(1)
    lab.matrix._seen = True; spent = []
    try:
        for alpha in (.2, .3, .4, .5, .6, .7, .8, .9):
            start = time.process_time(); lab.controls['alpha'].value = alpha; spent.append(time.process_time() - start)
    finally: torch.set_num_threads(threads)
    with capsys.disabled(): print(f'\nregulation lab, N = 1,000, alpha moved: {1000*np.median(spent):.0f} ms of processor time in the kernel')
    assert min(spent) < .15


CELL = '''
import torch, numpy as np
from vlwb.core import make_generator
from vlwb.data.scenes import make_captions, support
from vlwb.data.world import make_scenes
from vlwb.widgets.gallery import scenes_gallery
from vlwb.widgets.regulation import RegulationLab
scenes = make_scenes(40, seed=5); captions = make_captions(scenes, per_scene=1, seed=5, false_negative_share=.1)
def features(seed):
    f = torch.from_numpy(support(scenes, captions)); u, s, v = torch.linalg.svd(f - f.mean(0) + .1*torch.randn(40, 40, generator=make_generator(seed)), full_matrices=False)
    return tuple(torch.nn.functional.normalize((x*s.sqrt())[:,:24], dim=1) for x in (u, v.T))
gallery = scenes_gallery(scenes, captions, *features(1), name='scenes', aux=features(2))
gallery.pairs.captions[5] = '<script>alert(1)</script>'
lab = RegulationLab(gallery, alpha=.5)
lab.controls['alpha'].add_class('alpha'); lab.histogram.add_class('weights');
'''

@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_in_the_browser(where, request, tmp_path):
    open_page = request.getfixturevalue(where)
    page = open_page([CELL, browser.watch('lab.state', ['alpha', 'cell', 'treatment'], tmp_path/'state.json'), 'lab'], dark=where == 'voila', size=(1300, 1300))
    p = page.page; p.locator('.weights path.line').first.wait_for(state='attached'); p.locator('.vlwb-matrix canvas').wait_for(); p.wait_for_timeout(800)
    matrix, words, bars = page.pixels('.vlwb-matrix canvas'), p.locator('[role=status]').first.inner_text(), p.locator('.weights path.line').first.get_attribute('d')
    page.slide('.alpha', 5)
    state = browser.wait_state(tmp_path/'state.json', lambda s: abs(s['alpha'] - .55) < 1e-6)
    page.wait_pixels('.vlwb-matrix canvas', matrix); p.wait_for_timeout(300)
    assert p.locator('[role=status]').first.inner_text() != words and p.locator('.weights path.line').first.get_attribute('d') != bars
    box = p.locator('.vlwb-matrix canvas').bounding_box()
    p.mouse.click(box['x'] + box['width']*5.5/40, box['y'] + box['height']*20.5/40)
    assert browser.wait_state(tmp_path/'state.json', lambda s: s['cell'])['cell'] == [20, 5]
    p.locator('.vlwb-cards').get_by_text('<script>alert(1)</script>', exact=True).wait_for(); p.locator('.vlwb-cards img.vlwb-photo').first.wait_for()
    page.shot(open_page.shots/f'regulation-{where}.png')


def test_times_in_the_browser(lab):
    big = CELL.replace('40', '1000').replace('per_scene=1, seed=5, false_negative_share=.1', 'per_scene=1, seed=5').replace('[:,:24]', '[:,:16]')
    page = lab([big, 'lab'], size=(1300, 1300)); page.page.locator('.weights path.line').first.wait_for(state='attached'); page.page.wait_for_timeout(1500)
    for target, attribute in (('.vlwb-matrix canvas', 'data-painted'), ('.weights', None)):
        found = page.time_change('.alpha .noUi-handle', target, attribute=attribute, times=7, pause=.5)
        print(target, sorted(round(f['frame']) for f in found), 'ms to the frame')
        assert min(f['frame'] for f in found) < 1000                                                    # `vlwb bench widgets` judges; here the machine may be busy
