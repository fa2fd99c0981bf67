"""Losses against momentum candidates in both forms against the formula written out; their memory; masking and the loss of masked tokens."""
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vlwb.core import make_generator
from vlwb.data.inputs import HubTokenizer, WordTokenizer
from vlwb.losses.albef import albef_itc
from vlwb.losses.infonce import anchor_losses
from vlwb.losses.momentum import candidate_weights, momentum_contrast
from vlwb.losses.regulation import regulation_log_weights
from vlwb.losses.tiled import Tiling
from vlwb.train.masking import IGNORE, mask_tokens, mlm_loss, special_tokens

F64 = torch.float64
cuts = st.builds(Tiling, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0., 1e-4, math.inf]))


@st.composite
def settings_of(draw):
    "Features, momentum features, a queue or none, H's features; ids with repeats and unknown entries, or a mask."
    n, m, d, q = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(2, 5)), draw(st.sampled_from([None, 0, 1, 7]))
    g = make_generator(draw(st.integers(0, 999)))
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=F64), dim=-1)
    some = draw(st.integers(1, 6))
    ids, of = (torch.randint(0, some, (size,), generator=g) for size in (n, m)); of[0] = ids[0]
    known = ids[:, None] == of
    who = dict(positives=known) if draw(st.booleans()) else dict(image_ids=ids, text_image_ids=of)
    s = dict(online=(unit(n, d).requires_grad_(), unit(m, d).requires_grad_(), torch.tensor(draw(st.sampled_from([1., 20., 100.])), dtype=F64, requires_grad=True)), who=who,
             momentum=dict(momentum_image_features=unit(n, d), momentum_text_features=unit(m, d)), H=dict(aux_image_features=unit(n, 3), aux_text_features=unit(m, 3)), queue={}, Hq={}, known=[known, known.T])
    if q is None: return s
    s |= dict(queue=dict(image_queue=unit(q, d), text_queue=unit(q, d)), Hq=dict(aux_image_queue=unit(q, 3), aux_text_queue=unit(q, 3)))
    queue_ids = torch.randint(-1, some, (q,), generator=g)
    found = [(x[:, None] == queue_ids) if 'image_ids' in who else torch.zeros(len(x), q, dtype=torch.bool) for x in (ids, of)]
    if 'image_ids' in who: s['queue']['queue_ids'] = queue_ids
    return s | dict(known=[torch.cat(x, 1) for x in zip(s['known'], found)])


def written_out(s, own, threshold, multi_positive, weigh=True, **kw):
    "Summed loss of one direction, its log weights and number of anchors; own is 0 for images, 1 for texts."
    side, other = ('image', 'text')[own], ('text', 'image')[own]
    everything = lambda batch, queue: torch.cat([batch, queue]) if queue is not None else batch
    similarity = s['online'][own] @ everything(s['momentum'][f'momentum_{other}_features'], s['queue'].get(f'{other}_queue')).T
    aux = s['H'][f'aux_{side}_features'] @ everything(s['H'][f'aux_{other}_features'], s['Hq'].get(f'aux_{other}_queue')).T
    log_w = regulation_log_weights(similarity, aux, positives=s['known'][own], **kw) if weigh else torch.zeros_like(similarity)
    if threshold is not None: log_w = torch.zeros_like(log_w).masked_fill(~s['known'][own] & (log_w.exp() < threshold), -math.inf)
    return anchor_losses(similarity * s['online'][2], s['known'][own], log_weights=log_w, multi_positive=multi_positive).sum() / s['known'][own].any(1).sum().clamp(min=1), log_w


@settings(max_examples=80, deadline=None)
@given(settings_of(), cuts, st.sampled_from(['none', 'srcl', 'removal']), st.sampled_from([0., 0.4, 1.]), st.sampled_from(['mean', 'softmax']), st.sampled_from([0.2, 1., math.inf]), st.sampled_from(['spread', 'each']), st.sampled_from([0., 0.4, 0.95]))
def test_equals_the_formula(s, cut, weights, alpha, norm, tau_s, form, threshold):
    kw = dict(alpha=alpha, norm=norm, similarity_temperature=tau_s)
    inputs = s['momentum'] | s['queue'] | s['who'] | s['H'] | s['Hq']
    loss = momentum_contrast(*s['online'], **inputs, **kw, weights=weights, threshold=threshold, multi_positive=form, tiling=cut)
    (a, wa), (b, wb) = (written_out(s, own, threshold if weights == 'removal' else None, form, weights != 'none', **kw) for own in (0, 1))
    # a weight that lies on the threshold may fall either way by rounding alone
    if weights == 'removal' and threshold and any(((regulation_log_weights_of(s, own, kw) - threshold).abs() < 1e-9).any() for own in (0, 1)): return
    for x, y in zip([loss, *torch.autograd.grad(loss, s['online'])], [(a + b) / 2, *torch.autograd.grad((a + b) / 2, s['online'])]): assert_close(x, y, rtol=1e-9, atol=1e-9)
    found = candidate_weights(*s['online'][:2], **inputs, **kw, weights=weights, threshold=threshold)
    assert_close(found.log_weights_per_image, wa.detach()); assert_close(found.log_weights_per_text, wb.detach())
    assert torch.equal(found.positives_per_image, s['known'][0]) and torch.equal(found.positives_per_text, s['known'][1])
    assert found.batch().weights_per_image.shape == (len(s['online'][0]), len(s['online'][1]))


def regulation_log_weights_of(s, own, kw): return written_out(s, own, None, 'spread', **kw)[1].exp()


@pytest.mark.parametrize('dtype, allowed', [(F64, 1e-12), (torch.float32, 2e-6)])
@settings(max_examples=20, deadline=None)
@given(s=settings_of())
def test_without_weights_it_is_albefs_loss_without_soft_targets(s, dtype, allowed):
    cast = lambda x: x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
    online = [cast(x).requires_grad_() for x in s['online']]
    inputs = {k: cast(x) for k, x in (s['momentum'] | s['queue'] | s['who']).items()}
    ours, theirs = momentum_contrast(*online, **inputs), albef_itc(*online, **inputs, soft_weight=0.)
    for x, y in zip([ours, *torch.autograd.grad(ours, online)], [theirs, *torch.autograd.grad(theirs, online)]): assert_close(x, y, rtol=20*allowed, atol=20*allowed)


class Largest(TorchDispatchMode):
    "The size of the largest tensor that an operation makes; views are not made."
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memory = lambda tree: {x.untyped_storage().data_ptr(): x.numel() for x in tree_leaves(tree) if isinstance(x, Tensor)}
        given, made = memory((args, kwargs)), memory(out)
        self.numel = max([self.numel, *(made[x] for x in made.keys() - given.keys())])
        return out


@pytest.mark.parametrize('weights', ['none', 'srcl', 'removal'])
def test_no_matrix_of_all_candidates(weights):
    n, q, d = 128, 65536, 64
    g = make_generator(0)
    unit = lambda k: F.normalize(torch.randn(k, d, generator=g), dim=1)
    v, t = unit(n).requires_grad_(), unit(n).requires_grad_()
    inputs = dict(momentum_image_features=unit(n), momentum_text_features=unit(n), image_queue=unit(q), text_queue=unit(q), image_ids=torch.arange(n), queue_ids=torch.arange(q))
    if weights != 'none': inputs |= dict(aux_image_features=unit(n), aux_text_features=unit(n), aux_image_queue=unit(q), aux_text_queue=unit(q), alpha=0.5, similarity_temperature=0.3)
    with Largest() as seen: momentum_contrast(v, t, 20., **inputs, weights=weights).backward()
    assert seen.numel <= n * (n + q) / 3


def test_a_batch_that_the_queue_outlives():
    "Sizes that do not divide each other, and a queue longer and shorter than the batch: the loss sees what is filled."
    from vlwb.losses.queue import Queue
    g = make_generator(1)
    unit = lambda k: F.normalize(torch.randn(k, 4, generator=g), dim=1)
    for size in (3, 7, 50):
        queue, gone = Queue(size, 4), []
        for step, n in enumerate((5, 2, 6, 1)):
            ids = torch.arange(n) + 3*step                     # some images come back
            v, t, vm, tm = (unit(n) for _ in range(4))
            inputs = dict(momentum_image_features=vm, momentum_text_features=tm, image_ids=ids)
            last = [torch.cat(x)[-size:] for x in zip(*gone)] if gone else None
            plain = {} if last is None else dict(image_queue=last[0], text_queue=last[1], queue_ids=last[2])
            assert_close(momentum_contrast(v, t, 10., **inputs, **queue.entries()), momentum_contrast(v, t, 10., **inputs, **plain))
            queue.enqueue_(vm, tm, ids); gone.append((vm, tm, ids))


# Masking --------------------------------------------------------------------------------------------------------------------------------------------

def bert_tokenizer():
    from transformers import BertTokenizerFast
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghij'])})


def test_special_tokens_of_every_tokenizer():
    bert = bert_tokenizer()
    for tokenizer in (bert, HubTokenizer(bert)): assert special_tokens(tokenizer) == (4, (0, 1, 2, 3, 4), 15)
    words = WordTokenizer.learn(['a red dog'])
    if getattr(words, 'mask_token_id', None) is None:
        with pytest.raises(ValueError, match='WordTokenizer has no mask token'): special_tokens(words)
        assert special_tokens(words, extra_mask=True) == (7, (0, 1, 2, 3, 7), 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0., 0.15, 0.6, 1.]), st.integers(0, 999))
def test_masks_only_what_may_be_masked(rows, width, share, seed):
    g = make_generator(seed)
    ids, mask = torch.randint(0, 15, (rows, width), generator=g), (torch.rand(rows, width, generator=g) < 0.7).long()
    kw = special_tokens(bert_tokenizer())._asdict()
    shown, labels = mask_tokens(ids, mask, share=share, generator=make_generator(seed), **kw)
    chosen = labels != IGNORE
    assert not (chosen & ((ids < 5) | (mask == 0))).any() and torch.equal(labels[chosen], ids[chosen]) and torch.equal(shown[~chosen], ids[~chosen])
    assert ((shown[chosen] == 4) | (shown[chosen] >= 5)).all()
    if share in (0., 1.): assert torch.equal(chosen, (ids >= 5) & (mask == 1) & (share == 1))
    cut = int(torch.randint(0, rows + 1, (), generator=g))                                   # two processes, the second padded less
    for part, wide in ((slice(0, cut), width), (slice(cut, rows), max(1, width - 2))):
        parts = mask_tokens(ids[part,:wide], mask[part,:wide], share=share, generator=make_generator(seed), rows=(part.start, part.stop, rows), **kw)
        assert torch.equal(parts[0], shown[part,:wide]) and torch.equal(parts[1], labels[part,:wide])


def test_mlm_loss_is_cross_entropy_and_distillation():
    g = make_generator(0)
    logits, slow = torch.randn(4, 6, 9, generator=g, dtype=F64).requires_grad_(), torch.randn(4, 6, 9, generator=g, dtype=F64).requires_grad_()
    labels = torch.randint(0, 9, (4, 6), generator=g).masked_fill(torch.rand(4, 6, generator=g) < 0.5, IGNORE)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    soft = -(logits.log_softmax(-1) * slow.detach().softmax(-1)).sum(-1)[labels != IGNORE].mean()     # as in ALBEF's code
    for a in (0., 0.4, 1.):
        ours, wanted = mlm_loss(logits, labels, slow, soft_weight=a), (1 - a) * hard + a * soft
        assert_close(ours, wanted)
        for x, y in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(wanted, logits, retain_graph=True)): assert_close(x, y)
    assert slow.grad is None
    assert torch.autograd.gradcheck(lambda x: mlm_loss(x, labels, slow, soft_weight=0.4), logits)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert mlm_loss(logits.bfloat16(), labels).dtype == torch.float32
