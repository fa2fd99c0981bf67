"Grouped scoring of pairs and re-ranking: equal to the plain encoder and to the one-query loop, whatever the pairs look like."
import copy
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from vlwb.bench.rerank import one_query, rerank_inputs
from vlwb.core import make_generator
from vlwb.eval.rerank import PAPER_ROWS, Candidates, States, encode_states, rerank_metrics, rerank_scores, results_table, top_candidates
from vlwb.eval.retrieval import own_matches, retrieval_metrics
from vlwb.models.fusion import FusionEncoder, fused_cls

ENCODER, TEXT, MASK, IMAGES = rerank_inputs(9, 6, natural=True, tiny=True)
HOLES = MASK & (torch.rand(MASK.shape, generator=make_generator(5)) > .2); HOLES[:,0] = True      # masks need not be prefixes
PATCHES = torch.rand(IMAGES.shape[:2], generator=make_generator(6)) > .3


def plain(image, text, encoder=ENCODER, mask=MASK, image_mask=None):
    with torch.no_grad():
        return encoder(TEXT[text], None if mask is None else mask[text], IMAGES[image], None if image_mask is None else image_mask[image])[:,0]


class Calls:
    "How many image tokens each cross-attention key and value projected."
    def __init__(self, encoder):
        self.tokens = [0] * len(encoder.layers)
        for n, layer in enumerate(encoder.layers):
            layer.crossattention.self.key.register_forward_hook(lambda m, x, y, n=n: self.tokens.__setitem__(n, self.tokens[n] + x[0].shape[:-1].numel()))


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(pairs, st.sampled_from([1e-6, .02, .1, 8.]), st.sampled_from(['none', 'padded', 'holes']), st.booleans())
def test_any_pairs_at_any_budget(listed, budget, masked, patches):
    "Uneven groups, repeated pairs, padding, holes, image masks; from a pair at a time to all at once."
    image, text = map(list, zip(*listed))
    mask, image_mask = dict(none=None, padded=MASK, holes=HOLES)[masked], PATCHES if patches else None
    ours = fused_cls(ENCODER, TEXT, mask, IMAGES, image, text, image_mask=image_mask, budget_mb=budget)
    assert_close(ours, plain(image, text, mask=mask, image_mask=image_mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('layers', [1, 2])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_few_layers_and_contexts(layers, context):
    encoder = FusionEncoder(32, layers, 4, 48).eval()
    image, text = [0, 0, 3, 0, 3], [1, 2, 1, 1, 8]
    with context(): ours = fused_cls(encoder, TEXT, MASK, IMAGES, image, text)
    assert_close(ours, plain(image, text, encoder), atol=1e-5, rtol=1e-5)
    assert not ours.requires_grad


def test_training_mode_drops_nothing():
    encoder = FusionEncoder(32, 2, 4, 48, dropout=.5).train()
    ours = fused_cls(encoder, TEXT, MASK, IMAGES, [0, 1], [2, 2])
    assert encoder.training
    assert_close(ours, plain([0, 1], [2, 2], encoder.eval()), atol=1e-5, rtol=1e-5)


def test_states_in_half_precision_and_double_weights():
    image, text = torch.arange(6).repeat_interleave(3), torch.arange(18) % 9
    half = fused_cls(ENCODER, TEXT.half(), MASK, IMAGES.bfloat16(), image, text)
    assert half.dtype == torch.float32
    with torch.no_grad(): whole = ENCODER(TEXT.half().float()[text], MASK[text], IMAGES.bfloat16().float()[image])[:,0]
    assert_close(half, whole, atol=1e-5, rtol=1e-5)
    double = FusionEncoder(32, 3, 2, 48).double().eval()
    with torch.no_grad(): exact = double(TEXT.double()[text], MASK[text], IMAGES.double()[image])[:,0]
    assert_close(fused_cls(double, TEXT, MASK, IMAGES, image, text), exact, atol=1e-12, rtol=1e-12)


def test_no_pairs_one_image_and_wrong_input():
    assert fused_cls(ENCODER, TEXT, MASK, IMAGES, [], []).shape == (0, 32)
    assert fused_cls(ENCODER, TEXT, MASK, IMAGES, [], [], head=lambda x: x[:,:2]).shape == (0, 2)
    assert_close(fused_cls(ENCODER, TEXT, MASK, IMAGES[:1], [0] * 9, range(9)), plain([0] * 9, list(range(9))), atol=1e-5, rtol=1e-5)
    for message, call in {'image_index must lie in 0..5': ([6], [0]), 'text_index must lie in 0..8': ([0], [-1]), r'must be \(R,\) each': ([0, 1], [0])}.items():
        with pytest.raises(ValueError, match=message): fused_cls(ENCODER, TEXT, MASK, IMAGES, *call)
    blind = MASK.clone(); blind[3,0] = False
    with pytest.raises(ValueError, match='first token'): fused_cls(ENCODER, TEXT, blind, IMAGES, [0], [0])
    with pytest.raises(ValueError, match='text_mask must be'): fused_cls(ENCODER, TEXT, MASK[:,1:], IMAGES, [0], [0])
    with pytest.raises(ValueError, match='image_states must be'): fused_cls(ENCODER, TEXT, MASK, TEXT, [0], [0])


def test_each_image_is_projected_once_a_layer():
    encoder = FusionEncoder(32, 3, 2, 48).eval()
    calls, (image, text) = Calls(encoder), (np.repeat(np.arange(6), 9), np.tile(np.arange(9), 6))
    shuffled = np.random.default_rng(0).permutation(54)
    for budget in (.12, 8.):
        calls.tokens[:] = [0] * 3
        ours = fused_cls(encoder, TEXT, MASK, IMAGES, image[shuffled], text[shuffled], budget_mb=budget)
        assert calls.tokens[:2] == [6 * 20] * 2 and calls.tokens[2] in (0, 6 * 20), (budget, calls.tokens)
    calls.tokens[:] = [0] * 3
    assert_close(ours, plain(image[shuffled], text[shuffled], encoder), atol=1e-5, rtol=1e-5)
    assert calls.tokens[0] == 54 * 20                                        # what the plain form projects


def test_an_adapter_around_a_projection_is_called():
    class Adapter(nn.Linear):
        def forward(self, x): return super().forward(x) * 2 - 1
    encoder = FusionEncoder(32, 2, 4, 48).eval()
    for layer in encoder.layers:
        for att, width in ((layer.attention.self, 32), (layer.crossattention.self, 48)): att.key, att.value = Adapter(width, 32), Adapter(width, 32)
    assert_close(fused_cls(encoder, TEXT, MASK, IMAGES, [0, 1, 1], [2, 3, 4]), plain([0, 1, 1], [2, 3, 4], encoder), atol=1e-5, rtol=1e-5)


def test_pairs_of_one_batch_do_not_touch_each_other():
    "A pair's result does not depend on who else is scored."
    image, text = torch.arange(6).repeat_interleave(9), torch.arange(9).repeat(6)
    together = fused_cls(ENCODER, TEXT, MASK, IMAGES, image, text)
    alone = fused_cls(ENCODER, TEXT, MASK, IMAGES, [4], [7])
    assert_close(together[(image == 4) & (text == 7)], alone, atol=1e-5, rtol=1e-5)


class Matcher(nn.Module):
    "The least that re-ranking needs of a model."
    def __init__(self):
        super().__init__()
        self.fusion, self.head, self.a, self.b = copy.deepcopy(ENCODER), nn.Linear(32, 2), nn.Linear(48, 8), nn.Linear(32, 8)

    def image_states(self, images): return images
    def text_states(self, texts): return TEXT[texts['input_ids'][:,0] - 1,:texts['input_ids'].shape[1]]
    def project_image(self, states): return nn.functional.normalize(self.a(states[:,0]), dim=1)
    def project_text(self, states): return nn.functional.normalize(self.b(states[:,0]), dim=1)
    def match_logits(self, fused): return self.head(fused[:,0] if fused.ndim == 3 else fused)


class Set:
    num_images, caption_image = 6, np.array([0, 0, 1, 1, 2, 3, 4, 5, 5])
    def __len__(self): return 9
    def images_at(self, index): return IMAGES[torch.from_numpy(index)]
    def texts_at(self, index):
        mask = MASK[torch.from_numpy(index)]
        return dict(input_ids=torch.from_numpy(index)[:,None].expand(mask.shape) + 1, attention_mask=mask.long())


torch.manual_seed(3)
MODEL = Matcher().train()
STATES = encode_states(MODEL, Set(), images_at_once=4, texts_at_once=4, progress=False)


def loop(k):
    "The one-query loop of ALBEF's evaluation, both ways: candidates and logits."
    similarity, found = STATES.image_features @ STATES.text_features.T, {}
    for side, rows in dict(i2t=similarity, t2i=similarity.T).items():
        index = rows.topk(min(k, rows.shape[1]), dim=1).indices
        logits = []
        for q, candidates in enumerate(index):
            text, image = (STATES.text_states[candidates], STATES.image_states[q][None]) if side == 'i2t' else (STATES.text_states[q][None], STATES.image_states[candidates])
            mask = STATES.text_mask[candidates] if side == 'i2t' else STATES.text_mask[q][None]
            with torch.no_grad(): logits.append(MODEL.match_logits(one_query(ENCODER, text, mask, image)))
        found[side] = index, torch.stack(logits)
    return found


@pytest.mark.parametrize('k', [1, 3, 100])
@pytest.mark.parametrize('blocks', [2, 512])
def test_scores_equal_the_one_query_loop(k, blocks):
    ours, theirs = rerank_scores(MODEL, STATES, k, images_at_once=blocks, progress=False), loop(k)
    assert MODEL.training                                                    # left as it was found
    for side, c in ours.items():
        assert torch.equal(c.index, theirs[side][0])
        assert_close(c.logits, theirs[side][1], atol=1e-5, rtol=1e-5)
    for side in ours:
        alone = rerank_scores(MODEL, STATES, k, side, progress=False)
        assert list(alone) == [side]; assert_close(alone[side].logits, ours[side].logits, atol=1e-5, rtol=1e-5)


def test_a_pair_that_both_sides_ask_for_is_scored_once(monkeypatch):
    import vlwb.eval.rerank as room
    seen = []
    monkeypatch.setattr(room, 'fused_cls', lambda *a, **k: (seen.extend(zip(a[4].tolist(), a[5].tolist())), fused_cls(*a, **k))[1])
    ours = rerank_scores(MODEL, STATES, 100, progress=False)
    assert len(seen) == len(set(seen)) == 54
    assert_close(ours['i2t'].logits[1, (ours['i2t'].index[1] == 4).nonzero()[0,0]], ours['t2i'].logits[4, (ours['t2i'].index[4] == 1).nonzero()[0,0]])


def test_states_may_be_made_again_or_lie_on_disk(tmp_path):
    whole = rerank_scores(MODEL, STATES, 4, progress=False)
    for other in (encode_states(MODEL, Set(), keep_images=False, progress=False), encode_states(MODEL, Set(), folder=tmp_path, max_gb=0, progress=False)):
        for side, c in rerank_scores(MODEL, other, 4, images_at_once=2, progress=False).items(): assert_close(c.logits, whole[side].logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='keep_images=False'): encode_states(MODEL, Set(), max_gb=0, progress=False)


def test_logits_that_are_not_finite_stop():
    class Broken(Matcher):
        def match_logits(self, fused): return super().match_logits(fused) * torch.inf
    with pytest.raises(ValueError, match='not finite'): rerank_scores(Broken(), STATES, 2, progress=False)


def made_up(seed, n=7, m=17, k=9, tied=False):
    "Candidates with any logits, and features."
    g = make_generator(seed)
    unit = lambda r: nn.functional.normalize(torch.randn(r, 5, generator=g), dim=1)
    v, t, head = unit(n), unit(m), torch.randn(n, m, generator=g)
    if tied: head = head.round(); t[m//2:] = t[:m-m//2].clone()                       # equal scores, equal captions
    logits = torch.stack([-head, head], 2)
    found = {}
    for side, a, b, l in (('i2t', v, t, logits), ('t2i', t, v, logits.transpose(0, 1))):
        index, similarity = top_candidates(a, b, k)
        found[side] = Candidates(index, similarity, l.gather(1, index[...,None].expand(-1, -1, 2)), len(b))
    return v, t, found, torch.rand(n, m, generator=g) < .25


def in_full(candidates, similarity, truth, k, ks):
    "Every ranking written out, then judged."
    figures = {f'R@{n}': [] for n in ks} | {'mAP@R': [], 'R-Precision': [], 'median_rank': []}
    for row, match, index, score in zip(similarity, truth, candidates.index[:,:k], candidates.scores()[:,:k]):
        if not match.any(): continue
        rest = row.clone(); rest[index] = -torch.inf
        ranking = torch.cat([index[score.argsort(descending=True)], rest.argsort(descending=True)[:len(row)-len(index)]])
        hits, R = match[ranking].double(), int(match.sum())
        for n in ks: figures[f'R@{n}'].append(100 * float(hits[:n].any()))
        figures['mAP@R'].append(100 * float((hits.cumsum(0) / torch.arange(1, len(hits)+1) * hits)[:R].sum() / R))
        figures['R-Precision'].append(100 * float(hits[:R].mean()))
        figures['median_rank'].append(float(hits.argmax()) + 1)
    return {name: float(np.median(v) if name == 'median_rank' else np.mean(v)) for name, v in figures.items()}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_figures_equal_rankings_written_out(seed):
    v, t, candidates, truth = made_up(seed)
    if not truth.any(): return
    ours = rerank_metrics(candidates, v, t, truth, k=(0, 1, 4, 9), ks=(1, 3))
    quick = rerank_metrics(candidates, v, t, truth, k=(0, 1, 4, 9), ks=(1, 3), recall_only=True)
    for k in ours:
        for side, rows, match in (('i2t', v @ t.T, truth), ('t2i', t @ v.T, truth.T)):
            theirs = in_full(candidates[side], rows, match, k, (1, 3))
            for name, value in theirs.items(): assert ours[k][side][name] == pytest.approx(value, abs=1e-9), (k, side, name)
            for name in ('R@1', 'R@3', 'median_rank', 'queries', 'left_out'): assert quick[k][side][name] == ours[k][side][name]
        assert ours[k]['rsum'] == pytest.approx(sum(ours[k][s][f'R@{n}'] for s in ('i2t', 't2i') for n in (1, 3)))
    assert ours[0] == retrieval_metrics(v, t, truth, ks=(1, 3))


def test_ties_are_the_mean_over_their_orders():
    "Equal scores and equal captions: the expected figures are the mean over random orders within ties."
    v, t, candidates, truth = made_up(2, tied=True)
    scored = dict(i2t=candidates['i2t'])
    expected = rerank_metrics(scored, v, t, truth, k=(6,), ks=(1, 3))[6]['i2t']
    low, high = (rerank_metrics(scored, v, t, truth, k=(6,), ks=(1, 3), ties=rule)[6]['i2t'] for rule in ('pessimistic', 'optimistic'))
    g, drawn, c = make_generator(0), [], candidates['i2t']
    for _ in range(300):
        noise = 1e-4 * torch.rand(c.logits.shape, generator=g)
        jitter = v @ t.T + 1e-4 * torch.rand(len(v), len(t), generator=g)
        drawn.append(in_full(Candidates(c.index, c.similarity, c.logits + noise, c.gallery), jitter, truth, 6, (1, 3)))
    for name in ('R@1', 'R@3', 'mAP@R', 'R-Precision'):
        mean, spread = np.mean([d[name] for d in drawn]), np.std([d[name] for d in drawn]) / 300**.5
        assert abs(expected[name] - mean) <= 5 * spread + 1e-6 and low[name] <= expected[name] + 1e-9 <= high[name] + 2e-9, name


def test_a_candidate_stays_above_the_rest_even_when_it_ties_with_them():
    query, gallery = torch.tensor([[1., 0.]]), torch.tensor([[1., 0.], [1., 0.], [1., 0.], [0., 1.]])
    index = torch.tensor([[1, 2]])
    c = dict(i2t=Candidates(index, torch.ones(1, 2), torch.tensor([[[0., 1.], [0., 2.]]]), 4))
    rank = lambda j: rerank_metrics(c, query, gallery, torch.arange(4)[None] == j, k=(2,), recall_only=True)[2]['i2t']['median_rank']
    assert [rank(j) for j in range(4)] == [3., 2., 1., 4.]


def test_k_beyond_the_gallery_and_beyond_the_candidates():
    v, t, candidates, truth = made_up(1, k=100)
    swept = rerank_metrics(candidates, v, t, truth, k=(17, 128, 256))
    assert swept[17] == swept[128] == swept[256]
    _, _, few, _ = made_up(1, k=4)
    with pytest.raises(ValueError, match='k must lie in 0..4'): rerank_metrics(few, v, t, truth, k=(5,))
    with pytest.raises(ValueError, match='k must lie'): rerank_metrics(few, v, t, truth, k=(-1,))
    none = rerank_metrics(made_up(1, k=0)[2], v, t, truth, k=(0,))
    assert none[0] == retrieval_metrics(v, t, truth)
    with pytest.raises(ValueError, match='k must be 0 or more'): top_candidates(v, t, -1)


def test_scores_may_add_the_similarity():
    v, t, candidates, truth = made_up(4)
    c = candidates['i2t']
    assert_close(c.scores('difference', 1.), c.logits[...,1] - c.logits[...,0] + c.similarity)
    with pytest.raises(ValueError, match='score must be one of'): c.scores('probability')
    by_similarity = rerank_metrics(candidates, v, t, truth, k=(9,), similarity_weight=1e7)[9]
    assert by_similarity['i2t']['mAP@R'] == pytest.approx(rerank_metrics(candidates, v, t, truth, k=(0,))[0]['i2t']['mAP@R'])


def test_whole_road_from_a_model_to_a_table():
    candidates = rerank_scores(MODEL, STATES, 256, progress=False)
    swept = rerank_metrics(candidates, STATES.image_features, STATES.text_features, own_matches(Set.caption_image, 6))
    assert list(swept) == [0, 16, 128, 256] and swept[16] == swept[256]
    table = results_table({'tiny': swept[16]}, 'COCO 5K')
    assert table.source.tolist() == ['paper', 'paper', 'this run'] and table['t2i R@1'].tolist()[:2] == [58.4, 60.4]
    assert len(PAPER_ROWS) == 7 and results_table({'one way': dict(i2t=swept[0]['i2t'])}, 'scenes')['t2i R@1'].isna().all()
