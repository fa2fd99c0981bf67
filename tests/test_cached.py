"""The two-pass step is the plain step of the whole batch: for every loss, micro-batch size and dtype, with dropout, and on two real gloo processes under DDP.

This file is also the script that the processes run: python test_cached.py FOLDER RANK
"""
import datetime, gc, os, subprocess, sys, warnings
from functools import partial
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vlwb import core
from vlwb.core import seed_everything
from vlwb.losses.infonce import infonce
from vlwb.losses.srcl import srcl
from vlwb.models.dual import DualEncoder, DualEncoderConfig
from vlwb.train.cached import Surroundings, TwoPass, cached_backward, in_micro_batches, split_rows


class Model(nn.Module):
    "Two towers with dropout that take a tensor and a dictionary; a learned scale and a learned bias."
    def __init__(self, p=0., dtype=torch.float64):
        super().__init__()
        tower = lambda d: nn.Sequential(nn.Linear(d, 16), nn.GELU(), nn.Dropout(p), nn.Linear(16, 6))
        self.image, self.text = tower(7), tower(5)
        self.log_logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.))
        self.to(dtype)
    def encode_image(self, images): return F.normalize(self.image(images), dim=1)
    def encode_text(self, texts): return F.normalize(self.text((texts['values'] * texts['mask'][...,None]).sum(1)), dim=1)
    def forward(self, images, texts): return self.encode_image(images), self.encode_text(texts), self.log_logit_scale.exp(), self.logit_bias.clone()


def make(p=0., dtype=torch.float64):
    seed_everything(0); return Model(p, dtype)

def make_dual():
    seed_everything(0); return DualEncoder(DualEncoderConfig(vision=dict(features=7, hidden=16), text=dict(features=15, hidden=16), projection_dim=6)).double()

def batch(n, m=None, dtype=torch.float64):
    g, m = torch.Generator().manual_seed(1), n if m is None else m
    return torch.randn(n, 7, generator=g, dtype=torch.float64).to(dtype), dict(values=torch.randn(m, 3, 5, generator=g, dtype=torch.float64).to(dtype), mask=(torch.rand(m, 3, generator=g) < 0.7).to(dtype))

def unit(n, seed): return F.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)

def family(n, rows=slice(None), group=None):
    "name -> loss of (image_features, text_features, logit_scale, logit_bias) for these rows of a batch of n pairs, the first four of which show two images."
    from vlwb.losses.albef import albef_itc
    from vlwb.losses.cyclip import cyclip
    from vlwb.losses.debiased import dcl, hcl
    from vlwb.losses.gist import gist
    from vlwb.losses.siglip import siglip
    from vlwb.losses.soft import soft_targets
    from vlwb.losses.vse import vse
    ids = dict(image_ids=torch.tensor([i // 2 if i < 4 else i for i in range(n)])[rows], group=group)
    def other(v, seed): return F.normalize(torch.randn(n, v.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)[rows].to(v.dtype)
    def h(v): return dict(aux_image_features=unit(n, 3)[rows].to(v.dtype), aux_text_features=unit(n, 4)[rows].to(v.dtype))
    return dict(
        infonce=lambda v, t, s, b: infonce(v, t, s, **ids), infonce_each=lambda v, t, s, b: infonce(v, t, s, multi_positive='each', form='tiled', **ids),
        srcl=lambda v, t, s, b: srcl(v, t, s, **h(v), alpha=0.5, similarity_temperature=0.3, **ids),
        srcl_own=lambda v, t, s, b: srcl(v, t, s, alpha=0., similarity_temperature=0.3, **ids),
        siglip=lambda v, t, s, b: siglip(v, t, s, logit_bias=b, **ids), vse=lambda v, t, s, b: vse(v, t, **ids),
        hcl=lambda v, t, s, b: hcl(v, t, s, **ids), dcl=lambda v, t, s, b: dcl(v, t, s, **ids), cyclip=lambda v, t, s, b: cyclip(v, t, s, **ids),
        gist=lambda v, t, s, b: gist(v, t, s, guide_image_features=other(v, 3), guide_text_features=other(v, 4), **ids),
        soft=lambda v, t, s, b: soft_targets(v, t, s, target_image_features=other(v, 3), target_text_features=other(v, 4), target_scale=5., mix=0.5, **ids),
        albef=lambda v, t, s, b: albef_itc(v, t, s, momentum_image_features=other(v, 5), momentum_text_features=other(v, 6), **ids))
NAMES = 'infonce', 'infonce_each', 'srcl', 'srcl_own', 'siglip', 'vse', 'hcl', 'dcl', 'cyclip', 'gist', 'soft', 'albef'


def step(model, run, seed=7):
    "Value, gradients (None kept) and the next random number of a step."
    model.zero_grad(); seed_everything(seed); value = run()
    return value.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}, torch.rand(4)

def plain(model, loss, images, texts, size=None):
    "One backward over everything, encoded whole, or in pieces that all keep their graph: the masks that micro-batches draw."
    outs = [model(i, t) for i, t in zip(split_rows(images, size or len(images)), split_rows(texts, size or len(images)))]
    value = loss(*(torch.cat([o[k] for o in outs]) for k in (0, 1)), *outs[-1][2:]); value.backward()
    return value.detach()

def compare(got, expected, tolerance):
    assert abs(got[0] - expected[0]) <= tolerance * max(1, abs(expected[0]))
    assert {n for n, g in got[1].items() if g is None} == {n for n, g in expected[1].items() if g is None}
    largest = max(g.abs().max() for g in expected[1].values() if g is not None)
    for n, g in expected[1].items():
        if g is not None: assert (got[1][n] - g).abs().max() <= tolerance * largest, n


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_plain_step(name):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model, (images, texts), loss = make(dtype=dtype), batch(9, dtype=dtype), family(9)[name]
        expected = step(model, lambda: plain(model, loss, images, texts))
        for size in (1, 2, 4, 8, 9, 20): compare(step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=size)), expected, tolerance)


def test_equals_for_any_sizes():
    from hypothesis import given, settings, strategies as st
    model = make()
    @settings(max_examples=40, deadline=None)
    @given(n=st.integers(1, 13), more=st.integers(0, 9), size=st.integers(1, 14), pair=st.booleans())
    def check(n, more, size, pair):
        m = n + more if pair else n                                                    # towers called apart take more texts than images
        images, texts = batch(n, m)
        ids = dict(image_ids=torch.arange(n), text_image_ids=torch.arange(m) % n)
        loss = lambda v, t, *rest: infonce(v, t, model.log_logit_scale.exp(), **ids)
        whole = lambda: plain_apart(loss, images, texts)
        def plain_apart(loss, images, texts):
            value = loss(model.encode_image(images), model.encode_text(texts)); value.backward(); return value
        compare(step(model, lambda: cached_backward((model.encode_image, model.encode_text) if pair else model, loss, images, texts, micro_batch=size)), step(model, whole), 1e-12)
    check()


@pytest.mark.parametrize('name', ['infonce', 'srcl_own', 'siglip'])
def test_dropout_is_replayed_and_leaves_no_trace(name):
    model, (images, texts), loss = make(p=0.4), batch(9), family(9)[name]
    for size in (1, 2, 4, 8):
        expected = step(model, lambda: plain(model, loss, images, texts, size))
        got = step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=size))
        compare(got, expected, 1e-12)
        assert torch.equal(got[2], expected[2])                                        # the stream goes on as after one pass
        apart = step(model, lambda: cached_backward((model.encode_image, model.encode_text), lambda v, t: loss(v, t, model.log_logit_scale.exp(), model.logit_bias), images, texts, micro_batch=size))
        compare(apart, expected, 1e-12); assert torch.equal(apart[2], expected[2])
    assert abs(step(model, lambda: plain(model, loss, images, texts))[0] - expected[0]) > 1e-4      # masks do matter here


def test_random_state_between_forward_and_backward_is_left_alone():
    model, (images, texts), loss = make(p=0.4), batch(9), family(9)['infonce']
    model.zero_grad(); seed_everything(7)
    value = loss(*TwoPass(model, 2)(images, texts))
    torch.manual_seed(123); before = torch.get_rng_state()
    value.backward()
    assert torch.equal(before, torch.get_rng_state())
    compare((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if n != 'logit_bias'} | dict(logit_bias=None)), step(model, lambda: plain(model, loss, images, texts, 2)), 1e-12)


@pytest.mark.parametrize('inside', [False, True])
def test_autocast(inside):
    "The second pass runs under the autocast of the first, and reaches the weights, wherever backward is called."
    model, (images, texts), loss = make(p=0.4, dtype=torch.float32), batch(9, dtype=torch.float32), family(9)['srcl_own']
    def run(encode):
        with torch.autocast('cpu', torch.bfloat16):
            value = loss(*encode())
            if inside: value.backward()
        if not inside: value.backward()
        return value
    def pieces():
        outs = [model(i, t) for i, t in zip(split_rows(images, 4), split_rows(texts, 4))]
        return torch.cat([o[0] for o in outs]), torch.cat([o[1] for o in outs]), *outs[-1][2:]
    got, expected = step(model, lambda: run(lambda: TwoPass(model, 4)(images, texts))), step(model, lambda: run(pieces))
    assert got[0] == expected[0]
    compare(got, expected, 0.02)                                                       # bf16: contributions to a weight are added in another order
    assert all(got[1][n].abs().sum() > 0 for n in ('image.0.weight', 'text.0.weight', 'log_logit_scale'))


def test_gradient_scaler_and_accumulation():
    model, (images, texts), loss = make(dtype=torch.float32), batch(9, dtype=torch.float32), family(9)['infonce']
    scaler = torch.amp.GradScaler('cpu', init_scale=64.)
    once = step(model, lambda: plain(model, loss, images, texts))
    def twice():
        for _ in range(2): value = cached_backward(model, loss, images, texts, micro_batch=4, scaler=scaler)
        return value
    got = step(model, twice)
    compare((got[0], {n: None if g is None else g / 128 for n, g in got[1].items()}), once, 1e-6)


def test_frozen_tower_runs_once():
    images, texts = batch(9)
    for model, text in ((make(), texts), (make_dual(), texts['values'].flatten(1))):
        frozen = model.image if isinstance(model, Model) else nn.ModuleList([model.image_tower, model.image_projection])
        frozen.requires_grad_(False)
        calls = dict(image=0, text=0)
        def counted(name, f, *args): calls[name] += 1; return f(*args)
        image_of, text_of = model.encode_image, model.encode_text
        model.encode_image, model.encode_text = partial(counted, 'image', image_of), partial(counted, 'text', text_of)
        loss = lambda v, t, *s: infonce(v, t, model.log_logit_scale.exp())
        encode = (model.encode_image, model.encode_text) if isinstance(model, Model) else model
        got = step(model, lambda: cached_backward(encode, loss, images, text, micro_batch=2))
        assert calls == dict(image=5, text=10)
        compare(got, step(model, lambda: plain(model, loss, images, text) if isinstance(model, Model) else plain_once(model, loss, images, text)), 1e-12)
        with torch.no_grad(): assert not TwoPass(encode, 2)(images, text)[0].requires_grad
    assert calls['image'] == 5 + 1 + 5

def plain_once(model, loss, images, texts):
    value = loss(*model(images, texts)); value.backward(); return value.detach()


def test_tower_that_the_loss_ignores_is_left_alone():
    model, (images, texts) = make(), batch(9)
    loss = lambda v, t, *rest: v.square().sum() - v.sum()
    compare(step(model, lambda: cached_backward((model.encode_image, model.encode_text), loss, images, texts, micro_batch=2)), step(model, lambda: plain(model, loss, images, texts)), 1e-12)


def test_inputs_that_need_a_gradient_get_it():
    model, (images, texts), loss = make(), batch(9), family(9)['infonce']
    one, two = images.clone().requires_grad_(), images.clone().requires_grad_()
    plain(model, loss, one, texts); cached_backward(model, loss, two, texts, micro_batch=2)
    torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-13)


def test_hooks_that_scale_are_right():
    model, (images, texts), loss = make(), batch(9), family(9)['infonce']
    model.text[0].weight.register_hook(lambda g: 3 * g)
    compare(step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=2)), step(model, lambda: plain(model, loss, images, texts)), 1e-12)


def test_activations_go_when_the_step_is_over():
    "After backward nothing holds the inputs or the features, and backward may be called twice with retain_graph."
    model, (images, texts), loss = make(), batch(9), family(9)['infonce']
    once = step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=2))
    def twice():
        value = loss(*TwoPass(model, 2)(images, texts)); value.backward(retain_graph=True); value.backward(); return value
    got = step(model, twice)
    compare((got[0], {n: None if g is None else g / 2 for n, g in got[1].items()}), once, 1e-12)
    gc.collect()
    def alive(): return sum(type(o) is Surroundings for o in gc.get_objects())
    assert alive() == 0
    out = TwoPass(model, 2)(images, texts)
    assert alive() == 5
    del out; assert alive() == 0                                                       # without a cycle: no wait for the collector


def test_error_in_the_second_pass_leaves_the_random_state_whole():
    model, (images, texts), loss = make(p=0.4), batch(9), family(9)['infonce']
    value = loss(*TwoPass(model, 2)(images, texts))
    model.text[0] = nn.Linear(3, 16)                                                   # what the encoder uses changed in between
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError): value.backward()
    assert torch.equal(before, torch.get_rng_state())


def test_changes_between_the_passes_are_noticed():
    model, (images, texts), loss = make(), batch(9), family(9)['infonce']
    core.warned.discard('second pass')
    value = loss(*TwoPass(model, 2)(images, texts))
    with torch.no_grad(): model.image[0].weight.mul_(1.5)
    with pytest.warns(UserWarning, match='second pass does not repeat the first'): value.backward()
    core.warned.discard('second pass')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for dtype in (torch.float32, torch.bfloat16):
            half = make(p=0.4, dtype=dtype)
            cached_backward(half, loss, *batch(9, dtype=dtype), micro_batch=2)


def test_batch_norm_is_said_and_counted_once():
    model, (images, texts), loss = make(), batch(9), family(9)['infonce']
    model.image[2] = nn.BatchNorm1d(16).double()
    core.warned.discard('batch norm in two passes')
    with pytest.warns(UserWarning, match='statistics are those of 3 items'): got = step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=3))
    state = {n: b.clone() for n, b in model.named_buffers()}
    assert state['image.2.num_batches_tracked'] == 3
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d): m.reset_running_stats()
    compare(got, step(model, lambda: plain(model, loss, images, texts, 3)), 1e-12)     # the plain step of a model that normalises by micro-batches
    for n, b in model.named_buffers(): assert torch.equal(b, state[n])
    model.eval()
    compare(step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=3)), step(model, lambda: plain(model, loss, images, texts)), 1e-12)


def test_gradient_checkpointing_inside_the_encoder():
    from torch.utils.checkpoint import checkpoint
    model, (images, texts), loss = make(p=0.4), batch(9), family(9)['srcl']
    expected = step(model, lambda: plain(model, loss, images, texts, 2))
    inner = model.image.forward
    model.image.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    compare(step(model, lambda: cached_backward(model, loss, images, texts, micro_batch=2)), expected, 1e-12)


@pytest.mark.parametrize('name', ['infonce', 'srcl', 'removal'])
def test_loop_with_micro_batches_ends_at_the_same_weights(name):
    from vlwb.data.inputs import TensorSet
    from vlwb.data.toy import hidden_matches
    from vlwb.train.loop import Batches, TrainConfig, train
    from vlwb.train.objectives import LossConfig, Objective
    toy = hidden_matches()
    def run(size):
        seed_everything(0)
        model = DualEncoder(DualEncoderConfig(vision=dict(features=toy.images.shape[1], hidden=32), text=dict(features=toy.texts.shape[1], hidden=32))).double()
        objective = Objective(LossConfig(name, alpha_start=0., similarity_temperature=0.5), steps=12)
        log = train(model, Batches(TensorSet(toy.images.double(), toy.texts.double(), toy.caption_image), 32), in_micro_batches(objective, size), TrainConfig(steps=12, device='cpu', log_every=1), progress=False)
        return [r['loss'] for r in log], model.state_dict()
    (a, whole), (b, pieces) = run(0), run(7)
    assert a == pytest.approx(b, rel=1e-10)
    for n in whole: torch.testing.assert_close(pieces[n], whole[n], rtol=1e-8, atol=1e-8)


def test_text_text_model_called_twice():
    "One tower for both sides, as in sentence-transformers: both calls add to the same weights."
    model, (_, texts), loss = make(), batch(9), family(9)['infonce']
    other = dict(texts, values=texts['values'] + 1)
    encode = lambda a, b: (model.encode_text(a), model.encode_text(b))
    scaled = lambda v, t: loss(v, t, 20., None)
    def whole(): value = scaled(*encode(texts, other)); value.backward(); return value
    compare(step(model, lambda: cached_backward(encode, scaled, texts, other, micro_batch=4)), step(model, whole), 1e-12)


def test_empty_batch_gives_empty_features():
    out = TwoPass(make(), 2)(*batch(0))
    assert out[0].shape == out[1].shape == (0, 6)


SHARES = 6, 3                                                                          # pairs of each process
CASES = [('model', name, 0., 2, False) for name in NAMES] + [('model', 'infonce', 0.4, 2, False), ('model', 'srcl', 0., 4, False), ('model', 'infonce', 0., 2, True),
         ('dual', 'infonce', 0., 2, False), ('dual', 'srcl_own', 0., 2, True)]         # which model, loss, dropout, micro-batch (4: process 1 does it in one pass), frozen image tower

def case_parts(kind, frozen, p):
    model = make(p) if kind == 'model' else make_dual()
    if frozen: (model.image if kind == 'model' else model.image_tower).requires_grad_(False)
    images, texts = batch(sum(SHARES))
    return model, images, texts if kind == 'model' else texts['values'].flatten(1)

def in_process(folder, rank):
    "What one of the two processes does: every case with two passes and, for dropout, the plain DDP step with the same masks."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    rows, results = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None), {}
    for case in CASES:
        kind, name, p, size, frozen = case
        model, images, texts = case_parts(kind, frozen, p)
        ddp = DistributedDataParallel(model, find_unused_parameters=kind == 'model')     # not every loss uses scale and bias
        full = family(sum(SHARES), rows, dist.group.WORLD)[name]
        loss = full if kind == 'model' else (lambda v, t, s: full(v, t, s, None))
        mine = images[rows], {k: v[rows] for k, v in texts.items()} if isinstance(texts, dict) else texts[rows]
        for _ in range(2): value, grads, _ = step(model, lambda: cached_backward(ddp, loss, *mine, micro_batch=size), 7 + rank)      # twice: the reducer is ready again
        extra = {}
        if p:                                                                          # plain: all graphs, one backward; DDP wants one forward, so it wraps the pieces
            again = DistributedDataParallel(Pieces(case_parts(kind, frozen, p)[0], size), find_unused_parameters=True)
            def pieces(): value = loss(*again(*mine)); value.backward(); return value
            extra = dict(zip(('value', 'grads'), step(again, pieces, 7 + rank)))
        def accumulated():
            with ddp.no_sync(): cached_backward(ddp, loss, *mine, micro_batch=size)
            return cached_backward(ddp, loss, *mine, micro_batch=size)
        results[case] = dict(value=value, grads=grads, extra=extra, twice=step(model, accumulated, 7 + rank)[1] if not p else None)
    torch.save(results, f'{folder}/result-{rank}.pt')
    dist.destroy_process_group()

class Pieces(nn.Module):
    "A model whose one forward encodes in pieces."
    def __init__(self, model, size): super().__init__(); self.model, self.size = model, size
    def forward(self, images, texts):
        outs = [self.model(i, t) for i, t in zip(split_rows(images, self.size), split_rows(texts, self.size))]
        return torch.cat([o[0] for o in outs]), torch.cat([o[1] for o in outs]), *outs[-1][2:]

@pytest.fixture(scope='session')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cached')
    jobs = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent))) for rank in (0, 1)]
    try: said = [job.communicate(timeout=120)[0] for job in jobs]
    finally:
        for job in jobs: job.kill()
    assert all(job.returncode == 0 for job in jobs), '\n'.join(said)[-4000:]
    return [torch.load(folder/f'result-{rank}.pt', weights_only=True) for rank in (0, 1)]

@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(map(str, c)))
def test_two_processes_under_ddp(two_processes, case):
    "Loss and averaged gradients of two uneven processes with micro-batches are those of one process with all pairs in one pass."
    kind, name, p, size, frozen = case
    ours = [r[case] for r in two_processes]
    model, images, texts = case_parts(kind, frozen, p)
    full = family(sum(SHARES))[name]
    expected = step(model, lambda: plain_once(model, full if kind == 'model' else lambda v, t, s: full(v, t, s, None), images, texts))
    for result in ours:
        grads = result['grads']
        if p: compare((result['value'], grads), (result['extra']['value'], {n.removeprefix('module.model.'): g for n, g in result['extra']['grads'].items()}), 1e-12)
        else:
            compare((result['value'], grads), expected, 1e-12)
            compare((result['value'], {n: None if g is None else g / 2 for n, g in result['twice'].items()}), expected, 1e-12)


if __name__ == '__main__': in_process(sys.argv[1], int(sys.argv[2]))
